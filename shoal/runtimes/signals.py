"""Signals: what the ranks tell each other in front of every exchange, so that nobody enters one that others do not.

    offset  bytes  field
    0       4      magic, b"SHOS"
    4       2      format version (wire.VERSION)
    6       1      layout of the random streams (rng.LAYOUT)
    7       1      kind: 0 hello, 1 all, 2 swap, 3 barrier, 4 fault, 5 roll call, 6 farewell, 7 gather
    8       4      attempt (restarts of the group)
    12      4      round
    16      4      rank of the sender
    20      4      ranks in all
    24      4      number of the exchange, from 0
    28      4      bytes of the body
    32      8      bytes that this rank brings to the exchange
    40      8      digest of the run's config
    48      4      CRC-32 (zlib) of the header with this field zero, then the body
    52      12     zero
    64             body: what is exchanged in words, a swap's sizes, a gather's bounds, a config, or what went wrong

All little-endian. Every rank holds every rank's signal before it judges, so all come to the same verdict.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shoal import rng
from shoal.errors import (
    BadMagic,
    ChecksumError,
    ConfigMismatch,
    LengthError,
    NonFiniteError,
    RoundMismatch,
    VersionMismatch,
    WireError,
)
from shoal.wire import VERSION

HELLO, ALL, SWAP, BARRIER, FAULT, ROLL, BYE, GATHER, TELL = range(9)
KINDS = (
    "a handshake", "an all-gather", "an all-to-all", "a barrier", "a fault", "a roll call", "a farewell",
    "an uneven all-gather", "an all-gather in the signals",
)  # fmt: skip
SIZE = 64
LONGEST = 2**20  # bytes of a body
_MAGIC = b"SHOS"
_FIELDS = struct.Struct("<4sHBBIIIIIIQ8sI12x")


class Signal(NamedTuple):
    """One rank's word about the exchange that it is about to enter."""

    kind: int
    rank: int
    world: int
    number: int
    round: int = 0
    nbytes: int = 0
    digest: bytes = bytes(8)
    attempt: int = 0
    body: bytes = b""
    version: int = VERSION
    layout: int = rng.LAYOUT

    def _header(self, crc: int) -> bytes:
        return _FIELDS.pack(
            _MAGIC, self.version, self.layout, self.kind, self.attempt, self.round, self.rank, self.world, self.number,
            len(self.body), self.nbytes, self.digest, crc,
        )  # fmt: skip

    def pack(self) -> bytes:
        """Header and body."""
        return self._header(zlib.crc32(self.body, zlib.crc32(self._header(0)))) + self.body


def first(buffer: bytearray, rank: int) -> Signal | None:
    """Takes the first signal out of what has arrived from `rank`; None while it is not whole.

    Raises BadMagic, LengthError (a body beyond 1 MiB, refused before it is waited for), ChecksumError.
    """
    if len(buffer) < SIZE:
        return None
    fields = _FIELDS.unpack_from(buffer)
    magic, version, layout, kind, attempt, index, sender, world, number, length, nbytes, digest, crc = fields
    if magic != _MAGIC:
        raise BadMagic(f"rank {rank}: a signal starts with {magic!r}, not {_MAGIC!r}; only ranks of shoal may connect.")
    if length > LONGEST:
        raise LengthError(f"rank {rank}: a signal of {length} bytes; the longest has {LONGEST}.")
    if len(buffer) < SIZE + length:
        return None
    body = bytes(buffer[SIZE : SIZE + length])
    signal = Signal(kind, sender, world, number, index, nbytes, digest, attempt, body, version, layout)
    if signal.pack() != bytes(buffer[: SIZE + length]):
        raise ChecksumError(f"rank {rank}: the checksum {crc:08x} of its signal does not match.")
    del buffer[: SIZE + length]
    return signal


def ranks(numbers: Sequence[int]) -> str:
    """'rank 2', 'ranks 0, 1'."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def sides(values: Sequence[Any]) -> str:
    """Who says what: 'ranks 0, 2: 5; rank 1: 6', where values[r] is rank r's."""
    who: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        who.setdefault(str(value), []).append(rank)
    return "; ".join(f"{ranks(those)}: {value}" for value, those in who.items())


def _same(name: str, values: Sequence[Any], error: type[WireError], mend: str) -> None:
    if any(value != values[0] for value in values):
        raise error(f"the ranks do not agree: {name} is, at {sides(values)}. {mend}")


COMMAND = "Start all ranks with the same command, files and versions."
ORDER = "Every rank makes the same calls in the same order: one has left out a round, or made one too many."


