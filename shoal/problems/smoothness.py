"""Smoothness constants: proved bounds for linear models on data, and L_± as measured along a trajectory.

Setting: f_i(x) = (n/N) sum over client i's rows a of phi(a'x) + R(x), with lo <= phi'' <= hi and R' Lipschitz with a
constant r; S_i = (n/N) A_i'A_i, S = (1/n) sum S_i = A'A/N, lambda_i = lmax(S_i). Every bound below is proved in
docs/derivations/smoothness.md, and every one is an upper bound in floating point too: eigenvalues are rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh
from scipy.sparse import csr_array, diags_array, vstack
from torch import Tensor

from shoal.core import Problem
from shoal.errors import ConfigError
from shoal.problems.secants import Secant, Seen
from shoal.theory import Constant, Smoothness, by_smoothness

DENSE = 2000  # the smaller side of a data matrix up to which its Gram matrix is decomposed densely
DENSE_VARIANCE = 500  # the largest d for which (1/n) sum S_i^2 is formed
Floats = NDArray[np.float64]


def linear_model(blocks: Sequence[csr_array], lo: float, hi: float, bend: float, slope: float) -> Smoothness:
    """Bounds for f_i(x) = (n/N) sum phi(a'x) + R(x), a over the rows of blocks[i]; R' is `bend`-Lipschitz.

    With r = bend: L_- <= c lmax(S) + r;  L_i <= c lambda_i + r;  L_+ <= min{c P + r, sqrt(mean L_i^2),
    sqrt(L_-^2 + L_±^2)} with P^2 = lmax((1/n) sum lambda_i S_i) and c = max(|lo|, hi);  L_± as in `spread_bound`, free
    of R;  L_{+,w} and L_{±,w} as in `_weighted`;  apart <= |lo + hi|/2 V + (hi - lo)/2 P + r, and together the same
    with lmax(S) for V. Samples are rows, f_ij = n N_i/N phi(a_j'x) + R: L_s <= c sqrt(lmax(sum_ij n N_i/N^2 ||a_j||^2
    a_j a_j')) and sigma^2 <= slope^2 sum_ij n N_i/N^2 ||a_j||^2 with |phi'| <= slope, clients of one row left out.
    f_inf is left None.
    """
    n, rows = len(blocks), sum(block.shape[0] for block in blocks)
    weight = n / rows
    tops = np.array([weight * largest_eigenvalue(block) for block in blocks])
    top = largest_eigenvalue(vstack(blocks, format="csr")) / rows
    weighted = [diags_array(np.full(b.shape[0], math.sqrt(t))) @ b for b, t in zip(blocks, tops, strict=True)]
    second = math.sqrt(largest_eigenvalue(vstack(weighted, format="csr")) / rows)
    c = max(abs(lo), hi)
    lengths = c * tops + bend
    minus = c * top + bend
    spread = _spread_of_grams(blocks, second)
    pm = spread_bound(tops, top, second, spread, lo, hi)
    tilde = math.sqrt(np.square(lengths).mean())
    plus = max(minus, min(c * second + bend, tilde, math.hypot(minus, pm)))
    bounds = {"minus": minus, "plus": plus, "pm": pm, "tilde": tilde, "max": lengths.max()}
    bounds |= _samples(blocks, c, slope)
    own = (hi - lo) / 2.0 * second + bend  # what points of their own can make of curvatures that differ with the point
    bounds |= {"apart": abs(lo + hi) / 2.0 * spread + own, "together": abs(lo + hi) / 2.0 * top + own}
    each = tuple(rounded_up(float(length)) for length in lengths)
    bounds |= _weighted(each, c * tops, c * top, bend, lo)
    known = {what: Constant(rounded_up(float(value)), "bound") for what, value in bounds.items()}
    counts = {"samples": rows / n, "most": float(max(block.shape[0] for block in blocks))}
    return Smoothness(**known, **{what: Constant(count, "exact") for what, count in counts.items()}, each=each)


def _weighted(each: tuple[float, ...], tops: Floats, top: float, bend: float, lo: float) -> dict[str, float]:
    """L_{+,w} and L_{±,w} for w = by_smoothness(each), from the c lambda_i and c lmax(S).

    L_{+,w}^2 <= mean(l) L_- with l_i = L_i, raised as w is; L_{±,w} <= L_{+,w}, and for convex losses at most
    sqrt(max of k s - s^2 over 0 <= s <= c lmax(S)) + r sqrt(mean(l) mean(1/l) - 1), k = mean(l) max(c lambda_i / l_i).
    """
    if not any(each):
        return {"plus_w": 0.0, "pm_w": 0.0}
    raised = np.array(by_smoothness(each)) * np.sum(each)
    # Raised by the weights' floor, their sum is larger; no l_i may come out below L_i.
    raised *= max(1.0, float((np.asarray(each) / raised).max()))
    mean = float(raised.mean())
    plus = math.sqrt(mean * (top + bend))
    if lo < 0.0:
        return {"plus_w": plus, "pm_w": plus}
    steep = mean * float((tops / raised).max())
    s = min(steep / 2.0, top)
    uneven = max(0.0, mean * float((1.0 / raised).mean()) - 1.0)
    return {"plus_w": plus, "pm_w": min(plus, math.sqrt(max(0.0, steep * s - s * s)) + bend * math.sqrt(uneven))}


def _samples(blocks: Sequence[csr_array], c: float, slope: float) -> dict[str, float]:
    """L_s and sigma^2. R is in every sample and drops out; one row alone has no spread."""
    n, rows = len(blocks), sum(block.shape[0] for block in blocks)
    squares, scaled = 0.0, []
    for block in blocks:
        weight = n * block.shape[0] / rows**2 if block.shape[0] > 1 else 0.0
        norms = np.asarray(block.multiply(block).sum(axis=1)).ravel()
        squares += weight * float(norms.sum())
        scaled.append(diags_array(np.sqrt(weight * norms)) @ block)
    top = largest_eigenvalue(vstack(scaled, format="csr"))
    return {"sample": c * math.sqrt(top), "noise": slope**2 * squares}


def spread_bound(tops: Floats, top: float, second: float, spread: float, lo: float, hi: float) -> float:
    """The least of three bounds on L_±, from lambda_i (n,), lmax(S), P and V, V^2 = lmax((1/n) sum (S_i - S)^2).

    max(|lo|, hi) P,   |lo + hi|/2 V + (hi - lo)/2 P,   |lo| V + Q(hi - lo): with the last, L_± is about half of L_+ on
    evenly split data. None can be much improved as long as nothing but lo <= phi'' <= hi is used.
    """
    if len(tops) == 1:
        return 0.0
    centered = abs(lo + hi) / 2.0 * spread + (hi - lo) / 2.0 * second
    return min(max(abs(lo), hi) * second, centered, abs(lo) * spread + popoviciu(tops, top, second, hi - lo))


def popoviciu(tops: Floats, top: float, second: float, c: float) -> float:
    """Q(c): the bound on L_± for curvatures in [0, c], sqrt of max over s of c K(s) - s^2; at most c max(lambda_i) / 2.

    K(s) is the largest (1/n) sum lambda_i t_i over 0 <= t_i <= c lambda_i with (1/n) sum t_i = s: fill the clients with
    the largest lambda_i first. s ranges over 0 <= s <= c lmax(S) with K(s) <= c P^2.
    """
    steep = np.sort(tops)[::-1]
    ends = np.concatenate([[0.0], np.cumsum(c * steep / len(steep))])
    heights = np.concatenate([[0.0], np.cumsum(c * steep**2 / len(steep))])
    # Clients without data in any coordinate have lambda_i = 0 and add nothing to either side.
    last = min(c * top, float(np.interp(c * second**2, heights, ends)))
    peaks = np.clip(c * steep / 2.0, ends[:-1], ends[1:]).clip(max=last)
    return math.sqrt(max(0.0, float((c * np.interp(peaks, ends, heights) - peaks**2).max())))


def _spread_of_grams(blocks: Sequence[csr_array], second: float) -> float:
    """V, or P >= V where the d x d matrices would be too large."""
    n, d = len(blocks), blocks[0].shape[1]
    if d > DENSE_VARIANCE:
        return second
    weight = n / sum(block.shape[0] for block in blocks)
    total, squares = np.zeros((d, d)), np.zeros((d, d))
    for block in blocks:
        gram = weight * (block.T @ block).toarray()
        total += gram
        squares += gram @ gram
    variance = squares / n - (total / n) @ (total / n)
    return math.sqrt(max(0.0, float(eigvalsh(variance, subset_by_index=[d - 1, d - 1])[0])))


def largest_eigenvalue(B: csr_array) -> float:
    """lmax(B'B), never less: the Gram matrix of the smaller side, or `collatz_wielandt` where both sides are large."""
    if min(B.shape) == 0:
        return 0.0
    if min(B.shape) > DENSE:
        return collatz_wielandt(B)
    gram = (B.T @ B if B.shape[1] <= B.shape[0] else B @ B.T).toarray()
    k = len(gram)
    return max(0.0, float(eigvalsh(gram, subset_by_index=[k - 1, k - 1])[0]))


def collatz_wielandt(B: csr_array, rounds: int = 300) -> float:
    """An upper bound on lmax(B'B) from products alone: max_j (|B|'|B| v)_j / v_j for a positive v.

    Valid for every v > 0; power steps bring it to lmax(|B|'|B|), which is lmax(B'B) for data of one sign. Lanczos would
    approach lmax from below, so that its answer is no bound. Never more than the trace.
    """
    M = abs(B)
    best = float(np.square(B.data).sum())
    v = np.ones(B.shape[1])
    for _ in range(rounds):
        w = M.T @ (M @ v)
        best = min(best, float((w / v).max()))
        if best <= (1.0 + 1e-7) * float(v @ w) / float(v @ v):
            break
        # The floor keeps v positive where a coordinate's share decays to nothing.
        v = np.maximum(w / max(w.max(), 1e-300), 1e-30)
    return best


def rounded_up(value: float) -> float:
    """The value, enlarged by 1e-10 for rounding errors and then to nine digits.

    Nine, so that machines whose linear algebra differs in the last bits still agree on the step size.
    """
    if value == 0.0:
        return 0.0
    enlarged = value * (1.0 + 1e-10)
    unit = 10.0 ** (math.floor(math.log10(enlarged)) - 8)
    return float(f"{math.ceil(enlarged / unit) * unit:.8e}")


def measured_pm(problem: Problem, points: Sequence[Tensor]) -> Constant:
    """The largest L_± seen between consecutive points (`shoal.problems.secants`): an estimate, and a lower bound.

    Raises ConfigError for fewer than two distinct points.
    """
    steps = [(x, y) for x, y in pairwise(points) if not torch.equal(x, y)]
    if not steps:
        raise ConfigError(f"measured_pm got {len(points)} points: it needs two that differ, for instance x^0 and x^1.")
    found = []
    for x, y in steps:
        secant = Secant(x, y)
        for ids in torch.arange(problem.n).split(max(1, 2**22 // problem.d)):  # 4 million coordinates at a time
            secant.add(problem.evaluate(x, ids)[1], problem.evaluate(y, ids)[1])
        found.append(secant.seen() or Seen())
    return Constant(max(seen.pm for seen in found), "estimate")
