"""The battery of methods: gradient descent as the special case, theorems as inequalities, refused pairings.

Statistical tests fix their seeds and allow six standard errors, 2e-9 for a normal mean of 1,500 draws (the recursions)
and 3e-4 for Student's t with seven degrees of freedom (the theorems, whose bounds are not tight on these problems:
with the six standard errors, the means reach 0.87 of what they may be).
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import zoo
from zoo import CONVEX, EQUAL, METHODS, MIXED, inputs, resolved, round_of, setting

from shoal import kernels
from shoal.compressors import QSGD, Correlated, Dense, Independent, PermK, RandK, Sign, TopK
from shoal.core import Method, Problem
from shoal.descents import Step
from shoal.errors import ConfigError
from shoal.kernels import Draw, cpu
from shoal.messages import Round
from shoal.methods import DCGD, EF21, GD, Dasha, Diana, Marina, MarinaP, TwoWayEF21, TwoWayMarina, VRDiana, VRMarina
from shoal.runtimes import Local, rounds
from shoal.theory import AB

every = pytest.mark.parametrize("method", METHODS, ids=repr)
SIX = 6.0


def iterates(method: Method, problem: Problem, gamma: float, length: int, seed: int = 0) -> torch.Tensor:
    """(length + 1, d): x^0, ..., x^length."""
    events = rounds(method, Step(gamma), problem, Local(problem.n), seed)
    return torch.stack([event.state.x for event in itertools.islice(events, length + 1)])


def descended(problem: Problem, gamma: float, length: int) -> torch.Tensor:
    """Gradient descent written out: sums in float64 in id order, g and x in float32."""
    x, out = problem.start(), [problem.start()]
    for _ in range(length):
        total = np.zeros(problem.d)
        for row in problem.evaluate(x, torch.arange(problem.n))[1].numpy():
            total += row
        x = x - gamma * torch.from_numpy((total / problem.n).astype(np.float32))
        out.append(x)
    return torch.stack(out)


DIFFERENCES = [Marina(Dense(), p=0.2), Diana(Dense()), Diana(Dense(), shift=0.3), EF21(Dense()), Dasha(Dense())]


def gradient(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    return problem.evaluate(x, torch.arange(problem.n))[1].double().mean(0)


# ------------------------------------------------------------------------------------------------ gradient descent
@pytest.mark.parametrize("problem", [CONVEX, MIXED, zoo.classification()], ids=repr)
@pytest.mark.parametrize("method", [GD(), DCGD(Dense()), Marina(Dense()), Marina(Dense(), p=1.0)], ids=repr)
def test_dense_methods_are_gradient_descent(method, problem):
    """Bit for bit: they add the same numbers in the same order (Marina resolves p to 1 where nothing is saved)."""
    ready = resolved(method, problem)
    assert torch.equal(iterates(ready, problem, 0.25, 40), descended(problem, 0.25, 40))


@pytest.mark.parametrize("problem", [CONVEX, MIXED, zoo.classification()], ids=repr)
@pytest.mark.parametrize("method", DIFFERENCES, ids=repr)
def test_differences_add_up_to_gradient_descent(method, problem):
    """These send differences, and (a - b) + b is a only to 2^-24 of the larger: 40 rounds of that, and what a step
    of 1/4 makes of it, stay below 1e-5 of the start's size."""
    ready = resolved(method, problem)
    plain = descended(problem, 0.25, 40)
    apart = (iterates(ready, problem, 0.25, 40) - plain).abs().max()
    assert apart <= 1e-5 * max(1.0, float(plain.abs().max()))


