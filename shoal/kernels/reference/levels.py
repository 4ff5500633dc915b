"""Stochastic rounding to a few points a coordinate, packed as it is sent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.bits import cells, decided, headed
from shoal.kernels.reference.codes import pack, pack_trits, unpack, unpack_trits
from shoal.kernels.reference.philox import half_array, places, shift_array, word_array
from shoal.kernels.reference.sums import total_of


def encode_levels(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | Draw | None = None,
    shifts: Tensor | Draw | None = None,
    head: bool = False,
) -> Tensor:
    """(m, ceil(d b / 8)) uint8: each coordinate rounded to a neighbor on `levels` grid points over [-r, r].

    code = floor(y) + [U < frac(y)], y = (u + r) (levels - 1) / (2 r), b = ceil(log2 levels) bits each, with the U of
    `encode_bits`: uniform on [0, 1), and in the stratum (place_i + shifts_j) mod strata of it. With `head`, the four
    bytes of r_i stand before them. Draws stand for what they stand for there.
    """
    place = places(place, strata, private.slots) if isinstance(place, Draw) else place
    shifts = torch.from_numpy(shift_array(shifts, u.shape[1], strata)) if isinstance(shifts, Draw) else shifts
    code = _rounded(u, r, private, tie, levels, strata, place, shifts)
    packed = pack(torch.from_numpy(code), (levels - 1).bit_length())
    return headed(r, packed) if head else packed


def _rounded(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | None = None,
    shifts: Tensor | None = None,
) -> np.ndarray:
    d = u.shape[1]
    cell, frac = cells(u, r, (levels - 1) * strata)
    y = cell + (levels - 1) * strata * 32768
    spot = np.zeros((len(u), 1), np.int64) if place is None else place.numpy().astype(np.int64)[:, None]
    spot = spot + (0 if shifts is None else shifts.numpy().astype(np.int64))
    whole = y // (strata * 65536)
    t = y - whole * (strata * 65536) - (spot % strata) * 65536
    up = decided(half_array(private, d), t, word_array(tie, d), frac)
    return np.clip(whole + up, 0, levels - 1).astype(np.int64)


def _grid(code: Tensor, r: Tensor, levels: int) -> tuple[np.ndarray, bool]:
    c = code.numpy()
    values = r.numpy().astype(np.float64)[:, None] * (2 * c - (levels - 1)) / (levels - 1)
    return np.where(c < levels, values, np.nan), bool((c >= levels).any())


def decode_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    """(m, d) float32 of packed codes: r_i (2 code - (levels - 1)) / (levels - 1), or NaN where code >= levels.

    And whether there is such a code.
    """
    values, beyond = _grid(unpack(payload, d, (levels - 1).bit_length()), r, levels)
    return torch.from_numpy(values.astype(np.float32)), beyond


def mean_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i of the grid values in float64, from row 0 to row m-1. And the same check."""
    values, beyond = _grid(unpack(payload, d, (levels - 1).bit_length()), r, levels)
    return torch.from_numpy((total_of(values) / cohort).astype(np.float32)), beyond


def encode_trits(u: Tensor, r: Tensor, private: Draw, tie: Draw) -> Tensor:
    """(m, 4 + ceil(d/5)) uint8: r_i, then the codes of `encode_levels` for three levels, as `pack_trits` has them."""
    return headed(r, pack_trits(torch.from_numpy(_rounded(u, r, private, tie, 3))))


def decode_trits(payload: Tensor, r: Tensor, d: int) -> tuple[Tensor, bool]:
    """(m, d) float32: r_i (digit - 1), or NaN. And whether a byte is not five digits in base 3, with zeros beyond d."""
    code = unpack_trits(payload, 5 * payload.shape[1])
    values, bad = _grid(code[:, :d], r, 3)
    return torch.from_numpy(values.astype(np.float32)), bad or bool(code[:, d:].any())


def mean_trits(payload: Tensor, r: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i r_i (digit - 1) in float64, from row 0 to row m-1. And the same check."""
    code = unpack_trits(payload, 5 * payload.shape[1])
    values, bad = _grid(code[:, :d], r, 3)
    return torch.from_numpy((total_of(values) / cohort).astype(np.float32)), bad or bool(code[:, d:].any())
