"""Coordinates dealt round among parts, block by block. The shifts, one a block, are drawn once; nothing is listed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.bits import ADDED
from shoal.kernels.gpu.launch import TILE, constant, inner, launch, tiles
from shoal.kernels.gpu.philox import below, below_from, tile_of


def _shifts(draw: Draw, parts: int, d: int) -> Tensor:
    """(blocks,) int32, of the draw's first row."""
    return below(draw._replace(slots=draw.slots[:1]), tiles(d, parts), parts)[0]


def dealt_lengths(draw: Draw, part: Tensor, parts: int, d: int) -> Tensor:
    whole, left = divmod(d, parts)
    first = whole // 64 * 64
    last = below_from(draw._replace(slots=draw.slots[:1]), first, 64, parts)[0, whole - first]
    return whole + ((part - last) % parts < left).long()


@triton.jit
def place(shifts, part, b, blocks, parts):
    """Where in d coordinates the one that the part has of block b stands."""
    t = part - tl.load(shifts + b, mask=b < blocks, other=0).to(tl.int64)
    return b * parts + tl.where(t < 0, t + parts, t)


@triton.jit
def _gather_dealt(u, shifts, part, out, d, blocks, parts, width, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    b = tile * SIZE + tl.arange(0, SIZE)
    j = place(shifts, tl.load(part + i), b, blocks, parts)
    value = tl.load(u + i * d + j, mask=(b < blocks) & (j < d), other=0.0)
    tl.store(out + i * width + b, value, mask=b < width)


def gather_dealt(u: Tensor, draw: Draw, part: Tensor, parts: int, width: int) -> Tensor:
    (m, d), across = u.shape, tiles(width)
    out = torch.empty((m, width), device=u.device)
    rows = (u.contiguous(), _shifts(draw, parts, d), part.contiguous(), out, d, tiles(d, parts), parts, width, across)
    launch(_gather_dealt, m * across, u.device, *rows, SIZE=TILE)
    return out


@triton.jit
def _scatter_dealt(values, shifts, part, out, scale, stride, d, blocks, parts, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    b = tile * SIZE + tl.arange(0, SIZE)
    j = place(shifts, tl.load(part + i), b, blocks, parts)
    there = (b < blocks) & (j < d)
    value = tl.load(values + i * stride + b, mask=there, other=0.0).to(tl.float64) * tl.load(scale)
    tl.store(out + i * d + j, value.to(tl.float32), mask=there)


def scatter_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float) -> Tensor:
    values, blocks, across = inner(values), tiles(d, parts), tiles(d, parts * TILE)
    out = torch.zeros((len(values), d), device=values.device)
    rows = (values, _shifts(draw, parts, d), part.contiguous(), out, constant(scale, values))
    launch(
        _scatter_dealt, len(values) * across, out.device, *rows, values.stride(0), d, blocks, parts, across, SIZE=TILE
    )
    return out


@triton.jit(do_not_specialize=("most", "cohort"))
def _mean_dealt(values, shifts, order, first, out, scale, stride, d, parts, most, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    b = j // parts
    owner = j - b * parts + tl.load(shifts + b, mask=j < d, other=0)
    owner = tl.where(owner >= parts, owner - parts, owner)
    at, end = tl.load(first + owner, mask=j < d, other=0), tl.load(first + owner + 1, mask=j < d, other=0)
    total = tl.zeros((SIZE,), tl.float64)
    for turn in range(most):
        sent = at + turn < end
        row = tl.load(order + at + turn, mask=sent, other=0)
        total += tl.load(values + row * stride + b, mask=sent, other=0.0).to(tl.float64)
    tl.store(out + j, (total * tl.load(scale) / cohort.to(tl.float64)).to(tl.float32), mask=j < d)


def mean_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float, cohort: int) -> Tensor:
    # A coordinate is added by one thread, over the rows of its part: these stand together, in ascending order.
    values, (sorted_parts, order) = inner(values), part.sort(stable=True)
    first = torch.searchsorted(sorted_parts, torch.arange(parts + 1, device=part.device))
    most = int(first.diff().max())
    out = torch.empty(d, device=values.device)
    rows = (values, _shifts(draw, parts, d), order, first, out, constant(scale, values), values.stride(0))
    launch(_mean_dealt, tiles(d, ADDED), out.device, *rows, d, parts, most, cohort, SIZE=ADDED)
    return out
