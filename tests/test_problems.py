"""The problems: gradients, values, smoothness constants, data and splits, each against a plain second computation."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from shoal import data, splits
from shoal.core import Problem
from shoal.errors import ConfigError, DataError
from shoal.messages import Round
from shoal.problems import Classification, Quadratics, measured_pm, smoothness
from shoal.problems.classification import HIGHEST, LOSSES, LOWEST, sigmoid_curvature


# ------------------------------------------------------------------------------------------------ plain references
def sigmoid(t):
    return 1.0 / (1.0 + np.exp(-t))


class Plain:
    """A classification problem in a few lines of NumPy, float64, dense, nothing folded and nothing shared."""

    def __init__(self, rows=97, d=7, n=5, loss="logistic", lam=0.01, seed=0, uneven=True):
        rng = np.random.default_rng(seed)
        self.A = rng.normal(size=(rows, d)) * (rng.random((rows, d)) < 0.6)
        self.y = np.where(rng.random(rows) < 0.4, 1.0, -1.0)
        cuts = np.sort(rng.choice(np.arange(1, rows), n - 1, replace=False)) if uneven else n
        self.parts = np.array_split(rng.permutation(rows), cuts)
        self.loss, self.lam, self.n, self.d, self.rows = loss, lam, n, d, rows

    def problem(self) -> Classification:
        return Classification(csr_array(self.A), self.y, self.parts, self.loss, self.lam)

    def regularizer(self, x):
        if self.loss == "logistic":
            return self.lam * np.sum(x**2 / (1 + x**2)), self.lam * 2 * x / (1 + x**2) ** 2
        return self.lam / 2 * x @ x, self.lam * x

    def phi(self, margins):
        if self.loss == "logistic":
            return np.log(1 + np.exp(-margins)), -sigmoid(-margins)
        return sigmoid(-margins) ** 2, -2 * sigmoid(margins) * sigmoid(-margins) ** 2

    def client(self, i, x):
        A, y = self.A[self.parts[i]], self.y[self.parts[i]]
        value, slope = self.phi(y * (A @ x))
        R, dR = self.regularizer(x)
        weight = self.n / self.rows
        return weight * value.sum() + R, weight * (A.T @ (y * slope)) + dR

    def gradients(self, x):
        return np.stack([self.client(i, x)[1] for i in range(self.n)])


def dense(q: Quadratics):
    """The A_i and b_i of a Quadratics, written out from its definition."""
    T = 2 * np.eye(q.d) - np.eye(q.d, k=1) - np.eye(q.d, k=-1)
    draws = np.random.Generator(np.random.PCG64(q.seed)).standard_normal((q.n, 2))
    nu = 1 + q.noise * draws[:, 0]
    shift = q.lam - np.linalg.eigvalsh(nu.mean() / 4 * T)[0]
    A = nu[:, None, None] / 4 * T + shift * np.eye(q.d)
    b = np.zeros((q.n, q.d))
    b[:, 0] = nu / 4 * (-1 + q.noise * draws[:, 1])
    return A, b


QUADRATICS = [
    Quadratics(),
    Quadratics(n=4, d=7, noise=0.05, lam=1e-2),
    Quadratics(n=6, d=12, noise=0.8, seed=3),
    Quadratics(n=2, d=9, noise=3.0, seed=8, lam=0.1),
    Quadratics(n=5, d=1, noise=0.3, lam=0.5),
    Quadratics(n=3, d=5, noise=0.01, lam=0.2),
]
PROBLEMS = [
    *QUADRATICS[:3],
    Plain(loss="logistic").problem(),
    Plain(loss="nonconvex", n=9, seed=1).problem(),
    Plain(rows=8, n=8, uneven=False, seed=2).problem(),
]
both_losses = pytest.mark.parametrize("loss", list(LOSSES))


# ------------------------------------------------------------------------------------------------ every problem
@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_gradient_is_the_derivative_of_the_value(problem):
    """Central differences along random directions; the points are float32, the differences of values float64."""
    rng, ids = np.random.default_rng(0), torch.arange(problem.n)
    for _ in range(5):
        x = torch.from_numpy(rng.normal(size=problem.d)).float()
        u = torch.from_numpy(rng.normal(size=problem.d)).float() * 2.0**-10
        ahead, behind = x + u, x - u
        middle = ((ahead.double() + behind.double()) / 2).float()
        rise = problem.evaluate(ahead, ids)[0] - problem.evaluate(behind, ids)[0]
        gradients = problem.evaluate(middle, ids)[1].double()
        slope = gradients @ (ahead.double() - behind.double())
        # Third derivatives times ||u||^3 and the float32 rounding of x and the gradient: below 1e-5 of the scale.
        scale = gradients.norm(dim=1) * u.norm().double() + 1e-6
        assert ((rise - slope).abs() <= 1e-5 * scale + 1e-8).all()


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_rows_are_independent_bit_for_bit(problem):
    x = torch.from_numpy(np.random.default_rng(1).normal(size=problem.d)).float()
    ids = torch.arange(problem.n)
    values, rows = problem.evaluate(x, ids)
    assert values.dtype == torch.float64
    assert rows.dtype == torch.float32
    assert rows.shape == (problem.n, problem.d)
    shuffled = torch.from_numpy(np.random.default_rng(2).permutation(problem.n))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = problem.evaluate(x, shuffled)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again[0], values[shuffled])
    assert torch.equal(again[1], rows[shuffled])
    for i in range(problem.n):
        alone = problem.only(ids[i : i + 1]).evaluate(x, ids[i : i + 1])
        assert torch.equal(alone[0], values[i : i + 1])
        assert torch.equal(alone[1], rows[i : i + 1])
    assert torch.equal(problem.grad(x, Round.full(0, 0, problem.n, shuffled)), rows[shuffled])
    assert problem.evaluate(x, ids[:0])[1].shape == (0, problem.d)


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_a_problem_answers_for_what_it_holds(problem):
    x, last = problem.start(), problem.n - 1
    assert x.shape == (problem.d,)
    assert x.dtype == torch.float32
    with pytest.raises(ConfigError, match=rf"clients \[{problem.n}\] are not hosted"):
        problem.evaluate(x, torch.tensor([0, problem.n]))
    with pytest.raises(ConfigError, match="not hosted"):
        problem.evaluate(x, torch.tensor([-1]))
    with pytest.raises(ConfigError, match=r"must be \("):
        problem.evaluate(torch.zeros(problem.d + 1), torch.tensor([0]))
    part = problem.only(torch.tensor([last]))
    assert (part.n, part.d, part.name) == (problem.n, problem.d, problem.name)
    if problem.n > 1:
        with pytest.raises(ConfigError, match=r"clients \[0\] are not hosted"):
            part.evaluate(x, torch.tensor([0]))
        with pytest.raises(ConfigError, match="not hosted"):
            part.only(torch.tensor([0, last]))


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_constants_keep_their_order(problem):
    L = problem.smoothness()
    slack = 1 + 1e-12
    assert L.minus <= L.plus * slack
    assert L.plus <= L.tilde * slack
    assert L.tilde <= L.max * slack
    assert L.pm <= L.plus * slack
    known = {status for name, (_, status) in L.facts().items() if name not in ("samples", "most")}
    assert known == {"exact" if isinstance(problem, Quadratics) else "bound"}


# ------------------------------------------------------------------------------------------------ quadratics
@pytest.mark.parametrize("q", QUADRATICS, ids=repr)
def test_quadratics_constants_against_dense_eigenvalues(q):
    A, _ = dense(q)
    mean, second = A.mean(axis=0), (A @ A).mean(axis=0)
    top = lambda M: np.linalg.eigvalsh(M)[-1]  # noqa: E731
    lengths = np.array([np.abs(np.linalg.eigvalsh(a)).max() for a in A])
    L = q.smoothness()
    # Dense eigenvalues are good to about 1e-15 of the norm; a square root of a tiny variance to its root.
    assert L.minus == pytest.approx(np.abs(np.linalg.eigvalsh(mean)).max(), rel=1e-11, abs=1e-13)
    assert L.plus == pytest.approx(np.sqrt(top(second)), rel=1e-11)
    assert L.pm == pytest.approx(np.sqrt(max(0.0, top(second - mean @ mean))), rel=1e-9, abs=1e-7)
    assert L.tilde == pytest.approx(np.sqrt(np.mean(lengths**2)), rel=1e-11)
    assert L.max == pytest.approx(lengths.max(), rel=1e-11)
    assert L.mu == pytest.approx(np.linalg.eigvalsh(mean)[0], rel=1e-8)


@pytest.mark.parametrize("q", QUADRATICS, ids=repr)
def test_quadratics_values_gradients_and_minima_against_dense(q):
    A, b = dense(q)
    x = np.random.default_rng(5).normal(size=q.d).astype(np.float32).astype(np.float64)
    values, rows = q.evaluate(torch.from_numpy(x).float(), torch.arange(q.n))
    np.testing.assert_allclose(values, 0.5 * np.einsum("j,ijk,k->i", x, A, x) - b @ x, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(rows, A @ x - b, rtol=2.0**-24, atol=1e-13)
    star = np.linalg.solve(A.mean(axis=0), b.mean(axis=0))
    minimizer, f_star = q.minimum()
    np.testing.assert_allclose(minimizer, star, rtol=1e-7)
    assert f_star == pytest.approx(-0.5 * b.mean(axis=0) @ star, rel=1e-7)
    assert q.f_star == f_star
    spectra = np.linalg.eigvalsh(A)
    if (spectra > 0).all():
        minima = [-0.5 * bi @ np.linalg.solve(Ai, bi) for Ai, bi in zip(A, b, strict=True)]
        assert q.smoothness().f_inf == pytest.approx(np.mean(minima), rel=1e-7)
    else:
        assert q.smoothness().f_inf is None


@pytest.mark.parametrize(("lam", "off"), [(1e-6, 1e-9), (1e-8, 1e-7), (1e-10, 1e-5)])
@pytest.mark.parametrize("seed", [0, 341])
def test_the_floor_near_the_border_of_convexity(lam, off, seed):
    """One client: f_inf is f_*. Without a digit of lam left in the matrix it is not known."""
    one = Quadratics(n=1, d=1000, noise=0.05, lam=lam, seed=seed)
    assert one.smoothness().f_inf == pytest.approx(one.f_star, rel=off)
    assert Quadratics(n=1, d=1000, noise=0.05, lam=1e-16, seed=seed).smoothness().f_inf is None


def test_quadratics_cover_every_case():
    """The list above holds a negative mean of nu, nonconvex members, and noise with all members convex."""
    slopes = [-dense(q)[0][:, 0, 1].mean() for q in QUADRATICS if q.d > 1]
    assert min(slopes) < 0 < max(slopes)
    infs = [q.smoothness().f_inf for q in QUADRATICS]
    assert None in infs
    assert any(inf is not None and q.noise > 0 for inf, q in zip(infs, QUADRATICS, strict=True))


def test_quadratics_constants_are_reached_along_eigenvectors():
    q = Quadratics(n=6, d=12, noise=0.8, seed=3)
    A, _ = dense(q)
    L, j = q.smoothness(), np.arange(1, q.d + 1)
    ratios = []
    for k in (1, q.d):
        v = np.sin(j * k * np.pi / (q.d + 1))
        D = A @ (v / np.linalg.norm(v))
        squares = np.square(D).sum(axis=1)
        minus = np.linalg.norm(D.mean(axis=0))
        ratios.append((minus, np.sqrt(squares.mean()), np.sqrt(squares.mean() - minus**2), np.sqrt(squares.max())))
    np.testing.assert_allclose(np.max(ratios, axis=0), [L.minus, L.plus, L.pm, L.max], rtol=1e-10)


def test_quadratics_generator_is_frozen():
    """Seed 0 with noise 0.8 has the published constants of this generator to three digits; another seed has not."""
    L = Quadratics(n=10, d=100, noise=0.8).smoothness()
    assert [round(float(v), 3) for v in (L.minus, L.plus, L.pm)] == [0.720, 1.061, 0.779]
    assert Quadratics(n=10, d=100, noise=0.8, seed=1).smoothness().pm != pytest.approx(L.pm, rel=1e-2)


def test_quadratics_start_as_in_the_paper():
    x = Quadratics(d=49).start()
    assert x[0] == 7.0
    assert not x[1:].any()


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"n": 0}, "n must be an integer"),
        ({"n": 2.5}, "n must be an integer"),
        ({"d": 0}, "d must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"noise": -0.1}, "noise must be a number that is not negative"),
        ({"noise": float("nan")}, "noise must be"),
        ({"lam": 0.0}, "lam must be a positive"),
        ({"lam": float("inf")}, "lam must be a positive"),
    ],
)
def test_quadratics_refuse_what_they_cannot_be(setting, word):
    with pytest.raises(ConfigError, match=word):
        Quadratics(**setting)


# ------------------------------------------------------------------------------------------------ classification
@both_losses
@pytest.mark.parametrize("seed", range(3))
def test_classification_against_plain_numpy(loss, seed):
    plain = Plain(loss=loss, seed=seed, n=6)
    problem = plain.problem()
    for size in (0.0, 1.0, 8.0):
        x = (size * np.random.default_rng(seed + 9).normal(size=plain.d)).astype(np.float32).astype(np.float64)
        values, rows = problem.evaluate(torch.from_numpy(x).float(), torch.arange(6))
        want = [plain.client(i, x) for i in range(6)]
        np.testing.assert_allclose(values, [v for v, _ in want], rtol=1e-12)
        np.testing.assert_allclose(rows, np.stack([g for _, g in want]), rtol=2.0**-23, atol=1e-12)


@both_losses
def test_f_is_the_mean_over_all_rows_for_uneven_splits(loss):
    plain = Plain(loss=loss, n=5, seed=4)
    sizes = [len(part) for part in plain.parts]
    assert max(sizes) > 2 * min(sizes)
    x = np.linspace(-1, 1, plain.d).astype(np.float32)
    values, rows = plain.problem().evaluate(torch.from_numpy(x), torch.arange(5))
    one = Plain(loss=loss, n=5, seed=4)
    one.parts, one.n = [np.arange(one.rows)], 1
    value, gradient = one.client(0, x.astype(np.float64))
    assert values.mean().item() == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(rows.double().mean(dim=0), gradient, atol=1e-7)


@both_losses
def test_nothing_overflows_at_huge_margins(loss):
    problem = Classification(csr_array([[1.0], [-1.0]]), np.array([1.0, 1.0]), [np.array([0, 1])], loss, 0.0)
    for size in (50.0, 1e4, 1e30):
        value, row = problem.evaluate(torch.tensor([size]), torch.tensor([0]))
        t = float(torch.tensor([size]).double())
        assert value.item() == pytest.approx(t / 2 if loss == "logistic" else 0.5, rel=1e-12)
        assert torch.isfinite(row).all()
    # A single well classified row: the loss and its slope keep their digits down to the smallest numbers.
    alone = Classification(csr_array([[1.0]]), np.array([1.0]), [np.array([0])], loss, 0.0)
    value, row = alone.evaluate(torch.tensor([40.0]), torch.tensor([0]))
    e = np.exp(-40.0)
    assert value.item() == pytest.approx(e if loss == "logistic" else e**2, rel=1e-12)
    assert row.item() == pytest.approx(-e if loss == "logistic" else -2 * e**2, rel=1e-6)


def test_curvature_extremes():
    s = np.linspace(0, 1, 1_000_001)
    curve = sigmoid_curvature(s)
    assert pytest.approx(curve.max(), abs=1e-10) == HIGHEST
    assert pytest.approx(curve.min(), abs=1e-10) == LOWEST
    assert round(HIGHEST, 6) == 0.154059
    # Against second differences of the loss itself.
    t, h = np.linspace(-6, 6, 25), 1e-4
    loss = lambda t: sigmoid(-t) ** 2  # noqa: E731
    np.testing.assert_allclose(
        (loss(t + h) - 2 * loss(t) + loss(t - h)) / h**2, sigmoid_curvature(sigmoid(t)), atol=1e-7
    )


@both_losses
def test_regularizers_bend_no_more_than_stated(loss):
    x, h = np.linspace(-4, 4, 80_001), 1e-4
    slope = LOSSES[loss].regularizer
    second = (slope(x + h)[1] - slope(x - h)[1]) / (2 * h)
    assert np.abs(second).max() == pytest.approx(LOSSES[loss].bend, rel=1e-6)


def directions(plain, rng):
    """Random unit vectors and the top eigenvectors of every client's and of the whole Gram matrix."""
    grams = [plain.A[part].T @ plain.A[part] for part in [*plain.parts, np.arange(plain.rows)]]
    vectors = [np.linalg.eigh(gram)[1][:, -1] for gram in grams] + list(rng.normal(size=(10, plain.d)))
    return [v / np.linalg.norm(v) for v in vectors]


