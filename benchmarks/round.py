"""One round of n = d = 1000, all clients in one thread, without the gradients.

The gradients are taken out by a problem that computes none: its rows are drawn before the clock starts, and its `grad`
returns a view of them (two tables take turns, so that MARINA has differences to compress). What is left is the method
and the driver: the differences, the scales, the encoding, the aggregation, the step. Nothing is subtracted afterwards.
MARINA runs with p = 1e-9 and a fixed seed: every round after round 0 is a compressed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal import EF21, QSGD, Correlated, Diana, Independent, Marina, PermK, RandK, TopK
from shoal.core import Compressor, Method, Problem
from shoal.descents import Step
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact
from shoal.experiments.timing import Row, beside_copy, clock, normal_rows
from shoal.messages import Messages, Round, Rows, Vector
from shoal.runtimes import Local, rounds
from shoal.theory import Smoothness

N, D = 1000, 1000
NEVER = 1e-9  # below the coin's resolution of 2^-24, and this seed never draws a zero
GOAL = 5.0  # ns a client-coordinate, for MARINA with Correlated


class Prepared(Problem):
    """n clients whose gradients were drawn in advance: round k sees table k mod 2, wherever x is."""

    name = "prepared"

    def __init__(self, n: int, d: int) -> None:
        self.n, self.d = n, d
        self.tables = [normal_rows(n, d, seed) for seed in (0, 1)]

    def start(self) -> Vector:
        return torch.zeros(self.d)

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        """A view: neither computed nor copied. The hosted clients of a chunk stand beside each other."""
        first = int(rnd.clients[0])
        return self.tables[rnd.index % 2][first : first + len(rnd.clients)]

    def evaluate(self, x: Vector, clients: Tensor) -> tuple[Tensor, Rows]:
        raise ConfigError("Prepared has gradients but no function: time its rounds, do not measure f.")

    def smoothness(self) -> Smoothness:
        raise ConfigError("Prepared has no constants: give the step size.")

    def only(self, clients: Tensor) -> Problem:
        raise ConfigError("Prepared holds all clients: run it in one process.")


class Clocked(Compressor):
    """Another compressor, and the CPU seconds spent in each of its four functions since `spent` was last cleared."""

    def __init__(self, inner: Compressor) -> None:
        self.inner, self.agrees = inner, inner.agrees
        self.spent: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # omega, alpha, ab: a method accepts what it would accept of `inner`

    def _clocked(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        began = clock()
        out = call(*args)
        self.spent[what] = self.spent.get(what, 0.0) + (clock() - began) / 1e9
        return out

    def capacity(self, n: int, d: int) -> int:
        return self.inner.capacity(n, d)

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        return self._clocked("prepare", self.inner.prepare, u, rnd)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        return self._clocked("encode", self.inner.encode, u, rnd)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        return self._clocked("decode", self.inner.decode, msgs, rnd)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        return self._clocked("aggregate", self.inner.aggregate, msgs, rnd)


METHODS: list[tuple[Callable[..., Method], dict[str, float], Compressor]] = [
    (Marina, {"p": NEVER}, Correlated()),
    (Marina, {"p": NEVER}, RandK(10)),
    (Marina, {"p": NEVER}, PermK()),
    (Marina, {"p": NEVER}, QSGD()),
    (Marina, {"p": NEVER}, Independent()),
    (EF21, {}, TopK(10)),
    (Diana, {}, RandK(10)),
]


def measure(repeat: int) -> Iterator[Row]:
    """A row a method: ns a client-coordinate, and where they go (medians, so that they add up only nearly)."""
    problem = Prepared(N, D)
    for kind, settings, inner in METHODS:
        code = Clocked(inner)
        events = rounds(kind(code, **settings), Step(1e-3), problem, Local(N), seed=0)
        for _ in range(3):  # x^0, MARINA's full round 0, a first compressed round
            next(events)
        parts: list[dict[str, float]] = []

        def one_round(events: Iterator[Any] = events, code: Clocked = code, parts: list = parts) -> None:
            code.spent.clear()
            next(events)
            parts.append(dict(code.spent))

        taken, ratio = beside_copy(one_round, N * D, repeat)
        whole = [1e9 * t / (N * D) for t in taken]
        split = [{what: 1e9 * t / (N * D) for what, t in part.items()} for part in parts[1:]]
        detail = {what: float(np.median([part[what] for part in split])) for what in split[0]}
        detail["rest"] = float(np.median([t - sum(part.values()) for t, part in zip(whole, split, strict=True)]))
        name = compact(kind(inner))
        yield Row("round", name, "ns", whole, ratio, GOAL if inner == Correlated() else None, detail)
