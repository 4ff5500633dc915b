"""Runtimes: one trace whatever the chunks, the resumptions, the measuring and the processes.

A trace is the SHA-256 of all uplink payloads with their slots and lengths, that of all iterates with their measured
values, and the payload counts of the meter; equality of traces is equality bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from zoo import METHODS, MIXED, TappedLocal, copied, resolved, trace

from shoal.cli import run as cli_run
from shoal.compressors import Correlated, RandK, TopK
from shoal.core import Method, Problem
from shoal.descents import Step
from shoal.errors import NonFiniteError
from shoal.experiments.expressions import known_names, parse
from shoal.experiments.run import simulate
from shoal.experiments.spec import RunSpec
from shoal.messages import Messages, Round, Rows
from shoal.methods import DCGD, EF21, GD, Diana, Marina
from shoal.problems import Classification
from shoal.runtimes import Local, replicated, rounds
from shoal.runtimes.replicated import Replicated
from shoal.runtimes.rounds import Watch, chunks
from shoal.runtimes.signals import SIZE
from shoal.wire import HEADER

every = pytest.mark.parametrize("method", METHODS, ids=repr)
TESTS = Path(__file__).resolve().parent


@cache
def whole(method: Method) -> dict[str, object]:
    """The trace of an uninterrupted run of all clients at once."""
    return trace(MIXED, resolved(method, MIXED))


# ------------------------------------------------------------------------------------------------ chunks and measuring
def test_chunks_cover_all_rows():
    for m, d, chunk in ((5, 12, None), (5, 12, 1), (5, 12, 3), (5, 12, 9), (7, 2**21, None), (3, 2**30, None)):
        parts = chunks(m, d, chunk)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(m))
    assert len(chunks(7, 2**19)) == 4, "2 clients are 2^20 coordinates"


@every
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_a_bit(method, chunk):
    assert trace(MIXED, resolved(method, MIXED), chunk=chunk) == whole(method)


@every
def test_measuring_does_not_change_a_bit(method):
    """A measured round uses the remembered rows; a round that nobody measures computes them."""
    for chunk in (None, 3):
        silent = trace(MIXED, resolved(method, MIXED), chunk=chunk, measure=False)
        assert silent["payloads"] == whole(method)["payloads"]
        assert silent["meter"] == whole(method)["meter"]


@pytest.mark.parametrize("method", [GD(), Marina(Correlated(), p=0.3), EF21(TopK(3))], ids=repr)
def test_data_in_chunks(method):
    for problem in zoo.PROBLEMS[3:]:
        ready = resolved(method, problem)
        assert trace(problem, ready, chunk=1) == trace(problem, ready, chunk=3) == trace(problem, ready)


def test_remembered_rows_are_used_and_only_where_they_belong():
    """grad is asked once a round where nobody measures, and never at a point that was measured."""
    asked = []

    class Counting(type(MIXED)):
        def grad(self, x, rnd):
            asked.append(rnd.clients.tolist())
            return super().grad(x, rnd)

    problem = Counting(n=5, d=12, noise=0.8, lam=0.1, seed=3)
    trace(problem, GD(), length=3)
    assert asked == []
    trace(problem, GD(), length=3, chunk=3, measure=False)
    assert asked == [[0, 1, 2], [3, 4]] * 3
    watch = Watch(MIXED, Local(5), None)
    watch.evaluate(MIXED.start())
    elsewhere = MIXED.start() + 1.0
    assert torch.equal(watch.grad(elsewhere, Round.full(0, 0, 5)), MIXED.grad(elsewhere, Round.full(0, 0, 5)))


def test_a_stochastic_gradient_is_never_replaced_by_a_remembered_one():
    class Noisy(type(MIXED)):
        full_batch = False

        def grad(self, x, rnd):
            return super().grad(x, rnd) + rnd.uniform(self.d, "test.noise")

    problem = Noisy(n=5, d=12, noise=0.8, lam=0.1, seed=3)
    traces = [trace(problem, GD(), measure=m, chunk=c)["payloads"] for m in (True, False) for c in (None, 1, 3)]
    assert len(set(traces)) == 1
    assert traces[0] != trace(MIXED, GD())["payloads"]


# ------------------------------------------------------------------------------------------------ states
def hash_from(method: Method, events, stop: int) -> str:
    out = hashlib.sha256()
    for event in events:
        out.update(event.state.x.numpy().tobytes())
        if event.state.index == stop:
            return out.hexdigest()
    raise AssertionError


WITH_STATE = [Diana(RandK(3)), EF21(TopK(3)), Marina(RandK(3), p=0.3), Marina(Correlated(), p=0.3)]


@every
@pytest.mark.parametrize("chunk", [None, 3])
def test_resumed_runs_are_uninterrupted_ones(method, chunk):
    """From a copy of the state of round 4, and from the very state that was yielded then, once the run has gone on:
    states are values, so nothing that happened later may have changed it."""
    ready = resolved(method, MIXED)
    events = rounds(ready, Step(0.125), MIXED, Local(5), seed=11, chunk=chunk)
    states = [event.state for event in itertools.islice(events, 5)]
    held, kept = states[4], copied(states[4])
    rest, counted = hashlib.sha256(held.x.numpy().tobytes()), []
    for event in itertools.islice(events, 5):
        rest.update(event.state.x.numpy().tobytes())
        counted.append(event.state.meter)
    for state in (kept, held):
        again = rounds(ready, Step(0.125), MIXED, Local(5, replace(state.meter)), seed=11, state=state, chunk=chunk)
        assert hash_from(ready, again, 9) == rest.hexdigest()
        assert next(again).state.meter.up > counted[-1].up, "the meter goes on where it stood"


@pytest.mark.parametrize("method", WITH_STATE, ids=repr)
@pytest.mark.parametrize("chunk", [None, 1])
def test_what_is_not_finite_stops_the_round_before_any_state_changes(method, chunk):
    """Client 3's gradient is not a number in round 2: the error names both, and that round's state is as it was."""

    class Broken(type(MIXED)):
        full_batch = False

        def grad(self, x, rnd):
            rows = super().grad(x, rnd).clone()
            if rnd.index == 2:
                rows[rnd.clients == 3] = float("nan")
            return rows

    problem = Broken(n=5, d=12, noise=0.8, lam=0.1, seed=3)
    events = rounds(resolved(method, MIXED), Step(0.125), problem, Local(5), seed=11, chunk=chunk)
    for _ in range(3):
        state = next(events).state
    before = copied(state)
    with pytest.raises(NonFiniteError, match="client 3, round 2"):
        next(events)
    for now, then in zip([*state.server, *state.workers], [*before.server, *before.workers], strict=True):
        assert torch.equal(now, then)


def test_the_simulator_counts_what_was_sent():
    """Bytes by hand: 3 rounds of RandK(3) for 5 clients are 3 * 5 * 12 up and 3 * 5 * 48 down, and a header each; the
    shared scale is billed 4 bytes each way, in frames of their own, in the rounds that use it."""
    channel = Local(5)
    for event in rounds(DCGD(RandK(3)), Step(0.1), MIXED, channel, seed=0):
        if event.state.index == 3:
            break
    assert (channel.meter.up, channel.meter.down) == (180, 720)
    assert (channel.meter.up_framed, channel.meter.down_framed) == (180 + 15 * HEADER, 720 + 15 * HEADER)
    assert event.state.meter.bits(5) == {
        "up_bits": 8 * 36.0, "down_bits": 8 * 144.0, "up_framed_bits": 8 * (36.0 + 3 * HEADER),
        "down_framed_bits": 8 * (144.0 + 3 * HEADER),
    }  # fmt: skip
    channel = Local(5)
    next(itertools.islice(rounds(DCGD(Correlated()), Step(0.1), MIXED, channel, seed=0), 1, None))
    assert (channel.meter.up, channel.meter.down) == (5 * (2 + 4), 5 * (48 + 4))
    assert channel.meter.up_framed == 5 * (2 + 4 + 2 * HEADER)


def test_an_agreed_scale_is_one_for_all_clients():
    """With one client at a time, every client is prepared before the first encodes."""
    seen = []

    class Watched(Correlated):
        def prepare(self, u: Rows, rnd: Round):
            seen.append("prepare")
            return super().prepare(u, rnd)

        def encode(self, u: Rows, rnd: Round) -> Messages:
            seen.append(rnd.agreed)
            return super().encode(u, rnd)

    next(itertools.islice(rounds(DCGD(Watched()), Step(0.1), MIXED, Local(5), seed=0, chunk=1), 1, None))
    largest = float(MIXED.evaluate(MIXED.start(), torch.arange(5))[1].abs().max())
    assert seen == ["prepare"] * 5 + [largest] * 5


# ------------------------------------------------------------------------------------------------ processes
def ranks(world: int, step: int) -> dict[str, list]:
    """One launch of torch.distributed that runs every `step`-th job inside."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*command, str(TESTS / "ranks_worker.py"), str(step)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "hosted", "step"), [(1, [5], 7), (2, [3, 2], 1), (3, [2, 2, 1], 7), (4, [2, 1, 1, 1], 2)]
)
def test_ranks_are_the_simulator_bit_for_bit(world, hosted, step):
    """The zoo, on every rank, over both channels: payloads, iterates, measured values, bytes. All of it on two ranks, a
    share on the others unless the variable SHOAL_ALL is set.

    Beside it: five clients are shared out evenly, two rounds of GD move two frames of 48 + 64 bytes for each place of
    the largest share to each other rank, behind a signal, and more ranks than clients are refused.
    """
    step = 1 if os.environ.get("SHOAL_ALL") else step
    found = ranks(world, step)
    expected = {name: job(lambda: TappedLocal(5)) for name, job in list(zoo.jobs().items())[::step]}
    for rank, channels in enumerate(found["traces"]):
        for channel, traces in zip(("replicated", "sharded"), channels, strict=True):
            assert traces.keys() == expected.keys()
            different = [name for name, seen in traces.items() if seen != expected[name]]
            assert not different, f"{channel}, rank {rank} of {world}"
    assert found["hosted"] == hosted
    signal = SIZE + len("messages of Dense(), d=12, torch.uint8")
    assert found["moved"] == [2 * (hosted[0] * (48 + HEADER) + signal) * (world - 1)] * world
    assert world == 1 or all(f"{world} ranks for n={world - 1}" in said for said in found["refused"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_keeps_no_other_clients_data(rank, monkeypatch, tmp_path):
    """From before the constants are known; the first rank answers for the whole problem. Also by way of the command."""
    gone = []

    def opened(config):
        gone.append(known() is None)
        raise NonFiniteError("enough")

    channel = SimpleNamespace(rank=rank, n=5, clients=torch.arange(2) + rank, open=opened)
    attempts = SimpleNamespace(channel=channel, number=0, supervised=False)
    monkeypatch.setattr(replicated, "started_by_torchrun", lambda: True)
    monkeypatch.setattr(cli_run, "Attempts", lambda *made: nullcontext(attempts))
    spec, whole = RunSpec(method="Marina(PermK())", rounds=2), Classification.load("mushrooms", n=5)
    known, objects = weakref.ref(whole), [(whole, parse(spec.method, known_names(), Method), None)]
    del whole
    with pytest.raises(NonFiniteError, match="enough"):
        cli_run._run(spec, objects, tmp_path / "out", False, Replicated, 60.0)
    handed = [Classification.load("mushrooms", n=5)]
    known = weakref.ref(handed[0])
    with pytest.raises(NonFiniteError, match="enough"):
        simulate(handed.pop(), "Marina(PermK())", rounds=2, channel=channel)
    assert gone == [rank > 0] * 2


def test_problems_hold_only_what_a_rank_needs():
    """The traces above ran on `only`: its rows are those of the whole problem, under the same ids."""
    for problem in zoo.PROBLEMS:
        part = problem.only(torch.tensor([1, 4]))
        assert isinstance(part, Problem)
        ids, x = torch.tensor([4, 1]), problem.start() + 0.25
        for mine, all_ in zip(part.evaluate(x, ids), problem.evaluate(x, torch.arange(5)), strict=True):
            assert torch.equal(mine, all_[ids])
