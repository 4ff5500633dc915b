"""Stochastic rounding to one bit a coordinate, and its means."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.hosted import hosted
from shoal.kernels.gpu.launch import KEY, TILE, headed, inner, key, launch, tiles
from shoal.kernels.gpu.philox import below_tile, halves_tile, shifts_tile, tile_of, words_tile
from shoal.kernels.reference.bits import LIFT, TINY
from shoal.kernels.reference.philox import FEW_STRATA

ADDED = 512  # coordinates a program that adds rows: each waits for its sums, so there are more of them


def cell_scale(r: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(lift, s), each (m,) float32, with cell = floor((u lift) s): see reference.bits.cells."""
    lift = torch.where((r > 0) & (r < float(TINY)), float(LIFT), 1.0)
    safe = torch.where(r == 0, 1.0, r * lift)
    return lift, torch.where(r == 0, 0.0, torch.full_like(r, steps * 32768) / safe)


@triton.jit
def floored(z):
    """floor(z) as int64. Triton's own floor takes denormals for zeros when it is compiled: -1e-40 would give 0."""
    whole = z.to(tl.int64)
    return tl.where(whole.to(tl.float32) > z, whole - 1, whole)


@triton.jit
def below(h, t, frac, lo, slot, index, tie, k0, k1, SIZE: tl.constexpr):
    """U < (t + frac) / 2^16, see reference.bits.decided; second words are drawn where a coordinate ties."""
    out = h < t
    tied = h == t
    if tl.sum(tied.to(tl.int32), axis=0) > 0:
        v = (words_tile(lo, slot, index, tie, k0, k1, SIZE) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        out = out | (tied & (v < frac))
    return out


@triton.jit
def stratum(p, strata):
    """(place + shift) mod strata of their sum, int64: both are below strata."""
    return tl.where(p >= strata, p - strata, p)


@triton.jit
def packed_flags(flags, SIZE: tl.constexpr):
    """(SIZE / 8,) uint8 of (SIZE,) flags, least significant bit first."""
    eights = tl.reshape(flags.to(tl.int32), (SIZE // 8, 8)) << tl.arange(0, 8)[None, :]
    return tl.sum(eights, axis=1).to(tl.uint8)


GIVEN, DRAWN, FEW = 1, 2, 3  # the shifts of the strata: a tensor, or numbers that a program draws, among few as well


@triton.jit(do_not_specialize=(*KEY, "tie", "strata", "shared_index", "shared_stream", "shared_k0", "shared_k1"))
def _encode_bits(
    u, lift, s, out, slots, place, shifts, d, width, stride, across, strata, index, stream, tie, k0, k1, shared_index,
    shared_stream, shared_k0, shared_k1, SHIFTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i, tile = tile_of(across)
    lo = tile * SIZE
    j = lo + tl.arange(0, SIZE)
    z = (tl.load(u + i * d + j, mask=j < d, other=0.0) * tl.load(lift + i)) * tl.load(s + i)
    cell = floored(z)
    at = tl.zeros_like(j) + tl.load(place + i)
    if SHIFTED == 1:
        at += tl.load(shifts + j, mask=j < d, other=0).to(tl.int64)
    elif SHIFTED == 2:
        lot = below_tile(lo, tl.load(shifts), strata, shared_index, shared_stream, shared_k0, shared_k1, SIZE)
        at += lot.to(tl.int64)
    elif SHIFTED == 3:
        lot = shifts_tile(lo, tl.load(shifts), strata, shared_index, shared_stream, shared_k0, shared_k1, SIZE)
        at += lot.to(tl.int64)
    strata = strata.to(tl.int64)
    t = cell + (strata * 32768 - stratum(at, strata) * 65536)
    slot = tl.load(slots + i)
    h = halves_tile(lo, slot, index, stream, k0, k1, SIZE).to(tl.int64)
    bits = below(h, t, z - cell.to(tl.float32), lo, slot, index, tie, k0, k1, SIZE) & (j < d)
    b = lo // 8 + tl.arange(0, SIZE // 8)
    tl.store(out + i * stride + b, packed_flags(bits, SIZE), mask=b < width)


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
    place = hosted("places")(place, strata, private.slots) if isinstance(place, Draw) else place
    (m, d), across, drawn = u.shape, tiles(u.shape[1]), isinstance(shifts, Draw)
    (lift, s), (out, body) = cell_scale(r, strata), headed(r, tiles(d, 8), head)
    rows = (u.contiguous(), lift, s, body, private.slots.contiguous(), place.contiguous())
    numbers = (d, body.shape[1], out.shape[1], across, strata)
    index, stream, k0, k1 = key(private)
    shift = place if shifts is None else shifts.slots if drawn else shifts
    lot = (shift.contiguous(), *numbers, index, stream, key(tie)[1], k0, k1, *key(shifts if drawn else private))
    what = (DRAWN if strata > FEW_STRATA else FEW) if drawn else GIVEN if shifts is not None else 0
    launch(_encode_bits, m * across, u.device, *rows, *lot, SHIFTED=what, SIZE=TILE)
    return out


def encode_within(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor | Draw, shifts: Tensor | Draw | None
) -> tuple[Tensor, bool]:
    return encode_bits(u, r, private, tie, strata, place, shifts), bool((u.abs() <= r[:, None]).all())


def read_scales(payload: Tensor, gain: float) -> tuple[Tensor, bool]:
    r = payload[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32)[:, 0]
    good = (r >= 0) & (r.double() * gain <= torch.finfo(torch.float32).max)
    return r, bool(good.all())


@triton.jit
def _sign_bits(u, out, d, width, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    b = tile * (SIZE // 8) + tl.arange(0, SIZE // 8)
    flags = tl.load(u + i * d + j, mask=j < d, other=-1.0) >= 0.0
    tl.store(out + i * width + b, packed_flags(flags, SIZE), mask=b < width)


def sign_bits(u: Tensor) -> Tensor:
    m, d = u.shape
    out = torch.empty((m, tiles(d, 8)), dtype=torch.uint8, device=u.device)
    launch(_sign_bits, m * tiles(d), u.device, u.contiguous(), out, d, out.shape[1], tiles(d), SIZE=TILE)
    return out


@triton.jit
def signs(payload, j, d):
    """1.0 where the bit of coordinate j is set, -1.0 where not: a factor, since 0 - r would lose the sign of zero."""
    byte = tl.load(payload + j // 8, mask=j < d, other=0).to(tl.int32)
    return tl.where(((byte >> (j % 8).to(tl.int32)) & 1) == 1, 1.0, -1.0)


@triton.jit
def _decode_bits(payload, r, out, stride, d, across, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    tl.store(out + i * d + j, signs(payload + i * stride, j, d) * tl.load(r + i), mask=j < d)


def decode_bits(payload: Tensor, r: Tensor, d: int) -> Tensor:
    payload, across = inner(payload), tiles(d)
    values = torch.empty((len(payload), d), device=payload.device)
    rows = (payload, r.contiguous(), values, payload.stride(0), d, across)
    launch(_decode_bits, len(payload) * across, values.device, *rows, SIZE=TILE)
    return values


@triton.jit(do_not_specialize=("m", "cohort"))
def _mean_bits(payload, r, out, stride, m, d, cohort, SIZE: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float64)
    for i in range(m):
        total += signs(payload, j, d).to(tl.float64) * tl.load(r + i).to(tl.float64)
        payload += stride
    tl.store(out + j, (total / cohort.to(tl.float64)).to(tl.float32), mask=j < d)


def mean_bits(payload: Tensor, r: Tensor, d: int, cohort: int) -> Tensor:
    payload = inner(payload)
    mean = torch.empty(d, device=payload.device)
    rows = (payload, r.contiguous(), mean, payload.stride(0), len(payload), d, cohort)
    launch(_mean_bits, tiles(d, ADDED), mean.device, *rows, SIZE=ADDED)
    return mean
