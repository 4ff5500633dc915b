"""What the ranks of one launch share: the kind of their channel, and what the first of them tells the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from shoal.errors import ConfigError
from shoal.runtimes.peers import Peers
from shoal.runtimes.replicated import Replicated
from shoal.runtimes.sharded import Sharded

Make = Callable[[int, bytes, Peers], Replicated]
KINDS: dict[str, Make] = {
    "auto": Sharded,  # cuts what can be cut where fewer bytes move then
    "sharded": partial(Sharded, cut="always"),
    "replicated": Replicated,
}


def channel_of(kind: str) -> Make:
    """What makes the channel of this name. Raises ConfigError where there is none."""
    if kind not in KINDS:
        raise ConfigError(f"channel={kind!r}: a channel is one of {', '.join(KINDS)}.")
    return KINDS[kind]


@dataclass(frozen=True)
class Ranks:
    """All ranks of a launch, which do run after run together. The first one keeps the folders."""

    peers: Peers
    make: Make

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads and writes."""
        return self.peers.rank == 0

    def channel(self, n: int, digest: bytes) -> Replicated:
        """A channel of its own for another run: its bytes are counted from zero."""
        return self.make(n, digest, Peers(self.peers.group))

    def hear(self, said: bytes) -> bytes:
        """What the first rank says, at every rank."""
        size = int(self.peers.all(torch.tensor([len(said)]))[0])
        if size == 0:
            return b""
        room = torch.frombuffer(bytearray(said) if self.first else bytearray(size), dtype=torch.uint8)
        return self.peers.all(room)[0].numpy().tobytes()
