"""Stochastic rounding to a few points a coordinate, and their means: packed while rounded, read while added.

Five digits a byte do not fit a tile of coordinates: `encode_trits` writes codes down and packs them in a second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.bits import ADDED, below, cell_scale, floored, stratum
from shoal.kernels.gpu.hosted import hosted
from shoal.kernels.gpu.launch import KEY, TILE, headed, inner, key, launch, tiles
from shoal.kernels.gpu.packing import digit, field, pack_trits, store_packed
from shoal.kernels.gpu.philox import halves_tile, tile_of
from shoal.kernels.gpu.philox import shifts as draw_shifts


@triton.jit(do_not_specialize=(*KEY, "tie", "levels", "strata", "steps"))
def _encode_levels(
    u, lift, s, out, slots, place, shifts, offset, d, width, stride, across, levels, strata, steps, index, stream, tie,
    k0, k1, PLACED: tl.constexpr, SHIFTED: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i, tile = tile_of(across)
    lo = tile * SIZE
    j = lo + tl.arange(0, SIZE)
    z = (tl.load(u + i * d + j, mask=j < d, other=0.0) * tl.load(lift + i)) * tl.load(s + i)
    cell = floored(z)
    y = cell + steps.to(tl.int64) * 32768
    if OFFSET:
        y += tl.load(offset + j, mask=j < d, other=0).to(tl.int64)
    if PLACED:
        strata = strata.to(tl.int64)
        at = tl.zeros_like(j) + tl.load(place + i)
        if SHIFTED:
            at += tl.load(shifts + j, mask=j < d, other=0).to(tl.int64)
        span = strata * 65536
        whole = y // span
        whole = tl.where(whole * span > y, whole - 1, whole)  # Triton's division drops the fraction of -1/2, too
        t = y - whole * span - stratum(at, strata) * 65536
    else:
        whole, t = y >> 16, y & 65535
    h = halves_tile(lo, tl.load(slots + i), index, stream, k0, k1, SIZE).to(tl.int64)
    up = below(h, t, z - cell.to(tl.float32), lo, tl.load(slots + i), index, tie, k0, k1, SIZE)
    code = tl.minimum(tl.maximum(whole + up.to(tl.int64), 0), levels.to(tl.int64) - 1)
    if BITS == 0:
        tl.store(out + i * stride + j, code.to(tl.uint8), mask=j < d)
    else:
        first = tile * (SIZE // 8 * BITS)
        store_packed(out + i * stride + first, tl.where(j < d, code, 0), width - first, BITS, SIZE)


def rounded(
    u: Tensor, r: Tensor, out: Tensor, private: Draw, tie: Draw, levels: int, strata: int, steps: int,
    place: Tensor | None, shifts: Tensor | None, offset: Tensor | None, bits: int,
) -> None:  # fmt: skip
    """Write the codes of `reference.encode_strata` into the rows `out`, packed, or as one byte each for bits = 0."""
    (m, d), across, (lift, s) = u.shape, tiles(u.shape[1]), cell_scale(r, steps)
    spot = torch.zeros(m, dtype=torch.int64, device=u.device) if place is None else place.contiguous()
    shift, start = (spot if x is None else x.contiguous() for x in (shifts, offset))
    index, stream, k0, k1 = key(private)
    rows = (u.contiguous(), lift, s, out, private.slots.contiguous(), spot, shift, start)
    numbers = (d, out.shape[1], out.stride(0), across, levels, strata, steps, index, stream, key(tie)[1], k0, k1)
    constants = {"PLACED": strata > 1, "SHIFTED": shifts is not None, "OFFSET": offset is not None, "BITS": bits}
    launch(_encode_levels, m * across, u.device, *rows, *numbers, **constants, SIZE=TILE)


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
    place = hosted("places")(place, strata, private.slots) if isinstance(place, Draw) else place
    shifts = draw_shifts(shifts, u.shape[1], strata) if isinstance(shifts, Draw) else shifts
    bits = (levels - 1).bit_length()
    out, body = headed(r, tiles(u.shape[1] * bits, 8), head)
    rounded(u, r, body, private, tie, levels, strata, (levels - 1) * strata, place, shifts, None, bits)
    return out


def encode_trits(u: Tensor, r: Tensor, private: Draw, tie: Draw) -> Tensor:
    code = torch.empty(u.shape, dtype=torch.uint8, device=u.device)
    rounded(u, r, code, private, tie, 3, 1, 2, None, None, None, 0)
    out, body = headed(r, tiles(u.shape[1], 5), True)
    body.copy_(pack_trits(code))
    return out


# ------------------------------------------------------------------------------------------------ reading
@triton.jit
def note(bad, wrong):
    """Set the flag where something is wrong; programs that do so at once write the same number."""
    if tl.sum(wrong.to(tl.int32), axis=0) > 0:
        tl.store(bad, 1)


@triton.jit
def grid(code, scale, levels):
    """The grid point of a code in float64, NaN where there is none."""
    value = scale.to(tl.float64) * (2 * code - (levels - 1)).to(tl.float64) / (levels - 1).to(tl.float64)
    return tl.where(code < levels, value, float("nan"))


@triton.jit(do_not_specialize=("levels",))
def _decode_levels(
    payload, r, out, bad, stride, d, width, across, levels, BITS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * BITS)
    code = field(payload + i * stride + first, width - first, BITS, SIZE)
    tl.store(out + i * d + j, grid(code, tl.load(r + i), levels).to(tl.float32), mask=j < d)
    note(bad, (code >= levels) & (j < d))


def decode_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    payload, across, bits = inner(payload), tiles(d), (levels - 1).bit_length()
    out = torch.empty((len(payload), d), device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, r.contiguous(), out, bad, payload.stride(0), d, tiles(d * bits, 8), across, levels)
    launch(_decode_levels, len(payload) * across, out.device, *rows, BITS=bits, SIZE=TILE)
    return out, bool(bad.item())


@triton.jit(do_not_specialize=("m", "levels", "cohort"))
def _mean_levels(
    payload, r, out, bad, stride, m, d, width, levels, cohort, BITS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * BITS)
    total, worst = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.int32)
    for i in range(m):
        code = field(payload + first, width - first, BITS, SIZE)
        total += grid(code, tl.load(r + i), levels)
        worst = tl.maximum(worst, code)
        payload += stride
    tl.store(out + j, (total / cohort.to(tl.float64)).to(tl.float32), mask=j < d)
    note(bad, (worst >= levels) & (j < d))


def mean_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    payload, bits = inner(payload), (levels - 1).bit_length()
    out = torch.empty(d, device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    numbers = (payload.stride(0), len(payload), d, tiles(d * bits, 8), levels, cohort)
    launch(
        _mean_levels, tiles(d, ADDED), out.device, payload, r.contiguous(), out, bad, *numbers, BITS=bits, SIZE=ADDED
    )
    return out, bool(bad.item())


@triton.jit
def trit(code, scale):
    """r (digit - 1) in float64, NaN for a digit of 3."""
    return tl.where(code < 3, scale.to(tl.float64) * (code - 1).to(tl.float64), float("nan"))


@triton.jit
def _decode_trits(payload, r, out, bad, stride, d, count, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    code = digit(payload + i * stride, j, count)
    tl.store(out + i * d + j, trit(code, tl.load(r + i)).to(tl.float32), mask=j < d)
    note(bad, (code == 3) | ((code > 0) & (j >= d)))


def decode_trits(payload: Tensor, r: Tensor, d: int) -> tuple[Tensor, bool]:
    payload, count = inner(payload), 5 * payload.shape[1]
    out = torch.empty((len(payload), d), device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, r.contiguous(), out, bad, payload.stride(0), d, count, tiles(count))
    launch(_decode_trits, len(payload) * tiles(count), out.device, *rows, SIZE=TILE)
    return out, bool(bad.item())


@triton.jit(do_not_specialize=("m", "cohort"))
def _mean_trits(payload, r, out, bad, stride, m, d, count, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total, worst = tl.zeros((SIZE,), tl.float64), tl.zeros((SIZE,), tl.int32)
    for i in range(m):
        code = digit(payload, j, count)
        total += trit(code, tl.load(r + i))
        worst = tl.maximum(worst, code)
        payload += stride
    tl.store(out + j, (total / cohort.to(tl.float64)).to(tl.float32), mask=j < d)
    note(bad, (worst == 3) | ((worst > 0) & (j >= d)))


def mean_trits(payload: Tensor, r: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    payload, count = inner(payload), 5 * payload.shape[1]
    out = torch.empty(d, device=payload.device)
    bad = torch.zeros(1, dtype=torch.int32, device=payload.device)
    rows = (payload, r.contiguous(), out, bad, payload.stride(0), len(payload), d, count, cohort)
    launch(_mean_trits, tiles(count, ADDED), out.device, *rows, SIZE=ADDED)
    return out, bool(bad.item())
