"""Rounding in strata: the exact error, also where clients are absent, and the exact supremum where all clients agree.

Ours, with proofs: docs/derivations/strata.md. n clients on k points cut [-r, r] into N = n (k-1) strata; clients that
agree leave the error that one client alone would have on N + 1 points.
"""

from __future__ import annotations

import math

import numpy as np

WORDS = 1 << 17  # float64 numbers that the sums over strata hold at a time


def strata_error(z: np.ndarray, step: np.ndarray, strata: int) -> float:
    """E||(1/m) sum_i q_i - (its mean)||^2 of m of `strata` = n clients that round z (m, d), in steps (m,), to integers.

    The sum of `strata_errors` over the coordinates.
    """
    return float(strata_errors(z, step, strata).sum())


def strata_errors(z: np.ndarray, step: np.ndarray, strata: int) -> np.ndarray:
    """(d,): y = frac(z), c_ijs = clip(n y_ij - s, 0, 1) for s = 0..n-1, X_i = step_i c_i, f = frac(n y), and of each j

        (1/(m^2 n)) sum_i step_i^2 f_ij (1 - f_ij) + (n-m)/(m^2 (n-1)) sum_i Var_s(X_ijs)
        + 1/(m (n-1)) sum_i Var_s(X_ijs - (1/m) sum_l X_ljs),

    whichever m clients of n they are, as long as that does not depend on the round's random numbers. O((m + n) d).
    """
    m, n = len(z), strata
    rounding, alone, apart = _strata_sums(z, step, n)
    if n == 1:
        return rounding
    return rounding / (m * m * n) + alone * ((n - m) / (m * m * (n - 1))) + apart / (m * (n - 1))


def drawn_errors(u: np.ndarray, z: np.ndarray, step: np.ndarray, size: int) -> np.ndarray:
    """(d,): E((1/r) sum q_i - ubar)^2 over uniformly drawn cohorts of r = `size` of the m clients, with r strata.

    q_i - u_i is the step times the rounding of z. With V_j the variance of the u_ij over the clients, of each j

        1/(r^2 m) sum_i step_i^2 f_ij (1 - f_ij) + 1/(r (m-1)) sum_i Var_s(X_ijs - Xbar_js) + (m-r)/(r (m-1)) V_j.

    Proof: docs/derivations/strata.md.
    """
    m, r = len(z), size
    rounding, _, apart = _strata_sums(z, step, r)
    if m == 1:
        return rounding
    return rounding / (r * r * m) + (apart + (m - r) * u.var(axis=0)) / (r * (m - 1))


def _strata_sums(z: np.ndarray, step: np.ndarray, strata: int) -> np.ndarray:
    """(3, d): the sums over clients of step^2 f (1-f), of Var_s(X_i) and of Var_s(X_i - Xbar).

    Exact but for 1e-15 step^2: where all clients are that near to grid points, z itself says no more.
    """
    m, d = z.shape
    width, found = max(1, WORDS // (m + strata)), np.empty((3, d))
    for j in range(0, d, width):
        found[:, j : j + width] = _sums(z[:, j : j + width], step[:, None], strata)
    return found


def _sums(z: np.ndarray, step: np.ndarray, n: int) -> np.ndarray:
    """X_i is 1, then f at one stratum, then 0: its squares have closed forms, and sum_i X_i is a running sum of jumps.

    Of X_i - X_0 throughout: clients that agree would cancel to nothing otherwise. Any client 0 will do, as
    sum_i Var_s(X_i - X_0) is at most 2 (m+1) times sum_i Var_s(X_i - Xbar).
    """
    y = z - np.floor(z)
    whole = np.floor(n * y)
    f = n * y - whole
    g = f * (1.0 - f)
    # sum_s (c_i - c_0)^2; in one stratum as the square that it is, so that nothing cancels
    apart = np.where(whole == whole[0], (f - f[0]) ** 2, n * np.abs(y - y[0]) - g - g[0])
    square = n * y - g  # sum_s c_i^2
    apart = step * step[0] * apart + (step - step[0]) * (step * square - step[0] * square[0])
    apart = apart / n - (step * y - step[0] * y[0]) ** 2
    spread = apart.sum(0) - _sums_variance(whole.astype(np.int64), f, step, n) / len(z)
    return np.stack([(step**2 * g).sum(0), (step**2 * (y * (1.0 - y) - g / n)).sum(0), spread])


def _sums_variance(whole: np.ndarray, f: np.ndarray, step: np.ndarray, n: int) -> np.ndarray:
    """(d,): Var_s(sum_i (X_i - X_0))."""
    m, d = whole.shape
    weight = np.repeat(step, d, axis=1)
    weight[0] -= m * step[0]
    at = (whole * d + np.arange(d)).ravel()
    jumps = np.bincount(at, weight.ravel(), (n + 1) * d).reshape(n + 1, d)
    total = np.bincount(at, (weight * f).ravel(), (n + 1) * d).reshape(n + 1, d)[:n]
    total += np.cumsum(jumps[:0:-1], axis=0)[::-1]  # whoever has `whole` > s has all of stratum s
    return np.asarray(total.var(axis=0))


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
