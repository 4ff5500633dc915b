"""Samples and cohorts: minibatches from the round, the variance-reduced methods, clients that stay away.

Statistical tests fix their seeds and allow six standard errors: 2e-9 for a normal mean of 500 draws or more.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import zoo
from scipy.sparse import csr_array
from test_methods import SIX, descended, estimates_on, iterates, mean_and_error, two_points
from zoo import MIXED, TappedLocal, resolved, setting, trace

from shoal.compressors import QSGD, Correlated, Dense, PermK, RandK, TopK
from shoal.core import Method, Problem
from shoal.descents import Step
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.messages import Round
from shoal.methods import EF21, Dasha, Marina, PPMarina, VRDiana, VRMarina
from shoal.methods.pp_marina import drawable
from shoal.problems import Classification
from shoal.runtimes import Local, rounds
from shoal.theory import (
    by_smoothness,
    dasha_step,
    drawn,
    gamma_clients,
    gamma_samples,
    step_size,
    vr_diana_step,
    vr_diana_weights,
)
from shoal.wire import HEADER

IDS = torch.arange(5)
DATA = [zoo.classification("logistic"), zoo.classification("nonconvex")]
data = pytest.mark.parametrize("problem", DATA, ids=["logistic", "nonconvex"])


def even(n: int = 3, rows: int = 8, d: int = 4, loss: str = "logistic") -> Classification:
    """n clients of as many rows each."""
    rng = np.random.default_rng(1)
    A, y = rng.normal(size=(n * rows, d)), np.where(rng.random(n * rows) < 0.5, 1.0, -1.0)
    return Classification(csr_array(A), y, np.split(np.arange(n * rows), n), loss, lam=0.05)


def samples(problem: Classification, x: torch.Tensor) -> list[np.ndarray]:
    """grad f_ij(x), (N_i, d) for every client: n N_i/N phi'(a'x) a + the regularizer's gradient, written out."""
    z, out = x.double().numpy(), []
    regular = 2 * z / (1 + z**2) ** 2 if problem.loss == "logistic" else z
    for a, b in zip(problem._starts[:-1], problem._starts[1:], strict=True):
        A = problem._A[a:b].toarray()
        s = 1 / (1 + np.exp(-A @ z))
        slope = s - 1 if problem.loss == "logistic" else -2 * s * (1 - s) ** 2
        out.append(problem.n * (b - a) / problem.total_rows * slope[:, None] * A + problem.lam * regular)
    return out


def point(problem: Problem, scale: float = 0.5) -> torch.Tensor:
    return scale * torch.linspace(-1, 1, problem.d)


# ------------------------------------------------------------------------------------------------ minibatches
@data
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_batch_is_the_mean_of_its_samples(problem, batch):
    x, rnd = point(problem), Round.full(4, 9, 5)
    rows, counts, sizes = problem._drawn(rnd, batch)
    each, places = samples(problem, x), np.split(rows, np.cumsum(counts)[:-1])
    for i, place in enumerate(places):
        assert len(place) == min(batch, sizes[i])
        assert len(set(place.tolist())) == len(place), "drawn without replacement"
        mean = each[i][place - problem._starts[i]].mean(0)
        assert np.allclose(problem.grad(x, rnd, batch)[i].numpy(), mean, rtol=1e-6, atol=1e-6)


@data
def test_a_batch_is_a_function_of_seed_round_and_client(problem):
    """The same rows at another point, for other hosts, and in other cohorts; other ones in another round or seed."""
    rnd = Round.full(4, 9, 5)
    whole, chosen = problem.grad(point(problem), rnd, 3), problem._drawn(rnd, 3)[0]
    for ids in ([1, 3], [4], [0, 1, 2, 3, 4]):
        some = torch.tensor(ids)
        for held in (problem, problem.only(some)):
            assert torch.equal(held.grad(point(problem), Round.full(4, 9, 5, some), 3), whole[some])
            cohort = Round(4, 9, 5, some, torch.arange(len(ids)), len(ids))
            assert torch.equal(held.grad(point(problem), cohort, 3), whole[some])
    others = [Round.full(5, 9, 5), Round.full(4, 8, 5)]
    assert all(not np.array_equal(problem._drawn(other, 3)[0], chosen) for other in others)


@data
def test_a_batch_of_all_is_the_gradient_to_the_bit(problem):
    x, most = point(problem), int(problem.smoothness().most)
    for batch in (most, most + 7):
        assert torch.equal(problem.grad(x, Round.full(2, 0, 5), batch), problem.evaluate(x, IDS)[1])
    assert torch.equal(MIXED.grad(point(MIXED), Round.full(2, 0, 5), 1), MIXED.evaluate(point(MIXED), IDS)[1])


