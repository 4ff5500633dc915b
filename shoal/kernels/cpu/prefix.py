"""Huffman's code: lengths by package-merge, segments to bytes, and bytes back to the numbers that symbols stand for.

A table of all beginnings of 12 bits says which symbol comes next and how long its code is. Waiting for that answer is
what a decoder does most of its time, so four segments are decoded in turns.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from shoal.kernels.cpu.lookup import put_four, put_word, take_word
from shoal.kernels.reference.prefix import LIMIT, SEGMENT

ROOM = SEGMENT * LIMIT // 8  # bytes of a segment's codes, at most
BEYOND = ROOM + 8  # bytes behind the last segment that a decoder may look at
TURNS = 4  # segments that are decoded side by side
_SEEN = np.uint64((1 << LIMIT) - 1)
_LENGTH = np.uint64(15)  # of an entry of the table: four bits of it, below the symbol


@njit(cache=True, nogil=True)
def _merged(weights):
    """(LIMIT, 2 n) bool: whether each place of each level's list is a symbol or a package; and the lists' lengths."""
    n = weights.size
    single, size = np.zeros((LIMIT, 2 * n), np.bool_), np.zeros(LIMIT, np.int64)
    old, new = np.empty(2 * n, np.int64), np.empty(2 * n, np.int64)
    for level in range(LIMIT):
        packages = size[level - 1] // 2 if level else 0
        i = j = 0
        while i < n or j < packages:
            package = old[2 * j] + old[2 * j + 1] if j < packages else 0
            first = j == packages or (i < n and weights[i] <= package)
            single[level, i + j] = first
            new[i + j] = weights[i] if first else package
            i, j = (i + 1, j) if first else (i, j + 1)
        size[level] = n + packages
        old, new = new, old
    return single


@njit(cache=True, nogil=True)
def _taken(single):
    """Bits of the codes of n symbols, the rarest first: how often each is among what is taken of the levels' lists."""
    n = single.shape[1] // 2
    out, take = np.zeros(n, np.int64), 2 * n - 2
    for level in range(LIMIT - 1, -1, -1):
        symbols = 0
        for k in range(take):
            symbols += single[level, k]
        for i in range(symbols):
            out[i] += 1
        take = 2 * (take - symbols)
    return out


def lengths_of(counts: np.ndarray) -> np.ndarray:
    """As the reference's, of (symbols,) int64."""
    there = np.flatnonzero(counts)
    order = there[np.argsort(counts[there], kind="stable")]
    if len(order) == 1:
        order = np.array([0 if order[0] else 1, order[0]])
    out = np.zeros(len(counts), np.int64)
    out[order] = _taken(_merged(counts[order]))
    return out


