"""What ranks settle before the first round: constants from the first of them, however long they take, and equal data.

Ranks are threads here, over a channel that does no more than hand tensors around; under torchrun they are processes
(last test), and the problem counts who asks it for what.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal import Quadratics, simulate
from shoal.data import load
from shoal.errors import ConfigError, ConfigMismatch, PeerLost
from shoal.experiments import prepared
from shoal.experiments.prepared import at_start, check_data, from_first, settle
from shoal.experiments.run import load_result
from shoal.problems import Classification
from shoal.theory import Constant, Smoothness

QUADRATICS = Quadratics(n=5, d=6, noise=0.3, lam=0.1)


class Lane:
    """One thread's channel among W."""

    def __init__(self, rank: int, n: int, world: int, tables: list, barrier: threading.Barrier) -> None:
        self.rank, self.n, self.tables, self.barrier = rank, n, tables, barrier
        self.clients = torch.arange(n).tensor_split(world)[rank]
        self.asked = 0

    def together(self, mine):
        self.tables[self.rank] = mine.clone()
        self.asked += 1
        self.barrier.wait(10)
        out = [one.clone() for one in self.tables]
        assert len({(one.shape, one.dtype) for one in out}) == 1
        self.barrier.wait(10)
        return out


def ranked(work, n: int = 5, world: int = 3) -> list:
    """What each of the ranks returns, or the error that it raises."""
    tables, barrier, out = [None] * world, threading.Barrier(world), [None] * world

    def one(rank: int) -> None:
        try:
            out[rank] = work(Lane(rank, n, world, tables, barrier))
        except Exception as error:
            out[rank] = error
            if not isinstance(error, (ConfigError, ConfigMismatch)):
                barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return out


def test_all_hear_what_the_first_works_out(monkeypatch):
    """In a thread of its own with the caller's number of threads, while the others give signs of life."""
    monkeypatch.setattr(prepared, "PULSE", 0.01)
    seen, before = [], torch.get_num_threads()

    def work() -> bytes:
        seen.append(torch.get_num_threads())
        time.sleep(0.2)
        return bytes(range(256)) * 40

    def one(lane):
        torch.set_num_threads(1)
        return from_first(work, lane), lane.asked

    out = ranked(one)
    torch.set_num_threads(before)
    assert [said for said, _ in out] == [bytes(range(256)) * 40] * 3
    assert min(asked for _, asked in out) > 5
    assert seen == [1]


def test_all_hear_why_the_first_could_not():
    def refused() -> bytes:
        raise ConfigError("no constants: none are known.")

    out = ranked(lambda lane: from_first(refused, lane))
    assert [(type(error), str(error)) for error in out] == [(ConfigError, "no constants: none are known.")] * 3


def test_an_error_that_is_not_ours_ends_the_first():
    def broken() -> bytes:
        raise ZeroDivisionError

    out = ranked(lambda lane: from_first(broken, lane))
    assert isinstance(out[0], ZeroDivisionError)
    assert all(isinstance(error, threading.BrokenBarrierError) for error in out[1:])


def test_who_is_told_to_leave_does_not_wait(monkeypatch):
    """A signal counts at the next sign of life, and before the word of a rank that was faster."""
    monkeypatch.setattr(prepared, "PULSE", 0.01)
    release = threading.Event()

    def leave() -> None:
        raise ValueError("leave")

    lane = Lane(0, 5, 3, [], threading.Barrier(1))
    with pytest.raises(ValueError, match="leave"):
        from_first(lambda: b"x" * release.wait(10), lane, leave)
    release.set()

    def lost(mine):
        raise PeerLost("rank 1 has gone.", [1])

    heeded = []
    lane.together = lost
    with pytest.raises(PeerLost, match="rank 1"):
        from_first(lambda: b"", lane, lambda: heeded.append(1))
    assert len(heeded) == 2


@pytest.mark.parametrize("known", [None, replace(QUADRATICS.smoothness(), mu=None, minus=Constant(1 / 3, "estimate"))])
def test_constants_are_the_firsts_bit_for_bit(known):
    """And what the whole problem looks like is known there; others need no constants."""

    def one(lane):
        mine = QUADRATICS.only(lane.clients)
        if lane.rank:
            object.__setattr__(mine, "smoothness", None)  # nobody may ask
        return settle(mine, QUADRATICS if lane.rank == 0 else mine, known if lane.rank == 0 else None, lane)

    out, expected = ranked(one), known or QUADRATICS.smoothness()
    for constants, _ in out:
        assert constants == expected
        assert constants.facts() == expected.facts()
        assert constants.each == expected.each
    whole = at_start(QUADRATICS, torch.arange(5))
    assert torch.equal(out[0][1].numbers, whole.numbers)
    assert out[0][1].facts == whole.facts
    assert [start for _, start in out[1:]] == [None, None]


def test_constants_travel_exactly():
    """Denormals, infinities and statuses among them."""
    odd = Smoothness(*(Constant(v, "bound") for v in (5e-324, math.inf, 0.1, 1 / 3, 1e308)), each=(0.1, 2.0**-1074))
    back = Smoothness.unpacked(odd.packed())
    assert back == odd
    assert back.facts() == odd.facts()
    assert back.mu is None


