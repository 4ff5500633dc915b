"""Which coordinates a client sends, as a list or dealt round by shared shifts; parts that differ by at most one.

What PermK, RandK, quantizers around them and correlated quantization in groups have in common
(docs/derivations/composition.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal import kernels
from shoal.kernels import Draw


class Listed(NamedTuple):
    """Row i keeps coordinates[pointer[i]:pointer[i+1]] of d."""

    coordinates: Tensor
    pointer: Tensor
    d: int

    def lengths(self) -> Tensor:
        """(m,) int64: how many coordinates each row keeps."""
        return self.pointer.diff()

    def gather(self, u: Tensor, width: int) -> Tensor:
        """(m, width) float32: what is kept of each row, then zeros."""
        return kernels.of(u).gather(u, self.coordinates, self.pointer, width)

    def scatter(self, values: Tensor, scale: float) -> Tensor:
        """(m, d) float32: scale times the values where they belong, zero elsewhere."""
        return kernels.of(values).scatter(values, self.coordinates, self.pointer, self.d, scale)

    def mean(self, values: Tensor, scale: float, cohort: int) -> Tensor:
        """(d,) float32: (scale/cohort) sum_i of the rows, added in float64."""
        return kernels.of(values).mean_sparse(values, self.coordinates, self.pointer, self.d, scale, cohort).float()


class Dealt(NamedTuple):
    """Coordinate j belongs to part (j + s_b) mod parts, with one shared shift s_b for its block b = floor(j / parts).

    s_b = floor(word_b parts / 2^32) is uniform on 0..parts-1. A part has one coordinate of every block, and one of the
    last, if that is cut short, or none. Row i keeps those of its part, ascending; nothing is listed.
    """

    draw: Draw
    part: Tensor  # (m,) int64
    parts: int
    d: int

    def lengths(self) -> Tensor:
        """(m,) int64: floor(d / parts), or one more for the d mod parts parts that have one of the last block."""
        return kernels.of(self.part).dealt_lengths(self.draw, self.part, self.parts, self.d)

    def gather(self, u: Tensor, width: int) -> Tensor:
        """(m, width) float32: what is kept of each row, then zeros."""
        return kernels.of(u).gather_dealt(u, self.draw, self.part, self.parts, width)

    def scatter(self, values: Tensor, scale: float) -> Tensor:
        """(m, d) float32: scale times the values where they belong, zero elsewhere."""
        return kernels.of(values).scatter_dealt(values, self.draw, self.part, self.parts, self.d, scale)

    def mean(self, values: Tensor, scale: float, cohort: int) -> Tensor:
        """(d,) float32: (scale/cohort) sum_i of the rows, added in float64."""
        return kernels.of(values).mean_dealt(values, self.draw, self.part, self.parts, self.d, scale, cohort)


def dealt_bound(constant: Callable[[int], float], d: int, parts: int) -> float:
    """sup of sum_j E constant(length of the part that has j) a_j^2 / ||a||^2, with `constant` any function of lengths.

    A coordinate of a whole block says nothing of its part's length; one of the last, cut short, says that it is the
    longer one (docs/derivations/composition.md).
    """
    short, longer = divmod(d, parts)
    if longer == 0:
        return constant(short)
    more = constant(short + 1)
    return max(((parts - longer) * constant(short) + longer * more) / parts, more)


@lru_cache(maxsize=64)
def cut(total: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes), int64: 0..total-1 in `parts` consecutive parts, the longer ones first. Not to be written to."""
    short, longer = divmod(total, parts)
    number = np.arange(parts)
    return number * short + np.minimum(number, longer), short + (number < longer)


ALL = slice(None)


def alike(*keys: Tensor) -> Iterator[tuple[Tensor | slice, tuple[int, ...]]]:
    """(rows, values) for every combination of the keys, each (m,) int64, that occurs: the rows that share it.

    A kernel takes rows of one length: blocks that differ by one are two calls, and no row is padded. Where all rows are
    alike, `ALL` stands for them.
    """
    found = list(zip(*(key.tolist() for key in keys), strict=True))
    kinds = sorted(set(found))
    for kind in kinds:
        rows = [i for i, values in enumerate(found) if values == kind] if len(kinds) > 1 else []
        yield torch.tensor(rows, device=keys[0].device) if rows else ALL, kind


def taken(x: Tensor, rows: Tensor | slice, width: int) -> Tensor:
    """The first `width` columns of these rows, contiguous: x itself, if it is that."""
    some = x if rows is ALL else x[rows]
    return (some if some.shape[1] == width else some[:, :width]).contiguous()
