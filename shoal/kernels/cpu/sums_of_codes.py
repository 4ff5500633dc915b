"""Sums of many messages' codes to a prefix code or to digits of a few bytes, and back to means.

The former is in `prefix`, the latter are in `digits`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import ROOM, SPAN, unpack_tile
from shoal.kernels.cpu.digits import pack_digits, unpack_digits
from shoal.kernels.cpu.lanes import count_512
from shoal.kernels.cpu.philox import copy
from shoal.kernels.cpu.prefix import (
    BEYOND,
    TURNS,
    coded_bytes,
    codes_of,
    complete,
    decode,
    encode,
    lengths_of,
    side_by_side,
    table_of,
)
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.reference.prefix import SEGMENT
from shoal.kernels.reference.sums_of_codes import CODED, DIGITS, joint, may_pay, packed_bytes

BLOCK = 512  # coordinates that are counted at a time
MANY = 1 << 15  # symbols that are counted at least, before another count begins


@njit(cache=True, nogil=True)
def _count_bits(payload, out, lo, hi):
    """out[lo:hi] = how many rows have the bit set. Eight bits a coordinate count 255 rows at a time."""
    m = payload.shape[0]
    counts, pad = np.empty(BLOCK, np.uint8), np.zeros(64, np.uint8)
    for at in range(lo, hi, BLOCK):
        count = min(BLOCK, hi - at)
        sums = out[at : at + count]
        sums[:] = 0
        for first in range(0, m, 255):
            counts[:] = 0
            for i in range(first, min(first + 255, m)):
                if count == BLOCK:
                    count_512(payload[i], at // 8, counts)
                else:
                    copy(payload[i, at // 8 : (at + count + 7) // 8], pad)
                    count_512(pad, 0, counts)
            for j in range(count):
                sums[j] += counts[j]


@njit(cache=True, nogil=True)
def _add_codes(payload, out, bits, levels, lo, hi):
    """out[lo:hi] = the sums of the codes; whether one is not below `levels`."""
    code, buffer, beyond = np.empty(SPAN, np.uint16), np.empty(ROOM, np.uint8), False
    for at in range(lo, hi, SPAN):
        count = min(SPAN, hi - at)
        sums = out[at : at + count]
        sums[:] = 0
        for i in range(payload.shape[0]):
            unpack_tile(payload[i, at * bits // 8 : ((at + count) * bits + 7) // 8], code, buffer, bits)
            worst = np.uint16(0)
            for j in range(count):
                sums[j] += code[j]
                worst = max(worst, code[j])
            beyond |= worst >= levels
    return beyond


@njit(cache=True, nogil=True)
def _look_up(sums, values, out, lo, hi):
    for j in range(lo, hi):
        out[j] = values[sums[j]]


@njit(inline="always")
def _join_block(sums, base, some, out):
    """out: the symbols of `some` sums each. Two and three, the usual ones, are written out: loops of a known stride."""
    if some == 2:
        for k in range(out.size):
            out[k] = sums[2 * k] + base * sums[2 * k + 1]
    elif some == 3:
        for k in range(out.size):
            out[k] = sums[3 * k] + base * (sums[3 * k + 1] + base * sums[3 * k + 2])
    else:
        weight = np.uint16(1)
        out[:] = 0
        for place in range(some):
            for k in range(out.size):
                out[k] += weight * sums[some * k + place]
            weight *= base


@njit(cache=True, nogil=True)
def _join(sums, base, some, out, seen, lo, hi):
    """Symbols lo..hi-1, and how often each occurs, which is added to seen[lo // MANY] (4, symbols): neighbors are often
    alike, and one counter would keep them waiting for each other."""
    one, two, three, four = seen[lo // MANY]
    for at in range(lo, hi, BLOCK):
        end = min(at + BLOCK, hi)
        block, part = out[at:end], sums[at * some : end * some]
        _join_block(part, base, some, block)
        whole = block.size // 4 * 4
        for k in range(0, whole, 4):
            one[block[k]] += 1
            two[block[k + 1]] += 1
            three[block[k + 2]] += 1
            four[block[k + 3]] += 1
        for k in range(whole, block.size):
            one[block[k]] += 1


def _symbols(sums: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """(symbols,) uint16, and how often each possible one occurs."""
    some = joint(base)
    whole = len(sums) // some
    symbols, seen = ready(-(-len(sums) // some), np.uint16), np.zeros((whole // MANY + 1, 4, base**some), np.int64)
    spread(_join, (sums, np.uint16(base), some, symbols, seen), whole, MANY, LEAST // some)
    counts = seen.sum((0, 1))
    if whole < len(symbols):
        rest = sums[whole * some :].astype(np.int64)
        symbols[whole] = rest @ base ** np.arange(len(rest))
        counts[symbols[whole]] += 1
    return symbols, counts


def _shorter(counts: np.ndarray, count: int, base: int) -> np.ndarray | None:
    """The lengths of the prefix code, if it is shorter than the digits."""
    lengths = lengths_of(counts)
    return lengths if coded_bytes(counts, lengths) < 1 + packed_bytes(count, base) else None


def _coded(symbols: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    segments = -(-len(symbols) // SEGMENT)
    rows, sizes = ready((segments, BEYOND), np.uint8), np.empty(segments, np.int64)
    codes = codes_of(lengths)
    spread(encode, (symbols, codes, rows, sizes), segments, least=LEAST // SEGMENT)
    head = 1 + (len(lengths) + 1) // 2
    out = np.empty(head + 2 * segments + int(sizes.sum()), np.uint8)
    out[0] = CODED
    out[1:head] = lengths[::2]
    out[1 : 1 + len(lengths) // 2] |= (lengths[1::2] << 4).astype(np.uint8)
    out[head : head + 2 * segments] = sizes.astype("<u2").view(np.uint8)
    side_by_side(rows, sizes, out[head + 2 * segments :])
    return out


def fold_codes(payload: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    rows = (payload if payload.stride(-1) == 1 else payload.contiguous()).numpy()
    sums, bits = ready(d, np.uint16), (levels - 1).bit_length()
    least = max(SPAN, LEAST // max(len(rows), 1))
    if levels == 2:
        beyond = spread(_count_bits, (rows, sums), d, BLOCK, least)
    else:
        beyond = spread(_add_codes, (rows, sums, bits, levels), d, SPAN, least)
    if beyond:
        return torch.zeros(0, dtype=torch.uint8), True
    base, lengths = len(rows) * (levels - 1) + 1, None
    if may_pay(d, base):
        symbols, counts = _symbols(sums, base)
        lengths = _shorter(counts, d, base)
    if lengths is not None:
        return torch.from_numpy(_coded(symbols, lengths)), False
    return torch.from_numpy(np.concatenate([np.array([DIGITS], np.uint8), pack_digits(sums, base)])), False


def unfold_codes(bodies: Sequence[Tensor], values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    out, good, at, table = ready(sum(counts), np.float32), list[bool](), 0, values.numpy()
    for body, count in zip(bodies, counts, strict=True):
        part, raw = out[at : at + count], body.contiguous().numpy()
        good.append(_unfold(raw, table, part) if count else not raw.size)
        if not good[-1]:
            part[:] = np.nan
        at += count
    return torch.from_numpy(out), torch.tensor(good)


def _unfold(raw: np.ndarray, values: np.ndarray, out: np.ndarray) -> bool:
    """out, all of it, from one body; whether it is one that `fold_codes` makes."""
    base, pays = len(values), may_pay(len(out), len(values))
    if raw.size and raw[0] == CODED:
        return pays and _unfold_coded(raw[1:], values, out)
    if raw.size != 1 + packed_bytes(len(out), base) or raw[0] != DIGITS:
        return False
    if not pays:
        return unpack_digits(raw[1:], values, out)
    sums = ready(len(out), np.uint16)
    if not unpack_digits(raw[1:], np.arange(base, dtype=np.uint16), sums):
        return False
    spread(_look_up, (sums, values, out), len(out))
    return _shorter(_symbols(sums, base)[1], len(out), base) is None


def _unfold_coded(raw: np.ndarray, values: np.ndarray, out: np.ndarray) -> bool:
    base = len(values)
    some = joint(base)
    alphabet, symbols = base**some, -(-len(out) // some)
    head, segments = (alphabet + 1) // 2, -(-symbols // SEGMENT)
    first = head + 2 * segments
    if raw.size < first:
        return False
    lengths, sizes = np.empty(2 * head, np.int64), raw[head:first].copy().view("<u2").astype(np.int64)
    lengths[::2], lengths[1::2] = raw[:head] & 15, raw[:head] >> 4
    if lengths[alphabet:].any() or not complete(lengths[:alphabet]) or first + sizes.sum() != raw.size:
        return False
    lengths = lengths[:alphabet]
    starts, seen = np.concatenate([[0], np.cumsum(sizes)]), np.zeros((segments // TURNS + 1, 4, alphabet), np.int64)
    ends, last = np.empty(segments, np.int64), np.empty(segments, np.int64)
    wide = 4 if some <= 4 else 8
    means = np.zeros((alphabet, wide), np.float32)
    means[:, :some] = values[np.arange(alphabet)[:, None] // base ** np.arange(some) % base]
    body = np.concatenate([raw[first:], np.zeros(BEYOND, np.uint8)])
    args = (body, starts, table_of(lengths), means.reshape(-1), wide, some, out, ends, last, seen)
    spread(decode, args, segments, TURNS, LEAST // (SEGMENT * some))
    filled = body[ends >> 3] >> (ends & 7)  # of the bytes in which codes end: what stands behind them
    if (ends + 7 >> 3 != starts[1:]).any() or (filled * (ends & 7)).any():
        return False
    if last[-1] >= base ** (len(out) - (symbols - 1) * some):
        return False
    shortest = _shorter(seen.sum((0, 1)), len(out), base)
    return shortest is not None and np.array_equal(shortest, lengths)