def test_data_that_are_not_the_same_are_named_everywhere():
    """Rounding differs between machines, and is let pass; another row, another order or a NaN is not."""
    read = load("phishing")
    parts = np.array_split(np.arange(500), 5)

    def problem(A=read.A[:500], y=read.y[:500]) -> Classification:
        return Classification(A, y, parts)

    def shaken(other) -> list:
        whole = at_start(problem(), torch.arange(5))
        return ranked(lambda lane: check_data(other.only(lane.clients), whole if lane.rank == 0 else None, lane))

    assert shaken(problem()) == [None] * 3
    close = problem(read.A[:500] * (1 + 1e-6))
    assert shaken(close) == [None] * 3
    labels = read.y[:500].copy()
    labels[400:] *= -1  # all of client 4, the last rank's: its f and its norm are what they were
    other = Classification(read.A[:500], labels, parts)
    whole, turned = at_start(problem(), torch.arange(5)).numbers, at_start(other, torch.arange(5)).numbers
    assert torch.equal(whole[:2], turned[:2])
    said = {f"{type(error).__name__}: {error}" for error in shaken(other)}
    assert len(said) == 1
    assert "ConfigMismatch: rank 2 has other data than rank 0 for 1 of its clients: f_4, ||grad f_4||" in said.pop()


@pytest.mark.parametrize(("here", "there", "same"), [(math.nan, math.nan, True), (math.inf, math.inf, True),
                                                     (math.inf, 1.0, False), (1.0, math.nan, False),
                                                     (0.0, 1e-9, True), (1.0, 1.01, False)])  # fmt: skip
def test_which_numbers_are_the_same(here, there, same):
    class Still(Quadratics):
        def evaluate(self, x, clients):
            values, rows = torch.full((len(clients),), there, dtype=torch.float64), torch.ones(len(clients), self.d)
            return values, rows

    numbers = at_start(Still(n=2, d=4, noise=0.1, lam=0.1), torch.arange(2)).numbers
    numbers[0] = torch.tensor([1.0, here])  # the second is the second rank's client

    def one(lane):
        whole = prepared.Start(numbers, {}) if lane.rank == 0 else None
        return check_data(Still(n=2, d=4, noise=0.1, lam=0.1), whole, lane)

    out = ranked(one, n=2, world=2)
    assert all((error is None) == same for error in out), out


def test_settings_are_checked_before_constants_are_found():
    class Slow(Quadratics):
        def smoothness(self):
            raise AssertionError("this takes minutes")

    problem = Slow(n=5, d=6, noise=0.3, lam=0.1)
    for wrong in ({"rounds": 0}, {"rounds": None}, {"target": -1.0}, {"multiple": 0.0}, {"step": "big"}):
        with pytest.raises(ConfigError):
            simulate(problem, "GD()", **({"rounds": 3} | wrong))
    with pytest.raises(ConfigError, match="k must be in"):
        simulate(problem, "EF21(TopK(7))", rounds=3)
    known = QUADRATICS.smoothness()
    ours, theirs = simulate(problem, "GD()", rounds=3, smoothness=known), simulate(QUADRATICS, "GD()", rounds=3)
    assert ours.sha256 == theirs.sha256
    assert ours.smoothness == known


COUNTED = """
import os, time
from pathlib import Path
from shoal import Quadratics


class Counted(Quadratics):
    \"\"\"Says in files who is asked for what; its constants take longer than ranks are waited for.\"\"\"

    def smoothness(self):
        Path(f"constants{os.environ['RANK']}").touch()
        time.sleep(1.5)
        return super().smoothness()

    def evaluate(self, x, clients):
        with open(f"clients{os.environ['RANK']}", "a") as file:
            file.write(" ".join(map(str, clients.tolist())) + " ")
        return super().evaluate(x, clients)
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "race"])
def test_under_torchrun_one_rank_finds_the_constants(tmp_path, command):
    """And the run ends where the simulator's does."""
    (tmp_path / "counted.py").write_text(COUNTED)
    problem, budget = "Counted(n=5, d=6, noise=0.3, lam=0.1)", ["--rounds", "20", "--target", "1e-1"]
    method = ["Marina(Correlated(), p=0.5)"]
    more = ["--steps", "theory", "--seeds", "1"] if command == "race" else []
    words = [command, problem, *method, *budget, *more, "--with", "counted.py", "--out", "out", "--timeout", "1"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*agent, "-m", "shoal", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert (tmp_path / "out").exists(), done.stderr[-3000:]
    assert [p.name for p in tmp_path.glob("constants*")] == ["constants0"], done.stderr[-3000:]
    asked = [set((tmp_path / f"clients{rank}").read_text().split()) for rank in range(3)]
    if command == "run":  # a race compiles with everybody's data before it lets them go
        assert asked == [{"0", "1", "2", "3", "4"}, {"2", "3"}, {"4"}]
    folder = tmp_path / "out" if command == "run" else next((tmp_path / "out" / "runs").iterdir())
    there, here = load_result(folder), simulate(QUADRATICS, *method, rounds=20, target=1e-1)
    assert (there["sha256"], there["gamma"]) == (here.sha256, here.gamma)
    assert len(there["moved_bytes"]) == 3