# ------------------------------------------------------------------------------------------------ recursions
@cache
def two_points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, x+, and the rows of gradients of MIXED there."""
    x, ids = MIXED.start(), torch.arange(MIXED.n)
    ahead = x - 0.3 * MIXED.evaluate(x, ids)[1].mean(0)
    return x, ahead, MIXED.evaluate(x, ids)[1], MIXED.evaluate(ahead, ids)[1]


def estimates(
    method: Method, server: object, worker: object, x: torch.Tensor, draws: int = 1500
) -> tuple[np.ndarray, list]:
    """(draws, d) of g at x from one and the same state, over as many rounds; and the workers' states after it."""
    return estimates_on(MIXED, method, server, worker, x, draws)


def estimates_on(
    problem: Problem, method: Method, server: object, worker: object, x: torch.Tensor, draws: int = 1500
) -> tuple[np.ndarray, list]:
    """`estimates` on another problem."""
    g, after = np.empty((draws, len(x))), []
    for k in range(draws):
        rnd = Round.full(k + 1, 5, problem.n)
        members = method.cohort(rnd)
        rnd = rnd if members is None else rnd.among(members)
        down, _ = method.down(server, x, rnd)
        u, new = method.up(worker, down, problem.grad, rnd)
        code = method.code(rnd)
        rnd = replace(rnd, agreed=float(code.prepare(u, rnd).max())) if code.agrees else rnd
        sent = code.encode(u, rnd)
        after.append(method.commit(new, sent, rnd))
        g[k] = method.estimate(server, code.aggregate(sent, rnd), rnd)[0].numpy()
    return g, after


RANDOM = [RandK(3), PermK(), QSGD(1), Independent(), Correlated(), Correlated("own"), Correlated("max")]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), SIX * float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("compressor", RANDOM, ids=repr)
def test_recursion_of_marina(compressor):
    """E||g+ - grad f(x+)||^2 <= (1-p) (||g - grad f(x)||^2 + Gamma ||x+ - x||^2), the lemma's premise: by the stated
    Gamma, and with equality before smoothness enters where the AB inequality is one."""
    x, ahead, before, after = two_points()
    method = Marina(compressor, p=0.25)
    kinds = inspect.getmodule(Marina)
    offset = torch.linspace(-0.02, 0.03, MIXED.d)
    server, worker = kinds.Server(before.mean(0) + offset), kinds.Worker(before)
    g, _ = estimates(method, server, worker, ahead)
    mean, error = mean_and_error(((g - after.double().mean(0).numpy()) ** 2).sum(1))
    start, moved = float((server.g.double() - before.double().mean(0)).square().sum()), (after - before).double()
    squares, step = moved.square().sum(1), float((ahead - x).double().square().sum())
    ab: AB | None = compressor.ab(MIXED.n, MIXED.d)
    while ab is not None:
        lost = float(ab.a * squares.mean() - ab.b * moved.mean(0).square().sum() + ab.c * squares.max())
        assert mean <= 0.75 * (start + lost) + error
        assert lost <= ab.gamma(MIXED.smoothness()) * step * (1 + 1e-6)
        if isinstance(compressor, RandK | PermK | Independent):
            assert mean >= 0.75 * (start + lost) - error
        ab = ab.other


@pytest.mark.parametrize("compressor", [RandK(3), QSGD(1), Independent(), Correlated("own")], ids=repr)
def test_recursions_of_diana(compressor):
    """E||g - grad f||^2 <= (omega/n) s with s = mean ||grad f_i - h_i||^2, and E s+ <= (1 - shift) s at the same
    point; equalities for RandK and Independent."""
    x, _, rows, _ = two_points()
    method = resolved(Diana(compressor), MIXED)
    kinds = inspect.getmodule(Diana)
    h = 0.5 * rows + 0.1
    g, after = estimates(method, kinds.Server(h.mean(0)), kinds.Worker(h), x)
    s, omega = float((rows - h).double().square().sum(1).mean()), compressor.omega(MIXED.d)
    assert method.shift == pytest.approx(1 / (1 + omega))
    mean, error = mean_and_error(((g - rows.double().mean(0).numpy()) ** 2).sum(1))
    left, left_error = mean_and_error(np.array([float((rows - w.h).double().square().sum(1).mean()) for w in after]))
    assert mean <= omega / MIXED.n * s + error
    assert left <= (1 - method.shift) * s + left_error
    if isinstance(compressor, RandK | Independent):
        assert mean >= omega / MIXED.n * s - error
        assert left >= (1 - method.shift) * s - left_error