def pairs(plain, rng):
    """Pairs: around 0, around margins of extreme curvature (by least squares), around random points; near and far."""
    centers = [np.zeros(plain.d), *rng.normal(size=(6, plain.d)) * np.array([0.1, 0.5, 1, 2, 5, 20])[:, None]]
    for s in ((9 + 33**0.5) / 24, (9 - 33**0.5) / 24, 0.5):
        for part in plain.parts:
            signed = plain.A[part] * plain.y[part][:, None]
            centers.append(np.linalg.lstsq(signed, np.full(len(part), np.log(s / (1 - s))), rcond=None)[0])
    for center in centers:
        for v in directions(plain, rng):
            for length in (1e-3, 1.0, 10.0):
                yield center - length / 2 * v, center + length / 2 * v


@both_losses
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"n": 2, "seed": 1},
        {"n": 9, "seed": 2, "lam": 0.0},
        {"d": 2, "rows": 30, "lam": 1.0},
        {"rows": 6, "n": 6, "uneven": False},
    ],
    ids=str,
)
def test_bounds_hold_on_adversarial_pairs(loss, setting):
    plain = Plain(loss=loss, **setting)
    L = plain.problem().smoothness()
    worst = np.zeros(4)
    for x, y in pairs(plain, np.random.default_rng(0)):
        D = plain.gradients(y) - plain.gradients(x)
        square, mean, step = np.square(D).sum(axis=1), D.mean(axis=0), np.linalg.norm(y - x)
        found = (
            np.linalg.norm(mean),
            np.sqrt(square.mean()),
            np.sqrt(np.square(D - mean).sum() / plain.n),
            np.sqrt(square.max()),
        )
        worst = np.maximum(worst, np.array(found) / step)
    assert (worst <= np.array([L.minus, L.plus, L.pm, L.max]) * (1 + 1e-9)).all()
    assert worst[0] > 0.5 * L.minus  # the pairs are adversarial enough to come near


