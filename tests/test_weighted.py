"""The weighted AB inequality: independent compressors of unequal quality, and clients drawn with unequal odds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from zoo import FAMILIES, inputs

from shoal.compressors import QSGD, Independent, RandK
from shoal.theory import AB, Constant, Smoothness, WeightedAB, weighted_independent, weighted_sampling


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
