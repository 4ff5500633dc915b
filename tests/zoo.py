"""The zoo: every compressor, method and problem of the library, with the parameters that reach its special cases.

The batteries run over these lists. Whoever adds a public class adds a line here; `test_public` fails otherwise.
`trace` is the fingerprint of a run that all runtimes must share, `inputs` are the families of vectors on which
compressors are measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from shoal.compressors import (
    QSGD,
    Bernoulli,
    Coded,
    Composed,
    Correlated,
    CorrelatedOffset,
    Dense,
    Drive,
    Eden,
    Grid,
    Independent,
    LowRank,
    Natural,
    NaturalDithering,
    PerLayer,
    PermK,
    RandK,
    Rotated,
    Scaled,
    Sign,
    Ternary,
    TopK,
)  # fmt: skip
from shoal.compressors.correlated import agree_locally
from shoal.core import Channel, Compressor, Method, Problem, State
from shoal.descents import Step
from shoal.errors import ConfigError
from shoal.messages import Messages, Round
from shoal.methods import (
    DCGD,
    EF21,
    GD,
    Dasha,
    Diana,
    Marina,
    MarinaP,
    PPMarina,
    TwoWayEF21,
    TwoWayMarina,
    VRDiana,
    VRMarina,
)
from shoal.problems import Autoencoder, Classification, Module, Quadratics
from shoal.runtimes import Local, rounds
from shoal.theory import Setting

# ------------------------------------------------------------------------------------------------ compressors
COMPRESSORS: list[Compressor] = [
    Dense(),
    RandK(1),
    RandK(3),
    RandK(0.3),
    TopK(1),
    TopK(3),
    TopK(0.3),
    PermK(),
    QSGD(1),
    QSGD(3),
    QSGD(7),
    Independent(),
    Correlated(),
    Correlated("own"),
    Correlated("own", numerical=True),
    Correlated("max"),
    Correlated("max", numerical=True),
    Correlated(levels=4),
    Correlated("own", levels=3),
    Correlated(blocks=2),
    Correlated("full", blocks=2),
    Correlated("own", levels=3, blocks=2),
    Composed(RandK(3), QSGD(3)),
    Composed(PermK(), QSGD(7)),
    Scaled(RandK(3)),
    PerLayer((2, None), (RandK(1), QSGD(3))),
    PerLayer((None, 1), (PermK(), Composed(PermK(), Independent()))),
    Grid(2),
    Grid(5),
    Rotated(Grid(4)),
    Rotated(Correlated()),
    Rotated(PermK()),
    Rotated(TopK(3)),
    Rotated(RandK(3), shared=False),
    Drive(),
    Drive("least", rounds=1),
    Eden(3, rounds=3),
]
COMPRESSORS += [Bernoulli(0.6), Sign(), Ternary(), Natural(), NaturalDithering(1), NaturalDithering(3)]
COMPRESSORS += [CorrelatedOffset(), CorrelatedOffset("even"), CorrelatedOffset("random", "own", 4)]
COMPRESSORS += [Independent(3), Independent(4), Independent(7)]
COMPRESSORS += [Coded(QSGD(1)), Coded(Correlated("own", levels=3)), Eden(1.5), LowRank()]
SHAPES = [(5, 12), (5, 7), (4, 130), (3, 8), (6, 3), (7, 3), (5, 1), (1, 9), (1, 1), (2, 2)]
FAMILIES = ["gaussian", "identical", "one-hot", "two-hot", "cauchy", "zeros"]


def fits(compressor: Compressor, n: int, d: int) -> bool:
    """Whether n clients can compress d coordinates with it."""
    try:
        compressor.check(n, d)
    except ConfigError:
        return False
    return True


def inputs(family: str, n: int, d: int) -> Tensor:
    """(n, d) float32, the same in every run; every family but zeros has entries of magnitude about 1."""
    rng = np.random.default_rng(7)
    if family == "identical":
        u = np.tile(rng.normal(size=d), (n, 1))
    elif family == "one-hot":
        u = np.stack([np.roll(np.eye(d)[0] * (i + 1) / n, i) for i in range(n)])
    elif family == "two-hot":
        pair = np.zeros(d)
        pair[: min(d, 2)] = [1.0, 0.5][: min(d, 2)]
        u = np.stack([np.roll(pair, i) for i in range(n)])
    elif family == "cauchy":  # quantiles of the Cauchy law, in an order of its own for each client
        tails = np.tan(np.pi * ((np.arange(d) + 0.5) / d - 0.5))
        u = np.stack([rng.permutation(tails) for _ in range(n)])
    else:
        u = rng.normal(size=(n, d)) * (0.0 if family == "zeros" else 1.0)
    return torch.from_numpy(u.astype(np.float32))


def round_of(compressor: Compressor, u: Tensor, index: int = 0, seed: int = 0) -> Round:
    """A round in which the rows of u are all the clients there are, with the scale agreed on where one is needed."""
    return agree_locally(u, compressor, Round.full(index, seed, len(u)))


def rows_of(msgs: Messages) -> list[bytes]:
    """Each row's bytes, as they travel."""
    return [row[:size].numpy().tobytes() for row, size in zip(msgs.payload, msgs.nbytes.tolist(), strict=True)]