@pytest.mark.parametrize("batch", [1, 3])
def test_variance_of_a_batch(batch):
    """E of the batch is the gradient, and the variance (N - b)/(b (N - 1)) of one sample's: an equality."""
    problem = even()
    x, each = point(problem), samples(problem, point(problem))
    mean = np.stack([e.mean(0) for e in each])
    one = np.mean([np.square(e - e.mean(0)).sum(1).mean() for e in each])
    found = np.stack([problem.grad(x, Round.full(k, 3, 3), batch).numpy() for k in range(1500)])
    square, error = mean_and_error(np.square(found - mean).sum(2).mean(1))
    assert abs(square - drawn(batch, 8) * one) <= error
    assert np.all(np.abs(found.mean(0) - mean) <= SIX * found.std(0) / np.sqrt(1500) + 1e-6)


@data
def test_constants_of_samples(problem):
    """L_s and sigma^2 hold along lines of many directions and lengths, and L_s is no more than three times what the
    best of them shows on the logistic loss, near 0 where every phi'' is 1/4."""
    L, rng, best = problem.smoothness(), np.random.default_rng(0), 0.0
    assert (L.samples, L.most) == (12.0, max(np.diff(problem._starts)))
    directions = [*np.eye(problem.d), *rng.normal(size=(60, problem.d))]
    for direction in directions:
        for at, size in ((0.0, 1e-2), (0.0, 1.0), (1.0, 0.1), (3.0, 10.0)):
            x = torch.from_numpy(at * rng.normal(size=problem.d)).float()
            y = x + torch.from_numpy(size * direction).float()
            moved = [b - a for a, b in zip(samples(problem, x), samples(problem, y), strict=True)]
            spread = np.mean([np.square(m - m.mean(0)).sum(1).mean() for m in moved])
            best = max(best, np.sqrt(spread / float((y.double() - x.double()).square().sum())))
            noise = np.mean([np.square(e - e.mean(0)).sum(1).mean() for e in samples(problem, x)])
            assert noise <= L.noise
    assert best <= L.sample * (1 + 1e-9)
    assert problem.loss == "nonconvex" or best >= L.sample / 3


# ------------------------------------------------------------------------------------------------ VR-MARINA
CODES = [RandK(3), PermK(), pytest.param(Correlated(), marks=pytest.mark.slow)]


@pytest.mark.parametrize("problem", [*DATA, MIXED], ids=repr)
@pytest.mark.parametrize("code", [RandK(3), Correlated()], ids=repr)
def test_all_samples_are_marina_to_the_bit(problem, code):
    most = int(problem.smoothness().most)
    for large in (None, most):
        method = resolved(VRMarina(code, p=0.3, batch=most, large=large), problem)
        assert trace(problem, method) == trace(problem, Marina(code, p=0.3))
        step, plain = method.step_size(setting(problem)), Marina(code, p=0.3).step_size(setting(problem))
        assert step.gamma == plain.gamma
        assert step.constants.get("floor", 0.0) == 0.0


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_recursion_of_vr_marina(code):
    """E||g+ - grad f(x+)||^2 <= (1-p) (||g - grad f(x)||^2 + Gamma ||x+ - x||^2), and before smoothness enters it is
    an equality for RandK on clients of equally many rows."""
    problem = even(n=5, rows=6, d=12)
    x, ahead, n = point(problem), point(problem, 0.9), 5
    method, kinds = VRMarina(code, p=0.25, batch=2), inspect.getmodule(VRMarina)
    before, after = problem.evaluate(x, IDS)[1].double(), problem.evaluate(ahead, IDS)[1].double()
    server = kinds.Server((before.mean(0) + torch.linspace(-0.02, 0.03, problem.d)).float())
    g = estimates_on(problem, method, server, kinds.Worker(x), ahead, 500)[0]
    mean, error = mean_and_error(((g - after.mean(0).numpy()) ** 2).sum(1))
    start, moved = float((server.g.double() - before.mean(0)).square().sum()), (after - before).numpy()
    each = [b - a for a, b in zip(samples(problem, x), samples(problem, ahead), strict=True)]
    V = drawn(2, 6) * np.mean([np.square(m - m.mean(0)).sum(1).mean() for m in each])
    squares, dx = np.square(moved).sum(1), float((ahead - x).double().square().sum())
    for ab in code.ab(n, problem.d).all():
        sharp = ab.a * squares.mean() - ab.b * np.square(moved.mean(0)).sum() + (ab.a + (1 - ab.b) / n) * V
        lost = sharp + ab.c * (np.sqrt(squares.max()) + np.sqrt(n * V)) ** 2
        assert mean <= 0.75 * (start + lost) + error
        assert lost <= gamma_samples(ab, problem.smoothness(), n, drawn(2, 6)) * dx * (1 + 1e-6)
        if isinstance(code, RandK):
            assert mean >= 0.75 * (start + lost) - error


