"""Stochastic rounding to a few points a coordinate, and their means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.bits import ADDED, below, cell_scale, floored, stratum
from shoal.kernels.gpu.launch import KEY, TILE, key, launch, tiles
from shoal.kernels.gpu.packing import pack
from shoal.kernels.gpu.philox import halves_tile, tile_of


@triton.jit(do_not_specialize=(*KEY, "tie", "strata", "levels"))
def _encode_levels(
    u, lift, s, out, slots, place, shifts, d, across, strata, levels, index, stream, tie, k0, k1,
    PLACED: tl.constexpr, SHIFTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i, tile = tile_of(across)
    lo = tile * SIZE
    j = lo + tl.arange(0, SIZE)
    z = (tl.load(u + i * d + j, mask=j < d, other=0.0) * tl.load(lift + i)) * tl.load(s + i)
    cell = floored(z)
    strata = strata.to(tl.int64)
    y = cell + (levels.to(tl.int64) - 1) * strata * 32768
    if PLACED:
        width = strata * 65536
        whole = y // width
        whole = tl.where(whole * width > y, whole - 1, whole)  # Triton's division drops the fraction of -1/2, too
        t = y - whole * width - stratum(tl.load(place + i), shifts, j, d, strata, SHIFTED) * 65536
    else:
        whole, t = y >> 16, y & 65535
    slot = tl.load(slots + i)
    h = halves_tile(lo, slot, index, stream, k0, k1, SIZE).to(tl.int64)
    code = whole + below(h, t, z - cell.to(tl.float32), lo, slot, index, tie, k0, k1, SIZE).to(tl.int64)
    code = tl.minimum(tl.maximum(code, 0), levels.to(tl.int64) - 1)
    tl.store(out + i * d + j, code.to(tl.int16), mask=j < d)


def encode_levels(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | None = None,
    shifts: Tensor | None = None,
) -> Tensor:
    (m, d), across = u.shape, tiles(u.shape[1])
    u, (lift, s) = u.contiguous(), cell_scale(r, (levels - 1) * strata)
    code = torch.empty((m, d), dtype=torch.int16, device=u.device)
    index, stream, k0, k1 = key(private)
    spot = torch.zeros(m, dtype=torch.int64, device=u.device) if place is None else place.contiguous()
    shift = spot if shifts is None else shifts.contiguous()
    rows = (u, lift, s, code, private.slots.contiguous(), spot, shift)
    numbers = (d, across, strata, levels, index, stream, key(tie)[1], k0, k1)
    constants = {"PLACED": strata > 1, "SHIFTED": shifts is not None, "SIZE": TILE}
    launch(_encode_levels, m * across, u.device, *rows, *numbers, **constants)
    return pack(code, (levels - 1).bit_length())


@triton.jit
def _grid(code, scale, levels):
    return scale.to(tl.float64) * (2 * code - (levels - 1)).to(tl.float64) / (levels - 1).to(tl.float64)


@triton.jit(do_not_specialize=("levels",))
def _decode_levels(code, r, out, d, across, levels, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    value = _grid(tl.load(code + i * d + j, mask=j < d, other=0), tl.load(r + i), levels)
    tl.store(out + i * d + j, value.to(tl.float32), mask=j < d)


def decode_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    (m, d), across = code.shape, tiles(code.shape[1])
    out = torch.empty((m, d), device=code.device)
    rows = (code.contiguous(), r.contiguous(), out, d, across, levels)
    launch(_decode_levels, m * across, out.device, *rows, SIZE=TILE)
    return out


@triton.jit(do_not_specialize=("m", "cohort", "levels"))
def _mean_levels(code, r, out, m, d, levels, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float64)
    for i in range(m):
        total += _grid(tl.load(code + j, mask=j < d, other=0), tl.load(r + i), levels)
        code += d
    tl.store(out + j, total / cohort.to(tl.float64), mask=j < d)


def mean_levels(code: Tensor, r: Tensor, levels: int, cohort: int) -> Tensor:
    m, d = code.shape
    out = torch.empty(d, dtype=torch.float64, device=code.device)
    rows = (code.contiguous(), r.contiguous(), out, m, d, levels, cohort)
    launch(_mean_levels, tiles(d, ADDED), out.device, *rows, SIZE=ADDED)
    return out
