"""Stochastic rounding to one bit a coordinate, signs, and their means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.philox import half_array, places, shift_array, word_array
from shoal.kernels.reference.sums import total_of

TINY = np.float32(2.0**-80)  # below this scale a row is multiplied by LIFT first, so that no quotient overflows
LIFT = np.float32(2.0**60)


def cells(u: Tensor, r: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(floor(z), frac(z)) of z = u 2^15 steps / r: coordinates on [-r, r] in units of 2^-16 of an interval 2r / steps.

    The product keeps its relative accuracy in u (no 1/2 is added in floating point): with the 40 bits of `decided`,
    |bias| <= (2^-23 + 2^-48) |u_j| + 2^-40 (2 r / steps), see docs/derivations/compressors.md.
    """
    r_ = r.numpy()
    lift = np.where((r_ > 0) & (r_ < TINY), LIFT, np.float32(1))
    safe = np.where(r_ == 0, np.float32(1), r_ * lift)
    s = np.where(r_ == 0, np.float32(0), np.float32(steps * 32768) / safe)
    z = (u.numpy() * lift[:, None]) * s[:, None]
    cell = np.floor(z)
    return cell.astype(np.int64), z - cell


def decided(h: np.ndarray, t: np.ndarray, tie: np.ndarray, frac: np.ndarray) -> np.ndarray:
    """U < (t + frac) / 2^16, with U = (h + v) / 2^16 and v from the second word, which matters only where h = t."""
    v = (tie >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return (h < t) | ((h == t) & (v < frac))


def encode_bits(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    strata: int,
    place: Tensor | Draw,
    shifts: Tensor | Draw | None,
    head: bool = False,
) -> Tensor:
    """(m, ceil(d/8)) uint8, least significant bit first: bit = [U < y], y = (u + r) / (2 r), |u| <= 2 r at most.

    U_ij = (place_ij + u_ij) / strata with place_ij = (place_i + shifts_j) mod strata and u_ij private, uniform on
    [0, 1) with 40 bits. strata = 1 is independent rounding. A row with r = 0 gives fair bits.
    Draws stand for shifts(draw, d, strata), which a kernel may draw piece by piece, and places(place, strata, slots)
    with the slots of `private`. With `head` a row starts with r_i, little-endian.
    """
    d = u.shape[1]
    cell, frac = cells(u, r, strata)
    shifts = torch.from_numpy(shift_array(shifts, d, strata)) if isinstance(shifts, Draw) else shifts
    place = places(place, strata, private.slots) if isinstance(place, Draw) else place
    spot = place.numpy().astype(np.int64)[:, None] + (0 if shifts is None else shifts.numpy().astype(np.int64))
    t = cell + strata * 32768 - (spot % strata) * 65536
    bits = decided(half_array(private, d), t, word_array(tie, d), frac)
    code = np.packbits(bits, axis=1, bitorder="little")
    scale = r.numpy().astype("<f4").view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(np.hstack([scale, code]) if head else code)


def encode_within(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor | Draw, shifts: Tensor | Draw | None
) -> tuple[Tensor, bool]:
    """`encode_bits`, and whether every |u_ij| <= r_i: of a NaN it is not. If not, the bits stand for nothing."""
    within = u.abs() <= r[:, None]
    kept = torch.where(within, u, torch.zeros_like(u))
    return encode_bits(kept, r, private, tie, strata, place, shifts), bool(within.all())


def _signs(payload: Tensor, d: int) -> np.ndarray:
    return 2.0 * np.unpackbits(payload.numpy(), axis=1, count=d, bitorder="little") - 1.0


def decode_bits(payload: Tensor, r: Tensor, d: int) -> Tensor:
    """(m, d) float32: r_i where the bit is set, -r_i where not."""
    return torch.from_numpy((_signs(payload, d) * r.numpy()[:, None]).astype(np.float32))


def mean_bits(payload: Tensor, r: Tensor, d: int, cohort: int) -> Tensor:
    """(d,) float32: (1/cohort) sum_i (±r_i), in float64 from row 0 to row m-1, then rounded."""
    total = total_of(_signs(payload, d) * r.numpy()[:, None].astype(np.float64))
    return torch.from_numpy((total / cohort).astype(np.float32))


def read_scales(payload: Tensor, gain: float) -> tuple[Tensor, bool]:
    """(m,) float32: the scales that rows begin with, little-endian; and whether none is negative, and `gain` times each
    is finite in float32."""
    r = payload.numpy()[:, :4].copy().view("<f4")[:, 0]
    with np.errstate(over="ignore"):
        good = (r >= 0) & (r.astype(np.float64) * gain <= np.finfo(np.float32).max)
    return torch.from_numpy(r), bool(good.all())


def headed(r: Tensor, code: Tensor) -> Tensor:
    return torch.cat([r[:, None].contiguous().view(torch.uint8), code], 1)


def sign_bits(u: Tensor) -> Tensor:
    """(m, ceil(d/8)) uint8, least significant bit first: set where u_ij >= 0, that is for zeros of both signs."""
    return torch.from_numpy(np.packbits(u.numpy() >= 0, axis=1, bitorder="little"))
