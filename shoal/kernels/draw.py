"""What names a stream of random words: a pure function of (seed, stream, round, slot), see `shoal.rng`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """One stream in one round, for m rows: word j of row i is Philox(key=seed, counter=(j, slots[i], index, stream))."""

    slots: Tensor  # (m,) int64: whose randomness; rng.SHARED and rng.SERVER belong to no client
    index: int  # the round
    stream: int  # crc32 of the stream's name
    seed: int  # 64 bits
