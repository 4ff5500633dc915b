"""Rounding in strata: the exact error, also where clients are absent, and the exact supremum where all clients agree.

Ours, with proofs: docs/derivations/strata.md. n clients on k points cut [-r, r] into N = n (k-1) strata; clients that
agree leave the error that one client alone would have on N + 1 points.
"""

from __future__ import annotations

import math

import numpy as np


def strata_error(z: np.ndarray, step: np.ndarray, strata: int) -> float:
    """E||(1/m) sum_i q_i - (its mean)||^2 of m of `strata` = n clients that round z (m, d), in steps (m,), to integers.

    y = frac(z), c_ijs = clip(n y_ij - s, 0, 1) for s = 0..n-1, X_i = step_i c_i, f = frac(n y). The sum over j of

        (1/(m^2 n)) sum_i step_i^2 f_ij (1 - f_ij) + (n-m)/(m^2 (n-1)) sum_i Var_s(X_ijs)
        + 1/(m (n-1)) sum_i Var_s(X_ijs - (1/m) sum_l X_ljs),

    whichever m clients they are, as long as that does not depend on the round's random numbers. O(m n d).
    """
    m, n = len(z), strata
    y = z - np.floor(z)
    f = n * y - np.floor(n * y)
    agreement = (step[:, None] ** 2 * f * (1.0 - f)).sum() / (m * m * n)
    if n == 1:
        return float(agreement)
    x = np.clip(n * y[:, :, None] - np.arange(n), 0.0, 1.0) * step[:, None, None]  # client, coordinate, stratum
    apart = (x - x.mean(0)).var(axis=2).sum() / (m * (n - 1))
    missing = x.var(axis=2).sum() * (n - m) / (m * m * (n - 1)) if m < n else 0.0
    return float(agreement + missing + apart)


def _is_sum(total: int, d: int) -> bool:
    """Whether `total` >= 0 is a sum of d >= 3 squares: always from four on (Lagrange); three by Legendre's theorem."""
    while total and total % 4 == 0:
        total //= 4
    return d > 3 or total % 8 != 7


def _norms_of_centers(d: int, N: int) -> tuple[int, ...]:
    """Sums W of d squares of numbers whose parity N has not, with the roots nearest to N; d >= 2."""
    odd = 1 - N % 2
    if d == 2:
        p = np.arange(odd, N + 2, 2, dtype=np.int64)
        q = np.floor((np.sqrt(np.maximum(N * N - p * p, 0)) - odd) / 2).astype(np.int64) * 2 + odd
        found = np.concatenate([p * p + q * q, p * p + (q + 2) ** 2])
        return (int(found[np.argmin(np.abs(np.sqrt(found) - N))]),)
    if odd:  # d + 8 (a sum of d triangular numbers), and every number is a sum of three (Gauss)
        below = max(d, N * N - (N * N - d) % 8)
        return below, below + 8
    below, above = N * N // 4, N * N // 4 + 1
    while not _is_sum(below, d):
        below -= 1
    while not _is_sum(above, d):
        above += 1
    return 4 * below, 4 * above


def supremum_norm(d: int, N: int) -> float:
    """sup E||C(u) - u||^2 / ||u||^2 of rounding to N + 1 points over [-||u||, ||u||], exact for every d and N.

    (d - (N - sqrt W)^2) / N^2, where W is that sum of d squares of numbers, odd if N is even and even if N is odd,
    whose root is nearest to N. 2 sqrt(d)/N - 1 for even N and d >= N^2; d/N^2 where W = N^2 is such a sum.
    """
    if d == 1:
        return 0.0
    gap = min(abs(N * N - W) / (N + math.sqrt(W)) for W in _norms_of_centers(d, N))  # |N - sqrt W|
    return (d - gap**2) / N**2


def supremum_max(d: int, N: int) -> float:
    """sup E||C(u) - u||^2 / ||u||^2 of rounding to N + 1 points over [-max|u_j|, max|u_j|], exact for every d and N.

    (d-1) / N^2 for odd N, at one-hot vectors; (sqrt(1 + 4 (d-1)/N^2) - 1) / 2 for even N.
    """
    return (d - 1.0) / N**2 if N % 2 else (math.sqrt(1.0 + 4.0 * (d - 1.0) / N**2) - 1.0) / 2.0
