"""The Hadamard transform, and rotations by it.

A rotation multiplies by its signs in the first pass over memory, one back in the last: what is drawn is a word for 32
coordinates, and only those words stop in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.launch import launch, tiles
from shoal.kernels.gpu.philox import tile_of, words

FIRST, NEXT = 12, 8  # stages a pass: strides 1 .. 2^11 of 4096 neighbors, then eight strides at a time
HELD = 4096  # coordinates a program: a later pass takes HELD / 2^stages neighbors from each of its places


@triton.jit
def turned(x, signs, row, j, count):
    """x with the signs of these coordinates of a row, whose `count` words stand behind one another."""
    word = tl.load(signs + row * count + j // 32)
    return x * tl.where(((word >> (j % 32).to(tl.int32)) & 1) == 1, -1.0, 1.0)


@triton.jit
def _stages(
    u, out, before, after, scale, stride, size, inside, kept, count, before_rows, after_rows,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, LOG: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The butterflies with strides stride, 2 stride, ..., LOG of them: a program has 2^LOG places in its registers.

    Rows of `size` coordinates come from rows of `inside`, filled with zeros, and go to rows of `kept`.
    """
    outer, column = tile_of(stride // COLUMNS)
    place = tl.arange(0, 1 << LOG)[:, None].to(tl.int64) * stride + tl.arange(0, COLUMNS)[None, :]
    start = (outer << LOG) * stride + column * COLUMNS
    row, j = start // size, start % size + place
    x = tl.load(u + row * inside + j, mask=j < inside, other=0.0)
    if BEFORE:
        x = turned(x, before, row % before_rows, j, count)
    x = x * scale
    for stage in tl.static_range(LOG):
        pairs = tl.reshape(x, (1 << (LOG - 1 - stage), 2, COLUMNS << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (1 << LOG, COLUMNS))
    if AFTER:
        x = turned(x, after, row % after_rows, j, count)
    tl.store(out + row * kept + j, x, mask=j < kept)


def _passes(size: int) -> list[tuple[int, int]]:
    """(stride, stages) of each pass over memory; one row of one coordinate is a pass without stages."""
    out, stride = [(1, min(size.bit_length() - 1, FIRST))], 1 << FIRST
    while stride < size:
        out.append((stride, min((size // stride).bit_length() - 1, NEXT)))
        stride <<= NEXT
    return out


def _transform(u: Tensor, size: int, kept: int, before: Tensor | None, after: Tensor | None) -> Tensor:
    """(m, kept) float32: u filled with zeros to `size`, times the signs `before`, transformed, times those `after`."""
    source, m, passes = u.contiguous(), len(u), _passes(size)
    room = torch.empty((m, size), device=u.device) if len(passes) > 1 else source
    none, scale = torch.empty(0, dtype=torch.int32, device=u.device), size**-0.5
    for at, (stride, stages) in enumerate(passes):
        first, last, columns = at == 0, at == len(passes) - 1, min(stride, HELD >> stages)
        out = torch.empty((m, kept), device=u.device) if last else room
        one, other = before if first else None, after if last else None
        signs = [none if x is None else x for x in (one, other)]
        numbers = (scale, stride, size, source.shape[1], out.shape[1], tiles(size, 32), *(len(x) or 1 for x in signs))
        constants = {"BEFORE": one is not None, "AFTER": other is not None, "LOG": stages, "COLUMNS": columns}
        launch(_stages, m * size // (columns << stages), u.device, source, out, *signs, *numbers, **constants)
        source, scale = room, 1.0  # a pass in the middle works in place, and times 1.0 changes no bit
    return out


def hadamard(u: Tensor) -> Tensor:
    return _transform(u, u.shape[1], u.shape[1], None, None)


def _signs(draw: Draw, size: int) -> Tensor:
    """(m or 1, ceil(size / 32)) int32 words of signs."""
    return words(draw, tiles(size, 32)).view(torch.int32)


def rotate(u: Tensor, draws: Sequence[Draw], size: int) -> Tensor:
    for draw in draws:
        u = _transform(u, size, size, _signs(draw, size), None)
    return u


def rotate_back(y: Tensor, draws: Sequence[Draw], d: int) -> Tensor:
    size = y.shape[1]
    for step, draw in reversed(list(enumerate(draws))):
        y = _transform(y, size, size if step else d, None, _signs(draw, size))
    return y
