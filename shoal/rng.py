"""Keyed random numbers: every word is a pure function of (seed, stream, round, slot, coordinate).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11) with the 64-bit seed
as its key and the counter (c, slot, round, crc32 of the stream's name). Nothing is drawn in advance and nothing is
saved: drop a client, reorder rows, replay round 731 alone, and the bits are the same. The layout of coordinates over
counters is in `shoal.kernels.reference.words`, `.halves` and `.shifts`; LAYOUT numbers it, and frames carry it.
"""

from __future__ import annotations

import zlib
from functools import cache, lru_cache

import torch
from torch import Tensor

from shoal import kernels
from shoal.errors import ConfigError
from shoal.kernels import Draw

LAYOUT = 1  # frozen: another layout is another set of results
SHARED = torch.tensor([0xFFFFFFFF])  # the slot of randomness that everyone derives alike
SERVER = torch.tensor([0xFFFFFFFE])  # the slot of the server's own


@cache
def stream_id(name: str) -> int:
    """The 32-bit id of a named stream."""
    return zlib.crc32(name.encode())


def checked_seed(seed: int) -> int:
    """The seed, if it fits the 64-bit key."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed={seed!r}: a seed is an integer in 0..2^64-1.")
    return seed


def words(draw: Draw, d: int) -> Tensor:
    """(m, d) uint32 words."""
    return kernels.of(draw.slots).words(draw, d)


def uniform(draw: Draw, d: int) -> Tensor:
    """(m, d) float32, uniform on the multiples of 2^-24 in [0, 1)."""
    return (words(draw, d).to(torch.int64) >> 8).to(torch.float32) * 2.0**-24


@lru_cache(maxsize=256)
def shared_uniform(index: int, stream: int, seed: int) -> float:
    """One number on [0, 1) that everyone derives alike. Remembered: both halves of a method ask for the same coin."""
    return float(uniform(Draw(SHARED, index, stream, seed), 1).item())


def permutation(draw: Draw, d: int) -> Tensor:
    """(d,) int64: a uniform permutation of 0..d-1 from the first row's stream."""
    return kernels.of(draw.slots).permutation(draw, d)


def coins(draw: Draw, odds: int) -> Tensor:
    """(m,) bool: a coin for each row, heads with probability odds / 2^64."""
    return kernels.of(draw.slots).coins(draw, odds)


def places(draw: Draw, n: int, slots: Tensor) -> Tensor:
    """(m,) int64: where a uniform permutation of 0..n-1 has these slots."""
    return kernels.of(slots).places(draw, n, slots)


def support(draw: Draw, d: int, k: int) -> Tensor:
    """(m, k) int64, ascending: a uniform k-subset of 0..d-1 a row."""
    return kernels.of(draw.slots).support(draw, d, k)


def below(draw: Draw, d: int, n: int) -> Tensor:
    """(m, d) int32, uniform on 0..n-1 (floor(word n / 2^32): each probability is off by less than 2^-32)."""
    return kernels.of(draw.slots).below(draw, d, n)