@both_losses
def test_tight_lipschitz_constants(loss):
    """With all labels +1 and a constant feature, every margin can sit where the curvature is largest: equality."""
    rng = np.random.default_rng(0)
    A = np.column_stack([np.ones(40), rng.normal(size=(40, 3))])
    parts = np.array_split(np.arange(40), 4)
    plain = Plain(loss=loss, lam=0.0)
    plain.A, plain.y, plain.parts, plain.n, plain.d, plain.rows = A, np.ones(40), parts, 4, 4, 40
    L = plain.problem().smoothness()
    s = 0.5 if loss == "logistic" else (9 + 33**0.5) / 24
    x = np.array([np.log(s / (1 - s)), 0, 0, 0])
    reached = {}
    for what, rows in {"minus": np.arange(40), **{f"client {i}": part for i, part in enumerate(parts)}}.items():
        v = np.linalg.eigh(A[rows].T @ A[rows])[1][:, -1] * 1e-4
        reached[what] = (plain.gradients(x + v) - plain.gradients(x - v)) / 2e-4
    assert np.linalg.norm(reached["minus"].mean(axis=0)) == pytest.approx(L.minus, rel=1e-5)
    lengths = [np.linalg.norm(reached[f"client {i}"][i]) for i in range(4)]
    assert max(lengths) == pytest.approx(L.max, rel=1e-5)
    assert np.sqrt(np.mean(np.square(lengths))) == pytest.approx(L.tilde, rel=1e-5)


