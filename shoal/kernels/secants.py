"""Sums over clients of how their gradients differ between two points: what measured smoothness constants are made of.

Each coordinate has its own running sums over the clients in their order, so that the numbers depend neither on chunks
of clients nor on threads, and no addition waits for the one before it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["add", "totals"]

BLOCK = 1024  # coordinates whose sums stay in the first-level cache


@njit(cache=True, nogil=True)
def add(before, after, origin, moved, squares, sizes, lo, hi):
    """Adds each row's e = after - before - origin to `moved`, e^2 to `squares`, before^2 + after^2 to `sizes`.

    before, after (m, d) float32; the others (d,) float64. Coordinates lo..hi-1 alone.
    """
    for first in range(lo, hi, BLOCK):
        last = min(first + BLOCK, hi)
        # Slices of their own: with offsets to the whole arrays the loop stays scalar, and takes five times as long.
        start, sums, twos, size = origin[first:last], moved[first:last], squares[first:last], sizes[first:last]
        for i in range(before.shape[0]):
            old, new = before[i, first:last], after[i, first:last]
            for j in range(last - first):
                a, b = np.float64(old[j]), np.float64(new[j])
                e = b - a - start[j]
                sums[j] += e
                twos[j] += e * e
                size[j] += a * a + b * b


@njit(cache=True, nogil=True)
def totals(origin, moved, squares, sizes, n):
    """(||mean D||^2, mean ||D - mean D||^2, mean (||before||^2 + ||after||^2)) for D = after - before over n rows."""
    mean = spread = size = 0.0
    for j in range(origin.size):
        e = moved[j] / n
        mean += (origin[j] + e) * (origin[j] + e)
        spread += squares[j] / n - e * e
        size += sizes[j] / n
    return mean, spread, size