@pytest.mark.parametrize("k", [1, 3, 0.3])
def test_recursion_of_ef21(k):
    """||grad f_i - g_i+||^2 <= (1 - alpha) ||grad f_i - g_i||^2 for every client, and g is the mean of the g_i."""
    x, _, rows, _ = two_points()
    kinds = inspect.getmodule(EF21)
    before = 0.5 * rows + 0.1
    g, (after,) = estimates(EF21(TopK(k)), kinds.Server(before.mean(0)), kinds.Worker(before), x, draws=1)
    lost = (rows - after.g).double().square().sum(1)
    assert (lost <= (1 - TopK(k).alpha(MIXED.d)) * (rows - before).double().square().sum(1) * (1 + 1e-6)).all()
    # g = mean g_i + mean C_i against the mean of g_i + C_i: one rounding to float32 more on either side.
    assert np.allclose(g[0], after.g.double().mean(0).numpy(), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ theorems
SEEDS, LENGTH = 8, 40


def potential(method: Method, problem: Problem, gamma: float, pl: bool) -> float:
    """Phi_0: f(x^0) - f_* and, for methods whose state starts away from the gradients, its initial term."""
    delta = float(problem.evaluate(problem.start(), torch.arange(problem.n))[0].mean()) - problem.f_star
    squares = float(problem.evaluate(problem.start(), torch.arange(problem.n))[1].double().square().sum(1).mean())
    twice = 2.0 if pl else 1.0
    if isinstance(method, VRDiana):  # the weight of mean ||grad f_i(x^0) - h_i^0||^2, and h_i^0 = 0
        return delta + method.step_size(setting(problem, pl=pl)).constants["weight"] * squares
    if isinstance(method, Diana):  # (gamma omega / (n shift)) mean ||grad f_i(x^0) - h_i^0||^2, and h_i^0 = 0
        return delta + twice * gamma * method.compressor.omega(problem.d) / (problem.n * method.shift) * squares
    if isinstance(method, TwoWayEF21):  # the weight of mean ||g_i^0 - grad f_i(x^0)||^2, for what C leaves of them
        return delta + method.step_size(setting(problem, pl=pl)).start * squares
    if isinstance(method, EF21):  # gamma / (2 theta) mean ||g_i^0 - grad f_i(x^0)||^2, and g_i^0 = C(grad f_i(x^0))
        alpha = method.step_size(setting(problem)).constants["alpha"]  # of a client that may not be asked
        return delta + twice * gamma / (2 * (1 - math.sqrt(1 - alpha))) * (1 - alpha) * squares
    return delta


def paths(method: Method, problem: Problem, gamma: float) -> list[torch.Tensor]:
    code = getattr(method, "compressor", None)
    sure = isinstance(method, GD) or isinstance(code, Dense | TopK) or getattr(method, "p", None) == 1.0
    sure = sure and getattr(method, "clients", None) is None
    return [iterates(method, problem, gamma, LENGTH, seed) for seed in range(1 if sure else SEEDS)]


def within(values: list[float], bound: float) -> bool:
    """Whether the mean over seeds is at most the bound, six standard errors allowed."""
    error = SIX * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return bool(np.mean(values) <= bound + error + 1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, DCGD)], ids=repr)
