"""What DRIVE sends of long rows: the signs of a rotated row and the sums for its scale, without that row in memory.

The last stages of the transform are followed by the signs while their coordinates are in registers. Padding is not
even written: up to the last pass its blocks are zeros, whose signs neither bits nor sums can tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.points import encode_signs
from shoal.kernels.cpu.rotation import (
    BLOCK,
    COLUMNS,
    LEAF,
    add_pieces,
    block,
    columns,
    dots,
    piece,
    rotate_padded,
    sign_words,
)
from shoal.kernels.cpu.sums import added_lanes
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import last_2, last_4, last_8, last_16
from shoal.kernels.draw import Draw
from shoal.kernels.reference.sums import SUM_BLOCK


@njit(cache=True, nogil=True)
def _first(u, signs, scale, x, squares, across, lo, hi):
    """Blocks lo..hi-1, the first `across` of every row, and the squares of what they are made of."""
    room, lanes = np.empty(LEAF, np.float32), np.empty(16)
    for q in range(lo, hi):
        i, p = q // across, q % across
        if p < squares.shape[1]:
            squares[i, p] = piece(u[i], u[i], p * SUM_BLOCK, lanes)
        row, own = u[i], signs[i % signs.shape[0]]
        block(row, row, row.size, p * BLOCK, own, True, scale, x[i, p * BLOCK : (p + 1) * BLOCK], room)


@njit(cache=True, nogil=True)
def _last(x, stride, full, code, sums, lo, hi):
    """The last stages of units lo..hi-1: BLOCK columns each, and in every one of their rows a block of the sums."""
    count, units = 8 * code.shape[1] // stride, stride // BLOCK
    lanes = np.empty(16 * count)
    for q in range(lo, hi):
        i, first = q // units, q % units * BLOCK
        row, to = x[i], code[i]
        lanes[:] = 0.0
        for c in range(first, first + BLOCK, 16):
            if count == 16:
                last_16(row, c, stride, full, to, c // 8, lanes)
            elif count == 8:
                last_8(row, c, stride, full, to, c // 8, lanes)
            elif count == 4:
                last_4(row, c, stride, full, to, c // 8, lanes)
            else:
                last_2(row, c, stride, full, to, c // 8, lanes)
        for k in range(count):
            sums[i, k * units + q % units] = added_lanes(lanes[16 * k : 16 * k + 16])


def _turned(u: np.ndarray, signs: np.ndarray, code: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> None:
    """What is padding alone is left out: of the rows of the last pass, `full` are read."""
    (m, d), size, stride = u.shape, 8 * code.shape[1], BLOCK
    while 16 * stride < size:
        stride *= 16
    full = -(-d // stride)
    across, scale = full * stride // BLOCK, np.float32(size**-0.5)
    x = ready((m, full * stride), np.float32)
    spread(_first, (u, signs, scale, x, squares, across), m * across, least=LEAST // BLOCK)
    step = BLOCK
    while step < stride:
        spread(columns, (x, 0, x.shape[1], step, 16), x.size // (16 * COLUMNS), least=LEAST // (16 * COLUMNS))
        step *= 16
    spread(_last, (x, stride, full, code, sums), m * (stride // BLOCK), least=1)


def rotate_signs(u: Tensor, draws: Sequence[Draw], size: int) -> tuple[Tensor, Tensor, Tensor]:
    if size <= BLOCK:
        return *encode_signs(rotate_padded(u, draws, size)), dots(u, u)
    (m, d), square = u.shape, None
    if len(draws) > 1:
        square, u = dots(u, u), rotate_padded(u, draws[:-1], size)
    code, sums = ready((m, size // 8), np.uint8), np.empty((m, -(-size // SUM_BLOCK)))
    squares = np.empty((m, -(-d // SUM_BLOCK) if square is None else 0))
    _turned(u.numpy(), sign_words(draws[-1], size), code, sums, squares)
    square = torch.from_numpy(add_pieces(squares)) if square is None else square
    return torch.from_numpy(code), torch.from_numpy(add_pieces(sums)), square
