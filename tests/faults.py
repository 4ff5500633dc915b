"""Faults as data: every way in which one rank can differ from the others, and clients with something not finite.

A case is a call that all ranks make, the rank that differs, and how: other fields in its signal, or another call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.compressors import Correlated, PermK, RandK, TopK
from shoal.core import Channel, Compressor, Method
from shoal.descents import Step
from shoal.errors import ConfigMismatch, LengthError, NonFiniteError, RoundMismatch, ShoalError, VersionMismatch
from shoal.messages import Round, Rows, Vector
from shoal.methods import DCGD, EF21, GD, Diana, Marina
from shoal.problems import Quadratics
from shoal.runtimes import rounds
from shoal.runtimes.replicated import Replicated
from shoal.runtimes.signals import flat

# ------------------------------------------------------------------------------------------------ mismatches
CONFIG: dict[str, Any] = {
    "method": "Marina(RandK(k=3), p=0.1)", "seed": 0, "step": {"rule": "theory", "gamma": 0.125}, "every": 1,
    "problem": {"name": "quadratics", "n": 5, "d": 12}, "rounds": 100, "bits": None, "target": None,
    "on_nonfinite": "raise", "resolved": "Marina(RandK(k=3), p=0.1)", "constants": {"minus": "1.25"},
    "versions": {"python": "3.11.2", "shoal": "0.1.0", "torch": "2.13.0", "numpy": "2.3.0"},
}  # fmt: skip


def gather(code: Compressor = RandK(3), d: int = 12, late: int = 0, dtype: torch.dtype = torch.float32) -> Any:  # noqa: B008
    def call(channel: Replicated) -> Any:
        rnd = Round.full(channel.peers.round + late, 0, channel.n, channel.clients)
        sent = code.encode(torch.ones(len(channel.clients), d), rnd)
        channel.peers.round += late
        try:
            return channel.gather(sent, code, rnd)
        finally:
            channel.peers.round -= late

    return call


def agree(channel: Replicated) -> float:
    return channel.agree(torch.ones(len(channel.clients)), Round.full(channel.peers.round, 0, channel.n))


def swap(more: int = 0, expected: int = 0) -> Callable[[Replicated], Any]:
    def call(channel: Replicated) -> list[Tensor]:
        world, me = channel.peers.world, channel.peers.rank
        pieces = [torch.zeros(1 + me + r + (more if r == world - 1 else 0), dtype=torch.uint8) for r in range(world)]
        return channel.peers.swap(pieces, [1 + me + r + (expected if r == 0 else 0) for r in range(world)])

    return call


def uneven(more: int = 0, bound: int = 0, what: str = "") -> Callable[[Replicated], Any]:
    """Rank r brings r bytes of at most 2 r."""

    def call(channel: Replicated) -> list[Tensor]:
        world, me = channel.peers.world, channel.peers.rank
        most = [2 * r + (bound if r == 0 else 0) for r in range(world)]
        return channel.peers.gather(torch.zeros(me + more, dtype=torch.uint8), most, what)

    return call


def every(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Callable[[Replicated], Any]:
    return lambda channel: channel.peers.all(torch.zeros(shape, dtype=dtype))


def hello(**change: Any) -> Callable[[Replicated], None]:
    def call(channel: Replicated) -> None:
        before = channel.peers.digest
        config = flat(CONFIG) | change
        channel.open({name: value for name, value in config.items() if value != "left out"})
        channel.peers.digest = before

    return call


FIELDS = {name: f"{value} or so" if isinstance(value, str) else 77 for name, value in flat(CONFIG).items()}
CALLS: dict[str, Callable[[Replicated], Any]] = {
    "gather": gather(), "agree": agree, "swap": swap(), "barrier": lambda channel: channel.peers.barrier(),
    "all": every((3, 4)), "uneven": uneven(), "hello": hello(),
    "collect": lambda channel: channel.collect(torch.zeros(len(channel.clients)), torch.zeros(len(channel.clients), 4)),
    "gather TopK": gather(TopK(3)), "gather RandK(4)": gather(RandK(4)), "gather d=13": gather(d=13),
    "gather a round late": gather(late=1), "all of more": every((5, 4)), "all of less": every((2, 4)),
    "all in int32": every((3, 4), torch.int32), "all in float64": every((3, 2), torch.float64),
    "swap of more": swap(more=3), "swap for less": swap(expected=-1),
    "uneven beyond": uneven(more=9), "uneven of another bound": uneven(bound=1), "uneven else": uneven(what="else"),
    **{f"hello {name}": hello(**{name: value}) for name, value in FIELDS.items()},
    "hello without seed": hello(seed="left out"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """All ranks make `call`; `rank` makes `other` instead, or says `change` in its signal. All must raise `error`."""

    call: str
    rank: int
    error: type[ShoalError]
    change: dict[str, Any] = field(default_factory=dict)
    other: str = ""
    names: str = ""  # what every rank's message must contain


HEADER: list[tuple[dict[str, Any], type[ShoalError], str]] = [
    ({"version": 2}, VersionMismatch, "format"),
    ({"layout": rng.LAYOUT + 1}, VersionMismatch, "layout"),
    ({"world": 4}, ConfigMismatch, "number of ranks"),
    ({"rank": 7}, ConfigMismatch, "call themselves"),
    ({"digest": b"another."}, ConfigMismatch, "digest"),
    ({"attempt": 99}, RoundMismatch, "attempt"),
    ({"round": 99}, RoundMismatch, "round"),
    ({"number": 99}, RoundMismatch, "number of the exchange"),
    ({"kind": 77}, RoundMismatch, "what comes next"),
]
OTHERS: list[tuple[str, str, type[ShoalError], str]] = [
    ("gather", "gather TopK", ConfigMismatch, "TopK"),
    ("gather", "gather RandK(4)", ConfigMismatch, "RandK(k=4)"),
    ("gather", "gather d=13", ConfigMismatch, "d=13"),
    ("gather", "gather a round late", RoundMismatch, "round"),
    ("gather", "agree", ConfigMismatch, "scales"),
    ("gather", "swap", RoundMismatch, "all-to-all"),
    ("gather", "barrier", RoundMismatch, "a barrier"),
    ("agree", "collect", ConfigMismatch, "values"),
    ("barrier", "hello", RoundMismatch, "a handshake"),
    ("all", "all of more", LengthError, "bytes"),
    ("all", "all of less", LengthError, "bytes"),
    ("all", "all in int32", ConfigMismatch, "torch.int32"),
    ("all", "all in float64", ConfigMismatch, "torch.float64"),
    ("swap", "swap of more", LengthError, "bytes for rank 2"),
    ("swap", "swap for less", LengthError, "expects"),
    ("uneven", "uneven beyond", LengthError, "bytes of at most"),
    ("uneven", "uneven of another bound", LengthError, "the most bytes"),
    ("uneven", "uneven else", ConfigMismatch, "else"),
    ("uneven", "all", RoundMismatch, "an uneven all-gather"),
    ("swap", "uneven", RoundMismatch, "an all-to-all"),
    ("hello", "hello without seed", ConfigMismatch, "seed: "),
    *(("hello", f"hello {name}", ConfigMismatch, f"{name}: ") for name in FIELDS),
]
CASES = [
    *(Case(call, rank, error, change, names=names)
      for call in ("gather", "agree", "swap", "uneven", "barrier", "hello")
      for change, error, names in HEADER for rank in range(3)),
    *(Case(call, rank, error, other=other, names=names) for call, other, error, names in OTHERS for rank in range(3)),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ not finite
class Broken(Quadratics):
    """Quadratics whose clients have something that is not finite now and then: bad[round] = clients."""

    full_batch = False
    bad: dict[int, tuple[int, ...]] = {}  # noqa: RUF012
    value = float("nan")

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        rows = super().grad(x, rnd, batch).clone()
        rows[torch.isin(rnd.clients, torch.tensor(self.bad.get(rnd.index, (-1,)))), 0] = self.value
        return rows


def broken(bad: dict[int, tuple[int, ...]], n: int = 5, value: float = float("nan")) -> Broken:
    problem = Broken(n=n, d=12, noise=0.8, lam=0.1, seed=3)
    problem.bad, problem.value = bad, value
    return problem


BAD = {2: (3,), 4: (0, 4), 5: (1,)}
Open = Callable[[int], Channel]


def run(
    channel: Open, method: Method, policy: Any, bad: dict[int, tuple[int, ...]] = BAD, chunk: int | None = None
) -> Any:
    """[digest of the iterates, what was counted, [[round, clients, words], ...]] of eight rounds."""
    problem = broken(bad)
    opened = channel(problem.n)
    iterates, told = hashlib.sha256(), []
    for event in islice(rounds(method, Step(0.125), problem, opened, 11, chunk=chunk, on_nonfinite=policy), 9):
        iterates.update(event.state.x.numpy().tobytes())
        if event.fault is not None:
            told.append([event.state.index - 1, list(event.fault.clients), str(event.fault).split(" (rank")[0]])
    m = event.state.meter
    return [iterates.hexdigest(), [m.up, m.down, m.up_framed, m.down_framed], told]


METHODS: list[Method] = [
    GD(), DCGD(RandK(3)), DCGD(PermK()), DCGD(Correlated()), Diana(RandK(3), shift=0.2), EF21(TopK(3)),
    EF21(TopK(3), clients=3),
]  # fmt: skip
SKIPPING: list[Method] = [*METHODS, Marina(RandK(3), p=0.3), Marina(Correlated(), p=0.3)]


def runs() -> dict[str, Callable[[Open], Any]]:
    """name -> a run over a channel, for both policies that go on."""
    jobs = [(method, "drop") for method in METHODS] + [(method, "skip") for method in SKIPPING]
    return {f"{m!r} {p}": (lambda channel, m=m, p=p: run(channel, m, p)) for m, p in jobs}


def grid_row(channel: Open, client: int) -> list[list[Any]]:
    """[round, clients named, state untouched] for 50 rounds, in each of which another client of eight is not finite."""
    problem = broken({k: ((client + k) % 8,) for k in range(1, 51)}, n=8)
    events = rounds(Marina(RandK(3), p=0.3), Step(0.125), problem, channel(8), 11, on_nonfinite="skip")
    cells, before = [], None
    for event in islice(events, 52):
        state = [event.state.x, *event.state.server, *event.state.workers]
        if event.fault is not None:
            same = all(torch.equal(a, b) for a, b in zip(state, before or [], strict=True))
            cells.append([event.state.index - 1, list(event.fault.clients), same])
        before = [part.clone() for part in state]
    return cells


def raised(channel: Open) -> list[str]:
    """What is said where two clients have an infinity in round 3, by each method, and what its state is then."""
    said = []
    for method in SKIPPING:
        events = rounds(method, Step(0.125), broken({3: (1, 4)}, value=float("inf")), channel(5), 11)
        for _ in range(4):
            state = next(events).state
        kept = [part.clone() for part in [state.x, *state.server, *state.workers]]
        try:
            next(events)
        except NonFiniteError as error:
            same = all(torch.equal(a, b) for a, b in zip(kept, [state.x, *state.server, *state.workers], strict=True))
            said.append(f"{error} {same}")
    return said