def test_nonconvex_theorem(method):
    """(1/K) sum E||grad f(x^k)||^2 <= 2 Phi_0 / (gamma K) at the theorem's step, on members some of which are not
    convex."""
    ready = resolved(method, MIXED)
    step = ready.step_size(setting(MIXED))
    assert step.evidence == (
        "numerical" if "numerical=True" in repr(method) and isinstance(method, Marina) else "proved"
    )
    averages = [
        float(torch.stack([gradient(MIXED, x).square().sum() for x in path[:LENGTH]]).mean())
        for path in paths(ready, MIXED, step.gamma)
    ]
    assert within(averages, 2 * potential(ready, MIXED, step.gamma, False) / (step.gamma * LENGTH))


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, DCGD)], ids=repr)
def test_theorem_under_pl(method):
    """E f(x^K) - f_* <= (1 - gamma mu)^K Phi_0 at the step of the PL theorem."""
    known = setting(MIXED, pl=True)
    method.check(MIXED.n, MIXED.d)
    ready = method.resolved(known)
    step = ready.step_size(known)
    assert step.evidence == (
        "numerical" if "numerical=True" in repr(method) and isinstance(method, Marina) else "proved"
    )
    ids, bound = torch.arange(MIXED.n), potential(ready, MIXED, step.gamma, True)
    found = paths(ready, MIXED, step.gamma)
    for k in (LENGTH // 2, LENGTH):
        gaps = [float(MIXED.evaluate(path[k], ids)[0].mean()) - MIXED.f_star for path in found]
        assert within(gaps, (1 - step.gamma * MIXED.smoothness().mu) ** k * bound)


@pytest.mark.parametrize("compressor", [RandK(3), PermK(), QSGD(1), Independent(), Correlated()], ids=repr)
def test_theorem_of_dcgd(compressor):
    """min_k E||grad f||^2 <= 6 (f(x^0) - f_inf) / (gamma K)."""
    step = DCGD(compressor).step_size(setting(CONVEX, horizon=LENGTH))
    assert step.evidence == "proved"
    found = paths(DCGD(compressor), CONVEX, step.gamma)
    squares = np.array([[float(gradient(CONVEX, x).square().sum()) for x in path[:LENGTH]] for path in found])
    best = int(squares.mean(0).argmin())
    start = float(CONVEX.evaluate(CONVEX.start(), torch.arange(CONVEX.n))[0].mean())
    bound = 6 * (start - CONVEX.smoothness().f_inf) / (step.gamma * LENGTH)
    assert within(list(squares[:, best]), bound)


def test_dcgd_says_where_it_has_no_theorem():
    """No lower bound, no horizon, a biased compressor: a step size is offered and called unproved."""
    for method, known in (
        (DCGD(RandK(3)), setting(MIXED)),
        (DCGD(RandK(3)), setting(CONVEX, horizon=None)),
        (DCGD(TopK(3)), setting(CONVEX)),
    ):
        step = method.step_size(known)
        assert step.evidence == "none"
        assert step.theorem.startswith("none")
        assert step.gamma == pytest.approx(1 / known.smoothness.minus)
    by_bits = DCGD(RandK(3)).step_size(replace(setting(CONVEX, horizon=None), bits=9600.0))
    assert by_bits.constants["K"] == 100, "96 bits a round"


# ------------------------------------------------------------------------------------------------ refusals
REFUSED = [
    (lambda: Marina(TopK(3)), "EF21"),
    (lambda: Marina("RandK(3)"), "compressor"),
    (lambda: Marina(RandK), "compressor"),
    (lambda: EF21(RandK(3)), "Marina or Diana"),
    (lambda: EF21(PermK()), "Marina or Diana"),
    (lambda: EF21(Correlated()), "Marina or Diana"),
    (lambda: Diana(TopK(3)), "EF21"),
    (lambda: Diana(PermK()), "Marina for PermK"),
    (lambda: Diana(Correlated()).check(5, 12), "scale='own'"),
    (lambda: DCGD(GD()), "compressor"),
    (lambda: DCGD(None), "compressor"),
    (lambda: Marina(RandK(3), p=0.0), "p=0.0"),
    (lambda: Marina(RandK(3), p=1.5), "p=1.5"),
    (lambda: Marina(RandK(3), p=float("nan")), "p=nan"),
    (lambda: Diana(RandK(3), shift=0.0), "shift=0.0"),
    (lambda: Diana(RandK(3), shift=1.5), "shift=1.5"),
    (lambda: Diana(RandK(3), shift=0.26).check(5, 12), r"at most 1/\(1\+omega\) = 0.25"),
    (
        lambda: Marina(RandK(3), p="x"),
        r"Marina\(p='x'\): the probability of a full round is a number in \(0, 1\]; give",
    ),
    (lambda: Marina(RandK(3), p=True), "p=True"),
    (lambda: VRMarina(RandK(3), p=2), r"VRMarina\(p=2\)"),
    (lambda: MarinaP(RandK(3), p="x"), r"MarinaP\(p='x'\)"),
    (lambda: TwoWayMarina(RandK(3), p=[1], downlink=RandK(3)), r"TwoWayMarina\(p=\[1\]\)"),
    (lambda: TwoWayMarina(RandK(3), downlink="x"), r"TwoWayMarina\(downlink='x'\): a compressor"),
    (lambda: VRDiana(RandK(3), p="x"), r"VRDiana\(p='x'\): the probability of a new reference point"),
    (lambda: VRDiana(RandK(3), shift="x"), r"VRDiana\(shift='x'\)"),
    (lambda: Diana(RandK(3), shift="x"), r"Diana\(shift='x'\).*\(0, 1/\(1\+omega\)\]; give one, or leave shift out"),
    (lambda: Dasha(RandK(3), momentum="x"), r"Dasha\(momentum='x'\)"),
    (lambda: Dasha(RandK(3), batch=2, p="x"), r"Dasha\(p='x'\)"),
    (lambda: Marina(RandK(13)).check(5, 12), "1..12"),
    (lambda: Diana(RandK(13)).check(5, 12), "1..12"),
    (lambda: DCGD(RandK(13)).check(5, 12), "1..12"),
    (lambda: EF21(TopK(13)).check(5, 12), "1..12"),
    (lambda: Step(0.0), "positive"),
    (lambda: Step(float("inf")), "positive"),
]


@pytest.mark.parametrize(("make", "mend"), REFUSED, ids=[m for _, m in REFUSED])
def test_wrong_pairings_are_refused_with_a_mend(make, mend):
    with pytest.raises(ConfigError, match=mend):
        make()


def test_the_largest_shift_is_allowed():
    Diana(RandK(3), shift=0.25).check(5, 12)
    assert Diana(RandK(3), shift=0.25).resolved(setting(MIXED)).shift == 0.25
    assert Diana(RandK(3)).resolved(setting(MIXED)).shift == pytest.approx(0.25)


@dataclass(frozen=True)
class Alike(PermK):
    """A PermK that vouches for equal inputs only."""

    def ab(self, n: int, d: int) -> AB:
        return AB(0.5, 0.5, evidence="homogeneous", source="made up for a test")


def test_evidence_for_equal_inputs_only():
    """Good enough where L_± = 0; refused otherwise, whatever p, and by DCGD too."""
    assert Marina(Alike(), p=0.5).step_size(setting(EQUAL)).evidence == "proved"
    for p in (None, 0.5):
        with pytest.raises(ConfigError, match="equal inputs only"):
            Marina(Alike(), p=p).step_size(setting(MIXED))
    with pytest.raises(ConfigError, match="equal inputs only"):
        Marina(Alike()).resolved(setting(MIXED))
    with pytest.raises(ConfigError, match="equal inputs only"):
        DCGD(Alike()).step_size(setting(CONVEX))


# ------------------------------------------------------------------------------------------------ numbers and codes
@pytest.mark.parametrize("method", [m for m in METHODS if isinstance(m, Marina)], ids=repr)
@pytest.mark.parametrize("problem", [CONVEX, MIXED, EQUAL], ids=repr)
def test_resolved_p(method, problem):
    """A probability, the caller's own where there is one, and resolving twice changes nothing."""
    for pl in (False, True):
        known = setting(problem, pl=pl)
        ready = method.resolved(known)
        assert 0.0 < ready.p <= 1.0
        assert method.p is None or ready.p == method.p
        assert ready.resolved(known) == ready
        assert ready.compressor == method.compressor
        assert ready.step_size(known) == method.step_size(known)


@every
def test_everyone_derives_the_same_code(method):
    """Whoever hosts which clients, and the server; MARINA's coin too, both of whose sides turn up in 60 rounds."""
    ready = resolved(method, MIXED)
    seen = Counter()
    for k in range(60):
        hosts = [Round.full(k, 3, 5, torch.tensor(ids)) for ids in ([0, 1, 2, 3, 4], [1], [0, 4])]
        codes = {ready.code(rnd) for rnd in [*hosts, hosts[0].server(), replace(hosts[0], agreed=1.0)]}
        assert len(codes) == 1
        seen[codes.pop()] += 1
    if isinstance(ready, Marina | TwoWayMarina):
        assert ready.code(Round.full(0, 3, 5)) == Dense(), "round 0 sends whole gradients"
        p, heads = ready.p, seen[Dense()] - (ready.compressor != Dense())
        if 0 < p < 1 and ready.compressor != Dense():
            assert abs(heads - 59 * p) <= SIX * math.sqrt(59 * p * (1 - p)) + 1
    elif isinstance(ready, Dasha):
        assert seen == {Dense(): 1, ready.compressor: 59}
    else:
        assert list(seen) == [getattr(ready, "compressor", Dense())]


class Recorder:
    """Stands in for the kernels and notes the (stream, slot) pairs of every draw that is passed to one."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[int, int]] = Counter()

    def __getattr__(self, name: str):
        kernel = getattr(cpu, name)

        def recorded(*args, **options):
            for argument in args:
                for draw in argument if isinstance(argument, list) else [argument]:
                    if isinstance(draw, Draw) and name != "dealt_lengths":  # how much `gather_dealt` deals by it
                        self.pairs.update((draw.stream, slot) for slot in draw.slots.tolist())
            return kernel(*args, **options)

        return recorded


@pytest.mark.parametrize("compressor", zoo.COMPRESSORS, ids=repr)
def test_one_encode_draws_nothing_twice(compressor, monkeypatch):
    """A (stream, slot) pair that is drawn twice in a round gives the same words twice: dependent where the theory
    says independent."""
    recorder, u = Recorder(), inputs("gaussian", 5, 12)
    rnd = round_of(compressor, u)
    monkeypatch.setattr(kernels, "of", lambda tensor: recorder)
    compressor.encode(u, rnd)
    assert max(recorder.pairs.values(), default=1) == 1
    assert bool(recorder.pairs) == (not isinstance(compressor, Dense | Sign | TopK)), "the recorder sees the draws"


@every
def test_workers_halves_are_pure(method):
    """up, commit and estimate change nothing that they were given."""
    ready = resolved(method, MIXED)
    x, (server, worker) = MIXED.start(), ready.init(MIXED.start(), Round.full(0, 0, 5))
    for k in range(3):
        rnd = Round.full(k, 0, 5)
        held = [t.clone() for part in (server, worker) for t in part]
        down, same = ready.down(server, x, rnd)
        u, new = ready.up(worker, down, MIXED.grad, rnd)
        code = ready.code(rnd)
        rnd = replace(rnd, agreed=float(code.prepare(u, rnd).max())) if code.agrees else rnd
        sent = code.encode(u, rnd)
        new = ready.commit(new, sent, rnd)
        g, after = ready.estimate(same, code.aggregate(sent, rnd), rnd)
        assert all(torch.equal(a, b) for a, b in zip(held, [*server, *worker], strict=True))
        x, server, worker = x - 0.1 * g, after, new
