"""Grids that start elsewhere in every coordinate: rounding, grid points, and their means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.bits import ADDED
from shoal.kernels.gpu.hosted import hosted
from shoal.kernels.gpu.launch import TILE, headed, launch, tiles
from shoal.kernels.gpu.levels import rounded
from shoal.kernels.gpu.philox import halves, tile_of
from shoal.kernels.gpu.philox import shifts as draw_shifts


def _offsets(offset: Tensor | Draw, d: int) -> Tensor:
    return halves(offset, d)[0].to(torch.int32) if isinstance(offset, Draw) else offset


def encode_strata(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int,
    place: Tensor | Draw,
    shifts: Tensor | Draw,
    steps: int,
    offset: Tensor | Draw,
    head: bool = False,
) -> Tensor:
    place = hosted("places")(place, strata, private.slots) if isinstance(place, Draw) else place
    shifts = draw_shifts(shifts, u.shape[1], strata) if isinstance(shifts, Draw) else shifts
    bits = (levels - 1).bit_length()
    out, body = headed(r, tiles(u.shape[1] * bits, 8), head)
    rounded(u, r, body, private, tie, levels, strata, steps, place, shifts, _offsets(offset, u.shape[1]), bits)
    return out


@triton.jit
def point(code, scale, offset, strata, steps):
    """The grid point of a code, before it is rounded to float32: see reference.strata._points."""
    width, half = strata.to(tl.int64) * 65536, steps.to(tl.int64) * 32768
    at = code.to(tl.int64) * width - offset.to(tl.int64) - half
    return scale.to(tl.float64) * at.to(tl.float64) / half.to(tl.float64)


@triton.jit(do_not_specialize=("strata", "steps"))
def _decode_strata(code, r, offset, out, d, across, strata, steps, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    start = tl.load(offset + j, mask=j < d, other=0)
    value = point(tl.load(code + i * d + j, mask=j < d, other=0), tl.load(r + i), start, strata, steps)
    tl.store(out + i * d + j, value.to(tl.float32), mask=j < d)


def decode_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw) -> Tensor:
    (m, d), across = code.shape, tiles(code.shape[1])
    out = torch.empty((m, d), device=code.device)
    rows = (
        code.contiguous(),
        r.contiguous(),
        _offsets(offset, code.shape[1]).contiguous(),
        out,
        d,
        across,
        strata,
        steps,
    )
    launch(_decode_strata, m * across, out.device, *rows, SIZE=TILE)
    return out


@triton.jit(do_not_specialize=("m", "strata", "steps", "cohort"))
def _mean_strata(code, r, offset, out, m, d, strata, steps, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    start, total = tl.load(offset + j, mask=j < d, other=0), tl.zeros((SIZE,), tl.float64)
    for i in range(m):
        total += point(tl.load(code + j, mask=j < d, other=0), tl.load(r + i), start, strata, steps)
        code += d
    tl.store(out + j, total / cohort.to(tl.float64), mask=j < d)


def mean_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw, cohort: int) -> Tensor:
    m, d = code.shape
    out = torch.empty(d, dtype=torch.float64, device=code.device)
    rows = (
        code.contiguous(),
        r.contiguous(),
        _offsets(offset, code.shape[1]).contiguous(),
        out,
        m,
        d,
        strata,
        steps,
        cohort,
    )
    launch(_mean_strata, tiles(d, ADDED), out.device, *rows, SIZE=ADDED)
    return out
