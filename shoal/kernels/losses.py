"""Values and gradients of the clients' losses: sparse linear models, and the tridiagonal quadratics.

The logistic loss and the squared-sigmoid loss of Gorbunov et al. (MARINA, arXiv:2102.07845) depend on the margin y a'x
alone, so the label is folded into the row: y a stands in place of a. A client's sums run over its own rows in their own
order, on one thread, and nothing else enters: its numbers have the same bits whatever other clients stand beside it.
Sums are float64; a gradient is rounded to float32 once, at the end.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

__all__ = ["logistic", "nonconvex", "tridiagonal"]


@njit(cache=True, nogil=True)
def _margins(data, index, indptr, start, x, out):
    for r in range(out.size):
        lo, hi = indptr[start + r], indptr[start + r + 1]
        # Four running sums: in one, every nonzero would wait for the addition before it (0.87 ms against 0.59 ms).
        a, b, c, e = 0.0, 0.0, 0.0, 0.0
        k = lo
        while k + 3 < hi:
            # Unsigned, so that no test for negative indices is compiled in.
            a += data[k] * x[np.uint32(index[k])]
            b += data[k + 1] * x[np.uint32(index[k + 1])]
            c += data[k + 2] * x[np.uint32(index[k + 2])]
            e += data[k + 3] * x[np.uint32(index[k + 3])]
            k += 4
        while k < hi:
            a += data[k] * x[np.uint32(index[k])]
            k += 1
        out[r] = (a + b) + (c + e)


@njit(cache=True, nogil=True)
def _combine(data, index, indptr, start, slopes, sums):
    sums[:] = 0.0
    for r in range(slopes.size):
        for k in range(indptr[start + r], indptr[start + r + 1]):
            sums[np.uint32(index[k])] += slopes[r] * data[k]


@njit(cache=True, nogil=True)
def _logistic(t):
    """Sum of log(1 + exp(-t)); each margin in t is replaced by its slope -1 / (1 + exp(t))."""
    total = 0.0
    for r in range(t.size):
        # e <= 1, so nothing overflows: log(1 + exp(-t)) = max(-t, 0) + log1p(exp(-|t|)).
        e = math.exp(-abs(t[r]))
        total += max(-t[r], 0.0) + math.log1p(e)
        t[r] = -(e if t[r] > 0.0 else 1.0) / (1.0 + e)
    return total


@njit(cache=True, nogil=True)
def _nonconvex(t):
    """Sum of (1 - s(t))^2, s the sigmoid; each margin in t is replaced by its slope -2 s (1 - s)^2."""
    total = 0.0
    for r in range(t.size):
        e = math.exp(-abs(t[r]))
        # 1 - s is computed as such: as a difference it would lose every digit at large margins.
        near, far = 1.0 / (1.0 + e), e / (1.0 + e)
        s, miss = (near, far) if t[r] > 0.0 else (far, near)
        total += miss * miss
        t[r] = -2.0 * s * miss * miss
    return total


@njit(cache=True, nogil=True)
def _clients(loss, data, index, indptr, first, last, x, scales, shared_value, shared_gradient, values, rows):
    sums = np.empty(x.size)
    for i in range(first.size):
        t = np.empty(last[i] - first[i])
        _margins(data, index, indptr, first[i], x, t)
        values[i] = scales[i] * (_logistic(t) if loss == 0 else _nonconvex(t)) + shared_value
        _combine(data, index, indptr, first[i], t, sums)
        for j in range(x.size):
            rows[i, j] = np.float32(scales[i] * sums[j] + shared_gradient[j])


@njit(cache=True, nogil=True)
def logistic(data, index, indptr, first, last, x, scales, shared_value, shared_gradient, values, rows):
    """values[i], rows[i] = scales[i] * (sum of log(1 + exp(-a'x)) over CSR rows first[i]..last[i]-1), and its gradient.

    data, index, indptr: CSR rows with the label folded in; x (d,), scales (m,) float64.
    shared_value and shared_gradient (d,), the regularizer, are added to every client. values (m,) float64 and rows
    (m, d) float32 are written.
    """
    _clients(0, data, index, indptr, first, last, x, scales, shared_value, shared_gradient, values, rows)


@njit(cache=True, nogil=True)
def nonconvex(data, index, indptr, first, last, x, scales, shared_value, shared_gradient, values, rows):
    """As `logistic`, for the loss (1 - s(a'x))^2 with s the sigmoid."""
    _clients(1, data, index, indptr, first, last, x, scales, shared_value, shared_gradient, values, rows)


@njit(cache=True, nogil=True)
def tridiagonal(x, Tx, quarter, shift, linear, rows):
    """rows[i] = quarter[i] T x + shift x - linear[i] e_1, from x and T x (d,) float64, rounded to float32 once."""
    for i in range(quarter.size):
        for j in range(x.size):
            rows[i, j] = np.float32(quarter[i] * Tx[j] + shift * x[j])
        rows[i, 0] = np.float32(quarter[i] * Tx[0] + shift * x[0] - linear[i])
