"""Random words, tile by tile in the order of the coordinates: Philox4x32-10 and the layout of `rng.LAYOUT`.

A program draws a tile's words by whole calls of the generator, then puts them in order in registers, so that what
rounds with them is written coordinate by coordinate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.launch import KEY, TILE, key, launch, tiles
from shoal.kernels.reference.philox import FEW_STRATA


@triton.jit
def philox(c0, slot, index, stream, k0, k1):
    """The four words of the calls with counters (c0, slot, index, stream); c0 is a tensor, all are uint32."""
    c1, c2, c3 = tl.zeros_like(c0) + slot, tl.zeros_like(c0) + index, tl.zeros_like(c0) + stream
    for _ in tl.static_range(10):
        low0, high0 = c0 * 0xD2511F53, tl.umulhi(c0, 0xD2511F53)
        low1, high1 = c2 * 0xCD9E8D57, tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def calls(first, slot, index, stream, k0, k1, BLOCKS: tl.constexpr):
    """(BLOCKS, 16, 2, 2) uint32: entry (b, l, p, q) is word 2 p + q of counter first + 16 b + l."""
    c = first + (tl.arange(0, BLOCKS)[:, None] * 16 + tl.arange(0, 16)[None, :])
    w0, w1, w2, w3 = philox(
        c.to(tl.uint32), slot.to(tl.uint32), index.to(tl.uint32), stream.to(tl.uint32), k0.to(tl.uint32),
        k1.to(tl.uint32),
    )  # fmt: skip
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def words_tile(lo, slot, index, stream, k0, k1, SIZE: tl.constexpr):
    """(SIZE,) uint32: the words of coordinates lo .. lo + SIZE - 1; both are multiples of 64."""
    w = calls(lo // 4, slot, index, stream, k0, k1, SIZE // 64)
    return tl.reshape(tl.permute(w, (0, 2, 3, 1)), (SIZE,))


@triton.jit
def halves_tile(lo, slot, index, stream, k0, k1, SIZE: tl.constexpr):
    """(SIZE,) int32: the halves of coordinates lo .. lo + SIZE - 1; both are multiples of 128."""
    w = calls(lo // 8, slot, index, stream, k0, k1, SIZE // 128)
    h = tl.join(w & 0xFFFF, w >> 16)
    return tl.reshape(tl.permute(h, (0, 2, 3, 4, 1)), (SIZE,)).to(tl.int32)


@triton.jit
def tile_of(across):
    """(row, number of the tile in its row), int64, of this program, where a row has `across` tiles."""
    program = tl.program_id(0).to(tl.int64)
    return program // across, program % across


@triton.jit
def below_tile(lo, slot, n, index, stream, k0, k1, SIZE: tl.constexpr):
    """(SIZE,) uint32: floor(word n / 2^32) of coordinates lo .. lo + SIZE - 1."""
    w = words_tile(lo, slot, index, stream, k0, k1, SIZE)
    return tl.umulhi(w, tl.zeros_like(w) + n.to(tl.uint32))


@triton.jit
def shifts_tile(lo, slot, n, index, stream, k0, k1, SIZE: tl.constexpr):
    """(SIZE,) int32: see reference.philox.shifts, n <= FEW_STRATA; words are drawn where one may carry."""
    y = halves_tile(lo, slot, index, stream, k0, k1, SIZE) * n.to(tl.int32)
    if tl.sum(((y & 0xFFFF) + n.to(tl.int32) > 0x10000).to(tl.int32), axis=0) > 0:
        y += below_tile(lo + 0x200000000, slot, n, index, stream, k0, k1, SIZE).to(tl.int32)  # reference.philox.BEYOND
    return y >> 16


@triton.jit(do_not_specialize=(*KEY, "first", "n"))
def _words(out, slots, first, d, across, n, index, stream, k0, k1, WHAT: tl.constexpr, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    lo, slot = first + tile * SIZE, tl.load(slots + i)
    if WHAT == 0:
        tl.store(out + i * d + j, words_tile(lo, slot, index, stream, k0, k1, SIZE).to(tl.int32), mask=j < d)
    elif WHAT == 1:
        tl.store(out + i * d + j, halves_tile(lo, slot, index, stream, k0, k1, SIZE).to(tl.int16), mask=j < d)
    elif WHAT == 2:
        tl.store(out + i * d + j, below_tile(lo, slot, n, index, stream, k0, k1, SIZE).to(tl.int32), mask=j < d)
    else:
        tl.store(out + i * d + j, shifts_tile(lo, slot, n, index, stream, k0, k1, SIZE), mask=j < d)


def _drawn(draw: Draw, first: int, d: int, what: int, n: int = 1) -> Tensor:
    m, across = len(draw.slots), tiles(d)
    out = torch.empty((m, d), dtype=torch.int16 if what == 1 else torch.int32, device=draw.slots.device)
    drawn = (out, draw.slots.contiguous(), first, d, across, n, *key(draw))
    launch(_words, m * across, out.device, *drawn, WHAT=what, SIZE=TILE)
    return out


def words(draw: Draw, d: int) -> Tensor:
    return _drawn(draw, 0, d, 0).view(torch.uint32)


def halves(draw: Draw, d: int) -> Tensor:
    return _drawn(draw, 0, d, 1).view(torch.uint16)


def coins(draw: Draw, odds: int) -> Tensor:
    (high, low), (whole, part) = words(draw, 2).to(torch.int64).unbind(1), divmod(odds, 2**32)
    return (high < whole) | ((high == whole) & (low < part))


def symmetric(draw: Draw, d: int) -> Tensor:
    w = words(draw, d).to(torch.int64) >> 8
    return (2 * w + 1 - 2**24).to(torch.float32) * 2.0**-24


def below(draw: Draw, d: int, n: int) -> Tensor:
    return _drawn(draw, 0, d, 2, n)


def shifts(draw: Draw, d: int, n: int) -> Tensor:
    return _drawn(draw, 0, d, 2 if n > FEW_STRATA else 3, n)


def below_from(draw: Draw, first: int, d: int, n: int) -> Tensor:
    """(m, d) int32: `below` of the coordinates from `first` on, a multiple of 64."""
    return _drawn(draw, first, d, 2, n)