# ------------------------------------------------------------------------------------------------ problems
def classification(loss: str = "logistic", n: int = 5, rows: int = 60, d: int = 12) -> Classification:
    """Sparse rows with labels that a noisy linear rule gave them, in uneven parts."""
    rng = np.random.default_rng(3)
    A = rng.normal(size=(rows, d)) * (rng.random((rows, d)) < 0.5)
    y = np.where(A @ rng.normal(size=d) + 0.5 * rng.normal(size=rows) > 0, 1.0, -1.0)
    cuts = np.sort(rng.choice(np.arange(1, rows), n - 1, replace=False))
    return Classification(csr_array(A), y, np.split(rng.permutation(rows), cuts), loss, lam=0.05, name="made")


CONVEX = Quadratics(n=5, d=12, noise=0.05, lam=1e-1)  # every f_i is convex and has a lower bound
MIXED = Quadratics(n=5, d=12, noise=0.8, lam=1e-1, seed=3)  # some f_i are not, and have none
EQUAL = Quadratics(n=5, d=12, noise=0.0, lam=1e-1)  # all f_i are the same: L_± = 0
CODED = np.random.default_rng(4).normal(size=(30, 3)).astype(np.float32)
CODER = Autoencoder(CODED, np.split(np.arange(30), [9, 12, 20, 28]), width=5, lam=0.1)  # its constants are estimates


def linear(n: int = 5, d: int = 12) -> Module:
    """A linear layer with squared errors, some rows each."""
    rng = np.random.default_rng(5)
    layer = torch.nn.Linear(d, 1, bias=False)
    layer.weight.data = torch.from_numpy(rng.normal(size=(1, d)).astype(np.float32))
    data = [(torch.from_numpy(rng.normal(size=(k, d)).astype(np.float32)), torch.ones(k)) for k in range(3, n + 3)]
    return Module(layer, data, lambda outputs, targets: (outputs[:, 0] - targets).square(), "linear")


PROBLEMS: list[Problem] = [
    CONVEX,
    MIXED,
    EQUAL,
    classification("logistic"),
    classification("nonconvex"),
    CODER,
    linear(),
]


# ------------------------------------------------------------------------------------------------ methods
def has(compressor: Compressor, constant: str) -> bool:
    """Whether it states this constant (a shared scale and blocks have no omega, whatever their class says)."""
    if constant == "omega" and hasattr(compressor, "omega"):
        try:
            compressor.omega(12)
        except ConfigError:
            return False
    return hasattr(compressor, constant)


METHODS: list[Method] = [
    GD(),
    *(DCGD(c) for c in COMPRESSORS if has(c, "ab") or has(c, "alpha")),
    *(Diana(c) for c in COMPRESSORS if has(c, "omega")),
    Diana(RandK(3), shift=0.1),
    *(Marina(c) for c in COMPRESSORS if has(c, "ab")),
    *(Marina(c, p=0.3) for c in COMPRESSORS if has(c, "ab")),  # at this small d the best p is often 1
    *(EF21(c) for c in COMPRESSORS if has(c, "alpha")),
    VRMarina(Correlated(), p=0.3, batch=2),
    VRMarina(QSGD(3), p=0.3, batch=2, large=4),
    VRDiana(RandK(3), batch=2, p=0.3),
    Dasha(RandK(3)),
    Dasha(QSGD(3)),
    Dasha(RandK(3), momentum=0.05, batch=2, p=0.3),
    EF21(TopK(3), clients=2),
    EF21(Scaled(RandK(3)), clients=4),
    PPMarina(QSGD(3), p=0.3, clients=2),
    PPMarina(PermK(), p=0.3, clients=3, odds="even"),
    PPMarina(Correlated(), p=0.3, clients=2),
    VRDiana(QSGD(3), shift=0.1),
    PPMarina(QSGD(3), p=0.3, clients=3, odds="smoothness"),
    MarinaP(PermK(), p=0.3),
    TwoWayMarina(Correlated(), downlink=PermK(), p=0.3),
    TwoWayMarina(RandK(3), downlink=Coded(QSGD(1)), p=0.3),
    TwoWayEF21(TopK(3), downlink=TopK(3)),
    TwoWayEF21(Rotated(TopK(3)), downlink=Scaled(RandK(3)), clients=3),
]


