"""Values, gradients and Hessian-vector products of the linear autoencoder's losses, client by client.

f_i(D, E) = weight sum over client i's rows a of ||D E a - a||^2, with D (p, r) and E (r, p). With z = E a, y = D'a and
R = D'D, r numbers each, all that the rows give is

    ||D E a - a||^2 = z'R z - 2 z'y + a'a,   grad_D / (2 weight) = D sum z z' - sum a z',
    grad_E / (2 weight) = sum (R z - y) a',

so that the rows may be sparse: a nonzero costs 4 r multiplications. They are held twice, by rows for z and y and by
pairs of columns for the sums over a: neighboring pixels are mostly nonzero together, and a pair reads z once. A
client's sums run in one order, in float64 and on one thread, and nothing else enters: its numbers have the same bits
whatever other clients stand beside it. Derivation: docs/derivations/autoencoder.md.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from shoal.kernels.cpu.combinations import BLOCK, columns_two, gathered, gathered_two, squared, times, turned

__all__ = ["gradients", "products"]

# `unit` is (0,) * r everywhere: a tuple's length is known when the loops are compiled, and they are unrolled by it.


@njit(cache=True, nogil=True)
def _aligned(rows, columns, zero):
    """(rows, columns) of the type of `zero`, from a line of the cache on: else every register loaded touches two."""
    whole = np.full(rows * columns + 16, zero)
    first = (64 - whole.ctypes.data % 64) % 64 // whole.itemsize
    return whole[first : first + rows * columns].reshape(rows, columns)


@njit(cache=True, nogil=True)
def _inner(left, right, at, unit):
    """(r, r): the sum over both tables' rows of column at + a of the left times column at + b of the right."""
    r = len(unit)
    out = np.zeros((r, r))
    for j in range(left.shape[0]):
        for a in range(r):
            v = np.float64(left[j, at + a])
            for b in range(r):
                out[a, b] += v * np.float64(right[j, at + b])
    return out


@njit(cache=True, nogil=True)
def _fill(table, x, unit):
    """table (p, 2 r) = [E'|D] of the flat x = (D, E)."""
    p, r = table.shape[0], len(unit)
    for j in range(p):
        for c in range(r):
            table[j, c], table[j, r + c] = x[p * r + c * p + j], x[j * r + c]


@njit(cache=True, nogil=True)
def _longest(spans, blocks):
    most = 0
    for block in blocks:
        most = max(most, spans[block + 1] - spans[block])
    return most


@njit(cache=True, nogil=True)
def _regularizer(table, R, lam, shared, unit):
    """(lam / 2) ||D E - I||^2; its gradient, lam (D Q - E') and the transpose of lam (R E - D'), written to the table
    shared (p, 2 r), Q = E E'."""
    p, r = table.shape[0], len(unit)
    Q, side, total = _inner(table, table, 0, unit), np.empty(r), float(p)
    for a in range(r):
        for b in range(r):
            total += R[a, b] * Q[b, a]
    for j in range(p):
        for c in range(r):
            total -= 2.0 * np.float64(table[j, c]) * np.float64(table[j, r + c])
        times(table[j], r, Q, side, unit)
        for c in range(r):
            shared[j, c] = lam * (side[c] - np.float64(table[j, c]))
        times(table[j], 0, R, side, unit)
        for c in range(r):
            shared[j, r + c] = lam * (side[c] - np.float64(table[j, r + c]))
    return 0.5 * lam * total


