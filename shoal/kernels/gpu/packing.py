"""Streams of b-bit numbers, and five numbers 0..2 a byte. Every byte, and every number, is one thread's own work.

Numbers of at most 16 bits never stop in memory: kernels that round put them in bytes themselves (`store_packed`), and
those that read take them from there (`field`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.launch import TILE, inner, launch, tiles
from shoal.kernels.gpu.philox import tile_of


@triton.jit
def store_packed(out, code, left, BITS: tl.constexpr, SIZE: tl.constexpr):
    """Store SIZE numbers < 2^BITS, zero beyond the row's end, from this byte on, where `left` bytes are left."""
    eights = tl.reshape(code.to(tl.int32), (SIZE // 8, 8))  # eight numbers take BITS bytes
    for t in tl.static_range(BITS):
        up = tl.arange(0, 8)[None, :] * BITS - 8 * t
        bits = tl.where(
            up >= 0, eights << tl.minimum(tl.maximum(up, 0), 8), eights >> tl.minimum(tl.maximum(-up, 0), 31)
        )
        b = tl.arange(0, SIZE // 8) * BITS + t
        tl.store(out + b, tl.sum(bits & 255, axis=1).to(tl.uint8), mask=b < left)


@triton.jit
def field(payload, left, BITS: tl.constexpr, SIZE: tl.constexpr):
    """(SIZE,) int32: the numbers of BITS <= 16 bits from this byte on, where `left` bytes are left; zeros behind."""
    at = tl.arange(0, SIZE) * BITS
    value = tl.zeros((SIZE,), tl.int32)
    for t in tl.static_range((BITS + 6) // 8 + 1):
        b = (at >> 3) + t
        value |= tl.load(payload + b, mask=b < left, other=0).to(tl.int32) << (8 * t)
    return (value >> (at & 7)) & ((1 << BITS) - 1)


@triton.jit
def digit(payload, j, count):
    """Digit j of a row of `count`: 0..2, or 3 where the byte is not five digits in base 3; zeros behind."""
    byte = tl.load(payload + j // 5, mask=j < count, other=0).to(tl.int32)
    rest = byte
    for t in tl.static_range(4):
        rest = tl.where(j % 5 > t, rest // 3, rest)
    return tl.where(byte < 243, rest % 3, 3)


@triton.jit
def _pack(values, out, count, width, across, BITS: tl.constexpr, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    b = tile * SIZE + tl.arange(0, SIZE)
    first = b * 8 // BITS
    byte = tl.zeros((SIZE,), tl.int64)
    for t in tl.static_range((BITS + 6) // BITS + 1):  # as many values as can reach into one byte
        j = first + t
        value = tl.load(values + i * count + j, mask=(j < count) & (b < width), other=0).to(tl.int64)
        up = j * BITS - b * 8
        byte |= tl.where(up >= 0, value << tl.minimum(tl.maximum(up, 0), 8), value >> tl.maximum(-up, 0)) & 255
    tl.store(out + i * width + b, byte.to(tl.uint8), mask=b < width)


def pack(values: Tensor, bits: int) -> Tensor:
    m, count = values.shape
    width = tiles(count * bits, 8)
    out = torch.empty((m, width), dtype=torch.uint8, device=values.device)
    if bits:
        rows = (values.contiguous(), out, count, width, tiles(width))
        launch(_pack, m * tiles(width), out.device, *rows, BITS=bits, SIZE=TILE)
    return out


@triton.jit
def _unpack(payload, out, stride, count, width, across, BITS: tl.constexpr, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    value = tl.zeros((SIZE,), tl.int64)
    for t in tl.static_range((BITS + 6) // 8 + 1):
        b = j * BITS // 8 + t
        byte = tl.load(payload + i * stride + b, mask=(j < count) & (b < width), other=0).to(tl.int64)
        up = b * 8 - j * BITS
        value |= tl.where(up >= 0, byte << tl.maximum(up, 0), byte >> tl.maximum(-up, 0))
    tl.store(out + i * count + j, value & ((1 << BITS) - 1), mask=j < count)


def unpack(payload: Tensor, count: int, bits: int) -> Tensor:
    payload, m = inner(payload), len(payload)
    out = torch.zeros((m, count), dtype=torch.int64, device=payload.device)
    if bits:
        rows = (payload, out, payload.stride(0), count, tiles(count * bits, 8), tiles(count))
        launch(_unpack, m * tiles(count), out.device, *rows, BITS=bits, SIZE=TILE)
    return out


@triton.jit
def _pack_trits(code, out, d, width, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    b = tile * SIZE + tl.arange(0, SIZE)
    byte = tl.zeros((SIZE,), tl.int64)
    for t in tl.static_range(5):
        j = 5 * b + 4 - t
        byte = 3 * byte + tl.load(code + i * d + j, mask=j < d, other=0).to(tl.int64)
    tl.store(out + i * width + b, byte.to(tl.uint8), mask=b < width)


def pack_trits(code: Tensor) -> Tensor:
    (m, d), width = code.shape, tiles(code.shape[1], 5)
    out = torch.empty((m, width), dtype=torch.uint8, device=code.device)
    launch(_pack_trits, m * tiles(width), out.device, code.contiguous(), out, d, width, tiles(width), SIZE=TILE)
    return out


@triton.jit
def _unpack_trits(payload, out, stride, count, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    tl.store(out + i * count + j, digit(payload + i * stride, j, count).to(tl.int64), mask=j < count)


def unpack_trits(payload: Tensor, count: int) -> Tensor:
    payload, m = inner(payload), len(payload)
    out = torch.empty((m, count), dtype=torch.int64, device=payload.device)
    rows = (payload, out, payload.stride(0), count, tiles(count))
    launch(_unpack_trits, m * tiles(count), out.device, *rows, SIZE=TILE)
    return out
