"""How ranks find each other: each opens a door, says in a store where it is, and calls on those of lower rank.

Whoever comes must show a card with the door's own word, which only ranks can know that read the store. Others are sent
away, and nobody waits for them.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Self

from torch.distributed import PrefixStore, Store, TCPStore

from shoal.errors import PeerLost, PeerTimeout
from shoal.runtimes.lines import TIMEOUT, Lines
from shoal.runtimes.signals import ranks

PATIENCE = 1.0  # seconds to show a card
STRANGERS = 16  # who may stand at a door beside the ranks
_CARD = struct.Struct("<16sI")  # a door's word, and the visitor's rank


class Door:
    """A port of this machine, and those who have come to it and not yet shown their cards."""

    def __init__(self, host: str, world: int) -> None:
        self.word, self.room = os.urandom(16), world + STRANGERS
        self._socket = socket.create_server((host, 0), backlog=world, family=_family(host))
        self._socket.setblocking(False)
        self.address = f"{self.word.hex()} {self._socket.getsockname()[1]} {host}"
        self._visitors: dict[socket.socket, tuple[float, bytes]] = {}  # until when, and what they have shown so far

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for line in (self._socket, *self._visitors):
            line.close()

    def arrivals(self, missing: set[int]) -> dict[int, socket.socket]:
        """Those of the missing ranks who have come since the last time, at once."""
        while len(self._visitors) < self.room:
            try:
                line, _ = self._socket.accept()
            except OSError:  # nobody, or somebody who has left again
                break
            line.setblocking(False)
            self._visitors[line] = time.monotonic() + PATIENCE, b""
        met: dict[int, socket.socket] = {}
        for line, (until, shown) in list(self._visitors.items()):
            try:
                more = line.recv(_CARD.size - len(shown))
            except BlockingIOError:
                if time.monotonic() <= until:
                    continue
                more = b""
            except OSError:
                more = b""
            shown += more
            if more and len(shown) < _CARD.size:
                self._visitors[line] = until, shown
                continue
            del self._visitors[line]
            word, rank = _CARD.unpack(shown) if more else (b"", -1)
            if word == self.word and rank in missing and rank not in met:
                met[rank] = line
            else:
                line.close()
        return met


def meet(
    store: Store,
    rank: int,
    world: int,
    timeout: float = TIMEOUT,
    attempt: int = 0,
    still: Callable[[], None] = lambda: None,
) -> Lines:
    """The lines of all ranks that find each other through `store` within `timeout` seconds; `still` is called while
    they wait, and raises PeerLost where this attempt is not the newest any more.

    Raises PeerTimeout naming those that did not come, PeerDied naming those that came and died, PeerLost if the store
    itself is gone.
    """
    lines, end = Lines(rank, world, timeout, attempt), time.monotonic() + timeout
    with Door(_host(store), world) as door:
        try:
            store.set(f"lines/{rank}", door.address)
            missing = set(range(world)) - {rank}
            while missing:
                for other, line in {**door.arrivals(missing), **_called(store, rank, missing)}.items():
                    lines.add(other, line)
                    missing.discard(other)
                if missing and time.monotonic() > end:
                    who = sorted(missing)
                    raise PeerTimeout(f"{ranks(who)} did not come within {timeout:g} s of the start: look whether they "
                                      "run, and reach this machine; --timeout gives them longer.", who)  # fmt: skip
                still()
                lines.watch(0.002 if missing else 0.0)
        except RuntimeError as error:  # torch's own errors of the store
            lost = PeerLost(f"the store that the ranks meet through is gone: {str(error).splitlines()[0]}")
            lines.close(lost)
            raise lost from error
        except PeerLost as error:
            lines.close(error)
            raise
    return lines


def _called(store: Store, rank: int, missing: set[int]) -> dict[int, socket.socket]:
    """Those of lower rank whose door is known by now, and open."""
    met = {}
    for other in sorted(missing):
        if other > rank or not store.check([f"lines/{other}"]):
            continue
        word, port, host = store.get(f"lines/{other}").decode().split(" ", 2)
        try:
            line = socket.create_connection((host, int(port)), timeout=1.0)
            line.sendall(_CARD.pack(bytes.fromhex(word), rank))
        except OSError:
            continue  # its machine may be slow; if it has died, the end of the wait says so
        met[other] = line
    return met


def _host(store: Store) -> str:
    """The address of this machine that the store's machine can reach."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return "127.0.0.1"
    family, kind, proto, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