def test_tight_spread():
    """Two clients with nearly equal rows, one of them saturated: L_± is c max(lambda_i) / 2, as the bound says."""
    A, parts = csr_array([[1.0, 0.01], [1.0, 0.0]]), [np.array([0]), np.array([1])]
    problem = Classification(A, np.array([1.0, 1.0]), parts, "logistic", 0.1)
    L = problem.smoothness()
    x, y = torch.tensor([-0.05, 1e4]), torch.tensor([0.05, 1e4])
    rows = problem.evaluate(y, torch.arange(2))[1].double() - problem.evaluate(x, torch.arange(2))[1].double()
    spread = (rows - rows.mean(dim=0)).square().sum().div(2).sqrt() / 0.1
    assert L.pm == pytest.approx(0.125, rel=1e-3)
    assert 0.99 * L.pm <= spread <= L.pm
    # The regularizer is common to both: it enters L_- and not L_±.
    assert problem.smoothness().minus - Classification(A, np.ones(2), parts, "logistic", 0.0).smoothness().minus == (
        pytest.approx(0.2, rel=1e-6)
    )


def test_tight_spread_with_curvatures_of_both_signs():
    """The same two clients, one at the largest curvature and one at the lowest: (hi - lo) / 2 is reached."""
    delta, (low, high) = 1e-4, (np.log(s / (1 - s)) for s in ((9 - 33**0.5) / 24, (9 + 33**0.5) / 24))
    plain = Plain(loss="nonconvex")
    plain.A, plain.y, plain.parts = np.array([[1.0, delta], [1.0, 0.0]]), np.ones(2), [np.array([0]), np.array([1])]
    plain.n, plain.d, plain.rows = 2, 2, 2
    x, step = np.array([high, (low - high) / delta]), np.array([1e-3, 0.0])
    D = (plain.gradients(x + step) - plain.gradients(x - step)) / 2e-3
    spread = np.sqrt(np.square(D - D.mean(axis=0)).sum() / 2)
    L = plain.problem().smoothness()
    assert 0.999 * L.pm <= spread <= L.pm
    assert L.pm == pytest.approx((HIGHEST - LOWEST) / 2, rel=1e-3)


