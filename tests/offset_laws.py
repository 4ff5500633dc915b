"""What the battery of compressors expects of correlated quantization with an offset."""

from __future__ import annotations

import math

import numpy as np

from shoal.compressors import CorrelatedOffset
from shoal.compressors.strata import strata_error

MIDPOINTS = 512  # of the offset's law: the errors below are piecewise quadratic in it, and so 1e-5 or less is lost


def total_bytes(c: CorrelatedOffset, n: int, d: int) -> int:
    """Of all n messages together."""
    return n * ((0 if c.scale == "shared" else 4) + math.ceil(d * math.ceil(math.log2(c.levels)) / 8))


def strata(c: CorrelatedOffset, n: int) -> int:
    """N - 1 strata over [-r, r], or the largest even number up to N."""
    N = n * (c.levels - 1)
    return N - 1 if c.offset == "random" else N - N % 2


def gain(c: CorrelatedOffset, n: int) -> float:
    """Of the outermost points."""
    N = n * (c.levels - 1)
    return (2 * N - strata(c, n)) / strata(c, n)


def offsets(c: CorrelatedOffset, points: int = MIDPOINTS) -> np.ndarray:
    return (np.arange(points) + 0.5) / points if c.offset == "random" else np.zeros(1)


def variance(c: CorrelatedOffset, u: np.ndarray, r: np.ndarray) -> np.ndarray:
    """(n, d): of each client's own coordinate, over the offset too."""
    n = len(u)
    T, total = strata(c, n), np.zeros_like(u)
    for start in offsets(c):
        z = ((u + r) * T / (2 * np.where(r > 0, r, 1.0)) + start) / n
        f = z - np.floor(z)
        total += (2 * r * n / T) ** 2 * f * (1 - f)
    return total / len(offsets(c))


def exact_error(c: CorrelatedOffset, u: np.ndarray, r: np.ndarray, points: int = MIDPOINTS) -> float:
    """Of the mean, over the offset too: a little above the truth, by a factor of at most 1 + 1 / (2 points^2)."""
    n, starts = len(u), offsets(c, points)
    T, step = strata(c, n), 2 * r * n / strata(c, n)
    z = ((u + r[:, None]) * T / (2 * np.where(r > 0, r, 1.0)[:, None]))[:, :, None] + starts
    return strata_error(z.reshape(n, -1) / n, step, n) / len(starts)
