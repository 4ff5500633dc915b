"""Whole messages of DRIVE and EDEN, written and read in one call: rows of one block, where calls would cost the most.

The bits are those of the steps one after the other (`reference.turned`); rows of several blocks take these steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import decode_bits
from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import put_four
from shoal.kernels.cpu.lanes import signs_64
from shoal.kernels.cpu.philox import fill_words, key
from shoal.kernels.cpu.points import (
    PASS,
    coded_points,
    coded_signs,
    decode_points,
    encode_points,
    encode_signs,
    read_points,
)
from shoal.kernels.cpu.rotation import BLOCK, LEAF, block, dots, piece, rotate_padded, rotate_padded_back, small
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.turned import rotate_signs
from shoal.kernels.cpu.vectors import flip_16
from shoal.kernels.draw import Draw
from shoal.kernels.reference.turned import Part, Steps, read_in_steps, sent_in_steps


class Plan(NamedTuple):
    """The parts as compiled loops take them: a row of each array is a part's."""

    counts: np.ndarray  # (parts, 2) int64: coordinates, and bits of each
    tables: np.ndarray  # (parts, most points) float32
    edges: np.ndarray  # (parts, most points) float64: between neighboring points
    width: int  # bytes of all parts


@lru_cache(maxsize=256)
def _plan(parts: tuple[Part, ...]) -> Plan:
    counts = np.array([(part.size, part.bits) for part in parts])
    tables = np.zeros((len(parts), 1 << counts[:, 1].max()), np.float32)
    for row, part in zip(tables, parts, strict=True):
        row[: len(part.table)] = part.table.numpy()
    edges = np.zeros(tables.shape)
    edges[:, :-1] = (tables[:, 1:].astype(np.float64) + tables[:, :-1]) / 2
    return Plan(counts, tables, edges, int(((counts[:, 0] * counts[:, 1] + 7) // 8).sum()))


@njit(inline="always")
def _turn(row, own, signed, scale, x, room):
    """x = the transform of the row, with signs in front of it. The row may be x."""
    if x.size < LEAF:
        small(row, row, row.size, own, signed, scale, x)
    else:
        block(row, row, row.size, 0, own, signed, scale, x, room)


@njit(inline="always")
def _signs(own, slots, i, key, stream):
    """own = the words of row i's signs."""
    index, k0, k1 = key
    fill_words(own, 0, np.uint64(slots[i % slots.size]), index, stream, k0, k1)


@njit(cache=True, nogil=True)
def _encode(u, slots, key, streams, factor, counts, tables, edges, least, size, out, squares, lo, hi):
    x, room, lanes, own = np.empty(size, np.float32), np.empty(LEAF, np.float32), np.empty(16), _room(size)
    some = (np.empty(PASS, np.float32), np.empty(PASS, np.float32))
    points = (np.empty(PASS), np.empty(PASS, np.int64))
    for i in range(lo, hi):
        squares[i] = square = piece(u[i], u[i], 0, lanes)
        for t in range(streams.size):
            _signs(own, slots, i, key, streams[t])
            _turn(u[i] if t == 0 else x, own, True, factor, x, room)
        along, whole, at, byte = 0.0, square, 0, 4
        for p in range(counts.shape[0]):
            count, bits = counts[p, 0], counts[p, 1]
            part, code = x[at : at + count], out[i, byte : byte + (count * bits + 7) // 8]
            if bits == 1:
                along += np.float64(tables[p, 1]) * coded_signs(part, 0, count, code, lanes, some[0])
            else:
                width = math.sqrt(np.float64(size)) / math.sqrt(square if square > 0.0 else 1.0)
                table, between = tables[p, : 1 << bits], edges[p, : (1 << bits) - 1]
                along += coded_points(part, 0, count, width, between, table, bits, code, lanes, some, points)
            at, byte = at + count, byte + code.size
        if at < size:
            whole = piece(part, part, 0, lanes) * (size / at)
        ratio = 0.0
        if along > 0.0:
            ratio = along / size if least else whole / along
        put_four(out[i], 0, np.float32(ratio).view(np.uint32))


@njit(inline="always")
def _room(size):
    """Room for the words of a row's signs, in whole blocks."""
    return np.empty((size // 32 + 63) // 64 * 64 + (64 if size < 32 else 0), np.uint32)


@njit(cache=True, nogil=True)
def _decode(payload, scale, slots, key, streams, factor, counts, tables, size, out, lo, hi):
    x, room, own = np.empty(size, np.float32), np.empty(LEAF, np.float32), _room(size)
    d, values = out.shape[1], np.empty(tables.shape[1], np.float32)
    for i in range(lo, hi):
        at, byte = 0, 4
        for p in range(counts.shape[0]):
            count, bits = counts[p, 0], counts[p, 1]
            part, code = x[at : at + count], payload[i, byte : byte + (count * bits + 7) // 8]
            for c in range(1 << bits):
                values[c] = tables[p, c] * scale[i]
            if bits == 1:
                whole = count // 64 * 64
                for j in range(0, whole, 64):
                    signs_64(code, j // 8, values[1], part, j)
                for j in range(whole, count):
                    part[j] = values[(code[j >> 3] >> (j & 7)) & 1]
            else:
                read_points(code, values, bits, part, 0, count)
            at, byte = at + count, byte + code.size
        x[at:] = np.float32(0)
        own[: LEAF // 32] = 0  # no signs
        for t in range(streams.size - 1, -1, -1):
            # The signs that follow one transform are those in front of the next.
            _turn(x, own, t < streams.size - 1, factor, x, room)
            _signs(own, slots, i, key, streams[t])
        to = out[i]
        for j in range(0, d - 15, 16):
            flip_16(x, j, own, j // 16, to, j)
        for j in range(d // 16 * 16, d):
            to[j] = -x[j] if (own[j >> 5] >> np.uint32(j & 31)) & 1 else x[j]


STEPS = Steps(
    rotate_padded, rotate_padded_back, rotate_signs, encode_signs, encode_points, decode_bits, decode_points, dots,
    lambda parts: torch.from_numpy(np.concatenate([part.numpy() for part in parts], 1)),
)  # fmt: skip


def _short(draws: Sequence[Draw], size: int) -> bool:
    """Whether rows are of one block, and all signs of one slot each."""
    return size <= BLOCK and (len(draws) == 1 or all(draw.slots is draws[0].slots for draw in draws))


def _keys(draws: Sequence[Draw]) -> tuple[np.ndarray, tuple[np.uint64, ...], np.ndarray]:
    """(slots, the key without the stream, streams)."""
    index, _, k0, k1 = key(draws[0])
    return draws[0].slots.numpy(), (index, k0, k1), np.array([draw.stream for draw in draws], np.uint64)


def encode_turned(
    u: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], least: bool
) -> tuple[Tensor, Tensor]:
    if not _short(draws, size):
        return sent_in_steps(STEPS, u, draws, size, parts, least)
    m, (counts, tables, edges, width) = len(u), _plan(tuple(parts))
    out, squares = ready((m, 4 + width), np.uint8), np.empty(m)
    args = (u.numpy(), *_keys(draws), np.float32(size**-0.5), counts, tables, edges, least, size, out, squares)
    spread(_encode, args, m, least=LEAST // size)
    return torch.from_numpy(out), torch.from_numpy(squares)


def decode_turned(
    payload: Tensor, scale: Tensor, draws: Sequence[Draw], size: int, parts: Sequence[Part], d: int
) -> Tensor:
    if not _short(draws, size):
        return read_in_steps(STEPS, payload, scale, draws, size, parts, d)
    m, (counts, tables, _, _) = len(payload), _plan(tuple(parts))
    out = ready((m, d), np.float32)
    rows = payload if payload.stride(1) == 1 else payload.contiguous()
    args = (rows.numpy(), scale.numpy(), *_keys(draws), np.float32(size**-0.5), counts, tables, size, out)
    spread(_decode, args, m, least=LEAST // size)
    return torch.from_numpy(out)