def setting(problem: Problem, horizon: int | None = 100, pl: bool = False) -> Setting:
    """What is known of a problem before a run of so many rounds."""
    return Setting(problem.n, problem.d, problem.smoothness(), horizon, None, pl)


# ------------------------------------------------------------------------------------------------ traces
class Tap:
    """Mixed into a channel: adds what is gathered to a SHA-256, each row with its slot and length."""

    heard = hashlib.sha256()

    def gather(self, up: Messages, code: Compressor, rnd: Round) -> Messages:
        up = super().gather(up, code, rnd)  # type: ignore[misc]
        for slot, row in zip(up.slots.tolist(), rows_of(up), strict=True):
            self.heard.update(f"{slot}:{len(row)}:".encode() + row)
        return up


class TappedLocal(Tap, Local):
    """The simulator, tapped."""


def trace(
    problem: Problem,
    method: Method,
    channel: Callable[[], Channel] = lambda: TappedLocal(5),
    chunk: int | None = None,
    measure: bool = True,
    length: int = 9,
    gamma: float = 0.125,
) -> dict[str, object]:
    """The SHA-256 of all uplink payloads and all iterates of a run, and what its meter counted as payload."""
    opened = channel()
    opened.heard = hashlib.sha256()  # type: ignore[attr-defined]
    mine = problem.only(opened.clients) if len(opened.clients) < problem.n else problem
    iterates = hashlib.sha256()
    for event in rounds(method, Step(gamma), mine, opened, seed=11, chunk=chunk):
        iterates.update(event.state.x.numpy().tobytes())
        if measure:
            iterates.update(repr(event.measured).encode())
        if event.state.index == length:
            break
    meter = event.state.meter
    counted = [meter.up, meter.down, meter.up_framed, meter.down_framed]
    return {"payloads": opened.heard.hexdigest(), "iterates": iterates.hexdigest(), "meter": counted}  # type: ignore[attr-defined]


def resolved(method: Method, problem: Problem) -> Method:
    """The method with all its numbers, ready to run on the problem."""
    method.check(problem.n, problem.d)
    return method.resolved(setting(problem))


def copied(state: State) -> State:
    """A state that shares no memory with the original: what a checkpoint would hold."""

    def clone(part: object) -> object:
        return type(part)(*(v.clone() for v in part)) if part else part  # type: ignore[attr-defined,call-arg]

    parts = {name: clone(getattr(state, name)) for name in ("server", "workers", "descent")}
    return replace(state, x=state.x.clone(), **parts, meter=replace(state.meter))


def jobs() -> dict[str, Callable[[Callable[[], Channel]], dict[str, object]]]:
    """name -> trace over a channel: every method on quadratics, and one of each kind on data."""

    def job(problem: Problem, method: Method) -> Callable[[Callable[[], Channel]], dict[str, object]]:
        return lambda channel: trace(problem, resolved(method, problem), channel)

    on_data = [GD(), Diana(QSGD(3)), Marina(Correlated(), p=0.3), Marina(PermK(), p=0.3), EF21(TopK(3))]
    on_data += [VRMarina(Correlated(), p=0.3, batch=2, large=5), VRDiana(QSGD(3), batch=2, p=0.3)]
    on_data += [Dasha(QSGD(3), batch=2, p=0.3), EF21(TopK(3), clients=3)]
    downlinks = [MarinaP(RandK(3), p=0.3), TwoWayMarina(Correlated(), downlink=PermK(), p=0.3)]
    downlinks += [TwoWayEF21(TopK(3), downlink=TopK(3))]
    pairs = [(MIXED, m) for m in METHODS] + [(p, m) for p in PROBLEMS[3:] for m in on_data]
    # Clients off on their own diverge at this step where gradients grow like cubes, as the autoencoder's do.
    pairs += [(p, m) for p in PROBLEMS[3:5] for m in downlinks]
    return {f"{problem!r} {method!r}": job(problem, method) for problem, method in pairs}