def test_bounds_halve_the_spread_on_real_data():
    """On evenly split data the bound on L_± is half of L_+ for the logistic loss, and what is measured is far below."""
    problem = Classification.load("phishing", n=20, lam=0.0)
    L = problem.smoothness()
    assert 0.49 * L.plus <= L.pm <= 0.52 * L.plus
    points = [problem.start()]
    for _ in range(4):
        points.append(points[-1] - problem.evaluate(points[-1], torch.arange(20))[1].mean(dim=0) / L.minus)
    assert 0.0 < measured_pm(problem, points) < 0.2 * L.pm


def test_bounds_for_one_client_and_for_partial_problems():
    plain = Plain()
    plain.parts, plain.n = [np.arange(plain.rows)], 1
    assert plain.problem().smoothness().pm == 0.0
    problem = Plain().problem()
    with pytest.raises(ConfigError, match=r"call smoothness\(\) on the whole problem"):
        problem.only(torch.tensor([1])).smoothness()
    whole = problem.smoothness()
    assert problem.only(torch.tensor([1])).smoothness() == whole


def brute_popoviciu(tops, top, second, c, steps=4001):
    """Q(c)^2 as a maximum over a grid of s, K(s) by filling the clients one by one."""
    best = 0.0
    for s in np.linspace(0, c * top, steps):
        left, filled = s * len(tops), 0.0
        for value in sorted(tops, reverse=True):
            t = min(left, c * value)
            filled, left = filled + value * t / len(tops), left - t
        best = max(best, c * min(filled, c * second**2) - s * s)
    return best**0.5


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=8), st.floats(0.1, 1), st.floats(0.3, 1))
def test_bounds_popoviciu_is_the_maximum_it_claims(tops, share, cap):
    tops = np.array(tops)
    top = share * tops.mean()
    second = max(top, cap * np.sqrt(np.mean(tops**2)))
    exact = smoothness.popoviciu(tops, top, second, 0.25)
    brute = brute_popoviciu(tops, top, second, 0.25)
    assert brute <= exact * (1 + 1e-9)
    assert exact <= 0.125 * tops.max() * (1 + 1e-12)
    assert brute == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("signed", [False, True])
