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
from shoal.kernels.reference.rotation import window

FIRST, NEXT = 12, 8  # stages a pass: strides 1 .. 2^11 of 4096 neighbors, then eight strides at a time
HELD = 4096  # coordinates a program: a later pass takes HELD / 2^stages neighbors from each of its places


@triton.jit
def turned(x, signs, row, j, count):
    """x with the signs of these coordinates of a row, whose `count` words stand behind one another."""
    word = tl.load(signs + row * count + j // 32)
    return x * tl.where(((word >> (j % 32).to(tl.int32)) & 1) == 1, -1.0, 1.0)


@triton.jit
def _stages(
    u, out, before, after, scale, stride, size, start, inside, kept, count, before_rows, after_rows,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, LOG: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The butterflies with strides stride, 2 stride, ..., LOG of them: a program has 2^LOG places in its registers.

    Of the `size` coordinates from `start` on: they come from rows of `inside`, filled with zeros, and go to rows of
    `kept`.
    """
    outer, column = tile_of(stride // COLUMNS)
    place = tl.arange(0, 1 << LOG)[:, None].to(tl.int64) * stride + tl.arange(0, COLUMNS)[None, :]
    first = (outer << LOG) * stride + column * COLUMNS
    row, j = first // size, first % size + place
    at = start + j
    x = tl.load(u + row * inside + at, mask=at < inside, other=0.0)
    if BEFORE:
        x = turned(x, before, row % before_rows, j, count)
    x = x * scale
    for stage in tl.static_range(LOG):
        pairs = tl.reshape(x, (1 << (LOG - 1 - stage), 2, COLUMNS << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (1 << LOG, COLUMNS))
    if AFTER:
        x = turned(x, after, row % after_rows, j, count)
    tl.store(out + row * kept + at, x, mask=at < kept)


def _passes(size: int) -> list[tuple[int, int]]:
    """(stride, stages) of each pass over memory; one row of one coordinate is a pass without stages."""
    out, stride = [(1, min(size.bit_length() - 1, FIRST))], 1 << FIRST
    while stride < size:
        out.append((stride, min((size // stride).bit_length() - 1, NEXT)))
        stride <<= NEXT
    return out


def _transform(u: Tensor, out: Tensor, size: int, before: Tensor | None, after: Tensor | None, start: int = 0) -> None:
    """The coordinates from `start` on of out = `size` of those of u, filled with zeros, times the signs `before`,
    transformed, times those `after`. In place where u is out."""
    m, passes = len(out), _passes(size)
    whole = len(passes) == 1 or out.shape[1] >= start + size
    source, room = u, out if whole else torch.empty((m, size), device=u.device)
    none, scale = torch.empty(0, dtype=torch.int32, device=u.device), size**-0.5
    for at, (stride, stages) in enumerate(passes):
        first, last, columns = at == 0, at == len(passes) - 1, min(stride, HELD >> stages)
        target = out if last else room
        one, other = before if first else None, after if last else None
        signs = [none if x is None else x for x in (one, other)]
        widths = (source.shape[1], target.shape[1])
        numbers = (scale, stride, size, start, *widths, tiles(size, 32), *(len(x) or 1 for x in signs))
        constants = {"BEFORE": one is not None, "AFTER": other is not None, "LOG": stages, "COLUMNS": columns}
        launch(_stages, m * size // (columns << stages), u.device, source, target, *signs, *numbers, **constants)
        source, scale = room, 1.0  # a pass in the middle works in place, and times 1.0 changes no bit


def hadamard(u: Tensor) -> Tensor:
    out = torch.empty(u.shape, device=u.device)
    _transform(u.contiguous(), out, u.shape[1], None, None)
    return out


def _signs(draw: Draw, size: int) -> Tensor:
    """(m or 1, ceil(size / 32)) int32 words of signs."""
    return words(draw, tiles(size, 32)).view(torch.int32)


def rotate(u: Tensor, draws: Sequence[Draw]) -> Tensor:
    y, d = u.clone(memory_format=torch.contiguous_format), u.shape[1]
    h = window(d)
    for step, draw in enumerate(draws):
        _transform(y, y, h, _signs(draw, h), None, step * (d - h))
    return y


def rotate_back(y: Tensor, draws: Sequence[Draw]) -> Tensor:
    u, d = y.clone(memory_format=torch.contiguous_format), y.shape[1]
    h = window(d)
    for step, draw in reversed(list(enumerate(draws))):
        _transform(u, u, h, None, _signs(draw, h), step * (d - h))
    return u


def rotate_padded(u: Tensor, draws: Sequence[Draw], size: int) -> Tensor:
    source, y = u.contiguous(), torch.empty((len(u), size), device=u.device)
    for draw in draws:
        _transform(source, y, size, _signs(draw, size), None)
        source = y
    return y


def rotate_padded_back(y: Tensor, draws: Sequence[Draw], d: int) -> Tensor:
    (m, size), source = y.shape, y.contiguous()
    for step, draw in reversed(list(enumerate(draws))):
        out = torch.empty((m, size if step else d), device=y.device)
        _transform(source, out, size, None, _signs(draw, size))
        source = out
    return source
