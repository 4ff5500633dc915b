"""The weighted AB inequality: independent compressors of unequal quality, and clients drawn with unequal odds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from zoo import FAMILIES, PROBLEMS, inputs

from shoal.compressors import QSGD, Independent, RandK
from shoal.problems import Classification, Quadratics
from shoal.theory import AB, Constant, Smoothness, WeightedAB, by_smoothness, weighted_independent, weighted_sampling


def bound(ab: WeightedAB, u: np.ndarray) -> float:
    """The right side."""
    n = len(u)
    return float(ab.a * ((u**2).sum(1) / (n * n * np.array(ab.weights))).sum() - ab.b * (u.mean(0) ** 2).sum())


def vectors(family: str, n: int, d: int) -> np.ndarray:
    return inputs(family, n, d).double().numpy() * np.arange(1, n + 1)[:, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_independent_compressors(family):
    """RandK with another k for each client loses omega_i ||a_i||^2 exactly: never above the bound, and on it where
    the weights are the best ones, whatever the vectors are."""
    n, d = 4, 6
    omegas = [RandK(k).omega(d) for k in (1, 2, 3, 5)]
    u = vectors(family, n, d)
    error = float((np.array(omegas) * (u**2).sum(1)).sum() / n**2)
    best = weighted_independent(omegas)
    assert best.a == pytest.approx(1 / sum(1 / w for w in omegas))
    assert bound(best, u) == pytest.approx(error)
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.random(n) + 0.01
        other = weighted_independent(omegas, weights / weights.sum())
        assert other.a >= best.a - 1e-12
        assert error <= bound(other, u) * (1 + 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draws", [1, 2])
def test_sampled_clients(family, draws):
    """Summed over every draw of clients, with RandK's exact variance: equality, and no bias."""
    n, d, omega = 3, 4, RandK(1).omega(4)
    u, weights = vectors(family, n, d), np.array([0.2, 0.5, 0.3])
    mean, square = np.zeros(d), 0.0
    for chosen in itertools.product(range(n), repeat=draws):
        p = math.prod(weights[i] for i in chosen)
        rows = u[list(chosen)] / (n * weights[list(chosen)])[:, None]
        mean += p * rows.mean(0)
        square += p * (((rows.mean(0) - u.mean(0)) ** 2).sum() + omega * (rows**2).sum() / draws**2)
    assert np.allclose(mean, u.mean(0))
    assert bound(weighted_sampling(omega, tuple(weights), draws), u) == pytest.approx(square)


def test_weights_by_smoothness_need_only_the_mean():
    """w_i = L_i / sum L: L_{+,w} is at most the mean of the L_i, where L_+ is at most their root mean square."""
    L = np.array([1.0, 2.0, 9.0])
    w = L / L.sum()
    assert math.sqrt((L**2 / (9 * w)).sum()) == pytest.approx(L.mean())
    assert L.mean() <= math.sqrt((L**2).mean())


@pytest.mark.parametrize("problem", PROBLEMS[:5], ids=repr)
def test_weighted_constants_of_problems(problem):
    """L_{+,w} and L_{±,w} hold along random directions, for w of the L_i, even and odd weights; quadratics reach them
    at eigenvectors of their common matrix. Each L_i holds for its client."""
    L, rng, ids = problem.smoothness(), np.random.default_rng(0), torch.arange(5)
    weights = [by_smoothness(L.each), (0.2,) * 5, (0.4, 0.1, 0.2, 0.05, 0.25)]
    found = [L.weighted(w) for w in weights]
    assert found[0].plus <= L.plus_w * (1 + 1e-12) <= np.mean(L.each) * (1 + 1e-2)
    assert max(L.each) == pytest.approx(L.max)
    j = np.arange(1, 13)
    best = [[0.0, 0.0] for _ in weights]
    for direction in [*np.sin(np.outer(j, j) * np.pi / 13), *rng.normal(size=(30, 12))]:
        for size in (0.3, 3.0):
            x = torch.from_numpy(rng.normal(size=12)).float()
            y = x + size * torch.from_numpy(direction).float()
            moved = (problem.evaluate(y, ids)[1] - problem.evaluate(x, ids)[1]).double().numpy()
            far, squares = float((y - x).double().square().sum()), np.square(moved).sum(1)
            assert np.all(squares <= np.square(L.each) * far * (1 + 1e-4) + 1e-10)
            for known, w, top in zip(found, weights, best, strict=True):
                M = (squares / (25 * np.array(w))).sum() / far
                S = M - np.square(moved.mean(0)).sum() / far
                assert known.plus**2 * (1 + 1e-4) + 1e-10 >= M  # float32 gradients
                assert known.pm**2 * (1 + 1e-4) + 1e-6 >= S
                top[:] = max(top[0], M), max(top[1], S)
    if isinstance(problem, Quadratics):
        assert best[0] == pytest.approx([L.plus_w**2, L.pm_w**2], rel=1e-3, abs=1e-6)
        assert best[1] == pytest.approx([L.plus**2, L.pm**2], rel=1e-3, abs=1e-6)


def test_clients_without_curvature():
    """They are drawn all the same; and where none has any, odds are even."""
    assert by_smoothness((0.0, 0.0)) == (0.5, 0.5)
    assert min(by_smoothness((1.0, 0.0, 1.0))) == pytest.approx(1e-3 / 3, rel=1e-2)
    flat = Classification(np.zeros((4, 2)), np.array([1, -1, 1, -1]), [np.arange(2), np.arange(2, 4)], lam=0.0)
    L = flat.smoothness()
    assert (L.plus_w, L.pm_w, L.each) == (0.0, 0.0, (0.0, 0.0))


def test_equal_weights_are_the_plain_inequality():
    known = Constant(1.0, "exact")
    L = Smoothness(known, Constant(3.0, "exact"), Constant(2.0, "exact"), known, known)
    ab, plain = WeightedAB(0.7, 0.2, (0.25,) * 4), AB(0.7, 0.2)
    assert ab.gamma(3.0, 2.0) == pytest.approx(plain.gamma(L))
    one = weighted_independent([QSGD(1).omega(9)] * 4)
    assert (one.a, one.b) == (pytest.approx(QSGD(1).ab(4, 9).a), 0.0)
    assert one.weights == pytest.approx((0.25,) * 4)
    assert weighted_independent([Independent().omega(9), 0.0], (0.1, 0.9)).a == pytest.approx(0.8)


@pytest.mark.parametrize("weights", [(), (0.5, 0.4), (1.0, 0.0), (1.5, -0.5)])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match="with the sum 1"):
        WeightedAB(1.0, 0.0, weights)
    with pytest.raises(ValueError, match="give weights"):
        weighted_independent([1.0, 0.0])
    with pytest.raises(ValueError, match="at least one"):
        weighted_sampling(1.0, (0.5, 0.5), 0)
