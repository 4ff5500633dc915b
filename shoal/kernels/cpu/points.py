"""What DRIVE and EDEN make of a rotated row: signs or numbers of points, packed, and the sums for their scale."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.rotation import add_pieces
from shoal.kernels.cpu.sums import added_lanes
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import add_products, split_64
from shoal.kernels.reference.sums import SUM_BLOCK

PASS = 64  # coordinates that are coded together: a whole number of bytes for any number of bits


@njit(inline="always")
def coded_signs(row, first, last, to, lanes, room):
    """to = the signs of row[first:last] from a whole byte on; the sum of their magnitudes."""
    lanes[:] = 0.0
    for j in range(first, last, PASS):
        count = min(PASS, last - j)
        if count == PASS:
            bits = split_64(row, j, lanes)
        else:
            room[:] = 0
            for a in range(count):
                room[a] = row[j + a]
            bits = split_64(room, 0, lanes) & ((np.uint64(1) << np.uint64(count)) - np.uint64(1))
        for b in range((count + 7) // 8):
            to[j // 8 + b] = np.uint8((bits >> np.uint64(8 * b)) & np.uint64(255))
    return added_lanes(lanes)


@njit(cache=True, nogil=True)
def _signs(y, code, sums, lo, hi):
    d, lanes, room = y.shape[1], np.empty(16), np.empty(PASS, np.float32)
    pieces = (d + SUM_BLOCK - 1) // SUM_BLOCK
    for q in range(lo, hi):
        first = q % pieces * SUM_BLOCK
        sums[q] = coded_signs(y[q // pieces], first, min(d, first + SUM_BLOCK), code[q // pieces], lanes, room)


def encode_signs(y: Tensor) -> tuple[Tensor, Tensor]:
    m, d = y.shape
    code, sums = np.empty((m, -(-d // 8)), np.uint8), np.empty((m, -(-d // SUM_BLOCK)))
    spread(_signs, (y.numpy(), code, sums.reshape(-1)), sums.size, least=LEAST // SUM_BLOCK)
    return torch.from_numpy(code), torch.from_numpy(add_pieces(sums))


@njit(inline="always")
def _numbers(x, factor, edges, code, z):
    """code[a] = the number of edges below x[a] factor: all of a few are compared, b steps find it among 2^b - 1."""
    for a in range(PASS):
        z[a] = np.float64(x[a]) * factor
        code[a] = 0
    if edges.size < 16:
        for edge in edges:
            for a in range(PASS):
                code[a] += z[a] > edge
        return
    step = (edges.size + 1) // 2
    while step > 0:
        for a in range(PASS):
            code[a] += step if z[a] > edges[code[a] + step - 1] else 0
        step //= 2


@njit(inline="always")
def _pack(code, bits, count, to, at):
    """The first `count` codes, 8 of them in `bits` bytes."""
    for group in range(0, count, 8):
        held = np.uint64(0)
        for a in range(min(8, count - group)):
            held |= np.uint64(code[group + a]) << np.uint64(a * bits)
        first = at + group // 8 * bits
        for b in range(min(bits, to.size - first)):
            to[first + b] = np.uint8((held >> np.uint64(8 * b)) & np.uint64(255))


@njit(inline="always")
def coded_points(row, first, last, factor, edges, table, bits, to, lanes, some, room):
    """to = the numbers of the points nearest to row[first:last] from a whole byte on; the sum of the products."""
    (x, q), (z, code) = some, room
    lanes[:] = 0.0
    for j in range(first, last, PASS):
        count = min(PASS, last - j)
        for a in range(PASS):
            x[a] = row[j + a] if a < count else np.float32(0)
        _numbers(x, factor, edges, code, z)
        for a in range(PASS):
            q[a] = table[code[a]]
        add_products(x, 0, q, 0, lanes)
        _pack(code, bits, count, to, j // 8 * bits)
    return added_lanes(lanes)


@njit(cache=True, nogil=True)
def _points(y, factor, edges, table, bits, out, sums, lo, hi):
    d, lanes = y.shape[1], np.empty(16)
    pieces = (d + SUM_BLOCK - 1) // SUM_BLOCK
    some, room = (np.empty(PASS, np.float32), np.empty(PASS, np.float32)), (np.empty(PASS), np.empty(PASS, np.int64))
    for q in range(lo, hi):
        i, first = q // pieces, q % pieces * SUM_BLOCK
        last = min(d, first + SUM_BLOCK)
        sums[q] = coded_points(y[i], first, last, factor[i], edges, table, bits, out[i], lanes, some, room)


def encode_points(y: Tensor, factor: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    (m, d), points, bits = y.shape, table.numpy(), (len(table) - 1).bit_length()
    edges = (points[1:].astype(np.float64) + points[:-1]) / 2
    out, sums = ready((m, (d * bits + 7) // 8), np.uint8), np.empty((m, -(-d // SUM_BLOCK)))
    args = (y.numpy(), factor.numpy(), edges, points, bits, out, sums.reshape(-1))
    spread(_points, args, sums.size, least=LEAST // SUM_BLOCK)
    return torch.from_numpy(out), torch.from_numpy(add_pieces(sums))


@njit(inline="always")
def read_points(sent, values, bits, to, lo, hi):
    """to[lo:hi] = the values that the numbers name, lo a multiple of 8."""
    mask = np.uint64((1 << bits) - 1)
    for j in range(lo, hi, 8):
        held, first = np.uint64(0), j // 8 * bits
        for b in range(min(bits, sent.size - first)):
            held |= np.uint64(sent[first + b]) << np.uint64(8 * b)
        for a in range(min(8, hi - j)):
            to[j + a] = values[(held >> np.uint64(a * bits)) & mask]


@njit(cache=True, nogil=True)
def _decode(payload, scale, table, bits, out, lo, hi):
    values = np.empty(table.size, np.float32)
    for i in range(out.shape[0]):
        for c in range(table.size):
            values[c] = table[c] * scale[i]
        read_points(payload[i], values, bits, out[i], lo, hi)


def decode_points(payload: Tensor, scale: Tensor, table: Tensor, d: int) -> Tensor:
    out, bits = ready((len(payload), d), np.float32), (len(table) - 1).bit_length()
    args = (payload.numpy(), scale.numpy(), table.numpy(), bits, out)
    spread(_decode, args, d, 8, LEAST // max(1, len(out)))
    return torch.from_numpy(out)
