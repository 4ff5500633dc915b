"""The goals of the kernels: how near a memory copy's speed each comes on this machine, with one thread and with two.

A ratio is t(copy) / t, the copy of the same float32 numbers into a ready buffer in the same run and on as many threads:
1 is as fast as a memory copy. Vectors and results take turns, `timing.FAR` bytes of them, so that a vector comes from
memory as a gradient does, and a copy is one of memory: within a cache it would be several times as fast. Medians: of
the CPU time of one thread, of the wall time of several. The goals are for two threads; one thread is held against seven
tenths of them. They depend on the machine: no test looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from shoal import kernels
from shoal.compressors import QSGD, Correlated, Drive, Eden, Independent, PermK, RandK, TopK
from shoal.compressors.correlated import agree_locally
from shoal.core import Compressor
from shoal.experiments.expressions import compact
from shoal.experiments.timing import beside, beside_copy, normal_rows, turns
from shoal.messages import Messages, Round

CLIENTS = 16
ONE_THREAD = 0.7  # of a goal for two
SMALL, MICROSECONDS = 1000, 20.0  # coordinates of a call that is all fixed cost, and the goal for it
Call = Callable[[], Any]
Rowed = Sequence[torch.Tensor]  # (1, d) each
T = TypeVar("T")


class Goal(NamedTuple):
    """What is called on d coordinates, and the ratio it should reach on two threads."""

    name: str
    call: Call
    ratio: float


@dataclass(frozen=True)
class Checked:
    """A goal's measurement: nanoseconds a coordinate (a call's microseconds where `d` is `SMALL`), ratio, and goal."""

    name: str
    d: int
    threads: int
    figure: float
    ratio: float | None
    goal: float

    @property
    def met(self) -> bool:
        """Whether the ratio is at least the goal; without a ratio, whether the figure is at most."""
        return self.figure <= self.goal if self.ratio is None else self.ratio >= self.goal


class Turns(Generic[T]):
    """What takes turns; as many of the last results are kept, so that none is written where one lay just before."""

    def __init__(self, some: Sequence[T]) -> None:
        self._next, self._kept = cycle(some), deque[Any](maxlen=len(some))

    def of(self, function: Callable[[T], Any]) -> Call:
        """The function, of the next one."""
        return lambda: self._kept.append(function(next(self._next)))


def goals(d: int) -> Iterator[Goal]:
    """The goals at d coordinates, one after the other."""
    rnd = Round.full(1, 0, CLIENTS)
    one, whole = rnd.rows(slice(0, 1)), normal_rows(turns(d), d, 0)
    ops, place, rows = kernels.of(whole), torch.zeros(1, dtype=torch.int64), whole.split(1)
    private, ties, us = one.draw("goals.bits"), one.draw("goals.ties"), Turns(rows)
    norm, top = ops.norms(rows[0]), ops.maxes(whole).max()[None]
    yield Goal(
        "IQ encode, 1 bit, scale given",
        us.of(lambda u: ops.encode_bits(u, norm, private, ties, 1, place, None)),
        0.9,
    )
    yield Goal("IQ encode, 1 bit, with the norm", us.of(lambda u: Independent().encode(u, one)), 0.5)
    shared = rnd.shared("goals.shifts")
    yield Goal(
        "CQ encode, 1 bit, scale given",
        us.of(lambda u: ops.encode_bits(u, top, private, ties, CLIENTS, place, shared)),
        0.5,
    )
    agreed = replace(one, agreed=float(top))
    yield Goal("CQ encode, 1 bit, with the scale", us.of(lambda u: _whole(Correlated(), u, one, agreed)), 0.35)
    sent = [Correlated().encode(u, agreed) for u in rows]
    yield Goal("decode of a 1-bit message", Turns(sent).of(lambda m: Correlated().decode(m, agreed)), 1.2)
    many = Turns([_repeated(m, agreed) for m in sent])
    yield Goal(f"mean of {CLIENTS} 1-bit messages", many.of(lambda m: Correlated().aggregate(*m)), 0.8)
    yield from _each_way(QSGD(7), rows, one, "4-bit quantization", 0.45, 1.2)
    yield from _one_way(Drive(rounds=1), rows, one, "DRIVE encode, one rotation", 0.2)
    yield from _one_way(Eden(1, rounds=1), rows, one, "EDEN encode, 1 bit, one rotation", 0.2)
    yield from _one_way(TopK(0.01), rows, one, "TopK encode, 1 %", 0.1)
    yield from _each_way(RandK(0.0625), rows, one, "RandK, k = d/16,", 0.12, 0.12)
    yield from _each_way(PermK(), rows, one, f"PermK, n = {CLIENTS},", 1.0, 1.0)


def _whole(compressor: Compressor, u: torch.Tensor, rnd: Round, agreed: Round) -> Messages:
    """What a client does where a scale is agreed on: its own part of it, then the message."""
    compressor.prepare(u, rnd)
    return compressor.encode(u, agreed)


def _repeated(msgs: Messages, rnd: Round) -> tuple[Messages, Round]:
    """The message, sent by every client."""
    everyone = Round(rnd.index, rnd.seed, CLIENTS, torch.arange(CLIENTS), torch.arange(CLIENTS), CLIENTS, rnd.agreed)
    payload = msgs.payload.expand(CLIENTS, -1).contiguous()
    return Messages.of(payload, everyone, msgs.d), everyone


def _one_way(compressor: Compressor, rows: Rowed, rnd: Round, name: str, goal: float) -> Iterator[Goal]:
    yield Goal(name, Turns(rows).of(lambda u: compressor.encode(u, rnd)), goal)


def _each_way(compressor: Compressor, rows: Rowed, rnd: Round, name: str, there: float, back: float) -> Iterator[Goal]:
    yield Goal(f"{name} encode", Turns(rows).of(lambda u: compressor.encode(u, rnd)), there)
    sent = Turns([compressor.encode(u, rnd) for u in rows])
    yield Goal(f"{name} decode", sent.of(lambda m: compressor.decode(m, rnd)), back)


def check(dims: Sequence[int], threads: Sequence[int], repeat: int) -> Iterator[Checked]:
    """Every goal at every d with every number of threads, then what a call costs that has next to nothing to do."""
    for d in dims:
        for count in threads:
            with using(count):
                for goal in goals(d):
                    _written(goal.call, d)
                    taken, ratio = beside_copy(goal.call, d, repeat, wall=count > 1, far=True)
                    yield Checked(goal.name, d, count, 1e9 * _median(taken) / d, ratio, _held(goal.ratio, count))
                yield from _butterflies(d, count, repeat)
                yield _against_torch(d, count, repeat)
    yield from fixed_costs(repeat)


def _written(call: Call, d: int) -> None:
    """Every result's memory once: the system clears a page that was never written, which no copy here pays for."""
    for _ in range(turns(d) + 1):
        call()


