"""Codes to numbers by tables, a row of numbers for each message: one message's numbers, or the mean of many.

Up to four bits, sixteen codes are looked up at a time (`lookup`), base-3 digits as codes of two bits. Wider codes and
the last few of a row are unpacked first and looked up one by one. The numbers of a table are computed as the reference
computes them, so that the bits are those of computing each coordinate anew. A code that stands for nothing is a NaN,
and a NaN among the results is how it is found.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import ROOM, SPAN, TRITS, bytes_of, digits_tile, room, unpack_tile
from shoal.kernels.cpu.lookup import add_four, add_one, far_look_up, look_up
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import beyond_caches, fence

SMALL = 4  # bits of the widest codes that are looked up sixteen at a time


@njit
def _numbers(row, code, buffer, bits, scale, values, levels, out):
    """out: the numbers of single codes. Without `values`, those of `levels` points over [-scale, scale]."""
    if bits == 8:
        for j in range(out.size):
            out[j] = values[row[j]]
        return
    unpack_tile(row, code, buffer, bits)
    if values.size:
        for j in range(out.size):
            out[j] = values[code[j]]
    else:
        for j in range(out.size):
            v = scale * np.float64(2 * np.int32(code[j]) - (levels - 1)) / np.float64(levels - 1)
            out[j] = v if code[j] < levels else np.nan


@njit
def _sixteens(source, start, count, width):
    """How many groups of sixteen codes there are, of which `width` bits each are read eight bytes at a time."""
    readable = (source.size - start - 8) // (2 * width) + 1
    return max(min(count // 16, readable), 0) if width <= SMALL else 0


@njit
def _any_nan(x):
    found = 0
    for j in range(x.size):
        found += x[j] != x[j]
    return found > 0


@njit
def _excess(digits, count):
    """Whether codes of two bits stand behind the last coordinate."""
    spare = count % 4
    return (spare > 0 and (digits[count // 4] >> np.uint8(2 * spare)) != 0) or digits[(count + 3) // 4] != 0


@njit(cache=True, nogil=True)
def _decode(flat, stride, scales, values, out, bits, levels, low, high):
    """Tiles low..high-1 of all rows."""
    d, bad = out.shape[1], False
    tiles, width = (d + SPAN - 1) // SPAN, 2 if bits == TRITS else bits
    code, buffer, digits = np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8), np.zeros(SPAN // 4 + 16, np.uint8)
    for t in range(low, high):
        i, first = t // tiles, t % tiles * SPAN
        count, start, source = min(SPAN, d - first), i * stride + room(first, bits), flat
        if bits == TRITS:
            digits_tile(flat[start : start + room(count, bits)], digits)
            source, start = digits, 0
            bad |= count % 5 > 0 and _excess(digits, count)
        groups, tile = _sixteens(source, start, count, width), out[i, first : first + count]
        if beyond_caches(out, out[i]):
            for k in range(groups):
                bad |= far_look_up(source, start + 2 * width * k, values, i, width, tile, 16 * k)
        else:
            for k in range(groups):
                bad |= look_up(source, start + 2 * width * k, values, i, width, tile, 16 * k)
        rest = tile[16 * groups :]
        if rest.size:
            at = start + 2 * width * groups
            row = source[at : at + room(rest.size, width)]
            _numbers(row, code, buffer, width, np.float64(scales[i]), values[i], levels, rest)
            bad |= _any_nan(rest)
    fence()
    return bad


def decode_table(
    payload: Tensor, scales: np.ndarray, values: np.ndarray, bits: int, levels: int, d: int
) -> tuple[Tensor, bool]:
    """(m, d) float32: number values[i, code] for each code of row i, and whether one is a NaN.

    Of codes of at most four bits, sixteen numbers are given: those of all codes again and again, so that what stands
    above a code in its byte does not count. Without `values` (m, 0), the numbers are those of `levels` points over
    [-scale, scale].
    """
    m, out = len(payload), ready((len(payload), d), np.float32)
    flat, stride = bytes_of(payload)
    args = (flat, stride, scales, values, out, bits, levels)
    bad = spread(_decode, args, m * -(-d // SPAN), least=LEAST // SPAN)
    return torch.from_numpy(out), bad


@njit
def _add_tile(source, at, stride, tables, rows, width, groups, acc):
    """acc += the numbers of 16 groups coordinates of the rows tables[rows], `stride` bytes apart, row by row."""
    first, last = rows
    while first + 4 <= last:
        for k in range(groups):
            add_four(source, at + 2 * width * k, stride, tables, first, width, acc, 16 * k)
        first, at = first + 4, at + 4 * stride
    while first < last:
        for k in range(groups):
            add_one(source, at + 2 * width * k, stride, tables, first, width, acc, 16 * k)
        first, at = first + 1, at + stride


@njit(cache=True, nogil=True)
def _mean(flat, stride, scales, values, out, bits, levels, cohort, low, high):
    """Coordinates low..high-1 of out."""
    m, bad, width = values.shape[0], False, 2 if bits == TRITS else bits
    code, buffer = np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8)
    acc, more, wide = np.empty(SPAN), np.empty(SPAN), SPAN // 4 + 16
    digits = np.zeros(4 * wide, np.uint8)
    for first in range(low, high, SPAN):
        count, start, size = min(SPAN, high - first), room(first, bits), room(min(SPAN, high - first), bits)
        acc[:count] = 0.0
        for i in range(0, m, 4):
            last, source, at, step = min(i + 4, m), flat, i * stride + start, stride
            if bits == TRITS:
                for k in range(last - i):
                    row = digits[k * wide : (k + 1) * wide]
                    digits_tile(flat[at + k * stride : at + k * stride + size], row)
                    bad |= count % 5 > 0 and _excess(row, count)
                source, at, step = digits, 0, wide
            groups = _sixteens(source, at + (last - i - 1) * step, count, width)
            _add_tile(source, at, step, values, (i, last), width, groups, acc)
            tail, rest = acc[16 * groups : count], more[: count - 16 * groups]
            for k in range(last - i if rest.size else 0):
                begin = at + k * step + 2 * width * groups
                row = source[begin : begin + room(rest.size, width)]
                _numbers(row, code, buffer, width, np.float64(scales[i + k]), values[i + k], levels, rest)
                for j in range(rest.size):
                    tail[j] += rest[j]
        for j in range(count):
            out[first + j] = np.float32(acc[j] / cohort)
        bad |= _any_nan(acc[:count])
    return bad


def mean_table(
    payload: Tensor, scales: np.ndarray, values: np.ndarray, bits: int, levels: int, d: int, cohort: int
) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i of the numbers of `decode_table`, in float64 from row 0 on. And its check."""
    out = ready(d, np.float32)
    flat, stride = bytes_of(payload)
    args = (flat, stride, scales, values, out, bits, levels, cohort)
    bad = spread(_mean, args, d, unit=SPAN, least=max(SPAN, LEAST // max(len(payload), 1)))
    return torch.from_numpy(out), bad
