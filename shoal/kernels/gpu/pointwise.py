"""Powers of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.launch import KEY, TILE, key, launch, tiles
from shoal.kernels.gpu.packing import pack
from shoal.kernels.gpu.philox import tile_of, words_tile


@triton.jit(do_not_specialize=KEY)
def _encode_natural(bits, out, slots, d, across, index, stream, k0, k1, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    b = tl.load(bits + i * d + j, mask=j < d, other=0).to(tl.int64)
    noise = words_tile(tile * SIZE, tl.load(slots + i), index, stream, k0, k1, SIZE).to(tl.int64) >> 9
    code = (((b & 0x7FFFFFFF) + noise) >> 23) | tl.where(b < 0, 256, 0)
    tl.store(out + i * d + j, code.to(tl.int16), mask=j < d)


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    (m, d), across = u.shape, tiles(u.shape[1])
    code = torch.empty((m, d), dtype=torch.int16, device=u.device)
    rows = (u.contiguous().view(torch.int32), code, private.slots.contiguous(), d, across, *key(private))
    launch(_encode_natural, m * across, u.device, *rows, SIZE=TILE)
    return pack(code, 9)


def decode_natural(code: Tensor) -> Tensor:
    bits = ((code & 255) << 23) | ((code >> 8) << 31)
    return bits.to(torch.int32).view(torch.float32)


@triton.jit(do_not_specialize=(*KEY, "levels"))
def _encode_natural_levels(
    u, r, top, out, slots, d, across, levels, index, stream, k0, k1, SIZE: tl.constexpr
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
    tl.store(out + i * d + j, tl.where(x < 0.0, levels - level, levels + level).to(tl.int16), mask=j < d)


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    (m, d), across = u.shape, tiles(u.shape[1])
    code = torch.empty((m, d), dtype=torch.int16, device=u.device)
    top = torch.full((1,), 2.0 ** (levels - 1), dtype=torch.float64, device=u.device)
    rows = (u.contiguous(), r.contiguous(), top, code, private.slots.contiguous(), d, across, levels, *key(private))
    launch(_encode_natural_levels, m * across, u.device, *rows, SIZE=TILE)
    return pack(code, (2 * levels).bit_length())


def decode_natural_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    powers = [2.0 ** (level - levels) for level in range(1, levels + 1)]
    table = torch.tensor([-p for p in reversed(powers)] + [0.0] + powers, dtype=torch.float64, device=code.device)
    return (table[code] * r.double()[:, None]).float()
