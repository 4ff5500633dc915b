"""Sums of many messages' codes, packed as digits of a few bytes: what a process says of the messages it has added."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.reference.codes import unpack

WORD = 8  # bytes of the longest group


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


def fold_codes(payload: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    """(bytes,) uint8: the sums over all m rows of their d packed codes of ceil(log2 levels) bits, as digits to the base
    m (levels - 1) + 1.

    Whether a code is not below `levels` (the bytes say nothing then). Groups of q digits take the B bytes that `group`
    says: sum_l base^l digit_l, little-endian; those of the last, cut short, as few as they need.
    """
    codes = unpack(payload, d, (levels - 1).bit_length()).numpy()
    base, sums = len(payload) * (levels - 1) + 1, codes.sum(0).tolist()
    digits, size = group(base)
    out = bytearray()
    for at in range(0, d, digits):
        some = sums[at : at + digits]
        number = sum(base**place * digit for place, digit in enumerate(some))
        whole = size if len(some) == digits else width(base, len(some))
        out += (number % 256**whole).to_bytes(whole, "little")
    return torch.from_numpy(np.frombuffer(bytes(out), np.uint8).copy()), bool((codes >= levels).any())


def unfold_codes(bodies: Sequence[Tensor], values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(sum counts,) float32: values[digit] for each of the counts[i] digits in bodies[i], to the base len(values).

    And (bodies,) bool: whether it is one that `fold_codes` makes. The values of any other are NaN.
    """
    read = [_read(body.numpy().tobytes(), values.numpy(), count) for body, count in zip(bodies, counts, strict=True)]
    means = [
        np.full(count, np.nan, np.float32) if one is None else one for one, count in zip(read, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(means)), torch.tensor([one is not None for one in read])


def _read(raw: bytes, values: np.ndarray, d: int) -> np.ndarray | None:
    """(d,) float32, or None where a group holds a number that no digits make."""
    base, out = len(values), np.empty(d, np.float32)
    digits, size = group(base)
    for at in range(0, d, digits):
        count = min(digits, d - at)
        start, whole = at // digits * size, size if count == digits else width(base, count)
        number = int.from_bytes(raw[start : start + whole], "little")
        if number >= base**count:
            return None
        for j in range(at, at + count):
            number, digit = divmod(number, base)
            out[j] = values[digit]
    return out
