"""Runtimes: the one driver, and the channels that move its bytes."""

from shoal.runtimes.local import Local
from shoal.runtimes.rounds import checked_policy, chunks, rounds, row_fields

__all__ = ["Local", "checked_policy", "chunks", "rounds", "row_fields"]
