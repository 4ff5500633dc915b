"""torch.distributed, each rank adding up one slice: an uneven all-to-all of slices, an uneven all-gather of means.

A rank that hosts m of n clients sends (W-1)/W of its m messages up and (W-1)/W of one mean down, however many ranks W
there are; `Replicated` sends its m messages W - 1 times. The mean comes back as the sums of the clients' codes where
they share one scale, in a prefix code, else as float32: in both cases it is the mean of the simulator bit for bit
(docs/ranks.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shoal import rng
from shoal.core import Compressor, Meter
from shoal.errors import LengthError, RoundMismatch
from shoal.messages import Messages, Round, Vector
from shoal.runtimes import crash
from shoal.runtimes.peers import Peers
from shoal.runtimes.replicated import Replicated
from shoal.slices import Slices
from shoal.wire import HEADER, MEAN, SLICE, Stamp, frame, unframe

NOTHING = torch.zeros(0, dtype=torch.uint8)


class Sharded(Replicated):
    """The channel of one rank, which serves slice `rank` of the coordinates.

    Messages that cannot be cut are gathered whole, as `Replicated` does it; with cut="cheaper" (the default) so are
    those of which fewer bytes move in this way: a few clients, or messages that are shorter than their mean. All ranks
    decide alike, by what they know before anything is sent.
    """

    def __init__(
        self,
        n: int,
        digest: bytes,
        peers: Peers | None = None,
        meter: Meter | None = None,
        cut: Literal["cheaper", "always"] = "cheaper",
    ) -> None:
        super().__init__(n, digest, peers, meter)
        self.cut = cut

    def mean(self, up: Messages, code: Compressor, rnd: Round) -> Vector:
        """`code.aggregate` of every message of the round, none of which any rank need see whole.

        Raises a WireError for a frame or a slice that is not what it ought to be.
        """
        slices = code.slices(up.d, rnd)
        if slices is None or not self._worth(slices, code.capacity(rnd.cohort, up.d), rnd):
            return super().mean(up, code, rnd)
        length = slices.length(0, slices.d)
        up.checked(length)
        self.meter.up += length * rnd.cohort
        self.meter.up_framed += (length + HEADER) * rnd.cohort
        crash.here("before-gather", self.rank, rnd.index)
        moved = self.peers.moved
        mean = slices.finish(self._gathered(self._folded(up, slices, rnd), slices, up.d, rnd))
        self.meter.moved += self.peers.moved - moved
        crash.here("after-gather", self.rank, rnd.index)
        return mean

    def _worth(self, slices: Slices, capacity: int, rnd: Round) -> bool:
        """Whether the busiest rank sends fewer bytes than if all messages were gathered whole, however long the means
        get: how short they are is known only behind the first exchange."""
        if self.cut == "always":
            return True
        counts, bounds, others = self.counts(rnd), slices.bounds(self.peers.world), self.peers.world - 1
        back = others * (HEADER + max(slices.folded(lo, hi) for lo, hi in bounds))
        sent = [
            sum(_piece(count, slices.length(*bound)) for s, bound in enumerate(bounds) if s != rank)
            for rank, count in enumerate(counts)
        ]
        return max(sent) + back < others * max(counts) * (HEADER + capacity)

    def _folded(self, up: Messages, slices: Slices, rnd: Round) -> Tensor:
        """What this rank says of the slice that it serves: every rank's messages of it, added up; empty for none."""
        bounds, counts = slices.bounds(self.peers.world), self.counts(rnd)
        lo, hi = bounds[self.peers.rank]
        length, first = slices.length(lo, hi), [sum(counts[:rank]) for rank in range(len(counts))]
        stamp = self._stamp(SLICE, up.d, rnd.cohort, rnd)
        sent = [_framed(slices.cut(up, *bound).payload, up.slots, stamp) for bound in bounds]
        heard = self.peers.swap(sent, [_piece(count, length) for count in counts], "slices")
        if hi == lo:
            return NOTHING
        rows = [
            _unframed(piece, stamp, slot, count * length).reshape(count, length)
            for piece, slot, count in zip(heard, first, counts, strict=True)
            if count
        ]
        payload = torch.cat(rows)
        slots = torch.arange(rnd.cohort)
        return slices.fold(Messages(payload, torch.full_like(slots, length), slots, hi - lo), lo)

    def _gathered(self, body: Tensor, slices: Slices, d: int, rnd: Round) -> Vector:
        """All slices' means, of which this rank has made one."""
        bounds, stamp = slices.bounds(self.peers.world), self._stamp(MEAN, d, self.peers.world, rnd)
        me, size = torch.tensor([self.peers.rank]), torch.tensor([len(body)])
        mine = frame(body[None], size, me, stamp, len(body))[0]
        heard = self.peers.gather(mine, [HEADER + slices.folded(lo, hi) for lo, hi in bounds], "means of slices")
        said = [_unframed(piece, stamp, rank, len(piece) - HEADER) for rank, piece in enumerate(heard)]
        return slices.unfold(said, bounds)

    def _stamp(self, kind: int, d: int, cohort: int, rnd: Round) -> Stamp:
        return Stamp(rng.LAYOUT, kind, rnd.index, cohort, d, self.digest)


def _piece(count: int, length: int) -> int:
    """Bytes of `count` slices in one frame, or none."""
    return HEADER + count * length if count and length else 0


def _framed(slices: Tensor, slots: Tensor, stamp: Stamp) -> Tensor:
    """Slices of some clients, one behind the other, in one frame that says the first one's slot; empty for none."""
    if not slices.numel():
        return NOTHING
    size = slices.numel()
    return frame(slices.reshape(1, size), torch.tensor([size]), slots[:1], stamp, size)[0]


def _unframed(piece: Tensor, stamp: Stamp, slot: int, size: int) -> Tensor:
    """(size,) uint8: what is in the frame that comes from `slot`. Raises a WireError for any other."""
    payload, nbytes, slots = unframe(piece[None], stamp)
    if int(slots[0]) != slot:
        raise RoundMismatch(f"slot {int(slots[0])}, round {stamp.round}: a frame of slot {slot} was due.")
    if int(nbytes[0]) != size:
        raise LengthError(f"slot {slot}, round {stamp.round}: {int(nbytes[0])} bytes where {size} were agreed.")
    return payload[0, :size]
