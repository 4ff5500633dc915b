"""The nearest of a few points, and signs, with what the scale is made of: two passes, codes and then sums in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.gpu.bits import decode_bits, sign_bits
from shoal.kernels.gpu.launch import TILE, inner, launch, tiles
from shoal.kernels.gpu.packing import field, store_packed
from shoal.kernels.gpu.philox import tile_of
from shoal.kernels.gpu.rotation import rotate_padded, rotate_padded_back
from shoal.kernels.gpu.sums import dots, sums
from shoal.kernels.reference.turned import Part, Steps, read_in_steps, sent_in_steps


def encode_signs(y: Tensor) -> tuple[Tensor, Tensor]:
    return sign_bits(y), sums(y, y, absolute=True)


def rotate_signs(u: Tensor, draws: Sequence[Draw], size: int) -> tuple[Tensor, Tensor, Tensor]:
    return *encode_signs(rotate_padded(u, draws, size)), dots(u, u)


@triton.jit
def _encode_points(y, factor, edges, table, out, near, d, width, across, BITS: tl.constexpr, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    z = tl.load(y + i * d + j, mask=j < d, other=0.0).to(tl.float64) * tl.load(factor + i)
    code = tl.zeros((SIZE,), tl.int32)
    for step in tl.static_range(BITS):  # the number of edges below z, its highest bit first
        more = code + (1 << (BITS - 1 - step))
        code = tl.where(tl.load(edges + more - 1) < z, more, code)
    tl.store(near + i * d + j, tl.load(table + code), mask=j < d)
    first = tile * (SIZE // 8 * BITS)
    store_packed(out + i * width + first, tl.where(j < d, code, 0), width - first, BITS, SIZE)


def encode_points(y: Tensor, factor: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    (m, d), across, bits = y.shape, tiles(y.shape[1]), (len(table) - 1).bit_length()
    out = torch.empty((m, tiles(d * bits, 8)), dtype=torch.uint8, device=y.device)
    table = table.contiguous()
    y, near, edges = y.contiguous(), torch.empty((m, d), device=y.device), (table[1:].double() + table[:-1]) / 2
    rows = (y, factor.contiguous(), edges, table, out, near, d, out.shape[1], across)
    launch(_encode_points, m * across, y.device, *rows, BITS=bits, SIZE=TILE)
    return out, dots(y, near)


@triton.jit
def _decode_points(payload, scale, table, out, stride, d, width, across, BITS: tl.constexpr, SIZE: tl.constexpr):
    i, tile = tile_of(across)
    j = tile * SIZE + tl.arange(0, SIZE)
    first = tile * (SIZE // 8 * BITS)
    code = field(payload + i * stride + first, width - first, BITS, SIZE)
    tl.store(out + i * d + j, tl.load(table + code) * tl.load(scale + i), mask=j < d)


def decode_points(payload: Tensor, scale: Tensor, table: Tensor, d: int) -> Tensor:
    payload, across, bits = inner(payload), tiles(d), (len(table) - 1).bit_length()
    out = torch.empty((len(payload), d), device=payload.device)
    rows = (payload, scale.contiguous(), table.contiguous(), out, payload.stride(0), d, tiles(d * bits, 8), across)
    launch(_decode_points, len(payload) * across, out.device, *rows, BITS=bits, SIZE=TILE)
    return out


STEPS = Steps(
    rotate_padded, rotate_padded_back, rotate_signs, encode_signs, encode_points, decode_bits, decode_points, dots,
    lambda parts: torch.cat(parts, 1),
)  # fmt: skip


def encode_turned(
    u: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], least: bool
) -> tuple[Tensor, Tensor]:
    return sent_in_steps(STEPS, u, draws, size, parts, least)


def decode_turned(
    payload: Tensor, scale: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], d: int
) -> Tensor:
    return read_in_steps(STEPS, payload, scale, draws, size, parts, d)
