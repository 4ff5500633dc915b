"""Named places where a rank can be made to die, for tests of what the others make of it.

`SHOAL_CRASH=before-gather:2:7` kills rank 2 with SIGKILL when it comes to that place in round 7. Unless the variable is
set when the rank starts, `here` compares with None and returns. A rank that replaces another never crashes here.
"""

from __future__ import annotations

import os
import signal

from shoal.errors import ConfigError

POINTS = (
    "joining",  # before it looks for the others (round 0)
    "measuring",  # before f and its gradient are added up over all ranks
    "before-gather",  # its messages are encoded, and nobody has them
    "after-gather",  # everyone's messages are here, and nothing has come of them
    "before-commit",  # the round is done, and only this process's memory knows
    "mid-journal",  # half of its state is in the journal
    "after-commit",  # all of it is
    "mid-checkpoint",  # its share of a checkpoint is on the disk, and there is no manifest
)
_armed: tuple[str, int, int] | None = None


def arm() -> None:
    """Read the variable. Raises ConfigError for one that names no place."""
    global _armed
    said = os.environ.get("SHOAL_CRASH", "")
    name, *numbers = said.split(":")
    if said and (name not in POINTS or len(numbers) != 2 or not all(n.isdecimal() for n in numbers)):
        raise ConfigError(f"SHOAL_CRASH={said!r}: PLACE:RANK:ROUND, PLACE one of {', '.join(POINTS)}.")
    _armed = (name, int(numbers[0]), int(numbers[1])) if said else None


def disarm() -> None:
    """This process replaces one that died."""
    global _armed
    _armed = None


def armed(point: str, rank: int, index: int) -> bool:
    """Whether this is the place."""
    return _armed is not None and (point, rank, index) == _armed


def here(point: str, rank: int, index: int) -> None:
    """Die here, if so told."""
    if armed(point, rank, index):
        os.kill(os.getpid(), signal.SIGKILL)
