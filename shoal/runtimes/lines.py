"""Lines: a TCP connection between every two ranks, that carries signals and whose end is a death certificate.

The kernel closes a killed process's sockets at once, so whoever waits on its line knows in milliseconds who it was;
gloo says no more than an address. A rank that leaves on purpose says why, and whom it lost: its word is passed on
instead of its own number. Nothing here needs the store after the start, so its end does no harm.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from collections import deque
from contextlib import suppress
from typing import Any, NoReturn
from weakref import WeakSet

from shoal import errors
from shoal.errors import LengthError, PeerDied, PeerLost, PeerTimeout, WireError
from shoal.runtimes.signals import BYE, ROLL, Signal, first, numbers, ranks, read

TIMEOUT = 60.0  # seconds; gloo's own default is 30 minutes
GRACE = 1.0  # for the answers to a roll call
LINGER = 0.05  # after a first loss, for others that died with it
AHEAD = 16  # signals that a rank may have sent and this one not used; exchange for exchange it is three at most
_OPEN: WeakSet[Lines] = WeakSet()
# A forked child holds copies of the sockets, which would keep the lines of a dead parent open.
os.register_at_fork(after_in_child=lambda: _hang_up())


def _hang_up() -> None:
    for lines in list(_OPEN):
        lines.hang_up()


class Lines:
    """The lines of `rank` to the other ranks of `world`."""

    def __init__(self, rank: int, world: int, timeout: float = TIMEOUT, attempt: int = 0) -> None:
        self.rank, self.world, self.timeout, self.attempt = rank, world, timeout, attempt
        self.number = self.round = 0
        self.gone: list[int] = []  # in the order in which their lines ended
        self.closed = False
        self._sockets: dict[int, socket.socket] = {}
        self._arrived: dict[int, bytearray] = {}
        self._inbox: dict[int, deque[Signal]] = {}
        self._outbox: dict[int, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        _OPEN.add(self)

    def __del__(self) -> None:
        if not self.closed:
            self.hang_up()

    def hang_up(self) -> None:
        """Close this process's copies, without a word."""
        for line in self._sockets.values():
            line.close()
        self._selector.close()
        self.closed = True

    def add(self, rank: int, line: socket.socket) -> None:
        """A connected socket to `rank`."""
        line.setblocking(False)
        if line.family != socket.AF_UNIX:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[rank], self._arrived[rank], self._inbox[rank] = line, bytearray(), deque()
        self._outbox[rank] = bytearray()
        self._selector.register(line, selectors.EVENT_READ, rank)

    # ------------------------------------------------------------------------------------------- bytes
    def _post(self, signal: Signal) -> int:
        data = signal.pack()
        for rank in self._sockets:
            if rank not in self.gone:
                self._outbox[rank] += data
                self._send(rank)
        return len(data)

    def _send(self, rank: int) -> None:
        box, line = self._outbox[rank], self._sockets[rank]
        try:
            while box:
                del box[: line.send(box)]
        except BlockingIOError:
            pass
        except OSError:
            box.clear()  # what it said before its end may still be read
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if box else 0)
        if rank not in self.gone and self._selector.get_key(line).events != events:
            self._selector.modify(line, events, rank)

    def _receive(self, rank: int) -> None:
        try:
            data = self._sockets[rank].recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.gone.append(rank)
            self._outbox[rank].clear()
            self._selector.unregister(self._sockets[rank])
        self._arrived[rank] += data
        while (signal := first(self._arrived[rank], rank)) is not None:
            self._inbox[rank].append(signal)
            if len(self._inbox[rank]) > AHEAD:
                raise LengthError(
                    f"rank {rank}: more than {AHEAD} signals that nobody waits for; it runs another code."
                )

    def _pump(self, seconds: float) -> None:
        """What arrives or leaves within this time, at most once a line."""
        for key, events in self._selector.select(max(0.0, seconds)):
            if events & selectors.EVENT_WRITE:
                self._send(key.data)
            if events & selectors.EVENT_READ:
                self._receive(key.data)

    # ------------------------------------------------------------------------------------------- signals
    def exchange(self, mine: Signal) -> tuple[list[Signal], int]:
        """Every rank's signal, in rank order, and the bytes that this rank sent. Raises PeerDied, PeerTimeout with the
        ranks that are lost, or the WireError that made another rank leave."""
        if self.closed:
            raise PeerDied(f"rank {self.rank} has left the group: start it again.", [self.rank], self.round)
        self.round = mine.round
        self.number += 1
        sent = self._post(mine) * len(self._sockets)
        try:
            self._wait(time.monotonic() + self.timeout)
        except (PeerLost, WireError) as error:
            self.close(error, waiting=True)
            raise
        return [mine if r == self.rank else self._inbox[r].popleft() for r in range(self.world)], sent

    def _wait(self, end: float) -> None:
        """Until a signal of every rank is here and all of this one's are gone out."""
        while True:
            self._look()
            silent = [r for r, box in self._inbox.items() if not box]
            if rolls := [box[0] for box in self._inbox.values() if box and box[0].kind == ROLL]:
                self._inquire(rolls[0].body.decode(errors="replace"))
            if not silent and not any(self._outbox.values()):
                return
            left = end - time.monotonic()
            if left <= 0:  # some may be silent only because they wait for another inside an exchange
                self._inquire("it took too long")
            self._pump(left)

    def _late(self, silent: list[int]) -> NoReturn:
        who = silent or [r for r, box in self._outbox.items() if box]
        raise PeerTimeout(
            f"{ranks(who)} did not answer within {self.timeout:g} s {self._when()}: stopped, cut off, or slower "
            "than that. Look there; give slow ranks more with --timeout.", who, self.round,
        )  # fmt: skip

    def _when(self) -> str:
        return f"in round {self.round}" if self.number else "at the start"

    def _look(self) -> None:
        """Raises where a line has ended, or a rank has said farewell, and nothing else of it is left to read."""
        for rank, box in self._inbox.items():
            # Behind a signal for this exchange a farewell counts only if this very exchange was given up.
            if box and box[-1].kind == BYE and (len(box) == 1 or read(box[-1]).get("waiting")):
                self._pass_on(rank, box[-1])
        if all(self._inbox[r] for r in self.gone):
            return
        end = time.monotonic() + LINGER
        while (left := end - time.monotonic()) > 0 and len(self.gone) < len(self._sockets):
            self._pump(left)
        for rank, box in self._inbox.items():  # a survivor's word about who died first
            if box and box[-1].kind == BYE:
                self._pass_on(rank, box[-1])
        lost = sorted(r for r in self.gone if not self._inbox[r])
        raise PeerDied(
            f"{ranks(lost)} died {self._when()}: the connection ended without a word, as it does when a process "
            "is killed or crashes. Look there for the reason, then start again.", lost, self.round,
        )  # fmt: skip

    def _pass_on(self, rank: int, farewell: Signal) -> NoReturn:
        """Another rank's verdict is this one's too; where it left for a reason of its own, it is the one lost."""
        told = read(farewell)
        kind, said, lost = getattr(errors, str(told.get("error")), None), str(told.get("said")), numbers(told, "ranks")
        if isinstance(kind, type) and issubclass(kind, PeerLost):
            raise kind(said, lost, self.round)
        if isinstance(kind, type) and issubclass(kind, WireError):
            raise kind(f"rank {rank}: {said}")
        why = f"stopped with {told.get('error')}: {said}" if told.get("error") else "has ended its run"
        raise PeerDied(f"rank {rank} {why} (round {farewell.round}; this one is in round {self.round}).", [rank],
                       self.round)  # fmt: skip

    def inquire(self, said: str) -> NoReturn:
        """After a failed exchange: a roll call. Raises PeerDied or PeerTimeout naming whom it shows to be lost."""
        try:
            self._inquire(said)
        except (PeerLost, WireError) as error:
            self.close(error, waiting=True)
            raise

    def _inquire(self, said: str) -> NoReturn:
        # With the reason: who is asked may be the first to give up, and the verdict is then in its words.
        body = " ".join(said.split())[:500].encode()
        self._post(Signal(ROLL, self.rank, self.world, self.number, self.round, attempt=self.attempt, body=body))
        end = time.monotonic() + GRACE
        while True:
            self._look()
            silent = [r for r, box in self._inbox.items() if not box]
            if not silent:
                raise PeerLost(f"an exchange of round {self.round} failed, though all ranks are there: {said}", (),
                               self.round)  # fmt: skip
            if time.monotonic() > end:
                self._late(silent)
            self._pump(end - time.monotonic())

    def watch(self, seconds: float) -> None:
        """Raises where a rank is lost within this time."""
        try:
            self._pump(seconds)
            self._look()
        except (PeerLost, WireError) as error:
            self.close(error, waiting=True)
            raise

    def close(self, error: BaseException | None = None, waiting: bool = False) -> None:
        """Say farewell, with the reason, and whether an exchange was given up for it; and hang up. A second time does
        nothing."""
        if self.closed:
            return
        told: dict[str, Any] = (
            {"said": " ".join(str(error).split())[:500], "error": type(error).__name__} if error else {}
        )
        told["waiting"] = waiting
        if isinstance(error, PeerLost):
            told["ranks"] = list(error.ranks)
        body = json.dumps(told).encode()
        self._post(Signal(BYE, self.rank, self.world, self.number, self.round, attempt=self.attempt, body=body))
        for line in self._sockets.values():
            with suppress(OSError):  # the other end was first
                line.shutdown(socket.SHUT_WR)
        self.hang_up()
