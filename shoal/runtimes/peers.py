"""The ranks of a process group and the three ways in which they exchange bytes.

Bytes alone travel, in uint8: gloo reads another type's bytes without a word, sums strided tensors wrongly and ends the
process where sizes differ. So every exchange has a fence in front: each rank tells all others, over lines of its own,
what it is about to do (`signals`), and unless all mean the same, every rank raises the same error and nobody enters.
Sums never go through all_reduce, whose order of summation is its own.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.errors import NonFiniteError
from shoal.runtimes.lines import TIMEOUT, Lines
from shoal.runtimes.meeting import meet
from shoal.runtimes.signals import ALL, BARRIER, FAULT, GATHER, HELLO, SWAP, TELL, Signal, bounds, fault, judge, table
from shoal.wire import digest

SMALL = 4096  # bytes that are told in a signal
_LINES: WeakKeyDictionary[dist.ProcessGroup, Lines] = WeakKeyDictionary()
_MEETINGS: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


class Peers:
    """All ranks of `group` (default: the world), of which this process is `rank` of `world`.

    `moved` counts the bytes that this rank has sent to others, signals among them; what it keeps for itself is not.
    `round` is the caller's to set: ranks in different rounds refuse to exchange. So are those with another `digest`.

    Raises, in every exchange and on every rank alike, the errors of `signals.judge`; PeerDied and PeerTimeout where
    ranks are lost, with their numbers; then the group is at an end.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, lines: Lines | None = None, timeout: float = TIMEOUT
    ) -> None:
        # None stays None: gloo's threads abort the process if a group lives on until the interpreter ends.
        self.group = group
        self.world, self.rank, self.moved = dist.get_world_size(group), dist.get_rank(group), 0
        known = dist.distributed_c10d._get_default_group() if group is None else group
        self.lines = lines or _known(known, self.rank, self.world, timeout)
        _LINES[known] = self.lines
        self.digest, self.round = bytes(8), 0

    def _fence(self, kind: int, body: bytes, nbytes: int = 0) -> list[Signal]:
        """Returns once all ranks are about to do the same: what each of them says."""
        signal = Signal(
            kind, self.rank, self.world, self.lines.number, self.round, nbytes, self.digest, self.lines.attempt, body
        )
        signals, sent = self.lines.exchange(signal)
        self.moved += sent
        judge(signals)
        return signals

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """gloo names no rank: the lines do."""
        try:
            yield
        except RuntimeError as error:
            self.lines.inquire(str(error).splitlines()[0])

    def _wait(self, work: dist.Work | None) -> None:
        """Until the exchange is done, or the lines say that it never will be: gloo waits for its neighbors, and these
        may have left because of another's end, with their sockets still open."""
        if work is None:
            return
        pause, end = 5e-5, time.monotonic() + self.lines.timeout  # a group's own limit may be 30 minutes
        while not work.is_completed() and time.monotonic() < end:
            if pause < 1e-3:
                time.sleep(pause)  # a selector rounds up to milliseconds
            else:
                self.lines.watch(pause)
            pause = min(1.25 * pause, 2e-3)  # a quarter of the time that has passed, at most
        work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))

    def all(self, mine: Tensor, what: str = "") -> list[Tensor]:
        """Every rank's tensor, in rank order; all of one shape and type. `what`: in words, the same at all ranks.

        Small ones travel in the signals: it takes a line's latency once, and not once more for every rank.
        """
        mine = mine.contiguous()
        size, words = mine.numel() * mine.element_size(), f"{_brief(what or 'a tensor')}, {mine.dtype}".encode()
        if size <= SMALL:
            told = self._fence(TELL, words + mine.reshape(-1).view(torch.uint8).numpy().tobytes(), size)
            return [_told(one, mine) for one in told]
        self._fence(ALL, words, size)
        out = self._gathered(mine)
        self.moved += size * (self.world - 1)
        return out

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        out = [torch.empty_like(mine) for _ in range(self.world)]
        with self._watched():
            self._wait(dist.all_gather(out, mine, group=self.group, async_op=True))
        return out

    def swap(self, mine: Sequence[Tensor], sizes: Sequence[int], what: str = "") -> list[Tensor]:
        """What each rank has for this one, `sizes[r]` bytes of rank r, for what this one has for each: mine[r], (b,)
        uint8. The sizes are what both ends know without asking."""
        sent = [len(piece) for piece in mine]
        self._fence(SWAP, table(sent, sizes, _brief(what or "slices")), sum(sent))
        out = self._swapped(mine, sizes)
        self.moved += sum(sent) - sent[self.rank]
        return out

    def _swapped(self, mine: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        sent, out = [len(piece) for piece in mine], torch.empty(sum(sizes), dtype=torch.uint8)
        with self._watched():
            self._wait(
                dist.all_to_all_single(
                    out, torch.cat(list(mine)), list(sizes), sent, group=self.group, async_op=True
                )
            )  # fmt: skip
        return list(out.split(list(sizes)))

    def gather(self, mine: Tensor, most: Sequence[int], what: str = "") -> list[Tensor]:
        """Every rank's bytes, in rank order, (b,) uint8: of rank r any number up to most[r], which all ranks know. What
        each brings stands in the signals."""
        sizes = [one.nbytes for one in self._fence(GATHER, bounds(most, _brief(what or "bytes")), len(mine))]
        nothing = mine[:0]
        pieces = [nothing if rank == self.rank else mine for rank in range(self.world)]
        out = self._swapped(pieces, [0 if rank == self.rank else size for rank, size in enumerate(sizes)])
        out[self.rank] = mine
        self.moved += len(mine) * (self.world - 1)
        return out

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        self._fence(BARRIER, b"")

    def handshake(self, config: dict[str, Any]) -> None:
        """All ranks have the same config: its digest is theirs from now on. Raises ConfigMismatch, on every rank, that
        names each field that differs and who has what."""
        self._fence(HELLO, json.dumps(config, sort_keys=True).encode())
        self.digest = digest(config)

    def fail(self, error: NonFiniteError) -> NoReturn:
        """Tell the others, who wait in front of an exchange, and raise on every rank what all of them report."""
        self._fence(FAULT, fault(error))
        raise error  # never reached: a fault is a fault at every rank

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group; `error` is why."""
        self.lines.close(error)


def in_use(group: dist.ProcessGroup) -> bool:
    """Whether somebody exchanges over this group, and has not left it."""
    lines = _LINES.get(group)
    return lines is not None and not lines.closed


def _told(signal: Signal, like: Tensor) -> Tensor:
    """What a signal has behind its words: a tensor of that shape and type."""
    data = bytearray(signal.body[len(signal.body) - signal.nbytes :])
    return torch.frombuffer(data, dtype=like.dtype).reshape(like.shape) if data else torch.empty_like(like)


def _brief(what: str) -> str:
    """Words that travel with every exchange: long ones by their beginning and a checksum."""
    return what if len(what) <= 80 else f"{what[:60]}... {zlib.crc32(what.encode()):08x}"


def _known(group: dist.ProcessGroup, rank: int, world: int, timeout: float) -> Lines:
    """The lines of a group, laid when they are first wanted."""
    lines = _LINES.get(group)
    if lines is None or lines.closed:
        count = _MEETINGS[group] = _MEETINGS.get(group, 0) + 1
        store = dist.PrefixStore(f"shoal{count}", dist.distributed_c10d._get_process_group_store(group))
        lines = meet(store, rank, world, timeout)
    return lines
