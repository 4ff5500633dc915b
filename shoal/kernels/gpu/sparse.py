"""Kept coordinates: gathered, scattered, added, and the largest found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.launch import TILE, constant, inner, launch, tiles
from shoal.kernels.gpu.packing import pack, unpack
from shoal.kernels.gpu.philox import tile_of


@triton.jit
def _gather(u, index, pointer, out, d, width, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    c = tile * SIZE + tl.arange(0, SIZE)
    first = tl.load(pointer + i)
    kept = c < tl.load(pointer + i + 1) - first
    j = tl.load(index + first + c, mask=kept, other=0)
    tl.store(out + i * width + c, tl.load(u + i * d + j, mask=kept, other=0.0), mask=c < width)


def gather(u: Tensor, index: Tensor, pointer: Tensor, width: int) -> Tensor:
    (m, d), across = u.shape, tiles(width)
    out = torch.empty((m, width), device=u.device)
    launch(_gather, m * across, u.device, u.contiguous(), index, pointer, out, d, width, across, SIZE=TILE)
    return out


@triton.jit
def _scatter(values, index, pointer, out, scale, stride, d, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    c = tile * SIZE + tl.arange(0, SIZE)
    first = tl.load(pointer + i)
    kept = c < tl.load(pointer + i + 1) - first
    j = tl.load(index + first + c, mask=kept, other=0)
    value = tl.load(values + i * stride + c, mask=kept, other=0.0).to(tl.float64) * tl.load(scale)
    tl.store(out + i * d + j, value.to(tl.float32), mask=kept)


def scatter(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float) -> Tensor:
    values, across = inner(values), tiles(values.shape[1])
    out = torch.zeros((len(values), d), device=values.device)
    rows = (values, index, pointer, out, constant(scale, values), values.stride(0), d, across)
    launch(_scatter, len(values) * across, out.device, *rows, SIZE=TILE)
    return out


@triton.jit
def _add_row(values, index, pointer, out, SIZE: tl.constexpr):
    c = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    first = tl.load(pointer)
    kept = c < tl.load(pointer + 1) - first
    at = out + tl.load(index + first + c, mask=kept, other=0)
    value = tl.load(values + c, mask=kept, other=0.0).to(tl.float64)
    tl.store(at, tl.load(at, mask=kept, other=0.0) + value, mask=kept)


@triton.jit(do_not_specialize=("cohort",))
def _finish(out, scale, d, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.load(out + j, mask=j < d, other=0.0) * tl.load(scale)
    tl.store(out + j, total / cohort.to(tl.float64), mask=j < d)


def mean_sparse(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float, cohort: int) -> Tensor:
    # Row after row, a launch each: a row's coordinates are distinct, so no two programs meet at one sum, and launches
    # run in order. Atomic additions would run in any.
    values = inner(values)
    out = torch.zeros(d, dtype=torch.float64, device=values.device)
    for i in range(len(values)):
        launch(_add_row, tiles(values.shape[1]), out.device, values[i], index, pointer[i:], out, SIZE=TILE)
    launch(_finish, tiles(d), out.device, out, constant(scale, values), d, cohort, SIZE=TILE)
    return out


def topk(u: Tensor, k: int) -> Tensor:
    # The bits of a magnitude are in the magnitudes' order; what ties with the least that is kept comes lowest first.
    size = u.contiguous().view(torch.int32) & 0x7FFFFFFF
    least = size.topk(k, dim=1).values[:, -1:]
    tied = size == least
    room = k - (size > least).sum(1, keepdim=True)
    kept = (size > least) | (tied & (tied.cumsum(1) <= room))
    return kept.nonzero()[:, 1].reshape(len(u), k)


def encode_topk(u: Tensor, k: int) -> Tensor:
    index = topk(u, k)
    return torch.cat([u.gather(1, index).view(torch.uint8), pack(index, (u.shape[1] - 1).bit_length())], 1)


def decode_topk(payload: Tensor, k: int, d: int) -> tuple[Tensor, Tensor, bool]:
    values = payload[:, : 4 * k].clone(memory_format=torch.contiguous_format).view(torch.float32)
    index = unpack(payload[:, 4 * k :], k, (d - 1).bit_length())
    good = (index[:, -1] < d).all() & (index[:, 1:] > index[:, :-1]).all()
    return values, index.reshape(-1), bool(good)
