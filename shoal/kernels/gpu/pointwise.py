"""Powers of two: rounding to them, reading them, and their means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.bits import ADDED
from shoal.kernels.gpu.launch import KEY, TILE, constant, headed, inner, key, launch, tiles
from shoal.kernels.gpu.levels import note
from shoal.kernels.gpu.packing import field, store_packed
from shoal.kernels.gpu.philox import tile_of, words_tile


@triton.jit(do_not_specialize=KEY)
def _encode_natural(bits, out, slots, d, width, across, index, stream, k0, k1, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    b = tl.load(bits + i * d + j, mask=j < d, other=0).to(tl.int64)
    noise = words_tile(tile * SIZE, tl.load(slots + i), index, stream, k0, k1, SIZE).to(tl.int64) >> 9
    code = (((b & 0x7FFFFFFF) + noise) >> 23) | tl.where(b < 0, 256, 0)
    first = tile * (SIZE // 8 * 9)
    store_packed(out + i * width + first, tl.where(j < d, code, 0), width - first, 9, SIZE)


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    (m, d), across = u.shape, tiles(u.shape[1])
    out = torch.empty((m, tiles(9 * d, 8)), dtype=torch.uint8, device=u.device)
    rows = (u.contiguous().view(torch.int32), out, private.slots.contiguous(), d, out.shape[1], across, *key(private))
    launch(_encode_natural, m * across, u.device, *rows, SIZE=TILE)
    return out


@triton.jit
def power(code):
    """The power of two that a code of 9 bits names, or 0, float32."""
    return (((code & 255) << 23) | ((code >> 8) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _decode_natural(payload, out, bad, stride, d, width, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * 9)
    code = field(payload + i * stride + first, width - first, 9, SIZE)
    tl.store(out + i * d + j, power(code), mask=j < d)
    note(bad, ((code & 255) == 255) & (j < d))


def decode_natural(payload: Tensor, d: int) -> tuple[Tensor, bool]:
    payload, across = inner(payload), tiles(d)
    out = torch.empty((len(payload), d), device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, out, bad, payload.stride(0), d, tiles(9 * d, 8), across)
    launch(_decode_natural, len(payload) * across, out.device, *rows, SIZE=TILE)
    return out, bool(bad.item())


@triton.jit(do_not_specialize=("m", "cohort"))
def _mean_natural(payload, out, bad, stride, m, d, width, cohort, SIZE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * 9)
    total, worst = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.int32)
    for _ in range(m):
        code = field(payload + first, width - first, 9, SIZE)
        total += power(code).to(tl.float64)
        worst = tl.maximum(worst, code & 255)
        payload += stride
    tl.store(out + j, (total / cohort.to(tl.float64)).to(tl.float32), mask=j < d)
    note(bad, (worst == 255) & (j < d))


def mean_natural(payload: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    payload = inner(payload)
    out = torch.empty(d, device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, out, bad, payload.stride(0), len(payload), d, tiles(9 * d, 8), cohort)
    launch(_mean_natural, tiles(d, ADDED), out.device, *rows, SIZE=ADDED)
    return out, bool(bad.item())


@triton.jit(do_not_specialize=(*KEY, "levels"))
def _encode_natural_levels(
    u, r, top, out, slots, d, width, stride, across, levels, index, stream, k0, k1, BITS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    x = tl.load(u + i * d + j, mask=j < d, other=0.0)
    scale = tl.load(r + i).to(tl.float64)
    t = tl.abs(x.to(tl.float64)) * tl.load(top) / tl.where(scale > 0.0, scale, 1.0)
    t = tl.where(scale > 0.0, t, 0.0)
    bits = t.to(tl.int64, bitcast=True)
    exponent = tl.maximum((bits >> 52) - 1022, 0)  # frexp's, by the bits of a float64 that is never denormal
    mantissa = (bits & 0xFFFFFFFFFFFFF).to(tl.float64) * 2.220446049250313e-16  # 2^-52
    frac = tl.where(exponent > 0, mantissa, t)
    word = words_tile(tile * SIZE, tl.load(slots + i), index, stream, k0, k1, SIZE)
    up = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10 < frac  # 2^-32
    level = tl.minimum(exponent + up.to(tl.int64), levels)
    code = tl.where(j < d, tl.where(x < 0.0, levels - level, levels + level), 0)
    first = tile * (SIZE // 8 * BITS)
    store_packed(out + i * stride + first, code, width - first, BITS, SIZE)


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    (m, d), across, bits = u.shape, tiles(u.shape[1]), (2 * levels).bit_length()
    out, body = headed(r, tiles(d * bits, 8), True)
    rows = (u.contiguous(), r.contiguous(), constant(2.0 ** (levels - 1), u), body, private.slots.contiguous())
    numbers = (d, body.shape[1], out.shape[1], across, levels, *key(private))
    launch(_encode_natural_levels, m * across, u.device, *rows, *numbers, BITS=bits, SIZE=TILE)
    return out


@triton.jit
def scaled_power(code, scale, levels):
    """sign(code - s) r 2^(|code - s| - s) as float32, 0 at s, NaN above 2 s."""
    level = code - levels
    high = tl.where(level < 0, -level, level)
    size = ((high - levels + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    power = tl.where(level == 0, 0.0, tl.where(level < 0, -size, size))
    return tl.where(level > levels, float("nan"), power * scale.to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=("levels",))
def _decode_natural_levels(
    payload, r, out, bad, stride, d, width, across, levels, BITS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * BITS)
    code = field(payload + i * stride + first, width - first, BITS, SIZE)
    tl.store(out + i * d + j, scaled_power(code, tl.load(r + i), levels), mask=j < d)
    note(bad, (code > 2 * levels) & (j < d))


def decode_natural_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    payload, across, bits = inner(payload), tiles(d), (2 * levels).bit_length()
    out = torch.empty((len(payload), d), device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, r.contiguous(), out, bad, payload.stride(0), d, tiles(d * bits, 8), across, levels)
    launch(_decode_natural_levels, len(payload) * across, out.device, *rows, BITS=bits, SIZE=TILE)
    return out, bool(bad.item())


@triton.jit(do_not_specialize=("m", "levels", "cohort"))
def _mean_natural_levels(
    payload, r, out, bad, stride, m, d, width, levels, cohort, BITS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * BITS)
    total, worst = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.int32)
    for i in range(m):
        code = field(payload + first, width - first, BITS, SIZE)
        total += scaled_power(code, tl.load(r + i), levels).to(tl.float64)
        worst = tl.maximum(worst, code)
        payload += stride
    tl.store(out + j, (total / cohort.to(tl.float64)).to(tl.float32), mask=j < d)
    note(bad, (worst > 2 * levels) & (j < d))


def mean_natural_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    payload, bits = inner(payload), (2 * levels).bit_length()
    out = torch.empty(d, device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, r.contiguous(), out, bad)
    numbers = (payload.stride(0), len(payload), d, tiles(d * bits, 8), levels, cohort)
    launch(_mean_natural_levels, tiles(d, ADDED), out.device, *rows, *numbers, BITS=bits, SIZE=ADDED)
    return out, bool(bad.item())
