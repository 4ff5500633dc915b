"""The Hadamard transform and its signs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.launch import KEY, key, launch, tiles
from shoal.kernels.gpu.philox import tile_of, words_tile

SIGNS = 4096  # coordinates a program: 128 words of 32 signs
FIRST, NEXT = 12, 8  # stages a pass: strides 1 .. 2^11 of 4096 neighbors, then eight strides at a time
COLUMNS = 16  # neighbors that a later pass takes from each of its 2^8 places


@triton.jit(do_not_specialize=KEY)
def _rademacher(out, slots, d, across, index, stream, k0, k1, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    w = words_tile(tile * (SIZE // 32), tl.load(slots + i), index, stream, k0, k1, SIZE // 32)
    bits = (tl.reshape(w, (SIZE // 32, 1)) >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    tl.store(out + i * d + j, tl.where(tl.reshape(bits, (SIZE,)) == 1, -1.0, 1.0), mask=j < d)


def rademacher(draw: Draw, d: int) -> Tensor:
    m, across = len(draw.slots), tiles(d, SIGNS)
    out = torch.empty((m, d), device=draw.slots.device)
    launch(_rademacher, m * across, out.device, out, draw.slots.contiguous(), d, across, *key(draw), SIZE=SIGNS)
    return out


@triton.jit
def _stages(u, out, scale, stride, LOG: tl.constexpr, COLUMNS: tl.constexpr):
    """The butterflies with strides stride, 2 stride, ..., LOG of them: a program has 2^LOG places in its registers."""
    outer, column = tile_of(stride // COLUMNS)
    place = tl.arange(0, 1 << LOG)[:, None].to(tl.int64) * stride + tl.arange(0, COLUMNS)[None, :]
    at = (outer << LOG) * stride + column * COLUMNS + place
    x = tl.load(u + at) * scale
    for stage in tl.static_range(LOG):
        pairs = tl.reshape(x, (1 << (LOG - 1 - stage), 2, COLUMNS << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (1 << LOG, COLUMNS))
    tl.store(out + at, x)


def hadamard(u: Tensor) -> Tensor:
    m, d = u.shape
    source, out, scale, stride = u.contiguous(), torch.empty((m, d), device=u.device), d**-0.5, 1
    while stride == 1 or stride < d:
        stages = min((d // stride).bit_length() - 1, FIRST if stride == 1 else NEXT)
        columns = min(stride, COLUMNS)
        launch(_stages, m * d // (columns << stages), u.device, source, out, scale, stride, LOG=stages, COLUMNS=columns)
        # A later pass works in place, and times 1.0 changes no bit.
        source, scale, stride = out, 1.0, max(stride << stages, 2)
    return out
