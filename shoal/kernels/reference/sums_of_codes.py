"""Sums of many messages' codes: what a process says of the messages it has added, in a prefix code or as digits.

    byte 0      0: digits, or 1: a prefix code
    0, then     groups of digits to the base B (`group`), the last as short as it can be
    1, then     4 bits a symbol: the length of its code, 0 for one that does not occur; two to a byte, the lower first
                2 bytes a segment of `SEGMENT` symbols: how many bytes its codes take
                the segments' codes, bits from the lowest of a byte on, each segment filled with zeros to a byte

A symbol is as many neighboring sums as `joint` says, the first the least significant digit; zeros behind the last sum.
The code is taken where `coded_bytes` says that it is shorter than digits, so that sums have one body.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.reference.codes import unpack
from shoal.kernels.reference.prefix import LIMIT, SEGMENT, coded_bytes, codes_of, complete, lengths_of

WORD = 8  # bytes of the longest group
SYMBOLS = 512  # of several sums, at most: their lengths travel, too
DIGITS, CODED = 0, 1


@cache
def group(base: int) -> tuple[int, int]:
    """(digits, bytes) of a group: at most eight bytes with the fewest bits a digit, of these the shortest.

    base = 5: 24 digits in 7 bytes, 2.33 bits each for log2 5 = 2.32.
    """
    fits = []
    for size in range(1, WORD + 1):
        digits = 0
        while base ** (digits + 1) <= 256**size:
            digits += 1
        if digits:
            fits.append((size / digits, size, digits))
    _, size, digits = min(fits)
    return digits, size


def width(base: int, digits: int) -> int:
    """The fewest bytes that hold so many digits."""
    return ((base**digits - 1).bit_length() + 7) // 8


def packed_bytes(count: int, base: int) -> int:
    """Bytes of `count` digits: whole groups, and the fewest bytes for those that are left."""
    digits, size = group(base)
    return count // digits * size + width(base, count % digits)


@cache
def joint(base: int) -> int:
    """How many sums are one symbol, at most eight; 0 where there are too many different ones for a prefix code."""
    if base > 1 << LIMIT:
        return 0
    some = 1
    while some < 8 and base ** (some + 1) <= SYMBOLS:
        some += 1
    return some


def may_pay(count: int, base: int) -> bool:
    """Whether `count` sums could be coded in less than their digits take: at one bit a symbol."""
    some = joint(base)
    if not some:
        return False
    symbols = -(-count // some)
    least = 1 + -(-(base**some) // 2) + 3 * -(-symbols // SEGMENT) + symbols // 8
    return least < 1 + packed_bytes(count, base)


def _joined(sums: list[int], base: int) -> list[int]:
    some = joint(base)
    return [
        sum(base**place * x for place, x in enumerate(sums[at : at + some])) for at in range(0, len(sums), some)
    ]  # fmt: skip


def _shorter(sums: list[int], base: int) -> list[int] | None:
    """The lengths of the code, if it is taken."""
    if not may_pay(len(sums), base):
        return None
    counts = np.bincount(_joined(sums, base), minlength=base ** joint(base)).tolist()
    lengths = lengths_of(counts)
    return lengths if coded_bytes(counts, lengths) < 1 + packed_bytes(len(sums), base) else None


def _coded(sums: list[int], base: int, lengths: list[int]) -> bytes:
    symbols, codes, parts = _joined(sums, base), codes_of(lengths), []
    for at in range(0, len(symbols), SEGMENT):
        bits = np.array(list("".join(codes[s] for s in symbols[at : at + SEGMENT])), np.uint8)
        parts.append(np.packbits(bits, bitorder="little").tobytes())
    even = lengths + [0] * (len(lengths) % 2)
    table = bytes(low | high << 4 for low, high in zip(even[::2], even[1::2], strict=True))
    return bytes([CODED]) + table + b"".join(len(part).to_bytes(2, "little") for part in parts) + b"".join(parts)


def _digits(sums: list[int], base: int) -> bytes:
    digits, size = group(base)
    out = bytearray([DIGITS])
    for at in range(0, len(sums), digits):
        some = sums[at : at + digits]
        whole = size if len(some) == digits else width(base, len(some))
        out += sum(base**place * digit for place, digit in enumerate(some)).to_bytes(whole, "little")
    return bytes(out)


def fold_codes(payload: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    """(bytes,) uint8: the sums over all m rows of their d >= 1 packed codes of ceil(log2 levels) bits, to the base
    m (levels - 1) + 1 <= 2^16.

    Whether a code is not below `levels`; there are no bytes then.
    """
    codes = unpack(payload, d, (levels - 1).bit_length()).numpy()
    if (codes >= levels).any():
        return torch.zeros(0, dtype=torch.uint8), True
    base, sums = len(payload) * (levels - 1) + 1, codes.sum(0).tolist()
    lengths = _shorter(sums, base)
    out = _digits(sums, base) if lengths is None else _coded(sums, base, lengths)
    return torch.from_numpy(np.frombuffer(out, np.uint8).copy()), False


def unfold_codes(bodies: Sequence[Tensor], values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(sum counts,) float32: values[sum] for each of the counts[i] >= 0 sums in bodies[i], to the base len(values).

    And (bodies,) bool: whether it is what `fold_codes` makes of any codes. The values of any other are NaN.
    """
    read = [_read(body.numpy().tobytes(), len(values), count) for body, count in zip(bodies, counts, strict=True)]
    good, table = [one is not None for one in read], values.numpy()
    means = [
        np.full(count, np.nan, np.float32) if one is None else table[np.array(one, np.int64)]
        for one, count in zip(read, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(means)), torch.tensor(good)


def _read(raw: bytes, base: int, d: int) -> list[int] | None:
    """The sums, or None where these bytes are not theirs."""
    if d == 0 or not raw:
        return [] if d == 0 and not raw else None
    sums = {DIGITS: _read_digits, CODED: _read_coded}.get(raw[0], lambda *_: None)(raw[1:], base, d)
    if sums is None:
        return None
    lengths = _shorter(sums, base)
    return sums if raw == (_digits(sums, base) if lengths is None else _coded(sums, base, lengths)) else None


def _read_digits(raw: bytes, base: int, d: int) -> list[int] | None:
    digits, size = group(base)
    if len(raw) != packed_bytes(d, base):
        return None
    out = []
    for at in range(0, d, digits):
        start, count = at // digits * size, min(digits, d - at)
        number = int.from_bytes(raw[start : start + size], "little")
        for _ in range(count):
            number, digit = divmod(number, base)
            out.append(digit)
        if number:
            return None
    return out


def _read_coded(raw: bytes, base: int, d: int) -> list[int] | None:
    if not may_pay(d, base):
        return None
    some = joint(base)
    alphabet, symbols = base**some, -(-d // some)
    head, segments = -(-alphabet // 2), -(-symbols // SEGMENT)
    at = head + 2 * segments
    lengths = [raw[s // 2] >> 4 * (s % 2) & 15 for s in range(alphabet)] if len(raw) >= at else [0]
    if not complete(lengths):
        return None
    symbol_of, found = {code: s for s, code in codes_of(lengths).items()}, list[int]()
    for k in range(segments):
        size = int.from_bytes(raw[head + 2 * k : head + 2 * k + 2], "little")
        bits = np.unpackbits(np.frombuffer(raw[at : at + size], np.uint8), bitorder="little").tolist()
        code, due, at = "", min(SEGMENT, symbols - k * SEGMENT), at + size
        for bit in bits:
            code += str(bit)
            if code in symbol_of:
                found.append(symbol_of[code])
                code, due = "", due - 1
            if not due:
                break
        if due:
            return None
    return [s // base**place % base for s in found for place in range(some)][:d]