def coded_bytes(counts: np.ndarray, lengths: np.ndarray) -> int:
    """As the reference's."""
    segments = -(-int(counts.sum()) // SEGMENT)
    return 1 + -(-len(counts) // 2) + 3 * segments + int(counts @ lengths) // 8


@njit(cache=True, nogil=True)
def codes_of(lengths):
    """(symbols,) uint32: 16 times the code, turned around so that its first bit is the lowest, plus its length."""
    out, code = np.zeros(lengths.size, np.uint32), 0
    for length in range(1, LIMIT + 1):
        code <<= 1
        for s in range(lengths.size):
            if lengths[s] != length:
                continue
            turned = 0
            for bit in range(length):
                turned |= ((code >> bit) & 1) << (length - 1 - bit)
            out[s] = 16 * turned + length
            code += 1
    return out


@njit(cache=True, nogil=True)
def table_of(lengths):
    """(2^LIMIT,) uint16, for complete lengths: 16 times the symbol that these bits begin with, plus its length."""
    codes, out = codes_of(lengths), np.zeros(1 << LIMIT, np.uint16)
    for s in range(lengths.size):
        if lengths[s]:
            for k in range(codes[s] >> 4, 1 << LIMIT, 1 << lengths[s]):
                out[k] = 16 * s + lengths[s]
    return out


def complete(lengths: np.ndarray) -> bool:
    """As the reference's."""
    return bool(lengths.max() <= LIMIT and ((1 << LIMIT) >> lengths[lengths > 0]).sum() == 1 << LIMIT)


@njit(cache=True, nogil=True)
def encode(symbols, codes, out, sizes, lo, hi):
    """Segments lo..hi-1, each from a row of `out` on (BEYOND bytes), and how many bytes each takes."""
    for k in range(lo, hi):
        row, at, held, count = out[k], 0, np.uint64(0), np.uint64(0)
        first, end = k * SEGMENT, min((k + 1) * SEGMENT, symbols.size)
        fours = first + (end - first) // 4 * 4
        for j in range(first, fours, 4):  # 7 bits are left over from before, and 48 come
            for i in range(4):
                code = np.uint64(codes[symbols[j + i]])
                held |= (code >> np.uint64(4)) << count
                count += code & _LENGTH
            put_word(row, at, held)
            at += np.int64(count >> np.uint64(3))
            held >>= count & np.uint64(56)
            count &= np.uint64(7)
        for j in range(fours, end):
            code = np.uint64(codes[symbols[j]])
            held |= (code >> np.uint64(4)) << count
            count += code & _LENGTH
        put_word(row, at, held)
        sizes[k] = at + np.int64((count + np.uint64(7)) >> np.uint64(3))


@njit(cache=True, nogil=True)
def side_by_side(rows, sizes, out):
    """out: the bytes of all segments, one behind the other."""
    at = 0
    for k in range(sizes.size):
        out[at : at + sizes[k]] = rows[k, : sizes[k]]
        at += sizes[k]


@njit(inline="always")
def _four(body, place, table, values, wide, some, out, at, seen):
    """Four symbols from bit `place` on. Returns where the next one begins."""
    held, bits = take_word(body, place >> 3) >> np.uint64(place & 7), np.uint64(0)
    for i in range(4):
        entry = np.uint64(table[held & _SEEN])  # an unsigned index: of a signed one, the sign would be looked at
        length, symbol = entry & _LENGTH, entry >> np.uint64(4)
        seen[symbol] += 1
        put_four(out, at + i * some, values, np.int64(symbol) * wide)
        if wide > 4:
            put_four(out, at + i * some + 4, values, np.int64(symbol) * wide + 4)
        held >>= length
        bits += length
    return place + np.int64(bits)


@njit(cache=True, nogil=True)
def _one(body, place, table, values, wide, some, out, at, symbols, seen):
    """As many symbols, and nothing written behind their numbers. Returns the bit behind the last one, and that one."""
    symbol = 0
    for _ in range(symbols):
        held = take_word(body, place >> 3) >> np.uint64(place & 7)
        entry = np.uint64(table[held & _SEEN])
        symbol = np.int64(entry >> np.uint64(4))
        seen[symbol] += 1
        for i in range(min(some, out.size - at)):
            out[at + i] = values[symbol * wide + i]
        at += some
        place += np.int64(entry & _LENGTH)
    return place, symbol


@njit(cache=True, nogil=True)
def decode(body, starts, table, values, wide, some, out, ends, last, seen, lo, hi):
    """Segments lo..hi-1, which begin at bytes starts[lo], ...: `some` numbers a symbol, values[symbol wide + i].

    last[k] is segment k's last symbol, ends[k] the bit behind its code, seen[lo // TURNS] (4, symbols) counts, and wide
    is 4 or 8. Reads up to BEYOND bytes behind the beginning of a segment, whatever it holds.
    """
    symbols = -(-out.size // some)
    full, step, k = symbols // SEGMENT, SEGMENT * some, lo
    one, two, three, four = seen[lo // TURNS]
    while k < hi:
        at = k * step
        if k + 4 > min(hi, full):
            count = min(SEGMENT, symbols - k * SEGMENT)
            ends[k], last[k] = _one(body, 8 * starts[k], table, values, wide, some, out, at, count, one)
            k += 1
            continue
        a, b, c, d = 8 * starts[k], 8 * starts[k + 1], 8 * starts[k + 2], 8 * starts[k + 3]
        for _ in range(SEGMENT // 4 - 1):
            a = _four(body, a, table, values, wide, some, out, at, one)
            b = _four(body, b, table, values, wide, some, out, at + step, two)
            c = _four(body, c, table, values, wide, some, out, at + 2 * step, three)
            d = _four(body, d, table, values, wide, some, out, at + 3 * step, four)
            at += 4 * some
        # What a row holds beside its numbers was overwritten by the next; behind the last, others' may stand.
        ends[k], last[k] = _one(body, a, table, values, wide, some, out, at, 4, one)
        ends[k + 1], last[k + 1] = _one(body, b, table, values, wide, some, out, at + step, 4, two)
        ends[k + 2], last[k + 2] = _one(body, c, table, values, wide, some, out, at + 2 * step, 4, three)
        ends[k + 3], last[k + 3] = _one(body, d, table, values, wide, some, out, at + 3 * step, 4, four)
        k += 4
