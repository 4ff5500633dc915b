"""The errors shoal raises, all in one tree.

::

    Exception
    └── ShoalError                    everything shoal raises on purpose
        ├── ConfigError               (also ValueError) a setting breaks a rule; raised before any work is done
        │   └── DataError             a data file is absent, malformed or does not fit the problem
        ├── NonFiniteError            (also ArithmeticError) a NaN or an infinity where a number is needed
        ├── WireError                 (also ValueError) a received frame cannot be accepted
        │   ├── BadMagic              it is not a frame of this protocol
        │   ├── VersionMismatch       it is a frame of another version of the protocol
        │   ├── ConfigMismatch        its sender runs another configuration
        │   ├── RoundMismatch         it belongs to another round
        │   ├── LengthError           it is shorter or longer than it must be
        │   ├── ChecksumError         its bytes changed on the way
        │   └── PayloadError          its payload does not decode to a message
        ├── PeerLost                  ranks of the group cannot go on together: `ranks`, `round`
        │   ├── PeerDied              these ranks are gone: killed, crashed, or stopped by an error of their own
        │   └── PeerTimeout           these ranks have not answered for as long as was allowed
        ├── QuorumLost                too few are left for the round to mean anything
        └── CheckpointError           a checkpoint cannot be used
            ├── CheckpointCorrupt     the file is damaged or incomplete
            ├── CheckpointWriteFailed (also OSError) a file of a run could not be written; what was there is as it was
            └── ResumeMismatch        the file is sound and belongs to another run

Every message names the offending value, the rule it breaks and the mend. The classes carry no behavior: what
distinguishes them is what a caller may do next (mend the settings, drop the frame, start afresh). Some name whom they
are about: the clients of a NonFiniteError, the ranks and the round of a PeerLost.

`CheckpointWarning` (a UserWarning) says that a damaged checkpoint was passed over for an older one.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BadMagic",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointWarning",
    "CheckpointWriteFailed",
    "ChecksumError",
    "ConfigError",
    "ConfigMismatch",
    "DataError",
    "LengthError",
    "NonFiniteError",
    "PayloadError",
    "PeerDied",
    "PeerLost",
    "PeerTimeout",
    "QuorumLost",
    "ResumeMismatch",
    "RoundMismatch",
    "ShoalError",
    "VersionMismatch",
    "WireError",
]


class ShoalError(Exception):
    """Any error that shoal raises on purpose."""


class ConfigError(ShoalError, ValueError):
    """A setting breaks a rule; raised before any work is done."""


class DataError(ConfigError):
    """A data file is absent, malformed or does not fit the problem that asked for it."""


class NonFiniteError(ShoalError, ArithmeticError):
    """A NaN or an infinity stands where a finite number is needed; `clients` have it, where that is known."""

    def __init__(self, message: str, clients: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.clients = tuple(clients)


class WireError(ShoalError, ValueError):
    """A received frame cannot be accepted."""


class BadMagic(WireError):
    """The first bytes are not those of a shoal frame."""


class VersionMismatch(WireError):
    """The frame was written by another version of the wire protocol."""


class ConfigMismatch(WireError):
    """The frame's sender runs another configuration, so its payload would be misread."""


class RoundMismatch(WireError):
    """The frame belongs to another round than the one under way."""


class LengthError(WireError):
    """The frame is shorter or longer than its header and configuration require."""


class ChecksumError(WireError):
    """The frame's bytes do not match its checksum."""


class PayloadError(WireError):
    """The frame is intact and its payload does not decode to a valid message."""


class PeerLost(ShoalError):
    """Ranks of the group cannot go on together: `ranks` are lost, in `round` (None before the first)."""

    def __init__(self, message: str, ranks: Iterable[int] = (), round: int | None = None) -> None:
        super().__init__(message)
        self.ranks, self.round = tuple(ranks), round


class PeerDied(PeerLost):
    """Ranks are gone: killed, crashed, or stopped by an error of their own."""


class PeerTimeout(PeerLost):
    """Ranks have not answered for as long as was allowed: stopped, cut off, or far too slow."""


class QuorumLost(ShoalError):
    """Too few are left for the round to mean anything."""


class CheckpointError(ShoalError):
    """A checkpoint cannot be used."""


class CheckpointCorrupt(CheckpointError):
    """The checkpoint file is damaged or incomplete."""


class CheckpointWriteFailed(CheckpointError, OSError):
    """A file of a run could not be written (errno, path); the one of that name is as it was before."""

    def __str__(self) -> str:
        said = f"{self.filename} could not be written: {self.strerror} (errno {self.errno})."
        return f"{said} What was there before is untouched; make room, then resume the run."


class ResumeMismatch(CheckpointError):
    """The checkpoint is sound and belongs to a run with other settings."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over: the run goes on from an older one, to the same iterate."""