@pytest.mark.slow
@data
@pytest.mark.parametrize("large", [None, 6])
def test_theorem_of_vr_marina(problem, large):
    """mean E||grad f||^2 <= 2 Phi_0/(gamma K) + floor, with f >= 0 and Phi_0 = f(x^0) + gamma floor/(2 p)."""
    method = resolved(VRMarina(RandK(3), p=0.3, batch=2, large=large), problem)
    step = method.step_size(setting(problem))
    floor, start = step.constants.get("floor", 0.0), float(problem.evaluate(problem.start(), IDS)[0].mean())
    assert (floor > 0) == (large is not None)
    runs = [iterates(method, problem, step.gamma, 40, seed)[:40] for seed in range(6)]
    means = [np.mean([float(problem.evaluate(x, IDS)[1].double().mean(0).square().sum()) for x in run]) for run in runs]
    bound = 2 * (start + step.gamma * floor / 0.6) / (step.gamma * 40) + floor
    assert np.mean(means) <= bound


def test_step_size_of_vr_marina():
    """For independent compressors the paper's Gamma = (omega L_+^2 + (1 + omega) L_s^2 share) / n, 1/b' made sharp."""
    problem = DATA[0]
    s, share = problem.smoothness(), drawn(2, DATA[0].smoothness().most)
    step = VRMarina(RandK(3), p=0.2, batch=2).step_size(setting(problem))
    Gamma = (3 * s.plus**2 + 4 * s.sample**2 * share) / 5
    assert step.gamma == pytest.approx(step_size(s.minus, Gamma, 0.2))
    assert share < 1 / 2


def test_resolved_vr_marina():
    """batch: a hundredth; p: the lesser of the paper's two ratios, of bits and of samples."""
    method = VRMarina(RandK(3)).resolved(setting(DATA[0]))
    assert (method.batch, method.p) == (1, pytest.approx(1 / 13))
    assert VRMarina(RandK(3), batch=12, large=4 * 12).resolved(setting(DATA[0])).p == 0.25, "96 of 384 bits"
    assert method.resolved(setting(DATA[0])) == method
    for bad in ({"batch": 0}, {"batch": True}, {"large": 2.5}, {"batch": 3, "large": 2}):
        with pytest.raises(ConfigError, match="VRMarina"):
            VRMarina(RandK(3), **bad)
    with pytest.raises(ConfigError, match="not resolved"):
        trace(DATA[0], VRMarina(RandK(3), p=0.5))


IN_CHUNKS = [
    Dasha(QSGD(3), batch=2, p=0.3),
    VRMarina(RandK(3), p=0.3, batch=2),
    VRMarina(Correlated(), p=0.3, batch=3),
    VRDiana(QSGD(3), None, 2, 0.3),
]


# ------------------------------------------------------------------------------------------------ VR-DIANA
def test_recursions_of_vr_diana():
    """E||g - grad f||^2 <= (omega/n) s + (1+omega) V/n, E s+ <= (1 - shift) s + shift V at one point, with equality for
    RandK(3) at the largest shift; and E||x+ - w||^2 as the proof has it."""
    problem, gamma, p = even(n=5, rows=6, d=12), 0.7, 0.3
    x, w = point(problem), point(problem, 0.2)
    method, kinds = resolved(VRDiana(RandK(3), batch=2, p=p), problem), inspect.getmodule(VRDiana)
    rows, anchor = problem.evaluate(x, IDS)[1], problem.evaluate(w, IDS)[1]
    h = 0.5 * rows + 0.02
    g, after = estimates_on(problem, method, kinds.Server(h.mean(0)), kinds.Worker(h, anchor, w), x, 500)
    each = [b - a for a, b in zip(samples(problem, w), samples(problem, x), strict=True)]
    V = drawn(2, 6) * np.mean([np.square(m - m.mean(0)).sum(1).mean() for m in each])
    q = float((x - w).double().square().sum())
    assert drawn(2, 6) * problem.smoothness().sample ** 2 * q >= V
    s, exact = float((rows - h).double().square().sum(1).mean()), rows.double().mean(0).numpy()
    mean, error = mean_and_error(((g - exact) ** 2).sum(1))
    assert abs(mean - (3 * s + 4 * V) / 5) <= error
    left, error = mean_and_error(np.array([float((rows - a.h).double().square().sum(1).mean()) for a in after]))
    assert abs(left - (0.75 * s + 0.25 * V)) <= error
    moved = gamma * g
    away = (x - w).double().numpy()
    far = np.array(
        [np.square(-m if torch.equal(a.w, x) else away - m).sum() for m, a in zip(moved, after, strict=True)]
    )
    mean, error = mean_and_error(far)
    squares = 2 * gamma**2 / p * np.square(exact).sum() + np.square(moved).sum(1).mean()
    assert mean <= (1 - p / 2) * q + squares + error
    heads = sum(torch.equal(a.w, x) and torch.equal(a.anchor, rows) for a in after)
    assert abs(heads - 150) <= SIX * np.sqrt(500 * 0.21)


