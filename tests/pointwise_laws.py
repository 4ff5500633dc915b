"""What the battery must know of the compressors in `shoal.compressors.pointwise` and of k-level rounding.

Lengths from the papers' formulas, exact variances of each coordinate from the definitions, in float64.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from shoal.compressors import Bernoulli, Independent, Natural, NaturalDithering, Sign, Ternary
from shoal.core import Compressor
from shoal.messages import Round

KINDS = (Bernoulli, Independent, Natural, NaturalDithering, Sign, Ternary)


def total_bytes(c: Compressor, n: int, d: int) -> int:
    """Bytes of all n messages of round 0 together."""
    if isinstance(c, Bernoulli):
        return 4 * d * int(c.sends(torch.arange(n), Round.full(0, 0, n)).sum())
    if isinstance(c, Natural):
        return n * math.ceil(9 * d / 8)
    if isinstance(c, Ternary):
        return n * (4 + math.ceil(d / 5))
    choices = 2 if isinstance(c, Sign) else 2 * c.levels + 1 if isinstance(c, NaturalDithering) else c.levels
    return n * (4 + math.ceil(d * math.ceil(math.log2(choices)) / 8))


def gain(c: Compressor) -> float:
    """How much larger than an entry what it becomes can be, where no norm is taken."""
    return 1.0 / c.p if isinstance(c, Bernoulli) else 2.0 if isinstance(c, Natural) else 1.0


def cells(y: np.ndarray) -> np.ndarray:
    """frac (1 - frac): the variance of rounding y to a neighboring integer."""
    return (y - np.floor(y)) * (1.0 - (y - np.floor(y)))


def octaves(y: np.ndarray, low: float) -> np.ndarray:
    """The variance of rounding y >= 0 to a neighbor among 0, low, 2 low, 4 low, ..."""
    below = np.where(y < low, 0.0, low * 2.0 ** np.floor(np.log2(np.maximum(y, low) / low)))
    return (y - below) * (np.maximum(2.0 * below, low) - y)


def variance(c: Compressor, u: np.ndarray) -> np.ndarray:
    """(n, d): the exact variance of each coordinate of C_i(u_i), for unbiased ones."""
    size = np.abs(u)
    if isinstance(c, Bernoulli):
        return u**2 * (1.0 / c.p - 1.0)
    if isinstance(c, Natural):
        return octaves(size, 2.0**-126)
    if isinstance(c, Ternary):
        return size * (size.max(1, keepdims=True) - size)
    r = np.linalg.norm(u, axis=1, keepdims=True)
    safe = np.where(r > 0, r, 1.0)
    if isinstance(c, NaturalDithering):
        return r**2 * octaves(size / safe, 2.0 ** (1 - c.levels))
    assert isinstance(c, Independent), f"no variance for {c!r}"
    steps = c.levels - 1
    return (2.0 * r / steps) ** 2 * cells((u / safe + 1.0) * steps / 2.0)