def judge(signals: Sequence[Signal]) -> None:
    """Returns where all ranks are about to do the same; else raises the same error on every rank.

    VersionMismatch (format, layout), ConfigMismatch (ranks in all, sender, digest, what is exchanged), RoundMismatch
    (attempt, number, round, kind), LengthError (bytes), and NonFiniteError where a rank reports a fault.
    """
    s = signals
    _same("the format", [x.version for x in s], VersionMismatch, COMMAND)
    _same("the layout of random streams", [x.layout for x in s], VersionMismatch, COMMAND)
    _same("the number of ranks", [x.world for x in s], ConfigMismatch, COMMAND)
    if any(x.rank != i for i, x in enumerate(s)):
        raise ConfigMismatch(f"the ranks call themselves {[x.rank for x in s]}: two have one number. {COMMAND}")
    _same("the digest of the config", [x.digest.hex() for x in s], ConfigMismatch, COMMAND)
    _same("the attempt", [x.attempt for x in s], RoundMismatch, "A rank of an earlier start is still there: end it.")
    _same("the round", [x.round for x in s], RoundMismatch, ORDER)
    _same("the number of the exchange", [x.number for x in s], RoundMismatch, ORDER)
    if any(x.kind == FAULT for x in s):
        raise _faults([x for x in s if x.kind == FAULT])
    _same("what comes next", [KINDS[x.kind] if x.kind < len(KINDS) else x.kind for x in s], RoundMismatch, ORDER)
    if s[0].kind in (ALL, TELL):
        _same("what is exchanged", [_words(x) for x in s], ConfigMismatch, COMMAND)
        _same("the number of bytes", [x.nbytes for x in s], LengthError, COMMAND)
    if s[0].kind == SWAP:
        _judge_swap(s)
    if s[0].kind == GATHER:
        _judge_gather(s)
    if s[0].kind == HELLO:
        _judge_configs(s)


def _words(signal: Signal) -> str:
    """What is exchanged, in words: a body without the bytes that are told in it."""
    return (signal.body if signal.kind == ALL else signal.body[: -signal.nbytes or None]).decode(errors="replace")


def fault(error: NonFiniteError) -> bytes:
    """The body that reports it."""
    return json.dumps({"clients": error.clients, "said": str(error)}).encode()


def _faults(signals: Sequence[Signal]) -> NonFiniteError:
    """One error for all: the words are those about the first client, as the simulator has them."""
    told = [(x.rank, read(x)) for x in signals]
    told.sort(key=lambda pair: min(numbers(pair[1], "clients"), default=2**63))
    rank, said = told[0]
    known = all(numbers(one, "clients") for _, one in told)
    clients = sorted({i for _, one in told for i in numbers(one, "clients")}) if known else []
    return NonFiniteError(f"{said.get('said', 'not finite')} (rank {rank})", clients)


def read(signal: Signal) -> dict[str, Any]:
    """A body in JSON. Raises LengthError where it is none, or no object."""
    try:
        found = json.loads(signal.body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LengthError(f"rank {signal.rank}: the body of {KINDS[signal.kind]} is no object in JSON.")
    return found


def numbers(told: Mapping[str, Any], name: str) -> list[int]:
    """The whole numbers that a body has under this name; none where it has something else there."""
    found = told.get(name, ())
    return list(found) if isinstance(found, list) and all(type(i) is int for i in found) else []


def table(sent: Sequence[int], expected: Sequence[int], what: str) -> bytes:
    """The body of a swap: bytes for each rank, bytes expected of each, and what they are."""
    return struct.pack(f"<{2 * len(sent)}Q", *sent, *expected) + what.encode()


def _judge_swap(s: Sequence[Signal]) -> None:
    world = len(s)
    if any(len(x.body) < 16 * world for x in s):
        raise LengthError(f"an all-to-all of {world} ranks names {2 * world} sizes, not {len(s[0].body) // 8}.")
    _same("what is exchanged", [x.body[16 * world :].decode(errors="replace") for x in s], ConfigMismatch, COMMAND)
    rows = [struct.unpack_from(f"<{2 * world}Q", x.body) for x in s]
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            if row[j] != other[world + i]:
                raise LengthError(f"rank {i} has {row[j]} bytes for rank {j}, which expects {other[world + i]}. "
                                  f"{COMMAND}")  # fmt: skip


def bounds(most: Sequence[int], what: str) -> bytes:
    """The body of a gather: the most bytes that each rank may bring, and what they are."""
    return struct.pack(f"<{len(most)}Q", *most) + what.encode()


def _judge_gather(s: Sequence[Signal]) -> None:
    world = len(s)
    if any(len(x.body) < 8 * world for x in s):
        raise LengthError(f"an uneven all-gather of {world} ranks names {world} bounds, not {len(s[0].body) // 8}.")
    _same("what is exchanged", [x.body[8 * world :].decode(errors="replace") for x in s], ConfigMismatch, COMMAND)
    rows = [list(struct.unpack_from(f"<{world}Q", x.body)) for x in s]
    _same("the most bytes of each", rows, LengthError, COMMAND)
    for x, most in zip(s, rows[0], strict=True):
        if x.nbytes > most:
            raise LengthError(f"rank {x.rank} brings {x.nbytes} bytes of at most {most}. {COMMAND}")


def _judge_configs(s: Sequence[Signal]) -> None:
    """Raises ConfigMismatch naming each field that differs, with who has what."""
    configs = [flat(read(x)) for x in s]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name, "absent") for config in configs] for name in names}
    differ = [f"{name}: {sides(v)}" for name, v in values.items() if any(x != v[0] for x in v)]
    if differ:
        raise ConfigMismatch(f"the ranks do not run the same. {' | '.join(differ)}. {COMMAND}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out