def test_step_size_of_vr_diana():
    """Gradient descent's where nothing is lost; the largest with weights otherwise; and of the published order m^(2/3),
    not m, in the samples."""
    assert vr_diana_step(2.0, 3.0, 0.0, 5, 0.0, 1.0, 0.5) == (0.5, 0.0)
    for omega in (0.0, 3.0, 40.0):
        for V, p, mu in ((0.0, 1.0, 0.0), (2.0, 0.1, 0.0), (50.0, 0.01, 0.0), (2.0, 0.1, 0.05)):
            known = (1.0, 1.5, omega, 5, V, 1 / (1 + omega), p, mu)
            gamma, weight = vr_diana_step(*known)
            found = vr_diana_weights(gamma, *known)
            assert found is not None
            assert weight == pytest.approx(found[0], rel=1e-6)
            if gamma < 1.0:
                assert vr_diana_weights(gamma * (1 + 1e-9), *known) is None
            assert all(vr_diana_weights(gamma * t, *known) for t in (1e-3, 0.1, 0.5, 0.9, 0.999))
            assert mu == 0.0 or gamma <= min(p, 1 / (1 + omega)) / (2 * mu)
    steps = [vr_diana_step(1.0, 1.0, 0.0, 1, 1.0, 1.0, p)[0] for p in (1e-4, 1e-7)]
    assert np.log(steps[0] / steps[1]) / np.log(1e3) == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.slow
@data
def test_theorem_of_vr_diana(problem):
    method = resolved(VRDiana(RandK(3), batch=2), problem)
    assert (method.shift, method.p) == (0.25, pytest.approx(2 / 12))
    step = method.step_size(setting(problem))
    value, rows = problem.evaluate(problem.start(), IDS)
    first = float(value.mean()) + step.constants["weight"] * float(rows.double().square().sum(1).mean())
    runs = [iterates(method, problem, step.gamma, 40, seed)[:40] for seed in range(6)]
    means = [np.mean([float(problem.evaluate(x, IDS)[1].double().mean(0).square().sum()) for x in run]) for run in runs]
    assert np.mean(means) <= 2 * first / (step.gamma * 40)


@data
def test_vr_diana_without_losses_is_gradient_descent(problem):
    """Dense and all samples: differences that add up to 2^-24 of the larger, as in test_methods."""
    method = resolved(VRDiana(Dense(), batch=100, p=0.3), problem)
    plain = descended(problem, 0.25, 40)
    assert (iterates(method, problem, 0.25, 40) - plain).abs().max() <= 1e-5 * max(1.0, float(plain.abs().max()))
    for bad, said in (({"batch": 0}, "batch"), ({"p": 0.0}, "p=0.0"), ({"p": 1.5}, "p=1.5"), ({"shift": 2.0}, "shift")):
        with pytest.raises(ConfigError, match=said):
            VRDiana(RandK(3), **bad)
    with pytest.raises(ConfigError, match="not resolved"):
        trace(problem, VRDiana(RandK(3)))


# ------------------------------------------------------------------------------------------------ cohorts
@pytest.mark.parametrize("code", [RandK(3), PermK(), Correlated()], ids=repr)
def test_all_clients_are_marina_to_the_bit(code):
    method = PPMarina(code, p=0.3, clients=5)
    assert trace(MIXED, method) == trace(MIXED, Marina(code, p=0.3))
    assert method.step_size(setting(MIXED)).gamma == Marina(code, p=0.3).step_size(setting(MIXED)).gamma


@pytest.mark.parametrize("replacement", [False, True])
def test_cohorts(replacement):
    """None on heads; on tails ascending ids, each client as often as any other, whoever asks; without replacement, no
    client twice."""
    method, seen = PPMarina(RandK(3), p=0.2, clients=3, odds="even" if replacement else None), []
    for k in range(600):
        asked = [method.cohort(Round.full(k, 1, 5, torch.tensor(ids))) for ids in ([0, 1, 2, 3, 4], [4])]
        assert (asked[0] is None) == (asked[1] is None) == (method.code(Round.full(k, 1, 5)) == Dense())
        if asked[0] is not None:
            assert torch.equal(*asked)
            assert asked[0].tolist() == sorted(asked[0].tolist())
            seen.append(torch.bincount(asked[0], minlength=5))
    counts = torch.stack(seen).double()
    variance = 3 * 0.2 * 0.8 if replacement else 0.6 * 0.4
    assert (counts.mean(0) - 0.6).abs().max() <= SIX * np.sqrt(variance / len(seen))
    assert (int(counts.max()) > 1) == replacement


