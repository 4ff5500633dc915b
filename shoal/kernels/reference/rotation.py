"""The Hadamard transform, rotations, and the points nearest to rotated coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.bits import sign_bits
from shoal.kernels.reference.codes import pack, unpack
from shoal.kernels.reference.philox import word_array
from shoal.kernels.reference.sums import block_sums, dots


def rademacher(draw: Draw, d: int) -> Tensor:
    """(m, d) float32 signs: -1 where bit j mod 32 of word floor(j / 32) is set, least significant first, else 1."""
    bits = np.unpackbits(word_array(draw, -(-d // 32)).astype("<u4").view(np.uint8), axis=1, count=d, bitorder="little")
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def hadamard(u: Tensor) -> Tensor:
    """(m, d) float32: u H / sqrt(d), H_jl = (-1)^popcount(j & l), d a power of two.

    Each entry is multiplied by float32(d^-1/2), then log2 d stages of butterflies (a + b, a - b) follow, strides
    1, 2, 4, ...: this order defines the bits. Scaling first keeps every partial sum below ||u_i||.
    """
    m, d = u.shape
    with np.errstate(over="ignore", invalid="ignore"):
        x = u.numpy() * np.float32(d**-0.5)
        stride = 1
        while stride < d:
            pairs = x.reshape(m, -1, 2, stride)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            x = np.stack([a + b, a - b], 2).reshape(m, d)
            stride *= 2
    return torch.from_numpy(x)


def _signs_of(draw: Draw, m: int, d: int) -> np.ndarray:
    """(m, d): the signs of each row, or of a shared draw the same for all."""
    return np.broadcast_to(rademacher(draw, d).numpy(), (m, d))


def window(d: int) -> int:
    """The greatest power of two that is at most d: so many coordinates a transform of `rotate` takes."""
    return 1 << (d.bit_length() - 1)


def rotate(u: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(m, d) float32: a rotation of R^d. With h = window(d), the signs of the first draw and `hadamard` on coordinates
    0..h-1, then those of the second on coordinates d-h..d-1, of what the first left there.

    There is one draw where d = h, and there are two else. Each has h signs.
    """
    y, d = u.numpy().copy(), u.shape[1]
    h = window(d)
    for step, draw in enumerate(draws):
        part = y[:, step * (d - h) :][:, :h]
        part[:] = hadamard(torch.from_numpy(part * _signs_of(draw, len(y), h))).numpy()
    return torch.from_numpy(y)


def rotate_back(y: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(m, d) float32: the inverse of `rotate`, the last draw first: `hadamard`, then signs."""
    u, d = y.numpy().copy(), y.shape[1]
    h = window(d)
    for step, draw in reversed(list(enumerate(draws))):
        part = u[:, step * (d - h) :][:, :h]
        part[:] = hadamard(torch.from_numpy(part.copy())).numpy() * _signs_of(draw, len(u), h)
    return torch.from_numpy(u)


def rotate_padded(u: Tensor, draws: Sequence[Draw], size: int) -> Tensor:
    """(m, size) float32: u padded with zeros to a power of two; then for each draw its signs, then `hadamard`."""
    y = np.zeros((len(u), size), np.float32)
    y[:, : u.shape[1]] = u.numpy()
    for draw in draws:
        y = hadamard(torch.from_numpy(y * _signs_of(draw, *y.shape))).numpy()
    return torch.from_numpy(y)


def rotate_padded_back(y: Tensor, draws: Sequence[Draw], d: int) -> Tensor:
    """(m, d) float32: the inverse of `rotate_padded`, the last draw first. The padding is dropped."""
    for draw in reversed(draws):
        y = torch.from_numpy(hadamard(y).numpy() * _signs_of(draw, *y.shape))
    return y[:, :d].contiguous()


def encode_signs(y: Tensor) -> tuple[Tensor, Tensor]:
    """(`sign_bits` of y, (m,) float64 sum_j |y_ij| in the blocks' order)."""
    return sign_bits(y), block_sums(np.abs(y.numpy().astype(np.float64)))


def rotate_signs(u: Tensor, draws: Sequence[Draw], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = `rotate_padded`(u): its `encode_signs`, two tensors, and (m,) float64 sum_j u_ij^2, both sums in the
    blocks' order."""
    return *encode_signs(rotate_padded(u, draws, size)), dots(u, u)


def encode_points(y: Tensor, factor: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """((m, ceil(d b / 8)) uint8, (m,) float64 sum_j y_ij q_ij): q_ij of 2^b points, the one nearest y_ij factor_i.

    The point's number, in b bits, is how many midpoints of neighboring points lie below y_ij factor_i (float64).
    """
    points = table.numpy()
    edges = (points[1:].astype(np.float64) + points[:-1]) / 2
    code = np.searchsorted(edges, y.numpy().astype(np.float64) * factor.numpy()[:, None])
    along = dots(y, torch.from_numpy(points[code]))
    return pack(torch.from_numpy(code), (len(points) - 1).bit_length()), along


def decode_points(payload: Tensor, scale: Tensor, table: Tensor, d: int) -> Tensor:
    """(m, d) float32: the points that the numbers name, times scale_i."""
    code = unpack(payload, d, (len(table) - 1).bit_length())
    return table[code] * scale[:, None]