def test_bounds_on_eigenvalues_without_a_dense_matrix(monkeypatch, signed):
    B = csr_array(random_array((60, 40), density=0.2, rng=np.random.default_rng(0), format="csr"))
    if signed:
        B.data -= 0.5
    exact = np.linalg.eigvalsh((B.T @ B).toarray())[-1]
    assert smoothness.largest_eigenvalue(B) == pytest.approx(exact, rel=1e-12)
    assert smoothness.largest_eigenvalue(csr_array(B.T)) == pytest.approx(exact, rel=1e-12)
    monkeypatch.setattr(smoothness, "DENSE", 0)
    bound = smoothness.largest_eigenvalue(B)
    assert exact * (1 - 1e-12) <= bound <= (np.square(B.data).sum() if signed else exact * (1 + 1e-5))


def test_bounds_stay_bounds_for_many_coordinates(monkeypatch):
    plain = Plain(loss="nonconvex", seed=6)
    plain.A = np.abs(plain.A)
    exact = plain.problem().smoothness()
    monkeypatch.setattr(smoothness, "DENSE", 0)
    monkeypatch.setattr(smoothness, "DENSE_VARIANCE", 0)
    loose = plain.problem().smoothness()
    for what in ("minus", "plus", "pm", "tilde", "max"):
        assert getattr(exact, what) * (1 - 1e-8) <= getattr(loose, what) <= getattr(exact, what) * 2


def test_rounding_up_never_rounds_down():
    for value in np.random.default_rng(0).lognormal(0, 20, size=1000):
        assert value <= smoothness.rounded_up(value) <= value * (1 + 2e-8)
    assert smoothness.rounded_up(0.0) == 0.0


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"loss": "hinge"}, ConfigError, "a loss is one of logistic, nonconvex"),
        ({"lam": -1.0}, ConfigError, "lam=-1.0"),
        ({"lam": float("nan")}, ConfigError, "lam=nan"),
        ({"parts": [np.array([0, 1]), np.array([1, 2])]}, ConfigError, "exactly once"),
        ({"parts": [np.array([0, 1])]}, ConfigError, "exactly once"),
        ({"parts": [np.array([0, 1, 2]), np.array([], int)]}, ConfigError, r"clients without rows: \[1\]"),
        ({"parts": []}, ConfigError, "without rows"),
        ({"labels": np.array([0.0, 1.0, 1.0])}, DataError, "-1 or \\+1"),
        ({"labels": np.array([1.0, 1.0])}, DataError, "2 labels"),
        ({"A": csr_array([[1.0], [np.nan], [1.0]])}, DataError, "NaN or an infinity"),
        ({"A": csr_array((3, 0))}, DataError, "at least one row and one column"),
    ],
)
def test_classification_refuses_what_it_cannot_use(change, error, word):
    good = {"A": csr_array([[1.0], [2.0], [3.0]]), "labels": np.array([1.0, -1.0, 1.0]), "parts": [np.arange(3)]}
    Classification(**good)
    with pytest.raises(error, match=word):
        Classification(**{**good, **change})


def test_classification_leaves_its_arguments_alone():
    A = csr_array((np.array([1.0, 2.0, 4.0]), np.array([1, 0, 0]), np.array([0, 2, 3])), shape=(2, 2))
    before = [A.data.copy(), A.indices.copy(), A.indptr.copy()]
    Classification(A, np.array([-1.0, 1.0]), [np.array([1]), np.array([0])])
    for kept, now in zip(before, [A.data, A.indices, A.indptr], strict=True):
        np.testing.assert_array_equal(kept, now)


# ------------------------------------------------------------------------------------------------ measured L_±
class Linear(Problem):
    """f_i(x) = a_i ||x||^2 / 2 + b_i'x: its Hessian variance is the standard deviation of the a_i."""

    name = "linear"

    def __init__(self, a, common=0.0):
        self.a, self.n, self.d, self.common = torch.tensor(a, dtype=torch.float64), len(a), 6, common

    def start(self):
        return torch.zeros(self.d)

    def evaluate(self, x, clients):
        z = x.double()
        return 0.5 * self.a[clients] * (z @ z), (
            self.a[clients, None] * z + self.common + 0.1 * clients[:, None]
        ).float()

    def smoothness(self):
        raise NotImplementedError

    def only(self, clients):
        return self


def test_measured_pm_on_problems_with_a_known_answer():
    x = torch.linspace(-1, 1, 6)
    problem = Linear([1.0, 2.0, 6.0])
    assert measured_pm(problem, [x, x, 3 * x]) == pytest.approx(np.std([1, 2, 6]), rel=1e-5)
    assert measured_pm(problem, [x, 3 * x]).status == "estimate"
    assert measured_pm(Linear([2.0, 2.0], common=1e4), [x, 3 * x]) == 0.0
    q = Quadratics(n=6, d=12, noise=0.8, seed=3)
    top = torch.from_numpy(np.sin(np.arange(1, 13) * 12 * np.pi / 13)).float()
    assert measured_pm(q, [q.start(), q.start() + top]) == pytest.approx(q.smoothness().pm, rel=1e-5)
    assert measured_pm(Quadratics(), [torch.zeros(100), Quadratics().start()]) == 0.0


