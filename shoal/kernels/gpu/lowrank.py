"""Products of two thin matrices. Their factors are made on the host: its columns are made orthogonal one by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.gpu.launch import TILE, launch, tiles
from shoal.kernels.gpu.philox import tile_of


@triton.jit(do_not_specialize=("rank",))
def _outer(left, right, out, a, b, rank, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    e = tile * SIZE + tl.arange(0, SIZE)
    row, column = e // b, e % b
    total = tl.zeros((SIZE,), tl.float64)
    for c in range(rank):
        p = tl.load(left + (i * a + row) * rank + c, mask=row < a, other=0.0).to(tl.float64)
        q = tl.load(right + (i * b + column) * rank + c, mask=row < a, other=0.0).to(tl.float64)
        total += p * q
    tl.store(out + i * a * b + e, total.to(tl.float32), mask=row < a)


def outer(left: Tensor, right: Tensor) -> Tensor:
    (m, a, rank), b = left.shape, right.shape[1]
    out, across = torch.empty((m, a, b), device=left.device), tiles(a * b)
    launch(_outer, m * across, out.device, left.contiguous(), right.contiguous(), out, a, b, rank, across, SIZE=TILE)
    return out