@pytest.mark.parametrize(
    ("code", "replacement"),
    [(RandK(3), False), (PermK(), True), pytest.param(Correlated(), False, marks=pytest.mark.slow)],
    ids=repr,
)
def test_recursion_of_pp_marina(code, replacement):
    """E||g+ - grad f(x+)||^2 <= (1-p) (||g - grad f(x)||^2 + Gamma ||x+ - x||^2), over compressors and cohorts; before
    smoothness enters it is an equality for RandK and PermK."""
    x, ahead, before, after = two_points()
    method, kinds = PPMarina(code, p=0.25, clients=3, odds="even" if replacement else None), inspect.getmodule(PPMarina)
    server = kinds.Server(before.mean(0) + torch.linspace(-0.02, 0.03, MIXED.d))
    g = estimates_on(MIXED, method, server, kinds.Worker(x), ahead, 500)[0]
    mean, error = mean_and_error(((g - after.double().mean(0).numpy()) ** 2).sum(1))
    start, moved = (
        float((server.g.double() - before.double().mean(0)).square().sum()),
        (after - before).double().numpy(),
    )
    squares, center = np.square(moved).sum(1), np.square(moved.mean(0)).sum()
    share, dx = (1 / 3 if replacement else 2 / 12), float((ahead - x).double().square().sum())
    for ab in code.ab(3, MIXED.d).all():
        spread = squares.mean() - center
        lost = (ab.a - ab.b) * squares.mean() + (ab.b + (1 - ab.b) * share) * spread + ab.c * squares.max()
        assert mean <= 0.75 * (start + lost) + error
        assert lost <= gamma_clients(ab, MIXED.smoothness(), share) * dx * (1 + 1e-6)
        if isinstance(code, RandK | PermK):
            assert mean >= 0.75 * (start + lost) - error


ODDS = (0.4, 0.1, 0.2, 0.05, 0.25)


def test_odds_are_drawn_exactly():
    """Multiples of 2^-32 with the sum 1, next to what was asked; and as often in cohorts, whoever asks."""
    for odds in (ODDS, (1.0,), by_smoothness((5.0, 0.0, 1e-9, 3.0)), by_smoothness(range(1, 300))):
        ends, exact = drawable(odds)
        assert ends[-1] == 2**32
        assert [0, *ends.tolist()] == [round(sum(exact[:i]) * 2**32) for i in range(len(odds) + 1)]
        assert max(abs(q - asked) for q, asked in zip(exact, odds, strict=True)) <= 2.0**-31
        assert drawable(exact)[1] == exact
        assert min(exact) > 0
    method, counts = PPMarina(RandK(3), p=2.0**-20, clients=3, odds=ODDS), torch.zeros(5)
    for k in range(1, 601):
        asked = [method.cohort(Round.full(k, 1, 5, torch.tensor(ids))) for ids in ([0, 1, 2, 3, 4], [4])]
        assert torch.equal(*asked)
        assert asked[0].tolist() == sorted(asked[0].tolist())
        counts += torch.bincount(asked[0], minlength=5)
    q = np.array(ODDS)
    assert np.all(np.abs(counts.numpy() / 1800 - q) <= SIX * np.sqrt(q * (1 - q) / 1800))


@pytest.mark.parametrize("code", [RandK(3), PermK()], ids=repr)
def test_recursion_with_odds(code):
    """E||g+ - grad f(x+)||^2 = (1-p) (||g - grad f(x)||^2 + (a-b) M + (b + (1-b)/r) S) with the weighted M and S."""
    x, ahead, before, after = two_points()
    ready = PPMarina(code, p=0.25, clients=3, odds="smoothness").resolved(setting(MIXED))
    server = inspect.getmodule(PPMarina).Server(before.mean(0) + torch.linspace(-0.02, 0.03, MIXED.d))
    g = estimates_on(MIXED, ready, server, inspect.getmodule(PPMarina).Worker(x), ahead, 500)[0]
    mean, error = mean_and_error(((g - after.double().mean(0).numpy()) ** 2).sum(1))
    start = float((server.g.double() - before.double().mean(0)).square().sum())
    moved, q = (after - before).double().numpy(), np.array(ready.odds)
    M = (np.square(moved).sum(1) / q).sum() / 25
    S, ab = M - np.square(moved.mean(0)).sum(), code.ab(3, MIXED.d)
    lost = (ab.a - ab.b) * M + (ab.b + (1 - ab.b) / 3) * S
    assert abs(mean - 0.75 * (start + lost)) <= error
    step = ready.step_size(setting(MIXED)).constants
    dx = float((ahead - x).double().square().sum())
    assert step["Gamma"] == gamma_clients(ab, MIXED.smoothness().weighted(ready.odds), 1 / 3)
    assert lost <= step["Gamma"] * dx * (1 + 1e-6)
    assert step["Gamma"] < PPMarina(code, p=0.25, clients=3, odds="even").step_size(setting(MIXED)).constants["Gamma"]