def test_measured_pm_does_not_depend_on_chunks(monkeypatch):
    problem, x = Plain(n=9).problem(), torch.linspace(-1, 1, 7)
    whole = measured_pm(problem, [x, 2 * x, -x])
    original = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, dim=0: original(self, 2, dim))
    assert measured_pm(problem, [x, 2 * x, -x]) == pytest.approx(whole, rel=1e-9)
    assert whole <= problem.smoothness().pm


@pytest.mark.parametrize("count", [0, 1, 3])
def test_measured_pm_needs_two_points(count):
    with pytest.raises(ConfigError, match=f"got {count} points"):
        measured_pm(Quadratics(), [torch.zeros(100)] * count)


# ------------------------------------------------------------------------------------------------ data
FACTS = {"mushrooms": (8124, 112, 170604, 4208, 1.0, 21), "phishing": (11055, 68, 331650, 6157, 0.18257, 30)}


@pytest.mark.parametrize("name", FACTS)
def test_bundled_data_have_the_published_counts(name):
    rows, d, nonzeros, positive, value, each = FACTS[name]
    read = data.load(name)
    assert read.A.shape == (rows, d)
    assert read.A.nnz == nonzeros
    assert (read.y == 1).sum() == positive
    assert (read.y == -1).sum() == rows - positive
    assert (read.A.data == value).all()
    assert (np.diff(read.A.indptr) == each).all()
    assert (read.A.dtype, read.y.dtype) == (np.float64, np.float64)
    assert "doi:" in read.source


@pytest.mark.parametrize("name", FACTS)
def test_bundled_data_equal_the_originals(name):
    folder = os.environ.get("SHOAL_DATA")
    if not folder:
        pytest.skip("SHOAL_DATA names no folder with the original LIBSVM files")
    with lzma.open(Path(folder) / name / f"{name}.libsvm.xz") as stream:
        A, y = load_svmlight_file(stream, zero_based=False)
    read = data.load(name)
    np.testing.assert_array_equal(read.A.toarray(), A.toarray())
    np.testing.assert_array_equal(read.y == 1, y == y.max())
    again = data.load(Path(folder) / name / f"{name}.libsvm.xz")
    np.testing.assert_array_equal(again.A.toarray(), A.toarray())
    assert again.name == name


def test_bundled_files_are_small():
    for name in FACTS:
        assert (Path(data.__file__).parent / "bundled" / f"{name}.npz").stat().st_size < 200_000


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".xz", lzma.open), (".gz", gzip.open), (".bz2", bz2.open)])
def test_a_file_written_by_another_tool_reads_back(tmp_path, suffix, opener):
    A = random_array((30, 9), density=0.4, rng=np.random.default_rng(1), format="lil")
    A[:, [8]] = 0.1  # the last column must occur for the width to be known
    A = csr_array(A)
    y = np.where(np.arange(30) % 3 == 0, 4.0, -2.5)
    path = tmp_path / f"made.libsvm{suffix}"
    with opener(path, "wb") as stream:
        dump_svmlight_file(A, y, stream, zero_based=False)
    read = data.load(str(path))
    np.testing.assert_allclose(read.A.toarray(), A.toarray(), rtol=1e-14)
    np.testing.assert_array_equal(read.y, np.where(y == 4.0, 1.0, -1.0))
    assert read.name == "made"
    problem = Classification.load(path, n=4, split="contiguous", loss="nonconvex")
    assert (problem.n, problem.d, problem.total_rows) == (4, 9, 30)


def test_comments_and_indices_from_zero(tmp_path):
    path = tmp_path / "zero.txt"
    path.write_text("# a comment\n3 0:1.5 2:-2 # behind\n\n7 1:0.25\n")
    read = data.load(path)
    np.testing.assert_array_equal(read.A.toarray(), [[1.5, 0, -2], [0, 0.25, 0]])
    np.testing.assert_array_equal(read.y, [-1, 1])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no rows"),
        ("# only a comment\n\n", "no rows"),
        ("1 1:2\n-1 2:x\n", "line 2: '2:x' is not an index:value pair"),
        ("1 1:2\n-1 2\n", "line 2: '2' is not an index:value pair"),
        ("id,label\n1,2\n", "line 1: 'id,label' is not a label"),
        ("1 1:2\n\n-1 3:1 2:1\n", "line 3: index 2 after 3: indices must ascend"),
        ("1 1:2\n-1 -4:1\n", "line 2: '-4:1' is not an index:value pair with an index"),
        ("1 1:2\n1 2:1\n", r"1 labels \(1\); binary"),
        ("1 1:2\n2 2:1\n3 1:1\n", r"3 labels \(1, 2, 3\)"),
        ("nan 1:2\n2 2:1\n", "exactly two finite ones"),
        ("1 1:2\n2 2:nan\n", "row 2 holds a NaN"),
        ("1 1:inf\n2 2:1\n", "row 1 holds a NaN or an infinity"),
        ("1\n2\n", "without a single feature"),
        ("\x00\x01\x02binary\n", "line 1"),
    ],
)
def test_malformed_files_are_named_in_one_line(tmp_path, text, word):
    path = tmp_path / "bad.libsvm"
    path.write_text(text)
    with pytest.raises(DataError, match=word) as caught:
        data.load(path)
    assert "\n" not in str(caught.value)
    assert "bad.libsvm" in str(caught.value)


