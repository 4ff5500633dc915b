"""What the battery of compressors expects of those made of others, and of correlated rounding onto k points in blocks.

Lengths by formula, exact variances by summing over every block that a client may get, and where a result overflows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch

from shoal.compressors import Composed, Correlated, PerLayer, RandK, Scaled
from shoal.compressors.sparse import kept
from shoal.core import Compressor


def parts(total: int, count: int) -> list[int]:
    """`total` things in `count` parts, the longer ones first."""
    return [len(part) for part in np.array_split(np.arange(total), count)]


def slices(c: PerLayer, d: int) -> list[tuple[Compressor, slice]]:
    """Every layer's compressor and coordinates."""
    rest = d - sum(s for s in c.sizes if s is not None)
    ends = np.cumsum([rest if s is None else s for s in c.sizes]).tolist()
    return [(code, slice(lo, hi)) for code, lo, hi in zip(c.compressors, [0, *ends], ends, strict=False)]


def supports(c: Composed | Correlated, n: int, d: int) -> list[tuple[float, int, float]]:
    """(probability, number of kept coordinates, factor): what one client may have to send."""
    if isinstance(c, Correlated):
        sizes, lengths = parts(n, c.blocks), parts(d, c.blocks)
        return [(m / n / c.blocks, b, n / m) for m in sizes for b in lengths]
    if isinstance(c.outer, RandK):
        k = kept(c.outer.k, d, "")
        return [(1.0, k, d / k)]
    return [(1.0, 1, float(d))] if d < n else [(1 / n, b, float(n)) for b in parts(d, n)]


def dealt(d: int, count: int) -> list[list[int]]:
    """Every set of coordinates that one of `count` parts may have, all equally likely: one of each block of `count`."""
    whole = itertools.product(range(count), repeat=-(-d // count))
    return [[b * count + t for b, t in enumerate(turns) if b * count + t < d] for turns in whole]


def sets(c: Composed | Correlated, n: int, d: int) -> list[tuple[float, list[list[int]], float]]:
    """(probability, sets of coordinates, all equally likely, factor): what one client may have to send."""
    if isinstance(c, Correlated):
        return [(m / n, dealt(d, c.blocks), n / m) for m in parts(n, c.blocks)]
    if not isinstance(c.outer, RandK) and d >= n:
        return [(1.0, dealt(d, n), float(n))]
    ((probability, size, factor),) = supports(c, n, d)
    return [(probability, list(map(list, itertools.combinations(range(d), size))), factor)]


def paper_bytes(c: Compressor, n: int, d: int, formula: Callable[..., int]) -> int | set[int]:
    """Bytes of all n messages together; all that may occur, where it is drawn which groups send a coordinate more."""
    if isinstance(c, Scaled):
        return formula(c.inner, n, d)
    if isinstance(c, PerLayer):
        varying = sum("PermK" in repr(code) for code in c.compressors)
        return 4 * n * varying + sum(formula(code, n, part.stop - part.start) for code, part in slices(c, d))
    if isinstance(c, Correlated):
        scale, bits = 0 if c.scale == "shared" else 4, math.ceil(math.log2(c.levels))
        size, (short, longer) = parts(n, c.blocks), divmod(d, c.blocks)
        lucky = itertools.combinations(range(c.blocks), longer)
        return {sum(m * (scale + -(-(short + (g in some)) * bits // 8)) for g, m in enumerate(size)) for some in lucky}
    return sum(round(p * n) * formula(c.inner, 1, b) for p, b, _ in supports(c, n, d))


def overflows(c: Compressor, u: torch.Tensor, inner: Callable[..., bool]) -> bool:
    """Whether the result is beyond float32 for these special vectors, whatever is drawn."""
    n, d = u.shape
    if isinstance(c, Scaled):
        return inner(c.inner, u)
    if isinstance(c, PerLayer):
        return any(inner(code, u[:, part]) for code, part in slices(c, d))
    gain = max(factor for _, _, factor in supports(c, n, d))
    if float(u.double().abs().max()) * gain > torch.finfo(torch.float32).max:
        return True
    return isinstance(c, Composed) and gain == 1.0 and inner(c.inner, u)


def grid_variance(u: np.ndarray, r: np.ndarray, levels: int) -> np.ndarray:
    """(n, d): of rounding to a neighbor on `levels` points over [-r, r]."""
    step = 2.0 * r / (levels - 1)
    z = (u + r) / np.where(step > 0, step, 1.0)
    f = z - np.floor(z)
    return step**2 * f * (1.0 - f)


def variance(c: Compressor, u: np.ndarray, inner: Callable[..., np.ndarray]) -> np.ndarray:
    """(n, d): factor^2 E[j in S] (u_j^2 + Var Q_S(u)_j) - u_j^2, over every block S that may be kept."""
    n, d = u.shape
    if isinstance(c, PerLayer):
        return np.concatenate([inner(code, u[:, part]) for code, part in slices(c, d)], 1)
    top = np.abs(u).max()
    second = np.zeros_like(u)
    for probability, subsets, factor in sets(c, n, d):
        for subset in subsets:
            v = u[:, subset]
            if isinstance(c, Correlated):
                own = np.linalg.norm(u if c.scale == "full" else v, axis=1, keepdims=True)
                r = np.full((n, 1), top) if c.scale == "shared" else own
                var = grid_variance(v, r, c.levels)
            else:
                var = inner(c.inner, v)
            second[:, subset] += probability / len(subsets) * factor**2 * (v**2 + var)
    return second - u**2