@njit(cache=True, nogil=True)
def gradients(by_rows, by_columns, spans, squares, blocks, x, weight, lam, values, rows, unit, lo, hi):
    """values[i], rows[i] = f_i + (lam / 2) ||D E - I||^2 and its gradient, for the clients blocks[i],
    i in lo..hi-1.

    by_rows = (data, index, indptr): the rows a, of client b those from spans[b] to spans[b + 1]. by_columns = (data,
    row within the client, indptr): two columns side by side, a row of two numbers where either of them is not zero;
    entry b ceil(p / 2) + j of indptr begins columns 2 j and 2 j + 1 of client b. squares[b] = sum a'a over its rows. x
    is the flat (D, E) in float32. values (m,) float64 and rows (m, 2 p r) float32 are written.
    """
    r = len(unit)
    p = x.size // (2 * r)
    data, index, indptr = by_rows
    cdata, cindex, cindptr = by_columns
    even = p + p % 2
    table = _aligned(p, 2 * r, np.float32(0))  # half the memory traffic of float64, and exact: x is float32
    _fill(table, x, unit)
    R, shared, decoder = _inner(table, table, r, unit), _aligned(even, 2 * r, 0.0), _aligned(even, r, 0.0)
    regularizer = _regularizer(table, R, lam, shared, unit)
    decoder[:p] = table[:, r:]
    T, S, side = _aligned(_longest(spans, blocks[lo:hi]), 2 * r, 0.0), _aligned(r, r, 0.0), np.empty(r)
    block, last = _aligned(BLOCK, -(-r // BLOCK) * BLOCK, np.float32(0)), np.empty(2 * r, np.float32)
    for i in range(lo, hi):
        first, total = spans[blocks[i]], squares[blocks[i]]
        S[:] = 0.0
        for row in range(first, spans[blocks[i] + 1]):
            start, end, t = indptr[row], indptr[row + 1], T[row - first]
            gathered(data, index, start, end, table, t, unit)  # z and y
            times(t, 0, R, side, unit)
            squared(t, S, unit)
            for a in range(r):
                total += t[a] * (side[a] - 2.0 * t[r + a])
                t[r + a] = side[a] - t[r + a]
        values[i] = weight * total + regularizer
        out = rows[i]
        for j in range(0, p, 2):
            at, k = (blocks[i] * even + j) // 2, j % BLOCK
            pairs = cdata, cindex, cindptr[at], cindptr[at + 1]
            to, start = (out, j * r) if j + 1 < p else (last, 0)
            columns_two(*pairs, T, decoder[j], S, 2.0 * weight, shared[j], to, start, block[k], unit)
            if k == BLOCK - 2 and j + 1 < p:
                turned(block, out, p * r + j - k, p, unit)
        if p % 2 == 1:
            out[(p - 1) * r : p * r] = last[:r]
        for j in range(p - p % BLOCK, p):
            for c in range(r):
                out[p * r + c * p + j] = block[j % BLOCK, c]


@njit(cache=True, nogil=True)
def products(by_rows, by_columns, spans, blocks, x, V, weight, lam, rows, unit, lo, hi):
    """rows[i] = Hessian of client blocks[i] at x, times V[i] (or V[0], where V is one row), i in lo..hi-1: all float64.

    With a dot for the derivative along V: dot grad_D / (2 weight) = dD sum z z' + D sum (dz z' + z dz') - sum a dz' and
    dot grad_E / (2 weight) = sum (dR z + R dz - dy) a'; the regularizer's part is the same with columns of I for a.
    """
    r = len(unit)
    p = x.size // (2 * r)
    data, index, indptr = by_rows
    cdata, cindex, cindptr = by_columns
    table, moving = np.empty((p, 2 * r), np.float32), np.empty((p, 2 * r))
    _fill(table, x, unit)
    R, Q = _inner(table, table, r, unit), _inner(table, table, 0, unit)
    T, z = np.empty((_longest(spans, blocks[lo:hi]), 2 * r)), np.empty(2 * r)
    lines, side, other = np.empty((2, 2 * r)), np.empty(r), np.empty(r)
    half = 0.5 * lam / weight
    for i in range(lo, hi):
        _fill(moving, V[i if len(V) > 1 else 0], unit)
        dR, dQ = _inner(moving, table, r, unit), _inner(moving, table, 0, unit)
        dR, dQ = dR + dR.T, dQ + dQ.T
        S, U = half * Q, half * dQ
        first = spans[blocks[i]]
        for row in range(first, spans[blocks[i] + 1]):
            start, end, t = indptr[row], indptr[row + 1], T[row - first]
            gathered(data, index, start, end, table, z, unit)
            gathered(data, index, start, end, moving, t, unit)
            times(z, 0, dR, side, unit)
            times(t, 0, R, other, unit)
            for a in range(r):
                t[r + a] = side[a] + other[a] - t[r + a]
                for b in range(r):
                    S[a, b] += z[a] * z[b]
                    U[a, b] += t[a] * z[b] + z[a] * t[b]
        for j in range(p):
            line = lines[j % 2]
            if j % 2 == 0:
                at = (blocks[i] * (p + p % 2) + j) // 2
                gathered_two(cdata, cindex, cindptr[at], cindptr[at + 1], T, lines, unit)
            times(moving[j], r, S, side, unit)
            times(table[j], r, U, other, unit)
            for c in range(r):
                rows[i, j * r + c] = 2.0 * weight * (side[c] + other[c] - line[c] - half * moving[j, c])
            times(table[j], 0, dR, side, unit)
            times(moving[j], 0, R, other, unit)
            for c in range(r):
                part = line[r + c] + half * (side[c] + other[c] - moving[j, r + c])
                rows[i, p * r + c * p + j] = 2.0 * weight * part
