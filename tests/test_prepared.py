"""What ranks settle before the first round: constants from the first of them, however long they take, and equal data.

Ranks are threads here, over a channel that hands tensors around; under torchrun they are processes
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
from test_checkpoint import Ranks

from shoal import Quadratics, simulate
from shoal.data import load
from shoal.errors import ConfigError, ConfigMismatch, PeerLost
from shoal.experiments import prepared
from shoal.experiments.prepared import Survey, at_start, fingerprint
from shoal.experiments.run import load_result
from shoal.problems import Classification
from shoal.theory import Constant, Smoothness

QUADRATICS = Quadratics(n=5, d=6, noise=0.3, lam=0.1)


class Surveyed(Ranks):
    """Any error is what a rank returns, and ends the meetings unless all of them raise it."""

    def each(self, work) -> list:
        def guarded(lane):
            try:
                return work(lane)
            except Exception as error:
                if not isinstance(error, (ConfigError, ConfigMismatch)):
                    self.barrier.abort()
                return error

        return super().each(guarded)


def ranked(work, world: int = 3) -> list:
    """What each of the ranks returns, or the error that it raises; five clients are shared out."""
    return Surveyed(world).each(work)


class Asked(Quadratics):
    """Its constants and gradients are what a test makes of them."""

    def smoothness(self):
        return constants_of(self)

    def evaluate(self, x, clients):
        EVALUATED.append((torch.get_num_threads(), tuple(clients.tolist())))
        return super().evaluate(x, clients)


constants_of = Quadratics.smoothness
EVALUATED: list = []
ASKED = Asked(n=5, d=6, noise=0.3, lam=0.1)


@pytest.fixture
def asking(monkeypatch):
    """Sets what `ASKED.smoothness()` does."""
    monkeypatch.setattr(prepared, "PULSE", 0.01)
    EVALUATED.clear()
    return lambda work: monkeypatch.setitem(globals(), "constants_of", work)


def survey(lane, given=None, **more) -> Survey:
    return Survey(ASKED if lane.rank == 0 else ASKED.only(lane.clients), given, lane, **more)


def test_all_hear_what_the_first_works_out(asking):
    """In a thread of its own with the caller's number of threads, while the others give signs of life; each evaluates
    its own clients meanwhile."""
    before = torch.get_num_threads()

    def slow(problem):
        time.sleep(0.3)
        return Quadratics.smoothness(problem)

    def one(lane):
        torch.set_num_threads(1)
        mine, meet, met = survey(lane), lane.together, []
        lane.together = lambda tensor: met.append(1) or meet(tensor)
        return mine.share(lane), len(met), mine.start

    asking(slow)
    out = ranked(one)
    torch.set_num_threads(before)
    expected = QUADRATICS.smoothness()
    for known, asked, _ in out:
        assert known == expected
        assert known.facts() == expected.facts()
        assert known.each == expected.each
        assert asked > 5
    assert {threads for threads, _ in EVALUATED} == {1}
    assert {clients for _, clients in EVALUATED} == {(0, 1, 2, 3, 4), (2, 3), (4,)}
    assert out[0][2].facts == fingerprint(QUADRATICS)


def test_what_is_given_is_not_searched(asking):
    given = replace(QUADRATICS.smoothness(), mu=None, minus=Constant(1 / 3, "estimate"))
    asking(None)
    for known in ranked(lambda lane: survey(lane, given if lane.rank == 0 else None).share(lane)):
        assert known == given
        assert known.facts() == given.facts()


def test_all_hear_why_the_first_could_not(asking):
    def refused(problem):
        raise ConfigError("no constants: none are known.")

    asking(refused)
    out = ranked(lambda lane: survey(lane).share(lane))
    assert [(type(error), str(error)) for error in out] == [(ConfigError, "no constants: none are known.")] * 3


def test_an_error_that_is_not_ours_ends_the_first(asking):
    def broken(problem):
        raise ZeroDivisionError

    asking(broken)
    out = ranked(lambda lane: survey(lane).share(lane))
    assert isinstance(out[0], ZeroDivisionError)
    assert all(isinstance(error, threading.BrokenBarrierError) for error in out[1:])


def test_a_search_goes_on_in_the_next_attempt(asking):
    """It is one search, however many attempts there are; a later one compares nothing, and who has taken a rank's
    place works nothing out."""
    searches, release = [], threading.Event()

    def once(problem):
        searches.append(1)
        release.wait(10)
        return Quadratics.smoothness(problem)

    def leave() -> None:
        raise ValueError("leave")

    asking(once)
    lane = Ranks(3).channel(0)
    first = survey(lane)
    for _ in range(2):
        with pytest.raises(ValueError, match="leave"):
            first.share(lane, heed=leave)
    assert prepared.searching()
    release.set()
    out = ranked(lambda lane: (first if lane.rank == 0 else survey(lane)).share(lane, compare=False))
    assert out == [QUADRATICS.smoothness()] * 3
    assert searches == [1]
    assert {clients for _, clients in EVALUATED} == {(0, 1, 2, 3, 4)}
    first._thread.join(10)
    assert not prepared.searching()


def test_a_signal_comes_before_the_word_of_a_rank_that_was_faster(asking):
    asking(Quadratics.smoothness)
    heeded = []

    def lost(mine):
        raise PeerLost("rank 1 has gone.", [1])

    lane = Ranks(3).channel(0)
    lane.together = lost
    with pytest.raises(PeerLost, match="rank 1"):
        survey(lane).share(lane, heed=lambda: heeded.append(1))
    assert len(heeded) == 2


def test_constants_travel_exactly():
    """Denormals, infinities and statuses among them."""
    odd = Smoothness(*(Constant(v, "bound") for v in (5e-324, math.inf, 0.1, 1 / 3, 1e308)), each=(0.1, 2.0**-1074))
    back = Smoothness.unpacked(odd.packed())
    assert back == odd
    assert back.facts() == odd.facts()
    assert back.mu is None


def test_data_that_are_not_the_same_are_named_everywhere():
    """Rounding differs between machines, and is let pass; other labels are not, even all of them turned."""
    read = load("phishing")
    parts = np.array_split(np.arange(500), 5)

    def problem(A=read.A[:500], y=read.y[:500]) -> Classification:
        return Classification(A, y, parts)

    def shaken(other) -> list:
        mine = problem()
        out = ranked(lambda lane: Survey(mine if lane.rank == 0 else other.only(lane.clients), None, lane).share(lane))
        return [None if isinstance(one, Smoothness) else one for one in out]

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
    """Of f at the last rank's last client."""

    def one(lane):
        numbers = torch.full((3, 5), 2.0, dtype=torch.float64)
        numbers[0] = torch.tensor([1.0, 1.0, 1.0, 1.0, here if lane.rank == 0 else there])
        clients = torch.arange(5) if lane.rank == 0 else lane.clients
        return prepared._compare(numbers[:, clients], clients, lane)

    out = ranked(one, world=2)
    assert all((error is None) == same for error in out), out


def test_a_plain_number_is_an_estimate():
    """And travels as one."""
    plain = Smoothness(1.0, 1.0, 0.5, 1.0, 1.0, mu=0.1)
    assert plain.facts()["mu"] == (0.1, "estimate")
    assert Smoothness.unpacked(plain.packed()).facts() == plain.facts()


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
    \"\"\"Says in files who is asked for what; its constants take several signs of life.\"\"\"

    def smoothness(self):
        Path(f"constants{os.environ['RANK']}").touch()
        time.sleep(0.5)
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
    words = [command, problem, *method, *budget, *more, "--with", "counted.py", "--out", "out"]
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
