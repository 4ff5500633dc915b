"""Rotations by random signs and Hadamard transforms, and scalar products.

The bits are those of scaling first and then stages of butterflies with strides 1, 2, 4, ...: any grouping of the same
additions. Eight stages are done in registers, four more in the first-level cache and four in the second; what is left
are passes over memory, four stages each. Signs and the padding cost no pass of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.philox import word_rows
from shoal.kernels.cpu.sums import added_lanes
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import add_products, first_256, flip_16, radix_2, radix_4, radix_8, radix_16
from shoal.kernels.draw import Draw
from shoal.kernels.reference.sums import SUM_BLOCK

LEAF, INNER, BLOCK = 256, 4096, 65536  # coordinates in registers, in the first-level cache, in the second-level cache
COLUMNS = 2048  # of a pass over memory, a unit of work


@njit(inline="always")
def _radix(x, i, stride, count):
    if count == 16:
        radix_16(x, i, stride)
    elif count == 8:
        radix_8(x, i, stride)
    elif count == 4:
        radix_4(x, i, stride)
    else:
        radix_2(x, i, stride)


@njit(inline="always")
def _stages(x, o, size, stride):
    """All stages from `stride` on, of x[o:o+size] in place."""
    while stride < size:
        count = min(16, size // stride)
        for group in range(o, o + size, count * stride):
            for c in range(group, group + stride, 16):
                _radix(x, c, stride, count)
        stride *= count


@njit(inline="always")
def block(row, at, own, signed, scale, x, room):
    """x = the signs, the scale and the stages within it of row[at : at + x.size]; zeros behind the row's end."""
    d, size = row.size, x.size
    inner = min(size, INNER)
    for o in range(0, size, inner):
        for leaf in range(o, o + inner, LEAF):
            j = at + leaf
            w = j // 32 if signed else 0
            if j + LEAF <= d:
                first_256(row, j, scale, own, w, x, leaf)
            else:
                room[:] = 0
                for c in range(j, d):
                    room[c - j] = row[c]
                first_256(room, 0, scale, own, w, x, leaf)
        _stages(x, o, inner, LEAF)
    _stages(x, 0, size, inner)


@njit(cache=True, nogil=True)
def _blocks(u, out, signs, signed, scale, lo, hi):
    """Blocks lo..hi-1 of all rows: signs, scale, and the stages within the block. u may be out."""
    size = min(out.shape[1], BLOCK)
    across, room = out.shape[1] // size, np.empty(LEAF, np.float32)
    for q in range(lo, hi):
        i, at = q // across, q % across * size
        block(u[i], at, signs[i % signs.shape[0]], signed, scale, out[i, at : at + size], room)


