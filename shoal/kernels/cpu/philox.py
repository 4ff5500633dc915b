"""Random words and what is drawn with them alone: Philox4x32-10 in 64-bit lanes.

One 64-bit multiplication yields both halves of Philox's 32 x 32 product. Blocks of 16 counters are drawn in wide
registers (`drawn`); what stands here in scalars is for single coordinates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.drawn import below_64, below_128, halves_128, halves_256, shifts_256, words_64, words_128
from shoal.kernels.cpu.threads import spread
from shoal.kernels.cpu.vectors import lowest
from shoal.kernels.draw import Draw
from shoal.kernels.reference.philox import BEYOND, FEW_STRATA

TILE = 1024  # coordinates a pass: their random words and flags stay in the first-level cache
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@njit(inline="always")
def copy(values, out):
    """out[:values.size] = values; the slice assignment itself compiles for seconds, error messages included."""
    for j in range(values.size):
        out[j] = values[j]


@njit(inline="always")
def fill_words(out, block, slot, index, stream, k0, k1):
    """out (64 b) uint32: the words of whole blocks of 64 coordinates, from `block` on."""
    draw = (slot, index, stream, k0, k1)
    pairs = out.size // 128
    for b in range(pairs):
        words_128(out, 128 * b, np.uint64((block + 2 * b) * 16), draw)
    if out.size > 128 * pairs:
        words_64(out, 128 * pairs, np.uint64((block + 2 * pairs) * 16), draw)


@njit(inline="always")
def fill_halves(out, block, slot, index, stream, k0, k1):
    """out (128 b) int32: the 16-bit halves of whole blocks of 128 coordinates, from `block` on."""
    draw = (slot, index, stream, k0, k1)
    pairs = out.size // 256
    for b in range(pairs):
        halves_256(out, 256 * b, np.uint64((block + 2 * b) * 16), draw)
    if out.size > 256 * pairs:
        halves_128(out, 256 * pairs, np.uint64((block + 2 * pairs) * 16), draw)


@njit(inline="always")
def fill_below(out, block, draw, n):
    """out (64 b) int32: numbers below n for whole blocks of 64 coordinates, from `block` on."""
    pairs = out.size // 128
    for b in range(pairs):
        below_128(out, 128 * b, np.uint64((block + 2 * b) * 16), draw, np.uint64(n))
    if out.size > 128 * pairs:
        below_64(out, 128 * pairs, np.uint64((block + 2 * pairs) * 16), draw, np.uint64(n))


@njit(inline="always")
def word(j, slot, index, stream, k0, k1):
    """Word j of a stream alone: what a tie asks for."""
    w0, w1, w2, w3 = philox(np.uint64((j // 64) * 16 + j % 16), slot, index, stream, k0, k1)
    w = (j % 64) // 16
    if w == 0:
        return w0
    if w == 1:
        return w1
    return w2 if w == 2 else w3


@njit(inline="always")
def half(j, slot, index, stream, k0, k1):
    """Half j of a stream alone."""
    b, k = j // 128 * 128, j % 128  # of the words of the same call
    w = word(b // 2 + k // 32 * 16 + k % 16, slot, index, stream, k0, k1)
    return (w >> np.uint64(16)) if (k // 16) % 2 else w & np.uint64(0xFFFF)


@njit
def _carried(out, ties, at, first, draw, n):
    """out[at:at+256]: those with a bit in `ties` are drawn again, with their words."""
    slot, index, stream, k0, k1 = draw
    for w in range(8):
        left = np.uint64(ties[w])
        while left:
            k = 32 * w + lowest(left)
            left &= left - np.uint64(1)
            carry = (word(first + k + BEYOND, slot, index, stream, k0, k1) * np.uint64(n)) >> _SHIFT
            product = half(first + k, slot, index, stream, k0, k1) * np.uint64(n)
            out[at + k] = np.int32((product + carry) >> np.uint64(16))


@njit(inline="always")
def fill_shifts(out, at, first, draw, n, ties):
    """out[at:at+256] int32: shifts below n <= FEW_STRATA from coordinate `first` on; ties uint32[8] is for its use."""
    if shifts_256(out, at, np.uint64(first // 8), draw, np.uint16(n), ties):
        _carried(out, ties, at, first, draw, n)


@lru_cache(maxsize=1024)
def unsigned(value: int) -> np.uint64:
    """The number as the compiled loops take it: few different ones are asked for, again and again."""
    return np.uint64(value)


def key(draw: Draw) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """(round, stream, key low, key high) as the compiled loops take them."""
    low, high = draw.seed & 0xFFFFFFFF, draw.seed >> 32
    return unsigned(draw.round & 0xFFFFFFFF), unsigned(draw.stream), unsigned(low), unsigned(high)


def shared_key(draw: Draw) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64, np.uint64]:
    """(slot, round, stream, key low, key high) of the first slot, in most cases the only one."""
    slots = draw.slots
    return unsigned((slots if slots.numel() == 1 else slots[0]).item()), *key(draw)


@njit(cache=True, nogil=True)
def _words(out, slots, index, stream, k0, k1, lo, hi):
    tile = np.empty(64, np.uint32)
    for i in range(out.shape[0]):
        slot, whole = np.uint64(slots[i]), lo + (hi - lo) // 64 * 64
        fill_words(out[i, lo:whole], lo // 64, slot, index, stream, k0, k1)
        if whole < hi:
            fill_words(tile, whole // 64, slot, index, stream, k0, k1)
            copy(tile[: hi - whole], out[i, whole:])


@njit(cache=True, nogil=True)
def _halves(out, slots, index, stream, k0, k1):
    d = out.shape[1]
    tile = np.empty(TILE, np.int32)
    for i in range(out.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            fill_halves(tile[: (count + 127) // 128 * 128], lo // 128, np.uint64(slots[i]), index, stream, k0, k1)
            for j in range(count):
                out[i, lo + j] = np.uint16(tile[j])


@njit(cache=True, nogil=True)
def _below(out, slots, index, stream, k0, k1, n, lo, hi):
    tile = np.empty(64, np.int32)
    for i in range(out.shape[0]):
        draw, whole = (np.uint64(slots[i]), index, stream, k0, k1), lo + (hi - lo) // 64 * 64
        fill_below(out[i, lo:whole], lo // 64, draw, n)
        if whole < hi:
            fill_below(tile, whole // 64, draw, n)
            copy(tile[: hi - whole], out[i, whole:])


@njit(cache=True, nogil=True)
def _shifts(out, slots, index, stream, k0, k1, n, lo, hi):
    tile, ties = np.empty(256, np.int32), np.empty(8, np.uint32)
    for i in range(out.shape[0]):
        row, draw = out[i], (np.uint64(slots[i]), index, stream, k0, k1)
        for at in range(lo, hi, 256):
            if hi - at >= 256:
                fill_shifts(row, at, at, draw, n, ties)
            else:
                fill_shifts(tile, 0, at, draw, n, ties)
                copy(tile[: hi - at], row[at:])


def word_rows(draw: Draw, d: int) -> np.ndarray:
    """`words`, for other kernels."""
    out = ready((len(draw.slots), d), np.uint32)
    spread(_words, (out, draw.slots.numpy(), *key(draw)), d, TILE)
    return out


def words(draw: Draw, d: int) -> Tensor:
    return torch.from_numpy(word_rows(draw, d))


def half_rows(draw: Draw, d: int, dtype: type) -> np.ndarray:
    """`halves`, for other kernels."""
    out = ready((draw.slots.shape[0], d), dtype)
    _halves(out, draw.slots.numpy(), *key(draw))
    return out


def halves(draw: Draw, d: int) -> Tensor:
    return torch.from_numpy(half_rows(draw, d, np.uint16))


def below_rows(draw: Draw, d: int, n: int) -> np.ndarray:
    """`below`, for other kernels."""
    out = ready((len(draw.slots), d), np.int32)
    spread(_below, (out, draw.slots.numpy(), *key(draw), n), d, TILE)
    return out


def below(draw: Draw, d: int, n: int) -> Tensor:
    return torch.from_numpy(below_rows(draw, d, n))


def shift_rows(draw: Draw, d: int, n: int) -> np.ndarray:
    """`shifts`, for other kernels."""
    if n > FEW_STRATA:
        return below_rows(draw, d, n)
    out = ready((len(draw.slots), d), np.int32)
    spread(_shifts, (out, draw.slots.numpy(), *key(draw), n), d, TILE)
    return out


def shifts(draw: Draw, d: int, n: int) -> Tensor:
    return torch.from_numpy(shift_rows(draw, d, n))


@njit(cache=True, nogil=True)
def _coins(out, slots, index, stream, k0, k1, high, low):
    for i in range(out.size):
        slot = np.uint64(slots[i])
        first = word(0, slot, index, stream, k0, k1)
        out[i] = first < high or (first == high and word(1, slot, index, stream, k0, k1) < low)


def coins(draw: Draw, odds: int) -> Tensor:
    out = np.empty(draw.slots.shape[0], np.bool_)
    _coins(out, draw.slots.numpy(), *key(draw), np.uint64(odds >> 32), np.uint64(odds & 0xFFFFFFFF))
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _centered(words, out):
    for i in range(words.shape[0]):
        for j in range(words.shape[1]):
            w = np.int32(words[i, j] >> np.uint32(8))
            out[i, j] = np.float32(np.int32(2 * w + 1 - (1 << 24))) * np.float32(2.0**-24)


def symmetric(draw: Draw, d: int) -> Tensor:
    words = word_rows(draw, d)
    out = words.view(np.float32)
    _centered(words, out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _permutation(out, slot, index, stream, k0, k1):
    w = np.empty((out.size + 63) // 64 * 64, np.uint32)
    fill_words(w, 0, slot, index, stream, k0, k1)
    for t in range(out.size):
        out[t] = t
    for t in range(out.size - 1, 0, -1):
        j = np.int64((np.uint64(w[t]) * np.uint64(t + 1)) >> _SHIFT)
        out[t], out[j] = out[j], out[t]


def permutation(draw: Draw, d: int) -> Tensor:
    out = np.empty(d, np.int64)
    _permutation(out, *shared_key(draw))
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _places(out, slots, n, slot, index, stream, k0, k1):
    order = np.empty(n, np.int64)
    _permutation(order, slot, index, stream, k0, k1)
    for i in range(out.size):
        if not 0 <= slots[i] < n:
            raise IndexError("a slot lies beyond the permutation")
        out[i] = order[slots[i]]


def place_row(draw: Draw, n: int, slots: np.ndarray) -> np.ndarray:
    """`places`, for other kernels."""
    out = np.empty(slots.size, np.int64)
    _places(out, slots, n, *shared_key(draw))
    return out


def places(draw: Draw, n: int, slots: Tensor) -> Tensor:
    return torch.from_numpy(place_row(draw, n, slots.numpy()))


@njit(cache=True, nogil=True)
def _support(out, w, d):
    m, k = out.shape
    taken, one, low = np.zeros((d + 63) // 64, np.uint64), np.uint64(1), np.uint64(63)
    for i in range(m):
        row, own = out[i], w[i]
        for c in range(k):
            t = d - k + c
            j = np.int64((np.uint64(own[c]) * np.uint64(t + 1)) >> _SHIFT)
            j = t if (taken[j >> 6] >> (np.uint64(j) & low)) & one else j
            taken[j >> 6] |= one << (np.uint64(j) & low)
            row[c] = j
        if 256 * k >= d:  # dense enough that reading the whole set in order is cheaper than sorting
            c = 0
            for b in range(taken.size):
                left, taken[b] = taken[b], np.uint64(0)
                while left:
                    row[c] = 64 * b + lowest(left)
                    left &= left - one
                    c += 1
        else:
            for c in range(k):
                taken[row[c] >> 6] = np.uint64(0)
            row.sort()


def support(draw: Draw, d: int, k: int) -> Tensor:
    out = np.empty((len(draw.slots), k), np.int64)
    _support(out, word_rows(draw, k), d)
    return torch.from_numpy(out)
