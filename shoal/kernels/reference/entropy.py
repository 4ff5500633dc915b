"""An asymmetric numeral system over the counts of a row's symbols."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOW, DIGIT = 16, 8  # states lie in [d 2^16, d 2^24), and a byte at a time leaves or enters them


def state_bytes(d: int) -> int:
    """Bytes that hold any state of the code of d symbols."""
    return ((d << (LOW + DIGIT)) - 1).bit_length() + 7 >> 3


def _gamma(number: int) -> list[int]:
    """Elias' gamma code of number >= 1: k zeros, a one, then its k lowest bits, k = floor(log2 number)."""
    k = number.bit_length() - 1
    return [0] * k + [1] + [number >> i & 1 for i in range(k)]


def _read_counts(head: np.ndarray, d: int, levels: int) -> tuple[list[int], int] | None:
    """(how often each symbol occurs, bytes read), or None where the bits are no such thing."""
    bits, at, counts = np.unpackbits(head, bitorder="little").tolist(), 0, [0] * levels
    for symbol in range(levels):
        if symbol == (levels - 1) // 2:
            continue
        k = 0
        while at + k < len(bits) and not bits[at + k] and k <= 40:
            k += 1
        if k > 40 or at + 2 * k + 1 > len(bits):
            return None
        counts[symbol] = (1 << k) - 1 + sum(bits[at + k + 1 + i] << i for i in range(k))
        at += 2 * k + 1
    used = at + 7 >> 3
    if sum(counts) > d or any(bits[at : 8 * used]):
        return None
    counts[(levels - 1) // 2] = d - sum(counts)
    return counts, used


def encode_entropy(code: Tensor, levels: int, limit: int) -> tuple[Tensor, Tensor]:
    """((m, limit) uint8, (m,) int64 bytes used) of (m, d) integers 0..levels-1: an entropy code of each row.

    First count + 1 of every symbol but (levels-1)//2 in Elias' gamma code, filled with zeros to a byte; then the last
    state of an asymmetric numeral system, `state_bytes` long; then the bytes that left it, the latest first. The state
    starts at d 2^16 and takes the symbols from the last to the first: for one that occurs c times, with b smaller ones
    in the row, bytes leave until x < c 2^24, and then x becomes floor(x/c) d + b + (x mod c).
    A row that does not get shorter than `limit` is left out: its length is `limit`, its bytes are zero.
    """
    m, d = code.shape
    out, nbytes = np.zeros((m, limit), np.uint8), np.full(m, limit)
    for i, row in enumerate(code.numpy()):
        counts = np.bincount(row, minlength=levels).tolist()
        below = np.concatenate([[0], np.cumsum(counts)]).tolist()
        bits = [bit for s in range(levels) if s != (levels - 1) // 2 for bit in _gamma(counts[s] + 1)]
        x, gone = d << LOW, []
        for s in reversed(row.tolist()):
            while x >= counts[s] << (LOW + DIGIT):
                gone.append(x & 255)
                x >>= DIGIT
            x = x // counts[s] * d + below[s] + x % counts[s]
        head = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
        sent = head + x.to_bytes(state_bytes(d), "little") + bytes(reversed(gone))
        if len(sent) < limit:
            out[i, : len(sent)], nbytes[i] = np.frombuffer(sent, np.uint8), len(sent)
    return torch.from_numpy(out), torch.from_numpy(nbytes)


def decode_entropy(payload: Tensor, nbytes: Tensor, d: int, levels: int) -> tuple[Tensor, Tensor]:
    """((m, d) int64, (m,) bool): the inverse of `encode_entropy`, and which rows are messages of it; others are zeros.

    A row is one if its counts add up to at most d, its state is in range, it gives back d symbols, each as often as
    counted, ends at the state d 2^16, and leaves neither a byte nor a bit over.
    """
    out, good = np.zeros((len(payload), d), np.int64), np.zeros(len(payload), bool)
    for i, size in enumerate(nbytes.tolist()):
        row, wide = payload.numpy()[i, :size], state_bytes(d)
        read = _read_counts(row, d, levels)
        if read is None or read[1] + wide > size:
            continue
        counts, at = read
        x, at = int.from_bytes(row[at : at + wide].tobytes(), "little"), at + wide
        if not d << LOW <= x < d << (LOW + DIGIT):
            continue
        below = np.concatenate([[0], np.cumsum(counts)])
        symbols = []
        for _ in range(d):
            s = int(np.searchsorted(below, x % d, side="right")) - 1
            x = counts[s] * (x // d) + x % d - int(below[s])
            while x < d << LOW and at < size:
                x, at = x << DIGIT | int(row[at]), at + 1
            if x < d << LOW:
                break
            symbols.append(s)
        same = len(symbols) == d and np.bincount(symbols, minlength=levels).tolist() == counts
        if same and at == size and x == d << LOW:
            out[i], good[i] = symbols, True
    return torch.from_numpy(out), torch.from_numpy(good)
