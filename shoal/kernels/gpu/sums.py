"""Sums in the reference's order, norms and largest magnitudes.

The lanes of a block are added side by side and each from its first coordinate to its last, so a program has RUNS blocks
at once to fill its threads with. Largest magnitudes need no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels import divided
from shoal.kernels.gpu.bits import ADDED
from shoal.kernels.gpu.launch import TILE, launch, tiles
from shoal.kernels.gpu.philox import tile_of
from shoal.kernels.reference.sums import LANES, SUM_BLOCK

RUNS, STEPS = 8, 8


@triton.jit(do_not_specialize=("m", "runs", "span"))
def _lane_sums(
    u, v, out, m, d, runs, span, ABSOLUTE: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr
):
    run = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    i, first = run // runs, run % runs * span
    last = tl.minimum(first + span, d)
    row, lane = (i * d)[:, None], tl.arange(0, LANES)[None, :]
    lanes = tl.zeros((COUNT, LANES), tl.float64)
    for lo in range(0, span, STEPS * LANES):
        for step in tl.static_range(STEPS):  # loads that wait for no sum
            j = first[:, None] + (lo + step * LANES) + lane
            inside = (i < m)[:, None] & (j < last[:, None])
            x = tl.load(u + row + j, mask=inside, other=0.0).to(tl.float64)
            if ABSOLUTE:
                lanes += tl.abs(x)
            else:
                lanes += x * tl.load(v + row + j, mask=inside, other=0.0).to(tl.float64)
    # A sum of one lane and zeros is that lane; the additions that count are in the loop, from lane 0 on.
    total = tl.zeros((COUNT,), tl.float64)
    for at in tl.static_range(LANES):
        total += tl.sum(tl.where(lane == at, lanes, 0.0), axis=1)
    tl.store(out + run, total, mask=i < m)


@triton.jit(do_not_specialize=("m", "runs"))
def _add_runs(parts, out, m, runs, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float64)
    for run in range(runs):
        total += tl.load(parts + i * runs + run, mask=i < m, other=0.0)
    tl.store(out + i, total, mask=i < m)


def sums(u: Tensor, v: Tensor, absolute: bool = False, block: int = SUM_BLOCK) -> Tensor:
    """(m,) float64: sum_j u_ij v_ij, or sum_j |u_ij|: blocks in their lanes, then the blocks in order."""
    m, d = u.shape
    span, runs = min(d, block), tiles(d, block)
    parts = torch.empty((m, runs), dtype=torch.float64, device=u.device)
    rows = (u.contiguous(), v.contiguous(), parts, m, d, runs, span)
    constants = {"ABSOLUTE": absolute, "COUNT": RUNS, "STEPS": STEPS, "LANES": LANES}
    launch(_lane_sums, tiles(m * runs, RUNS), u.device, *rows, **constants, num_warps=2)
    if runs == 1:
        return parts[:, 0]
    out = torch.empty(m, dtype=torch.float64, device=u.device)
    launch(_add_runs, tiles(m, 32), u.device, parts, out, m, runs, SIZE=32, num_warps=1)
    return out


def norms(u: Tensor) -> Tensor:
    s = sums(u, u).sqrt()
    r = s.float()
    return torch.where(r.double() < s, torch.nextafter(r, torch.full_like(r, float("inf"))), r)


def dots(u: Tensor, v: Tensor) -> Tensor:
    return sums(u, v)


def mean_abs(u: Tensor) -> Tensor:
    return divided(sums(u, u, absolute=True), u.shape[1]).float()


def square_norm(x: Tensor) -> float:
    return float(sums(x[None], x[None])[0])


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


def greatest(u: Tensor) -> float:
    return maxes(u).view(torch.int32).max().view(torch.float32).item() if u.numel() else 0.0


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


def mean_rows(u: Tensor, cohort: int, share: float = 1.0) -> Tensor:
    m, d = u.shape
    total = torch.zeros(d, dtype=torch.float64, device=u.device)
    launch(_add_rows, tiles(d, ADDED), u.device, u.contiguous(), total, m, d, cohort, SIZE=ADDED)
    return divided(total, share).float()
