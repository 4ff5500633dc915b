"""What DRIVE and EDEN send and read: one scale, then the points nearest to the coordinates of a rotated row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.bits import decode_bits
from shoal.kernels.reference.rotation import (
    decode_points,
    encode_points,
    encode_signs,
    rotate_padded,
    rotate_padded_back,
    rotate_signs,
)
from shoal.kernels.reference.sums import dots


class Part(NamedTuple):
    """The next `size` rotated coordinates: each becomes one of 2^bits points, ascending; of two, -t and t, by its
    sign."""

    size: int
    table: Tensor  # (2^bits,) float32 on the CPU; never written to

    @property
    def bits(self) -> int:
        """Bits of a point's number."""
        return (len(self.table) - 1).bit_length()


class Steps(NamedTuple):
    """The kernels that messages are made of and read with, as a device has them."""

    rotate_padded: Callable[..., Tensor]
    rotate_padded_back: Callable[..., Tensor]
    rotate_signs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    encode_signs: Callable[..., tuple[Tensor, Tensor]]
    encode_points: Callable[..., tuple[Tensor, Tensor]]
    decode_bits: Callable[..., Tensor]
    decode_points: Callable[..., Tensor]
    dots: Callable[..., Tensor]
    joined: Callable[[list[Tensor]], Tensor]


def sent_in_steps(
    ops: Steps, u: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], least: bool
) -> tuple[Tensor, Tensor]:
    """`encode_turned`, a step at a time."""
    sent: list[Tensor] = []
    if [(part.size, part.bits) for part in parts] == [(size, 1)]:
        code, magnitude, square = ops.rotate_signs(u, draws, size)
        whole, along = square, float(parts[0].table[1]) * magnitude
        sent.append(code)
    else:
        whole = square = ops.dots(u, u)
        y, at, along = ops.rotate_padded(u, draws, size), 0, torch.zeros_like(square)
        for part in parts:
            some = y[:, at : at + part.size].contiguous()
            if part.bits == 1:
                code, magnitude = ops.encode_signs(some)
                along += float(part.table[1]) * magnitude
            else:
                factor = math.sqrt(size) / torch.where(square > 0, square, 1.0).sqrt()
                code, fit = ops.encode_points(some, factor, part.table.to(u.device))
                along += fit
            sent.append(code)
            at += part.size
        if at < size:
            whole = ops.dots(some, some) * (size / at)
    scale = torch.where(along > 0, along / size if least else whole / along, 0.0).float()
    return ops.joined([scale[:, None].view(torch.uint8), *sent]), square


def read_in_steps(
    ops: Steps, payload: Tensor, scale: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], d: int
) -> Tensor:
    """`decode_turned`, a step at a time."""
    rows, byte = [], 4
    for part in parts:
        end = byte + (part.size * part.bits + 7) // 8
        code = payload[:, byte:end].contiguous()
        if part.bits == 1:
            rows.append(ops.decode_bits(code, scale * float(part.table[1]), part.size))
        else:
            rows.append(ops.decode_points(code, scale, part.table.to(payload.device), part.size))
        byte = end
    y = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    if y.shape[1] < size:
        y = torch.nn.functional.pad(y, (0, size - y.shape[1]))
    return ops.rotate_padded_back(y, draws, d)


STEPS = Steps(
    rotate_padded, rotate_padded_back, rotate_signs, encode_signs, encode_points, decode_bits, decode_points, dots,
    lambda parts: torch.cat(parts, 1),
)  # fmt: skip


def encode_turned(
    u: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], least: bool
) -> tuple[Tensor, Tensor]:
    """((m, 4 + bytes) uint8, (m,) float64 ||u_i||^2 in the blocks' order).

    A row is S_i as float32, then for each part the numbers of the points q, packed, of y_i = `rotate_padded`(u_i):
    two points by the sign, more of them nearest to y_ij sqrt(size) / ||u_i||. S_i = V / <y_i, q>, V = ||u_i||^2, or
    where the parts leave coordinates out, size / part.size times the square norm of the one part's; with `least`,
    <y_i, q> / size. S_i = 0 where <y_i, q> is not positive.
    """
    return sent_in_steps(STEPS, u, draws, size, parts, least)


def decode_turned(
    payload: Tensor, scale: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], d: int
) -> Tensor:
    """(m, d) float32: `rotate_padded_back` of scale_i times the points that the numbers behind the first four bytes
    name, and zeros behind them."""
    return read_in_steps(STEPS, payload, scale, draws, size, parts, d)
