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
from shoal.kernels.reference.rotation import window
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


@njit(cache=True, nogil=True)
def small(row, rest, split, own, signed, scale, x):
    """`block` for less than LEAF coordinates."""
    size = x.size
    for j in range(size):
        value = np.float32(0)
        if j < rest.size:
            value = (row[j] if j < split else rest[j]) * scale
        x[j] = -value if signed and (own[j >> 5] >> np.uint32(j & 31)) & 1 else value
    stride = 1
    while stride < size:
        for group in range(0, size, 2 * stride):
            for j in range(group, group + stride):
                a, b = x[j], x[j + stride]
                x[j], x[j + stride] = a + b, a - b
        stride *= 2


@njit(inline="always")
def block(row, rest, split, at, own, signed, scale, x, room):
    """x = the signs, the scale and the stages within it of the coordinates at, ..., at + x.size - 1.

    They are those of `row` up to `split`, of `rest` from there on, and zeros behind its end.
    """
    d, size = rest.size, x.size
    inner = min(size, INNER)
    for o in range(0, size, inner):
        for leaf in range(o, o + inner, LEAF):
            j = at + leaf
            w = j // 32 if signed else 0
            if j + LEAF <= split:
                first_256(row, j, scale, own, w, x, leaf)
            elif split <= j and j + LEAF <= d:
                first_256(rest, j, scale, own, w, x, leaf)
            else:
                room[:] = 0
                for c in range(j, min(j + LEAF, d)):
                    room[c - j] = row[c] if c < split else rest[c]
                first_256(room, 0, scale, own, w, x, leaf)
        _stages(x, o, inner, LEAF)
    _stages(x, 0, size, inner)


@njit(cache=True, nogil=True)
def _blocks(u, rest, split, out, start, size, signs, signed, scale, lo, hi):
    """Blocks lo..hi-1 of all rows' transforms of out[:, start : start + size]; u or rest may be out."""
    width = min(size, BLOCK)
    across, room = size // width, np.empty(LEAF, np.float32)
    for q in range(lo, hi):
        i, at = q // across, q % across * width
        row, other, own = u[i, start:], rest[i, start:], signs[i % signs.shape[0]]
        x = out[i, start + at : start + at + width]
        if size < LEAF:
            small(row, other, split - start, own, signed, scale, x)
        else:
            block(row, other, split - start, at, own, signed, scale, x, room)


@njit(cache=True, nogil=True)
def columns(out, start, size, stride, count, lo, hi):
    """The stages stride, ..., count stride / 2 of out[:, start : start + size]: units lo..hi-1 of COLUMNS columns."""
    units = size // (count * COLUMNS)
    for q in range(lo, hi):
        column = q % units * COLUMNS
        x, first = out[q // units], start + column // stride * count * stride + column % stride
        for c in range(first, first + COLUMNS, 16):
            _radix(x, c, stride, count)


PLAIN = np.zeros((1, LEAF // 32), np.uint32)  # no sign changes


def _transform(
    u: np.ndarray, rest: np.ndarray, split: int, out: np.ndarray, start: int, size: int, signs: np.ndarray | None
) -> None:
    """out[:, start : start + size] = the transform, after the signs, of the same coordinates of the rows: those of u
    up to `split`, of `rest` from there on, and zeros behind. In place where u or rest is out."""
    m, signed, flips = len(out), signs is not None, PLAIN if signs is None else signs
    scale, stride = np.float32(size**-0.5), min(size, BLOCK)
    where = (u, rest, split, out, start, size)
    spread(_blocks, (*where, flips, signed, scale), m * (size // stride), least=LEAST // stride)
    while stride < size:
        count = min(16, size // stride)
        units = m * size // (count * COLUMNS)
        spread(columns, (out, start, size, stride, count), units, least=LEAST // (count * COLUMNS))
        stride *= count


def hadamard(u: Tensor) -> Tensor:
    out, rows = ready(u.shape, np.float32), u.numpy()
    _transform(rows, rows, out.shape[1], out, 0, out.shape[1], None)
    return torch.from_numpy(out)


def sign_words(draw: Draw, size: int) -> np.ndarray:
    return word_rows(draw, -(-size // 32))


def rotate(u: Tensor, draws: Sequence[Draw]) -> Tensor:
    (m, d), rows = u.shape, u.numpy()
    h, out, source = window(d), ready((m, d), np.float32), rows
    for step, draw in enumerate(draws):
        # What the first transform left is in `out`; what it did not take is still in the rows.
        _transform(source, rows, h, out, step * (d - h), h, sign_words(draw, h))
        source = out
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _placed(signs, start, size, words):
    """Rows of words: bits start, ..., start + size - 1 are the first `size` of signs, the others are those of words."""
    mask, shift = np.uint64(0xFFFFFFFF if size >= 32 else (1 << size) - 1), np.uint64(start % 32)
    out = np.empty((max(signs.shape[0], words.shape[0]) if signs.shape[0] else 0, words.shape[1]), np.uint32)
    for i in range(out.shape[0]):
        own, to = signs[i % signs.shape[0]], out[i]
        to[:] = words[i % words.shape[0]]
        for w in range(own.size):
            k, bits, kept = w + start // 32, (np.uint64(own[w]) & mask) << shift, ~(mask << shift)
            to[k] = np.uint32(to[k] & kept | bits & np.uint64(0xFFFFFFFF))
            if k + 1 < to.size:
                to[k + 1] = np.uint32(to[k + 1] & (kept >> np.uint64(32)) | bits >> np.uint64(32))
    return out


@njit(cache=True, nogil=True)
def _flip(y, signs, out, lo, hi):
    for i in range(out.shape[0]):
        x, own, to = y[i], signs[i % signs.shape[0]], out[i]
        for j in range(lo, hi - 15, 16):
            flip_16(x, j, own, j // 16, to, j)
        for j in range(hi - (hi - lo) % 16, hi):
            to[j] = -x[j] if (own[j >> 5] >> np.uint32(j & 31)) & 1 else x[j]


def rotate_back(y: Tensor, draws: Sequence[Draw]) -> Tensor:
    (m, d), source = y.shape, y.numpy()
    h, out, split = window(d), ready((m, d), np.float32), d
    signs = np.zeros((1, -(-d // 32)), np.uint32)
    for step, draw in reversed(list(enumerate(draws))):
        # The signs that follow the second transform are those in front of the first, or in the last pass.
        start = step * (d - h)
        _transform(source, out, split, out, start, h, signs)
        signs = _placed(sign_words(draw, h), start, h, signs)
        split = start
    spread(_flip, (out, signs, out), d, 16, LEAST // max(m, 1))
    return torch.from_numpy(out)


def rotate_padded(u: Tensor, draws: Sequence[Draw], size: int) -> Tensor:
    out, source = ready((len(u), size), np.float32), u.numpy()
    for draw in draws:
        _transform(source, source, source.shape[1], out, 0, size, sign_words(draw, size))
        source = out
    return torch.from_numpy(out)


def rotate_padded_back(y: Tensor, draws: Sequence[Draw], d: int) -> Tensor:
    m, size = y.shape
    turned, source, signs = ready((m, size), np.float32), y.numpy(), None
    for draw in reversed(draws):
        # The signs that follow one transform are those in front of the next.
        _transform(source, source, size, turned, 0, size, signs)
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
