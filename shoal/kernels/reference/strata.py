"""Grids with an offset of their own at every coordinate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.bits import cells, decided, headed
from shoal.kernels.reference.codes import pack
from shoal.kernels.reference.philox import half_array, places, shift_array, word_array
from shoal.kernels.reference.sums import total_of


def _offsets(offset: Tensor | Draw, d: int) -> Tensor:
    return torch.from_numpy(half_array(offset, d)[0].astype(np.int32)) if isinstance(offset, Draw) else offset


def encode_strata(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int,
    place: Tensor | Draw,
    shifts: Tensor | Draw,
    steps: int,
    offset: Tensor | Draw,
    head: bool = False,
) -> Tensor:
    """(m, ceil(d b / 8)) uint8: each coordinate rounded to a neighbor on a grid of its own, for all rows the same.

    `encode_levels` with `steps` strata in place of (levels - 1) strata over [-r, r], on points that start
    offset_j 2^-16 strata below -r and are `strata` strata apart. offset (d,) is in 0..65535, a draw for it stands for
    its halves(d). Draws for `place` and `shifts`, and `head`, mean what they mean there.
    """
    offset = _offsets(offset, u.shape[1])
    place = places(place, strata, private.slots) if isinstance(place, Draw) else place
    shifts = torch.from_numpy(shift_array(shifts, u.shape[1], strata)) if isinstance(shifts, Draw) else shifts
    cell, frac = cells(u, r, steps)
    y = cell + steps * 32768 + offset.numpy().astype(np.int64)
    spot = place.numpy().astype(np.int64)[:, None] + shifts.numpy().astype(np.int64)
    whole = y // (strata * 65536)
    t = y - whole * (strata * 65536) - (spot % strata) * 65536
    up = decided(half_array(private, u.shape[1]), t, word_array(tie, u.shape[1]), frac)
    code = np.clip(whole + up, 0, levels - 1).astype(np.int64)
    packed = pack(torch.from_numpy(code), (levels - 1).bit_length())
    return headed(r, packed) if head else packed


def _points(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw) -> np.ndarray:
    offset = _offsets(offset, code.shape[1])
    at = code.numpy() * (strata * 65536) - offset.numpy().astype(np.int64) - steps * 32768
    return r.numpy().astype(np.float64)[:, None] * at / (steps * 32768)


def decode_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw) -> Tensor:
    """(m, d) float32 of (m, d) unpacked codes: r_i (code strata 2^16 - offset_j - steps 2^15) / (steps 2^15)."""
    return torch.from_numpy(_points(code, r, strata, steps, offset).astype(np.float32))


def mean_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor | Draw, cohort: int) -> Tensor:
    """(d,) float64: (1/cohort) sum_i of the grid values, from row 0 to row m-1."""
    return torch.from_numpy(total_of(_points(code, r, strata, steps, offset)) / cohort)