@njit(cache=True, nogil=True)
def columns(out, stride, count, lo, hi):
    """The stages stride, ..., count stride / 2: units lo..hi-1 of COLUMNS columns of all rows."""
    units = out.shape[1] // (count * COLUMNS)
    for q in range(lo, hi):
        column = q % units * COLUMNS
        x, start = out[q // units], column // stride * count * stride + column % stride
        for c in range(start, start + COLUMNS, 16):
            _radix(x, c, stride, count)


@njit(cache=True, nogil=True)
def small(u, out, signs, signed, scale):
    """Rows shorter than LEAF."""
    m, size = out.shape
    for i in range(m):
        x, own = out[i], signs[i % signs.shape[0]]
        for j in range(size):
            value = u[i, j] * scale if j < u.shape[1] else np.float32(0)
            x[j] = -value if signed and (own[j >> 5] >> np.uint32(j & 31)) & 1 else value
        stride = 1
        while stride < size:
            for group in range(0, size, 2 * stride):
                for j in range(group, group + stride):
                    a, b = x[j], x[j + stride]
                    x[j], x[j + stride] = a + b, a - b
            stride *= 2


PLAIN = np.zeros((1, LEAF // 32), np.uint32)  # no sign changes


def _transform(u: np.ndarray, out: np.ndarray, signs: np.ndarray | None) -> None:
    """out = the transform of the rows of u, padded and with signs; in place if out is u."""
    (m, size), signed, flips = out.shape, signs is not None, PLAIN if signs is None else signs
    scale = np.float32(size**-0.5)
    if size < LEAF:
        small(u, out, flips, signed, scale)
        return
    block = min(size, BLOCK)
    spread(_blocks, (u, out, flips, signed, scale), m * (size // block), least=LEAST // block)
    stride = block
    while stride < size:
        count = min(16, size // stride)
        spread(columns, (out, stride, count), m * size // (count * COLUMNS), least=LEAST // (count * COLUMNS))
        stride *= count


def hadamard(u: Tensor) -> Tensor:
    out = ready(u.shape, np.float32)
    _transform(u.numpy(), out, None)
    return torch.from_numpy(out)


def sign_words(draw: Draw, size: int) -> np.ndarray:
    return word_rows(draw, -(-size // 32))


def rotate(u: Tensor, draws: Sequence[Draw], size: int) -> Tensor:
    out, source = ready((len(u), size), np.float32), u.numpy()
    for draw in draws:
        _transform(source, out, sign_words(draw, size))
        source = out
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _flip(y, signs, out, lo, hi):
    for i in range(out.shape[0]):
        x, own, to = y[i], signs[i % signs.shape[0]], out[i]
        for j in range(lo, hi - 15, 16):
            flip_16(x, j, own, j // 16, to, j)
        for j in range(hi - (hi - lo) % 16, hi):
            to[j] = -x[j] if (own[j >> 5] >> np.uint32(j & 31)) & 1 else x[j]


def rotate_back(y: Tensor, draws: Sequence[Draw], d: int) -> Tensor:
    m, size = y.shape
    turned, source, signs = ready((m, size), np.float32), y.numpy(), None
    for draw in reversed(draws):
        # The signs that follow one transform are those in front of the next.
        _transform(source, turned, signs)
        source, signs = turned, sign_words(draw, size)
    out = turned if d == size else ready((m, d), np.float32)
    spread(_flip, (turned, signs, out), d, 16, LEAST // max(m, 1))
    return torch.from_numpy(out)


@njit(inline="always")
def piece(a, b, first, lanes):
    """sum_j a_j b_j over at most SUM_BLOCK coordinates from `first` on."""
    last = min(a.size, first + SUM_BLOCK)
    lanes[:] = 0.0
    for j in range(first, last - 63, 64):
        add_products(a, j, b, j, lanes)
    for j in range(last - (last - first) % 64, last):
        lanes[j % 16] += np.float64(a[j]) * np.float64(b[j])
    return added_lanes(lanes)


@njit(cache=True, nogil=True)
def _dots(u, v, out, lo, hi):
    """out[q] for pieces lo..hi-1 of all rows."""
    pieces, lanes = (u.shape[1] + SUM_BLOCK - 1) // SUM_BLOCK, np.empty(16)
    for q in range(lo, hi):
        out[q] = piece(u[q // pieces], v[q // pieces], q % pieces * SUM_BLOCK, lanes)


@njit(cache=True, nogil=True)
def add_pieces(sums):
    """(m,): the sums of the rows' pieces, in their order."""
    out = np.empty(sums.shape[0])
    for i in range(out.size):
        out[i] = sums[i, 0]
        for p in range(1, sums.shape[1]):
            out[i] += sums[i, p]
    return out


def dots(u: Tensor, v: Tensor) -> Tensor:
    m, d = u.shape
    sums = np.empty((m, -(-d // SUM_BLOCK)))
    spread(_dots, (u.numpy(), v.numpy(), sums.reshape(-1)), sums.size, least=LEAST // SUM_BLOCK)
    return torch.from_numpy(add_pieces(sums))