def _butterflies(d: int, count: int, repeat: int) -> Iterator[Checked]:
    """The Hadamard transform of the power of two that d is padded to."""
    size = 1 << (d - 1).bit_length()
    xs = normal_rows(turns(size), size, 0).split(1)
    call = Turns(xs).of(kernels.of(xs[0]).hadamard)
    _written(call, size)
    taken, ratio = beside_copy(call, size, repeat, wall=count > 1, far=True)
    yield Checked("Hadamard transform", size, count, 1e9 * _median(taken) / size, ratio, _held(0.35, count))


def _against_torch(d: int, count: int, repeat: int) -> Checked:
    """TopK beside torch.topk of the same magnitudes, those of one vector: the ratio of their times."""
    x, k = normal_rows(1, d, 0), d // 100
    ops = kernels.of(x)
    taken, ratio = beside(lambda: ops.topk(x, k), lambda: x.abs().topk(k), repeat, wall=count > 1)
    return Checked("TopK, 1 %: times faster than torch.topk", d, count, 1e9 * _median(taken) / d, ratio, 4.0)


def fixed_costs(repeat: int) -> Iterator[Checked]:
    """Microseconds of each call on `SMALL` coordinates, on one thread."""
    u = normal_rows(1, SMALL, 0)
    with using(1):
        for compressor in (Independent(), Correlated(), QSGD(7), TopK(0.01), RandK(0.0625), PermK(), Drive(rounds=1)):
            rnd = Round.full(1, 0, CLIENTS).rows(slice(0, 1))
            rnd = agree_locally(u, compressor, rnd)
            msgs = compressor.encode(u, rnd)
            parts: dict[str, Call] = {
                "encode": partial(compressor.encode, u, rnd),
                "decode": partial(compressor.decode, msgs, rnd),
            }
            for part, call in parts.items():
                taken, _ = beside_copy(call, SMALL, 50 * repeat)
                name = f"{compact(compressor)} {part}, d = {SMALL}: µs a call"
                yield Checked(name, SMALL, 1, 1e6 * _median(taken), None, MICROSECONDS)


@contextmanager
def using(threads: int) -> Iterator[None]:
    """So many threads, for torch and for the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _held(goal: float, threads: int) -> float:
    return goal if threads > 1 else ONE_THREAD * goal


def _median(taken: Sequence[float]) -> float:
    return sorted(taken)[len(taken) // 2]
