"""Cutting the messages of a round by coordinates, so that each of several processes adds up one slice of them all.

A slice is a message of the same code with fewer coordinates. What comes back of it is its part of the mean: as float32,
or, where all clients share one scale, as the sum of their codes, which takes few bits in a prefix code and says the
same bit for bit (docs/derivations/slices.md; the layout of both is in docs/wire.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shoal import kernels
from shoal.errors import LengthError, PayloadError
from shoal.kernels.reference.sums_of_codes import packed_bytes
from shoal.messages import Messages, Vector, as_bytes, finite_floats, joined

MOST = 1 << 16  # different sums of codes: from there on they would take half as much as a float32


def unchanged(mean: Vector) -> Vector:
    """The mean itself."""
    return mean


@dataclass(frozen=True)
class Tally:
    """One scale r that all clients share, and `levels` points r (2 c / (levels - 1) - 1): sums of codes c are means."""

    r: float
    levels: int

    def sums(self, cohort: int) -> int:
        """How many different sums there are; 0 where a sum does not say the mean bit for bit, or is not short.

        levels - 1 must be a power of two: every partial sum of points is then exact in float64, in any order.
        """
        steps = self.levels - 1
        exact = steps & (steps - 1) == 0
        return cohort * steps + 1 if exact and cohort * steps < MOST else 0

    def means(self, cohort: int) -> Tensor:
        """(sums,) float32: the mean of `cohort` clients for each sum of their codes."""
        steps = self.levels - 1
        points = (2 * torch.arange(self.sums(cohort)) - cohort * steps).double()
        # Adding zero: where r = 0 the sum of the points is +0, as adding them one by one makes it.
        return kernels.divided(self.r * points / steps + 0.0, cohort).float()


@dataclass(frozen=True)
class Slices:
    """How messages of d coordinates are cut: `head` bytes that every slice repeats, then `size` bytes for every `grain`
    coordinates.

    mean(part, lo) is what the messages `part` of coordinates lo, lo + 1, ... add to the mean, bit for bit the same part
    of the mean of whole messages. finish(mean) is what is still to be done once all slices of it are back.
    """

    mean: Callable[[Messages, int], Vector]
    d: int
    cohort: int
    grain: int
    size: int
    head: int = 0
    tally: Tally | None = None
    finish: Callable[[Vector], Vector] = unchanged

    def bounds(self, parts: int) -> list[tuple[int, int]]:
        """Consecutive ranges of whole grains that cover 0..d-1, as even as they can be; some are empty where d is
        small."""
        grains = -(-self.d // self.grain)
        ends = [min(grains * part // parts * self.grain, self.d) for part in range(parts + 1)]
        return list(pairwise(ends))

    def length(self, lo: int, hi: int) -> int:
        """Bytes of a message's slice lo..hi-1; none for an empty one."""
        return self.head + -(-(hi - lo) * self.size // self.grain) if hi > lo else 0

    def cut(self, msgs: Messages, lo: int, hi: int) -> Messages:
        """The messages of coordinates lo..hi-1, lo a multiple of the grain; without a byte where there are none."""
        head = self.head if hi > lo else 0
        first = self.head + lo // self.grain * self.size
        codes = msgs.payload[:, first : first + self.length(lo, hi) - head]
        part = joined(msgs.payload[:, :head], codes) if head else codes
        return Messages(part, torch.full_like(msgs.nbytes, part.shape[1]), msgs.slots, hi - lo)

    @property
    def _sums(self) -> int:
        return self.tally.sums(self.cohort) if self.tally is not None else 0

    def folded(self, lo: int, hi: int) -> int:
        """Bytes of the mean of a slice: the most, where it comes back as sums of codes."""
        if not self._sums:
            return 4 * (hi - lo)
        return 1 + packed_bytes(hi - lo, self._sums) if hi > lo else 0

    def fold(self, part: Messages, lo: int) -> Tensor:
        """(bytes,) uint8: the mean of the cohort's messages of coordinates lo, lo + 1, ...

        Raises LengthError and PayloadError as the code's `decode` does.
        """
        if not self._sums:
            return as_bytes(self.mean(part, lo)[None])[0]
        assert self.tally is not None
        codes = part.checked(self.length(lo, lo + part.d))[:, self.head :]
        if len(codes) != self.cohort:
            raise LengthError(f"{len(codes)} slices from coordinate {lo} on, of a cohort of {self.cohort}.")
        body, beyond = kernels.of(codes).fold_codes(codes, self.tally.levels, part.d)
        if beyond:
            raise PayloadError(f"a code lies outside 0..{self.tally.levels - 1}.")
        return body

    def unfold(self, bodies: Sequence[Tensor], bounds: Sequence[tuple[int, int]]) -> Vector:
        """The mean of the slices `bounds`, one behind the other, from what `fold` made of each.

        Raises LengthError for a number of bytes that it cannot be, PayloadError for bytes that no `fold` writes.
        """
        for body, (lo, hi) in zip(bodies, bounds, strict=True):
            size, most = len(body), self.folded(lo, hi)
            if size > most or (size < most and not self._sums):
                rule = "at most" if self._sums else "not"
                raise LengthError(f"{size} bytes of a mean of {hi - lo} coordinates, {rule} {most}.")
        if not self._sums:
            return torch.cat([finite_floats(body[None])[0] for body in bodies])
        assert self.tally is not None
        means, counts = self.tally.means(self.cohort), [hi - lo for lo, hi in bounds]
        mean, good = kernels.of(bodies[0]).unfold_codes(bodies, means, counts)
        if not good.all():
            lo, hi = bounds[int(good.int().argmin())]
            raise PayloadError(f"coordinates {lo}..{hi - 1}: these bytes are no sums of {self.cohort} codes each.")
        return mean
