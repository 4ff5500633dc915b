"""Random words, and what is drawn with them alone: Philox4x32-10, permutations, subsets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw

FEW_STRATA = 128  # up to as many, half a word draws a shift, and another word settles less than one of 512
BEYOND = 2**33  # the coordinate from which on those words are: their calls, from 2^31 on, are never those of halves


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (..., 4) uint32 under a 64-bit key: (..., 4) uint32 (Salmon et al., SC'11)."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ k0, p1 & low, (p0 >> shift) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, -1).astype(np.uint32)


def _calls(draw: Draw, count: int, first: int = 0) -> np.ndarray:
    """(m, count, 4) words: the calls with counters first, first + 1, ... of every row."""
    slots = draw.slots.numpy().astype(np.uint32)
    counter = np.empty((len(slots), count, 4), np.uint32)
    counter[..., 0] = np.arange(first, first + count, dtype=np.uint32)
    counter[..., 1] = slots[:, None]
    counter[..., 2], counter[..., 3] = draw.round & 0xFFFFFFFF, draw.stream
    return philox(counter, (draw.seed & 0xFFFFFFFF, draw.seed >> 32))


def word_array(draw: Draw, d: int, first: int = 0) -> np.ndarray:
    """The words of d coordinates from `first` on, a multiple of 64."""
    blocks = -(-d // 64)
    w = _calls(draw, 16 * blocks, first // 4).reshape(-1, blocks, 16, 4)  # row, block, counter in block, word
    return np.ascontiguousarray(w.transpose(0, 1, 3, 2).reshape(-1, 64 * blocks)[:, :d])


def words(draw: Draw, d: int) -> Tensor:
    """(m, d) uint32. Coordinate 64 b + 16 w + l is word w of counter 16 b + l: planes of 16, to suit wide registers."""
    return torch.from_numpy(word_array(draw, d))


def half_array(draw: Draw, d: int) -> np.ndarray:
    blocks = -(-d // 128)
    w = _calls(draw, 16 * blocks).reshape(-1, blocks, 16, 4)
    h = np.stack([w & np.uint32(0xFFFF), w >> np.uint32(16)], -1).astype(np.uint16)  # row, block, counter, word, half
    return np.ascontiguousarray(h.transpose(0, 1, 3, 4, 2).reshape(-1, 128 * blocks)[:, :d])


def halves(draw: Draw, d: int) -> Tensor:
    """(m, d) uint16. Coordinate 128 b + 16 h + l is half h (low before high, word by word) of counter 16 b + l."""
    return torch.from_numpy(half_array(draw, d))


def below_array(draw: Draw, d: int, n: int) -> np.ndarray:
    return (word_array(draw, d).astype(np.uint64) * np.uint64(n) >> np.uint64(32)).astype(np.int32)


def below(draw: Draw, d: int, n: int) -> Tensor:
    """(m, d) int32, uniform on 0..n-1, n < 2^31: floor(word n / 2^32), each probability off by less than 2^-32."""
    return torch.from_numpy(below_array(draw, d, n))


def shift_array(draw: Draw, d: int, n: int) -> np.ndarray:
    if n > FEW_STRATA:
        return below_array(draw, d, n)
    h, w = half_array(draw, d).astype(np.uint64), word_array(draw, d, BEYOND).astype(np.uint64)
    return ((h << np.uint64(32) | w) * np.uint64(n) >> np.uint64(48)).astype(np.int32)


def shifts(draw: Draw, d: int, n: int) -> Tensor:
    """(m, d) int32, uniform on 0..n-1, n < 2^31: floor((h 2^32 + w) n / 2^48) of half h and word 2^33 + j, for n up to
    FEW_STRATA, and else `below`. Each probability is off by less than 2^-48, or 2^-32.

    That is (h n) >> 16, whatever w is, unless (h n mod 2^16) + n > 2^16, which holds for less than n of all 2^16 h.
    """
    return torch.from_numpy(shift_array(draw, d, n))


def permutation(draw: Draw, d: int) -> Tensor:
    """(d,) int64: Fisher-Yates from the top, j = floor(word_t (t+1) / 2^32), each draw off by < 2^-32."""
    w = word_array(draw, d)[0].astype(np.uint64)
    out = np.arange(d)
    for t in range(d - 1, 0, -1):
        j = int(w[t] * np.uint64(t + 1) >> np.uint64(32))
        out[t], out[j] = out[j], out[t]
    return torch.from_numpy(out)


def coins(draw: Draw, odds: int) -> Tensor:
    """(m,) bool: heads for odds / 2^64 of all pairs of the row's first two words, the first of them the upper one."""
    pairs = word_array(draw, 2).tolist()
    return torch.tensor([high << 32 | low < odds for high, low in pairs], dtype=torch.bool)


def symmetric(draw: Draw, d: int) -> Tensor:
    """(m, d) float32: odd multiples of 2^-24 in (-1, 1), uniform: 2^-23 floor(word / 2^8) + 2^-24 - 1."""
    w = (word_array(draw, d) >> np.uint32(8)).astype(np.int64)
    return torch.from_numpy((2 * w + 1 - 2**24).astype(np.float32) * np.float32(2.0**-24))


def places(draw: Draw, n: int, slots: Tensor) -> Tensor:
    """(m,) int64: the entries of `permutation` of 0..n-1 at these slots. Raises IndexError for a slot beyond."""
    return permutation(draw, n).index_select(0, slots)


def support(draw: Draw, d: int, k: int) -> Tensor:
    """(m, k) int64, ascending: a uniform k-subset of 0..d-1 for every row (Floyd's algorithm, word c for the c-th)."""
    w = word_array(draw, k).astype(np.uint64)
    out = np.empty((len(w), k), np.int64)
    for i, row in enumerate(w):
        chosen: set[int] = set()
        for c, t in enumerate(range(d - k, d)):
            j = int(row[c] * np.uint64(t + 1) >> np.uint64(32))
            chosen.add(t if j in chosen else j)
        out[i] = sorted(chosen)
    return torch.from_numpy(out)
