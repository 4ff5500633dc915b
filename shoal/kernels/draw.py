"""What names a stream of random words: a pure function of (seed, stream, round, slot), see `shoal.rng`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """One stream in one round, for m rows: row i is drawn with key `seed` and counters (c, slots[i], round, stream)."""

    slots: Tensor  # (m,) int64: whose randomness; rng.SHARED and rng.SERVER belong to no client
    round: int
    stream: int  # crc32 of the stream's name
    seed: int  # 64 bits
