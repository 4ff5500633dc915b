"""A prefix code of limited length for symbols of which it is known how often each occurs: Huffman's, canonical.

Larmore, Hirschberg, "A Fast Algorithm for Optimal Length-Limited Huffman Codes", J. ACM 37(3), 1990: the best lengths
by package-merge. Codes of one length follow each other in the order of their symbols, as in DEFLATE (RFC 1951, 3.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 12  # bits of the longest code: a table of all its beginnings stays in the first cache
SEGMENT = 4096  # symbols whose codes begin at a byte of their own: what one thread reads, and at most 6 KiB


def lengths_of(counts: Sequence[int]) -> list[int]:
    """Bits of every symbol's code, none for those that do not occur; a symbol that is alone gets a partner.

    counts[s] is how often s occurs, in at most 2^LIMIT symbols of which at least one does. Of several best choices, the
    one in which a symbol comes before a package of the same weight, and symbols in the order of (count, symbol).
    """
    coins = [(count, [s]) for count, s in sorted((count, s) for s, count in enumerate(counts) if count)]
    if len(coins) == 1:
        coins.insert(0, (0, [0 if coins[0][1] != [0] else 1]))
    merged: list[tuple[int, list[int]]] = []
    for _ in range(LIMIT):
        packages = [(a + b, s + t) for (a, s), (b, t) in zip(merged[::2], merged[1::2], strict=False)]
        merged = sorted(coins + packages, key=lambda coin: coin[0])
    out = [0] * len(counts)
    for _, symbols in merged[: 2 * len(coins) - 2]:
        for s in symbols:
            out[s] += 1
    return out


def codes_of(lengths: Sequence[int]) -> dict[int, str]:
    """The symbols' codes, the bit that comes first in front."""
    code, before, out = 0, 0, {}
    for length, s in sorted((length, s) for s, length in enumerate(lengths) if length):
        code <<= length - before
        out[s], before = f"{code:0{length}b}", length
        code += 1
    return out


def complete(lengths: Sequence[int]) -> bool:
    """Whether the lengths are those of a code that every sequence of bits goes on with: none too long, Kraft's sum is
    1."""
    return max(lengths) <= LIMIT and sum(1 << LIMIT - length for length in lengths if length) == 1 << LIMIT


def coded_bytes(counts: Sequence[int], lengths: Sequence[int]) -> int:
    """What a body of these symbols takes at most, known before any is encoded: its kind, four bits a length, two bytes
    a segment, the codes, and less than a byte at the end of each segment."""
    segments = -(-sum(counts) // SEGMENT)
    bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
    return 1 + -(-len(counts) // 2) + 3 * segments + bits // 8
