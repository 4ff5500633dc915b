"""torch.distributed: each rank hosts its share of the clients and runs the server's half too.

Nothing goes down (each rank has x, and makes the server's messages itself); the uplink is one all-gather of frames,
checked after arrival, so that every rank aggregates the same n rows in slot order and ends at the simulator's bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from shoal import rng
from shoal.core import Compressor, Meter
from shoal.errors import ConfigError, NonFiniteError
from shoal.messages import Messages, Round, Rows
from shoal.runtimes import crash
from shoal.runtimes.group import group
from shoal.runtimes.lines import TIMEOUT
from shoal.runtimes.local import Local
from shoal.runtimes.peers import Peers
from shoal.wire import UP, Stamp, frame, unframe


class Replicated(Local):
    """The channel of one rank among `dist.get_world_size()`, which hosts a contiguous share of the n clients.

    The meter counts the method's payload as the simulator does, and beside it `moved`: what this rank really sent.
    """

    def __init__(self, n: int, digest: bytes, peers: Peers | None = None, meter: Meter | None = None) -> None:
        super().__init__(n, meter)
        self.peers = peers = peers or Peers()
        if peers.world > n:
            raise ConfigError(
                f"{peers.world} ranks for n={n} clients: a rank hosts at least one; start at most {n} ranks."
            )
        self.shares = torch.arange(n).tensor_split(peers.world)
        self.rank, self.clients = peers.rank, self.shares[peers.rank]
        peers.digest = digest

    @property
    def digest(self) -> bytes:
        """Of the config that all ranks have: in every frame and in front of every exchange."""
        return self.peers.digest

    def open(self, config: dict[str, Any]) -> None:
        """A handshake: raises ConfigMismatch on every rank unless all have this config."""
        self.peers.handshake(config)

    def scatter(self, down: Messages | None, rnd: Round) -> Messages:
        """What the server says is known to every rank: nothing moves, and the round begins."""
        self.peers.round = rnd.index
        return super().scatter(down, rnd)

    def fail(self, error: NonFiniteError, rnd: Round) -> NoReturn:
        """The other ranks are told, and raise the same error."""
        self.peers.fail(error)

    def counts(self, rnd: Round | None = None) -> list[int]:
        """How many of the clients, or of those who take part in the round, each rank hosts."""
        members = None if rnd is None else rnd.members
        return [len(ids) if members is None else int(torch.isin(members, ids).sum()) for ids in self.shares]

    def _all(self, mine: Tensor, rnd: Round | None = None, what: str = "values") -> Tensor:
        """Every rank's rows of the round, in rank order, which is slot order. The shorter are padded with zeros."""
        counts = self.counts(rnd)
        most = max(counts)
        padded = torch.zeros((most, *mine.shape[1:]), dtype=mine.dtype)
        padded[: len(mine)] = mine
        moved = self.peers.moved
        out = self.peers.all(padded, what)
        self.meter.moved += self.peers.moved - moved
        return torch.cat([rows[:count] for rows, count in zip(out, counts, strict=True)])

    def gather(self, up: Messages, code: Compressor, rnd: Round) -> Messages:
        """One all-gather of frames, padded to the code's capacity."""
        crash.here("before-gather", self.rank, rnd.index)
        width = code.capacity(rnd.cohort, up.d)
        stamp = Stamp(rng.LAYOUT, UP, rnd.index, rnd.cohort, up.d, self.digest)
        frames = frame(up.payload, up.nbytes, up.slots, stamp, width)
        everyone = self._all(frames, rnd, f"messages of {code!r}, d={up.d}")
        crash.here("after-gather", self.rank, rnd.index)
        payload, nbytes, slots = unframe(everyone, stamp)
        return Messages(payload.contiguous(), nbytes, slots, up.d)

    def agree(self, values: Tensor, rnd: Round) -> float:
        """The maximum over all clients: exact, whatever the order."""
        return super().agree(self._all(values, rnd, "scales to agree on"), rnd)

    def collect(self, values: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """For measuring: not counted as moved either."""
        crash.here("measuring", self.rank, self.peers.round)
        moved = self.peers.moved, self.meter.moved
        out = self._all(values), self._all(rows)
        self.peers.moved, self.meter.moved = moved
        return out

    def moved(self) -> list[int]:
        """What each rank has really sent, in bytes; to ask is not counted."""
        return [int(said) for said in self.together(torch.tensor([self.meter.moved]))]

    def together(self, mine: Tensor) -> list[Tensor]:
        """For keeping house: not counted as moved either. When this returns, all ranks have what they asked for: one
        that leaves then, as after a checkpoint, takes nothing away from the others."""
        moved = self.peers.moved
        out = self.peers.all(mine)
        self.peers.barrier()
        self.peers.moved = moved
        return out

    def hand(self, mine: bytes, source: int, wanting: Sequence[bool]) -> bytes:
        """What `source` says, at the ranks that want it; elsewhere nothing. Not counted."""
        moved = self.peers.moved
        size = int(self.peers.all(torch.tensor([len(mine)]))[source])
        empty = torch.zeros(0, dtype=torch.uint8)
        here = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else empty
        gives, takes = self.rank == source, wanting[self.rank]
        pieces = [here if gives and wants else empty for wants in wanting]
        sizes = [size if takes and rank == source else 0 for rank in range(self.peers.world)]
        out = self.peers.swap(pieces, sizes, "a state")[source]
        self.peers.moved = moved
        return out.numpy().tobytes()


def started_by_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


@contextmanager
def connected(
    n: int,
    config: dict[str, Any],
    make: Callable[[int, bytes, Peers], Replicated] = Replicated,
    timeout: float = TIMEOUT,
    still: Callable[[], None] = lambda: None,
) -> Iterator[Replicated]:
    """The channel over a gloo group of torchrun's ranks, all of which have this config; destroyed at the end.

    No rank waits longer than `timeout` seconds for another. Raises ConfigMismatch, PeerTimeout, PeerDied.
    """
    with group(timeout, still) as peers:
        peers.handshake(config)
        yield make(n, peers.digest, peers)
