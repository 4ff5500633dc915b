"""Sums in the reference's order, norms and largest magnitudes.

A row's lanes are added side by side and each from its first coordinate to its last, so a program has RUNS rows at once
to fill its threads with. Largest magnitudes need no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.bits import ADDED
from shoal.kernels.gpu.launch import TILE, divided, launch, tiles
from shoal.kernels.gpu.philox import tile_of
from shoal.kernels.reference import LANES

RUNS = 8


@triton.jit
def _lane_sums(u, v, out, m, d, ABSOLUTE: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    lane = tl.arange(0, LANES)[None, :]
    lanes = tl.zeros((COUNT, LANES), tl.float64)
    for lo in range(0, d, LANES):
        j = lo + lane
        inside = (i < m)[:, None] & (j < d)
        x = tl.load(u + i[:, None] * d + j, mask=inside, other=0.0).to(tl.float64)
        if ABSOLUTE:
            lanes += tl.abs(x)
        else:
            lanes += x * tl.load(v + i[:, None] * d + j, mask=inside, other=0.0).to(tl.float64)
    # A sum of one lane and zeros is that lane; the additions that count are in the loop, from lane 0 on.
    total = tl.zeros((COUNT,), tl.float64)
    for at in tl.static_range(LANES):
        total += tl.sum(tl.where(lane == at, lanes, 0.0), axis=1)
    tl.store(out + i, total, mask=i < m)


def _sums(u: Tensor, v: Tensor, absolute: bool = False) -> Tensor:
    """(m,) float64: sum_j u_ij v_ij, or sum_j |u_ij|."""
    m, d = u.shape
    out = torch.empty(m, dtype=torch.float64, device=u.device)
    rows = (u.contiguous(), v.contiguous(), out, m, d)
    launch(_lane_sums, tiles(m, RUNS), u.device, *rows, ABSOLUTE=absolute, COUNT=RUNS, LANES=LANES, num_warps=2)
    return out


def norms(u: Tensor) -> Tensor:
    s = _sums(u, u).sqrt()
    r = s.float()
    return torch.where(r.double() < s, torch.nextafter(r, torch.full_like(r, float("inf"))), r)


def dots(u: Tensor, v: Tensor) -> Tensor:
    return _sums(u, v)


def mean_abs(u: Tensor) -> Tensor:
    return divided(_sums(u, u, absolute=True), u.shape[1]).float()


def square_norm(x: Tensor) -> float:
    return float(_sums(x[None], x[None])[0])


@triton.jit
def _maxes(bits, out, d, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    size = tl.load(bits + i * d + j, mask=j < d, other=0) & 0x7FFFFFFF
    tl.store(out + i * across + tile, tl.max(size, axis=0))


def maxes(u: Tensor) -> Tensor:
    (m, d), across = u.shape, tiles(u.shape[1], 4 * TILE)
    out = torch.empty((m, across), dtype=torch.int32, device=u.device)
    launch(_maxes, m * across, u.device, u.contiguous().view(torch.int32), out, d, across, SIZE=4 * TILE)
    return out.amax(1).view(torch.float32)


@triton.jit(do_not_specialize=("m", "cohort"))
def _add_rows(u, total, m, d, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    sums = tl.load(total + j, mask=j < d, other=0.0)
    for _ in range(m):
        sums += tl.load(u + j, mask=j < d, other=0.0).to(tl.float64)
        u += d
    tl.store(total + j, sums / cohort.to(tl.float64), mask=j < d)


def add_rows(u: Tensor, total: Tensor) -> None:
    m, d = u.shape
    launch(_add_rows, tiles(d, ADDED), u.device, u.contiguous(), total, m, d, 1, SIZE=ADDED)


def mean_rows(u: Tensor, cohort: int) -> Tensor:
    m, d = u.shape
    total = torch.zeros(d, dtype=torch.float64, device=u.device)
    launch(_add_rows, tiles(d, ADDED), u.device, u.contiguous(), total, m, d, cohort, SIZE=ADDED)
    return total
