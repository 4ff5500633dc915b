"""The error of correlated quantization on given vectors, known without measuring.

Ours: docs/derivations/correlated.md and strata.md (all clients, groups of them), offset.md (a grid with an offset).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from shoal.compressors import Correlated, CorrelatedOffset
from shoal.compressors.blocks import cut
from shoal.compressors.strata import drawn_errors, strata_errors
from shoal.core import Compressor

WORK = 50_000_000  # client-coordinates, times the offsets tried: a few seconds
PIECE = 1 << 20  # of them, at a time


def exact(compressor: Compressor, rows: Tensor) -> float | None:
    """E||(1/n) sum C_i(a_i) - abar||^2 on these rows (n, d); None where no formula is known, or only a slow one.

    Known for Correlated with one block, and with several where the scale is shared or full; and for CorrelatedOffset,
    whose random offset is a multiple of 2^-16 and is taken as uniform.
    """
    if isinstance(compressor, Correlated):
        if compressor.blocks > 1 and compressor.scale not in ("shared", "full"):
            return None  # the scale of a block depends on which coordinates it has
        cost, errors = 1, _of_correlated(compressor, rows)
    elif isinstance(compressor, CorrelatedOffset):
        cost, errors = 2 * (len(rows) + 1) if compressor.offset == "random" else 1, _of_offset(compressor, rows)
    else:
        return None
    n, d = rows.shape
    if n * d * cost > WORK:
        return None
    width = max(1, PIECE // (n * cost))
    return math.fsum(errors(rows[:, j : j + width].double().numpy()) for j in range(0, d, width))


def _scales(scale: str, rows: Tensor) -> np.ndarray:
    """(n, 1): the r_i."""
    if scale in ("own", "full"):
        return rows.double().norm(dim=1, keepdim=True).numpy()
    tops = rows.abs().amax(1, keepdim=True).double().numpy()
    return tops if scale == "max" else np.full_like(tops, tops.max())


def _of_correlated(code: Correlated, rows: Tensor) -> Callable[[np.ndarray], float]:
    n, r = len(rows), _scales(code.scale, rows)
    step = 2.0 * r / (code.levels - 1)
    sizes = cut(n, code.blocks)[1].tolist()

    def errors(u: np.ndarray) -> float:
        z = (u + r) / np.where(step > 0, step, 1.0)
        if code.blocks == 1:
            return float(strata_errors(z, step[:, 0], n).sum())
        each = {size: float(drawn_errors(u, z, step[:, 0], size).sum()) for size in set(sizes)}
        return sum(each[size] for size in sizes) / len(sizes)

    return errors


def _of_offset(code: CorrelatedOffset, rows: Tensor) -> Callable[[np.ndarray], float]:
    n, r, T = len(rows), _scales(code.scale, rows), code.steps(len(rows))
    step = 2.0 * r * n / T

    def errors(u: np.ndarray) -> float:
        x = (u + r) * (T / (2.0 * np.where(r > 0, r, 1.0)))  # in strata
        if code.offset == "even":
            return float(strata_errors(x / n, step[:, 0], n).sum())
        start, weight = _offsets(x)
        z = (x[:, :, None] + start).reshape(n, -1) / n
        return float(strata_errors(z, step[:, 0], n) @ weight.ravel())

    return errors


def _offsets(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d, 2n+2) offsets in [0, 1], and their weights: Gauss's two points between those where some x_ij + c is whole.

    The error is quadratic in c there, so that they give its integral, for each coordinate.
    """
    ends = np.sort(1.0 - (x - np.floor(x)), axis=0).T
    ends = np.concatenate([np.zeros((len(ends), 1)), ends, np.ones((len(ends), 1))], 1)
    middle, half = (ends[:, 1:] + ends[:, :-1]) / 2, np.diff(ends) / 2
    start = np.concatenate([middle - half / math.sqrt(3.0), middle + half / math.sqrt(3.0)], 1)
    return start, np.concatenate([half, half], 1)