def test_broken_archives_and_missing_files(tmp_path):
    for suffix in data.OPENERS:
        path = tmp_path / f"broken{suffix}"
        path.write_text("1 1:2\n-1 1:3\n")
        with pytest.raises(DataError, match=f"cannot be read as {suffix}"):
            data.load(path)
        path.write_bytes({".xz": lzma, ".gz": gzip, ".bz2": bz2}[suffix].compress(b"1 1:2\n-1 1:3\n" * 2000)[:-20])
        with pytest.raises(DataError, match=f"cannot be read as {suffix}"):
            data.load(path)
    with pytest.raises(
        DataError, match="neither a file nor a bundled data set: give mushrooms or phishing, or the path"
    ):
        data.load("mushroom")
    with pytest.raises(DataError, match="is a folder"):
        data.load(tmp_path)


def test_reading_text_needs_the_data_extra(tmp_path, monkeypatch):
    path = tmp_path / "a.libsvm"
    path.write_text("1 1:2\n-1 1:3\n")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r'pip install "shoal\[data\]"'):
        data.load(path)
    assert data.load("phishing").A.shape == (11055, 68)  # the bundled sets need no extra


# ------------------------------------------------------------------------------------------------ splits
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(splits.KINDS),
    st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=60),
    st.data(),
    st.integers(0, 2**32),
    st.floats(1e-3, 1e3),
)
def test_splits_are_partitions_without_empty_parts(kind, labels, choice, seed, alpha):
    n = choice.draw(st.integers(1, len(labels)))
    weight = alpha if kind == "dirichlet" else None
    parts = splits.split(kind, np.array(labels), n, seed, weight)
    assert len(parts) == n
    assert all(len(part) and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    again = splits.split(kind, np.array(labels), n, seed, weight)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    if kind != "dirichlet":
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_each_split_does_what_its_name_says():
    labels = np.where(np.arange(1000) % 4 == 0, 1.0, -1.0)
    contiguous = splits.split("contiguous", labels, 10)
    assert all(np.array_equal(part, np.arange(100 * i, 100 * i + 100)) for i, part in enumerate(contiguous))
    positive = [int((labels[part] == 1).sum()) for part in splits.split("label", labels, 8)]
    assert positive == [0, 0, 0, 0, 0, 0, 125, 125]
    one, other = splits.split("iid", labels, 10, 0), splits.split("iid", labels, 10, 1)
    assert not np.array_equal(one[0], other[0])
    # 100 of 1000 rows, 250 positive: a count below 9 or above 44 has probability below 1e-5 (hypergeometric).
    assert all(9 <= (labels[part] == 1).sum() <= 44 for part in one)


def test_dirichlet_is_the_more_uneven_the_smaller_alpha():
    labels = np.where(np.arange(2000) % 2 == 0, 1.0, -1.0)
    largest = [max(map(len, splits.split("dirichlet", labels, 20, 0, alpha))) for alpha in (0.01, 0.5, 1000.0)]
    assert largest[0] > 2 * largest[1] > 2 * largest[2]
    assert largest[2] < 120  # nearly even
    default = splits.split("dirichlet", labels, 20, 0)
    assert all(
        np.array_equal(a, b) for a, b in zip(default, splits.split("dirichlet", labels, 20, 0, 0.5), strict=True)
    )


def test_clients_without_rows_take_from_the_richest():
    assert splits.fill_empty([[], [1, 2, 3], [], [4, 5, 6]]) == [[3], [1, 2], [6], [4, 5]]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("random", 3), "a split is one of iid, contiguous, label, dirichlet"),
        (("iid", 11), r"n=11 clients for 10 rows.*1\.\.10"),
        (("iid", 0), "n=0"),
        (("dirichlet", 3, 0, 0.0), "alpha=0.0"),
        (("dirichlet", 3, 0, -1.0), "alpha=-1.0"),
        (("dirichlet", 3, 0, float("inf")), "alpha=inf"),
        (("iid", 3, 0, 0.5), "alpha belongs to split='dirichlet'"),
        (("iid", 3, -1), "seed=-1"),
        (("iid", 3, 1.5), "seed=1.5"),
    ],
)
def test_splits_refuse_what_they_cannot_do(arguments, word):
    kind, *rest = arguments
    with pytest.raises(ConfigError, match=word):
        splits.split(kind, np.ones(10), *rest)
