"""Cutting things into parts that differ by at most one, and treating rows of a few different kinds kind by kind.

What PermK around a quantizer and correlated quantization in groups have in common (docs/derivations/composition.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def cut(total: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes), int64: 0..total-1 in `parts` consecutive parts, the longer ones first."""
    short, longer = divmod(total, parts)
    number = np.arange(parts)
    return number * short + np.minimum(number, longer), short + (number < longer)


def ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index, pointer): row i is start_i, ..., start_i + length_i - 1, at index[pointer[i]:pointer[i+1]]."""
    pointer = np.concatenate([[0], np.cumsum(length)])
    return np.arange(pointer[-1]) + np.repeat(start - pointer[:-1], length), pointer


def alike(*keys: Tensor) -> Iterator[tuple[Tensor | slice, tuple[int, ...]]]:
    """(rows, values) for every combination of the keys, each (m,) int64, that occurs: the rows that share it.

    A kernel takes rows of one length: blocks that differ by one are two calls, and no row is padded.
    """
    found = list(zip(*(key.tolist() for key in keys), strict=True))
    kinds = sorted(set(found))
    for kind in kinds:
        rows = [i for i, values in enumerate(found) if values == kind] if len(kinds) > 1 else []
        yield torch.tensor(rows, device=keys[0].device) if rows else slice(None), kind
