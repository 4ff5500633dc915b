"""The codes of a quantizer in an entropy code: the same law, the same constants, fewer bits.

Asymmetric numeral systems: Duda, 2013, arXiv:1311.2540; here over the exact counts of the row's symbols, which travel
in Elias' gamma code (doi.org/10.1109/TIT.1975.1055349). QSGD's paper (arXiv:1610.02132) codes its levels with Elias
too. Lengths: docs/derivations/entropy.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors.correlated import Correlated
from shoal.compressors.dither import QSGD, Independent
from shoal.compressors.drive import Eden, padded
from shoal.compressors.pointwise import Natural, NaturalDithering, Ternary
from shoal.compressors.rotation import Conditional, Grid, Rotated
from shoal.core import Compressor
from shoal.errors import ConfigError, LengthError, PayloadError
from shoal.kernels.reference.entropy import state_bytes
from shoal.messages import Messages, Round, Rows, Vector
from shoal.theory import AB

MOST = 512  # symbols: the counts of more would take longer than what they save


class Layout(NamedTuple):
    """What an inner message is made of: `head` bytes, then so many `symbols` in 0..levels-1, packed."""

    head: int
    symbols: int
    levels: int
    ternary: bool = False  # five digits a byte, not so many bits a symbol


def layout(inner: Compressor, d: int) -> Layout | None:
    """The layout of the messages of `inner`, or None where they are no such thing."""
    if isinstance(inner, Rotated):
        return layout(inner.inner, d)
    if isinstance(inner, QSGD | NaturalDithering):
        return Layout(4, d, 2 * inner.levels + 1)
    if isinstance(inner, Independent | Grid):
        return Layout(4, d, inner.levels)
    if isinstance(inner, Correlated) and inner.blocks == 1:
        return Layout(0 if inner.scale == "shared" else 4, d, inner.levels)
    if isinstance(inner, Ternary):
        return Layout(4, d, 3, ternary=True)
    if isinstance(inner, Natural):
        return Layout(0, d, 512)
    if isinstance(inner, Eden) and isinstance(inner.bits, int):
        return Layout(4, padded(d), 2**inner.bits)
    return None


def entropy_bound(inner: Compressor, d: int) -> tuple[float, float] | None:
    """(bits a symbol, symbols beyond the most frequent ones): upper bounds of means for every u, where there are any.

    Rounding onto a grid over [-r, r], r = ||u||: docs/derivations/entropy.md, Theorem 2.
    """
    if isinstance(inner, QSGD):
        levels = 2 * inner.levels + 1
    elif isinstance(inner, Independent) or (isinstance(inner, Correlated) and inner.scale == "own"):
        levels = inner.levels
    else:
        return None
    if levels % 2:
        mu = (levels - 1) / (2.0 * math.sqrt(d))
        theta = mu / (1.0 + math.sqrt(1.0 + mu * mu))
        return math.log2((1.0 + theta) / (1.0 - theta)) - mu * math.log2(theta), mu * d
    mu = (levels - 1) ** 2 / (8.0 * d)
    return 1.0 + (1.0 + mu) * math.log2(1.0 + mu) - mu * math.log2(mu), mu * d + d


@dataclass(frozen=True)
class Coded(Conditional):
    """A quantizer whose points travel in an entropy code, where that is shorter: nothing else changes.

    C(u) = Q(u), Q = `inner`: QSGD, Independent, Correlated (blocks=1), Grid, Ternary, Natural, NaturalDithering, Eden
    (whole bits), or Rotated around one of them, with at most 512 points. It pays where some points are rare: coarse
    grids over [-||u||, ||u||], on which nearly all coordinates become zero.
    Wire: the inner message, if it is no longer than this: its first 4 bytes if they are a scale; count + 1 of every
    point but the middle one in Elias' gamma code, filled with zeros to a byte; the final state, an integer of
    ceil(log2(d 2^24) / 8) bytes; the bytes that left the state, the latest first. A message is coded if and only if it
    is shorter than the inner one.

    References: arXiv:1311.2540; lengths in docs/derivations/entropy.md.
    """

    inner: Compressor

    def __post_init__(self) -> None:
        form = layout(self.inner, 1)
        if form is None or form.levels > MOST:
            raise ConfigError(
                f"Coded(inner={self.inner!r}): what is coded is a quantizer with at most {MOST} points and one code a "
                "coordinate, such as QSGD(1), Correlated(levels=3, scale='own') or Rotated(Grid(5))."
            )

    @property
    def agrees(self) -> bool:  # type: ignore[override]
        """Whether `inner` does."""
        return self.inner.agrees

    def _states(self, constant: str) -> bool:
        return hasattr(self.inner, constant)

    def _omega(self, d: int) -> float:
        """That of `inner`: the code is lossless."""
        return self.inner.omega(d)  # type: ignore[attr-defined]

    def _alpha(self, d: int) -> float:
        """That of `inner`: the code is lossless."""
        return self.inner.alpha(d)  # type: ignore[attr-defined]

    def _ab(self, n: int, d: int) -> AB:
        """That of `inner`: the code is lossless."""
        return self.inner.ab(n, d)  # type: ignore[attr-defined]

    def check(self, n: int, d: int) -> None:
        self.inner.check(n, d)

    def _layout(self, d: int) -> Layout:
        form = layout(self.inner, d)
        assert form is not None  # __post_init__
        return form

    def capacity(self, n: int, d: int) -> int:
        """That of `inner`, whose message is sent where the code is not shorter."""
        return self.inner.capacity(n, d)

    def predicted_bits(self, n: int, d: int) -> float:
        """An upper bound of the mean for every u: the smaller of the inner compressor's and, where its points lie on a
        grid over [-||u||, ||u||], Theorem 2 of docs/derivations/entropy.md."""
        plain, bound = self.inner.predicted_bits(n, d), entropy_bound(self.inner, d)
        if bound is None:
            return plain
        form, (bits, beyond) = self._layout(d), bound
        counts = (form.levels - 1) * (1.0 + 2.0 * math.log2(1.0 + min(beyond, d) / (form.levels - 1)))
        ends = 8 * (form.head + state_bytes(d)) + 7 + d * math.log2(math.e) / 2**16
        return min(plain, ends + counts + d * bits)

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        """What `inner` brings."""
        return self.inner.prepare(u, rnd)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        plain = self.inner.encode(u, rnd)
        form, ops = self._layout(u.shape[1]), kernels.of(plain.payload)
        body = plain.payload[:, form.head :].contiguous()
        code = ops.unpack_trits(body, form.symbols) if form.ternary else ops.unpack(body, form.symbols, _bits(form))
        short, size = ops.encode_entropy(code, form.levels, body.shape[1])
        better = size < body.shape[1]
        sent = short if bool(better.all()) else torch.where(better[:, None], short, body)
        payload = torch.cat([plain.payload[:, : form.head], sent], 1)
        return replace(plain, payload=payload, nbytes=form.head + size)

    def _plain(self, msgs: Messages, rnd: Round) -> Messages:
        """The inner messages. Raises LengthError, or PayloadError where a short row is not in the code."""
        form, full = self._layout(msgs.d), self.capacity(rnd.cohort, msgs.d)
        payload, size, ops = msgs.payload, msgs.nbytes, kernels.of(msgs.payload)
        sizes = size.tolist()
        if sizes and (min(sizes) < form.head or max(sizes) > min(full, payload.shape[1])):
            raise LengthError(f"rows of {sizes[:4]} bytes in {payload.shape[1]}; {self!r} sends {full} at most.")

        def unpacked(rows: Tensor, size: Tensor) -> Tensor:
            code, good = ops.decode_entropy(
                rows[:, form.head :].contiguous(), size - form.head, form.symbols, form.levels
            )
            if not bool(good.all()):
                raise PayloadError(f"{self!r}: a row of {int(size[~good][0])} bytes is not in its code.")
            return ops.pack_trits(code) if form.ternary else ops.pack(code, _bits(form))

        if sizes and max(sizes) < full:
            out = torch.cat([payload[:, : form.head], unpacked(payload, size)], 1)
        else:
            out, short = torch.zeros(len(payload), full, dtype=torch.uint8, device=payload.device), size < full
            out[:, : payload.shape[1]] = payload[:, :full]
            if sizes and min(sizes) < full:
                out[short, form.head :] = unpacked(payload[short], size[short])
        return Messages(out, torch.full_like(size, full), msgs.slots, msgs.d)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        return self.inner.decode(self._plain(msgs, rnd), rnd)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        return self.inner.aggregate(self._plain(msgs, rnd), rnd)


def _bits(form: Layout) -> int:
    return (form.levels - 1).bit_length()