def test_odds_that_are_refused():
    for make, said in (
        (lambda: PPMarina(RandK(3), clients=2, odds=(0.5, 0.4)), "with the sum 1"),
        (lambda: PPMarina(RandK(3), clients=2, odds=(1.0, 0.0)), "at least 2\\^-32"),
        (lambda: PPMarina(RandK(3), clients=2, odds=(1.0, 1e-11)), "at least 2\\^-32"),
        (lambda: PPMarina(RandK(3), clients=2, odds=[0.5, 0.5]), "a tuple of one number"),
        (lambda: PPMarina(RandK(3), clients=2, odds=ODDS).check(4, 12), "n=4"),
        (lambda: trace(MIXED, PPMarina(RandK(3), p=0.3, clients=2, odds="smoothness")), "not resolved"),
        (
            lambda: PPMarina(RandK(3), clients=2, odds="smoothness").resolved(
                replace(setting(MIXED), smoothness=replace(MIXED.smoothness(), each=()))
            ),
            "does not state its L_i",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            make()
    text = compact(PPMarina(RandK(3), clients=2, odds=(0.25, 0.75)))
    assert parse(text, known_names(), Method) == PPMarina(RandK(3), clients=2, odds=(0.25, 0.75))


def test_step_size_of_pp_marina():
    """(omega L_+^2 + L_±^2)/r with replacement, never more than the paper's (1 + omega) L~^2 / r; less without."""
    s, steps = MIXED.smoothness(), {}
    for replacement in (True, False):
        step = PPMarina(RandK(3), p=0.2, clients=2, odds="even" if replacement else None).step_size(setting(MIXED))
        share = 1 / 2 if replacement else 3 / 8
        Gamma = 3 * s.plus**2 / 2 + share * s.pm**2
        assert 4 * s.tilde**2 / 2 >= Gamma
        assert step.gamma == pytest.approx(step_size(s.minus, Gamma, 0.2))
        steps[replacement] = step.gamma
    assert steps[True] < steps[False] < Marina(RandK(3), p=0.2).step_size(setting(MIXED)).gamma


def test_only_a_cohort_sends_and_all_hear():
    """By hand: round 0 has five messages of 48 bytes, a round of two clients two of 12; the model goes to all five. A
    shared scale costs the cohort alone 4 bytes each way."""
    for code, size, agreed in ((RandK(3), 12, 0), (Correlated(), 2, 4)):
        method, channel = PPMarina(code, p=2.0**-20, clients=2), Local(5)
        for event in rounds(method, Step(0.1), MIXED, channel, seed=0):
            if event.state.index == 4:
                break
        assert channel.meter.up == 5 * 48 + 3 * 2 * (size + agreed)
        assert channel.meter.down == 4 * 5 * 48 + 3 * 2 * agreed
        assert channel.meter.up_framed == channel.meter.up + HEADER * (5 + 6 * (2 if agreed else 1))


def test_wrong_cohorts_are_refused():
    rnd = Round.full(0, 0, 5, torch.tensor([1, 2]))
    assert rnd.among(torch.tensor([0, 1, 1, 4])).slots.tolist() == [1, 2]
    for bad in (
        torch.tensor([]),
        torch.tensor([2, 1]),
        torch.tensor([-1, 2]),
        torch.tensor([3, 5]),
        torch.tensor([0.0]),
    ):
        with pytest.raises(ConfigError, match="ascending"):
            rnd.among(bad)
    for make, said in (
        (lambda: PPMarina(RandK(3), clients=0), "clients=0"),
        (lambda: PPMarina(RandK(3), clients=True), "clients=True"),
        (lambda: PPMarina(RandK(3), clients=2, odds="odd"), "odds='odd'"),
        (lambda: PPMarina(TopK(3), clients=2), "EF21"),
        (lambda: PPMarina(RandK(3), clients=6).check(5, 12), "odds='even'"),
        (lambda: PPMarina(RandK(13), clients=2).check(5, 12), "1..12"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()
    PPMarina(RandK(3), clients=6, odds="even").check(5, 12)
    text = compact(PPMarina(RandK(3), clients=2))
    assert text == "PPMarina(RandK(3), clients=2)"
    assert parse(text, known_names(), Method) == PPMarina(RandK(3), clients=2)


# ------------------------------------------------------------------------------------------------ EF21, some clients
def test_a_cohort_of_all_is_ef21_to_the_bit():
    assert trace(MIXED, EF21(TopK(3), clients=5)) == trace(MIXED, EF21(TopK(3)))
    assert EF21(TopK(3), clients=5).step_size(setting(MIXED)) == EF21(TopK(3)).step_size(setting(MIXED))


def test_recursion_of_ef21_with_a_cohort():
    """What is left of mean ||grad f_i - g_i||^2 is, over the ten cohorts of two of five, r/n of what C leaves and
    (n-r)/n of what was; those who stay away keep their rows; and g stays the mean of the g_i."""
    problem, method = MIXED, EF21(TopK(3), clients=2)
    rows = problem.evaluate(problem.start(), IDS)[1]
    kinds, whole = inspect.getmodule(EF21), EF21(TopK(3))
    before = 0.5 * rows + 0.1
    sent, left, seen = rows - before, {}, set()
    full = estimates_on(problem, whole, kinds.Server(before.mean(0)), kinds.Worker(before), problem.start(), 1)[1][0].g
    for k in range(200):
        rnd = Round.full(k, 5, 5)
        rnd = rnd.among(method.cohort(rnd))
        some = rnd.clients
        seen.add(tuple(some.tolist()))
        u, _ = method.up(kinds.Worker(before[some]), method.down(None, problem.start(), rnd)[0], problem.grad, rnd)
        msgs = method.code(rnd).encode(u, rnd)
        g, _ = method.estimate(kinds.Server(before.mean(0)), method.code(rnd).aggregate(msgs, rnd), rnd)
        after = before.clone()
        after[some] = method.commit(kinds.Worker(before[some]), msgs, rnd).g
        assert torch.equal(after[some], full[some])
        assert np.allclose(g.numpy(), after.double().mean(0).numpy(), rtol=0, atol=1e-6)
        left[tuple(some.tolist())] = float((rows - after).double().square().sum(1).mean())
    assert len(seen) == 10
    lost = float((rows - full).double().square().sum(1).mean())
    assert np.mean(list(left.values())) == pytest.approx(0.4 * lost + 0.6 * float(sent.double().square().sum(1).mean()))
    assert method.step_size(setting(problem)).constants["alpha"] == pytest.approx(0.4 * 3 / 12)


@dataclass(frozen=True)
class Twice(EF21):
    """Client 1 twice, though its estimate can be moved only once."""

    def cohort(self, rnd: Round) -> torch.Tensor:
        return torch.tensor([1, 1, 2])


def test_rows_of_state_forbid_a_client_twice():
    with pytest.raises(ConfigError, match="names a client twice"):
        trace(MIXED, Twice(TopK(3)))


def test_those_who_stay_away_keep_their_state():
    for chunk in (None, 1):
        events = rounds(EF21(TopK(3), clients=2), Step(0.1), MIXED, Local(5), seed=3, chunk=chunk)
        states = [next(events).state for _ in range(6)]
        for k, (one, two) in enumerate(itertools.pairwise(states)):
            there = EF21(TopK(3), clients=2).cohort(Round.full(k, 3, 5)).tolist()
            moved = [i for i in range(5) if not torch.equal(one.workers.g[i], two.workers.g[i])]
            assert moved == there
    for make, said in (
        (lambda: EF21(TopK(3), clients=0), "clients=0"),
        (lambda: EF21(TopK(3), clients=1.0), "clients=1.0"),
        (lambda: EF21(TopK(3), clients=6).check(5, 12), "n=5"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()


# ------------------------------------------------------------------------------------------------ DASHA
def test_recursions_of_dasha():
    """E t+ = (1-a)^2 t + (omega/n) mean ||u_i||^2 and E s+ = (1-a)^2 s + omega mean ||u_i||^2 for RandK, from which the
    stated ones follow by Young's inequality."""
    x, ahead, before, after = two_points()
    method, kinds = resolved(Dasha(RandK(3)), MIXED), inspect.getmodule(Dasha)
    a, omega = method.momentum, 3.0
    assert a == pytest.approx(1 / 7)
    g = 0.6 * before + 0.05
    worker = kinds.Worker(g, before, x)
    found, states = estimates_on(MIXED, method, kinds.Server(g.mean(0)), worker, ahead, 500)
    u = float((after - before - a * (g - before)).double().square().sum(1).mean())
    s, t = (float((g - before).double().square().sum(1).mean()), float((g - before).double().mean(0).square().sum()))
    mean, error = mean_and_error(((found - after.double().mean(0).numpy()) ** 2).sum(1))
    assert abs(mean - ((1 - a) ** 2 * t + omega / 5 * u)) <= error
    mean, error = mean_and_error(np.array([float((w.g - after).double().square().sum(1).mean()) for w in states]))
    assert abs(mean - ((1 - a) ** 2 * s + omega * u)) <= error
    moved = float((after - before).double().square().sum(1).mean())
    assert (1 - a) ** 2 * s + omega * u <= (1 - a) * s + 2 * omega * moved


@pytest.mark.parametrize("mu", [0.0, 0.05])
def test_step_size_of_dasha(mu):
    """The proof's weights at gamma, with the best zeta and eta: each term falls to (1 - gamma mu) or below, and the
    factor of ||dx||^2 is not negative. DASHA's own is 1/(L_- + L_+ sqrt(2 omega (2 omega + 1)/n))."""
    n, L, plus = 5, 0.7, 1.1
    for omega, V, p, slow in itertools.product((0.5, 30.0), (0.0, 3.0), (0.02, 0.4, 1.0), (1.0, 0.3)):
        a = slow / (1 + 2 * omega)
        gamma, k = dasha_step(L, plus, omega, n, V, a, p, mu), gamma_free(mu)
        X, Y = 2 * k * omega / (n * a), k * (1 - p) * V / (p * n)
        zeta = np.sqrt(k * (1 - p) * V / p) / plus if V > 0 and p < 1 else 1e-9
        X *= plus**2 * (1 + p * zeta) + (1 - p) * V * (1 + k * (1 + 1 / zeta))
        eta = np.sqrt(Y / X)
        At, Atau = 1 + eta, 1 + (1 / eta if eta > 0 else 0.0)
        wt = gamma * At / (a * (3 - 2 * a) if mu else 2 * a * (2 - a))
        ws, wtau = 2 * k * omega * a / n * wt, k * gamma * Atau / (2 * p)
        K = 2 * omega / n * wt + 2 * omega * ws
        wsigma = k * K * (1 + 1 / zeta)
        keep = (1 - gamma * mu) * (1 + 1e-9)
        assert gamma * At / 2 + wt * (1 - a) ** 2 <= wt * keep
        assert wt * 2 * omega * a**2 / n + ws * ((1 - a) ** 2 + 2 * omega * a**2) <= ws * keep
        if V > 0:
            assert gamma * Atau / 2 * (Y > 0) + wtau * (1 - p) <= wtau * keep
            assert K * p * (1 + 1 / zeta) + wsigma * (1 - p) <= wsigma * keep
        tails = (1 - p) * V
        B = K * ((1 + p * zeta) * plus**2 + tails) + wsigma * tails + wtau * tails / n
        assert 1 / (2 * gamma) - L / 2 - B >= -1e-7 / gamma
    own = Dasha(RandK(3)).step_size(setting(MIXED))
    s = MIXED.smoothness()
    assert own.gamma == pytest.approx(1 / (s.minus + s.plus * np.sqrt(2 * 3 * 7 / 5)))


def gamma_free(mu: float) -> float:
    """Two where the PL proof doubles a weight."""
    return 2.0 if mu > 0 else 1.0


@pytest.mark.slow
@data
def test_theorem_of_dasha_page(problem):
    method = resolved(Dasha(RandK(3), batch=2), problem)
    assert method.p == pytest.approx(2 / 14)
    step = method.step_size(setting(problem))
    assert step.gamma < Dasha(RandK(3)).step_size(setting(problem)).gamma
    start = float(problem.evaluate(problem.start(), IDS)[0].mean())
    runs = [iterates(method, problem, step.gamma, 40, seed)[:40] for seed in range(6)]
    means = [np.mean([float(problem.evaluate(x, IDS)[1].double().mean(0).square().sum()) for x in run]) for run in runs]
    assert np.mean(means) <= 2 * start / (step.gamma * 40)


@data
def test_dasha_page_of_full_gradients_is_dasha_to_the_bit(problem):
    assert trace(problem, Dasha(QSGD(3), batch=2, p=1.0)) == trace(problem, Dasha(QSGD(3)))
    for make, said in (
        (lambda: Dasha(TopK(3)), "EF21"),
        (lambda: Dasha(PermK()), "Marina for PermK"),
        (lambda: Dasha(RandK(3), momentum=0.0), "momentum=0.0"),
        (lambda: Dasha(RandK(3), momentum=0.15).check(5, 12), "0.142857"),
        (lambda: Dasha(RandK(3), p=0.5), "batch=None, p=0.5"),
        (lambda: Dasha(RandK(3), batch=2, p=1.5), "p=1.5"),
        (lambda: Dasha(RandK(3), batch=-1), "batch=-1"),
        (lambda: trace(problem, Dasha(RandK(3), batch=2)), "not resolved"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()


@pytest.mark.parametrize("method", IN_CHUNKS, ids=repr)
@data
def test_chunks_of_samples(method, problem):
    """What the workers share moves once a round, whatever the chunks."""
    assert trace(problem, method, chunk=1) == trace(problem, method, chunk=3) == trace(problem, method)
    assert (
        trace(problem, method, lambda: TappedLocal(5), measure=False)["payloads"] == trace(problem, method)["payloads"]
    )
