"""Compressors made of compressors: a quantizer inside a sparsifier, an unbiased one made contractive, one a layer.

RandK around a quantizer and the step from unbiased to contractive are folklore (the latter in Richtarik, Sokolov,
Fatkhullin, "EF21", 2021, arXiv:2106.05203). The constants of PermK (Szlendak, Tyurin, Richtarik, 2021,
arXiv:2110.03300) around a quantizer and those of layers are ours: docs/derivations/composition.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors.blocks import ALL, Dealt, Listed, alike, cut, dealt_bound, taken
from shoal.compressors.permk import PermK
from shoal.compressors.sparse import RandK, kept
from shoal.core import Compressor, Unbiased
from shoal.errors import ConfigError, LengthError, PayloadError
from shoal.messages import FLOAT_MAX, Messages, Round, Rows, Vector, checked_rows, not_finite, topped_rows
from shoal.messages import joined as in_a_row
from shoal.theory import AB, independent

PAGE = "docs/derivations/composition.md"
SMALL = 2.0**64  # nothing here makes 2^64 times as much of an entry; what does is refused by whoever reads it


@lru_cache(maxsize=64)
def lengths_of(outer: RandK | PermK, n: int, d: int) -> tuple[int, ...]:
    """How many of d coordinates each of n clients keeps, in some order."""
    if isinstance(outer, RandK):
        return (kept(outer.k, d, "RandK"),) * n
    return (1,) * n if d < n else tuple(cut(d, n)[1].tolist())


@lru_cache(maxsize=64)
def kinds_of(outer: RandK | PermK, n: int, d: int) -> frozenset[int]:
    """The numbers of coordinates that occur."""
    return frozenset(lengths_of(outer, n, d))


@dataclass(frozen=True)
class Composed(Compressor):
    """A quantizer on what a sparsifier keeps: PermK's or RandK's coordinates, in a few bits each.

    C_i(u) = s Q_i(u_S) on S, with the coordinates S and the factor s of `outer`, Q_i independent for each client.

    outer is RandK(...) or PermK(), whose coordinates cost nothing; inner an unbiased compressor that works on its own.
    Wire: the inner compressor's message for the kept values, in the order of `outer`.

    References: arXiv:2110.03300 (PermK); constants in docs/derivations/composition.md.
    """

    outer: RandK | PermK
    inner: Unbiased

    def __post_init__(self) -> None:
        if not isinstance(self.outer, RandK | PermK):
            raise ConfigError(f"Composed(outer={self.outer!r}): the outer compressor is RandK(...) or PermK().")
        if not isinstance(self.inner, Unbiased):
            raise ConfigError(
                f"Composed(inner={self.inner!r}): the inner compressor is unbiased and independent from client to "
                "client, such as QSGD(7). For correlated rounding of blocks take Correlated(blocks=...)."
            )

    @property
    def fixed_length(self) -> bool:  # type: ignore[override]
        """As the inner one, unless PermK's blocks differ."""
        return isinstance(self.outer, RandK) and self.inner.fixed_length

    def _gain(self, n: int, d: int) -> float:
        return d / kept(self.outer.k, d, "RandK") if isinstance(self.outer, RandK) else min(n, d)

    def check(self, n: int, d: int) -> None:
        self.outer.check(n, d)
        for length in kinds_of(self.outer, n, d):
            self.inner.check(n, length)

    @property
    def omega(self) -> Callable[[int], float]:
        """omega(d) = (1 + omega_outer(d)) (1 + omega_inner(k)) - 1 around RandK; PermK has none to compose."""
        outer = self.outer
        if not isinstance(outer, RandK):
            raise AttributeError("omega")  # PermK states none: its clients' errors are correlated
        return lambda d: (1 + outer.omega(d)) * (1 + self.inner.omega(kept(outer.k, d, "RandK"))) - 1

    def alone(self, n: int, d: int) -> float:
        """(1 + outer's) (1 + omega_inner) - 1, with the largest omega_inner of the lengths that occur."""
        inner = max(self.inner.omega(length) for length in kinds_of(self.outer, n, d))
        return self._gain(n, d) * (1.0 + inner) - 1.0

    def ab(self, n: int, d: int) -> AB:
        """RandK: A = omega/n, B = 0. PermK, d >= n: A = 1 + omega_inner(ceil(d/n)) (for one that grows), B = 1.

        PermK, d < n: PermK's A and B, and (d/n) omega_inner(1) more in A. All for any inputs.
        """
        self.check(n, d)
        if isinstance(self.outer, RandK):
            return independent(self.omega(d), n, f"composed, omega = {self.omega(d):.6g} ({PAGE})")
        ab, lengths = self.outer.ab(n, d), lengths_of(self.outer, n, d)
        inner = {b: self.inner.omega(b) for b in set(lengths)}
        more = inner[1] * d / n if d < n else dealt_bound(inner.__getitem__, d, n)
        return AB(ab.a + more, ab.b, source=f"PermK around a quantizer ({PAGE})")

    def capacity(self, n: int, d: int) -> int:
        """The inner compressor's, for the longest block."""
        return max(self.inner.capacity(n, length) for length in kinds_of(self.outer, n, d))

    def predicted_bits(self, n: int, d: int) -> float:
        """The inner compressor's, averaged over the clients' blocks."""
        lengths = lengths_of(self.outer, n, d)
        return sum(self.inner.predicted_bits(n, length) for length in lengths) / len(lengths)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, top = topped_rows(u, rnd, gain=lambda d: self._gain(rnd.cohort, d))
        d, n = u.shape[1], rnd.cohort
        self.check(n, d)
        part, scale = self.outer.support(rnd.slots, d, rnd)
        values, wide = part.gather(u, max(kinds_of(self.outer, n, d))), self.capacity(n, d)
        payload, nbytes = None, torch.zeros_like(rnd.slots)
        for rows, (length,) in alike(part.lengths()):
            some = rnd.rows(rows).fork("Composed")
            sent = self.inner.encode(taken(values, rows, length), some)
            if not top * scale <= SMALL:
                self._check_range(sent, some, scale)
            if rows is ALL and sent.payload.shape[1] == wide:
                return Messages(sent.payload, sent.nbytes, rnd.slots, d)
            if payload is None:
                payload = torch.zeros(len(u), wide, dtype=torch.uint8, device=u.device)
            payload[rows, : sent.payload.shape[1]] = sent.payload
            nbytes[rows] = sent.nbytes
        if payload is None:
            payload = torch.zeros(0, wide, dtype=torch.uint8, device=u.device)
        return Messages.of(payload, rnd, d, nbytes)

    def _check_range(self, sent: Messages, rnd: Round, scale: float) -> None:
        """Raise NonFiniteError where what was rounded overflows once it is scaled: a norm can, where no entry does."""
        ops, rows = kernels.of(sent.payload), self.inner.decode(sent, rnd)
        if not ops.greatest(rows) * scale <= FLOAT_MAX:
            bad = ~(ops.maxes(rows).double() * scale <= FLOAT_MAX)
            raise not_finite(bad, rnd, f"what {self!r} sends overflows float32")

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Dealt | Listed, float]:
        d, n = msgs.d, rnd.cohort
        part, scale = self.outer.support(msgs.slots, d, rnd)
        values, wide, inside = None, max(kinds_of(self.outer, n, d)), rnd.fork("Composed")
        for rows, (length,) in alike(part.lengths()):
            some = msgs if rows is ALL else msgs.rows(rows)
            read = self.inner.decode(Messages(some.payload, some.nbytes, some.slots, length), inside)
            if rows is ALL and length == wide:
                values = read
                break
            if values is None:
                values = torch.zeros(len(msgs.slots), wide, device=msgs.payload.device)
            values[rows, :length] = read
        if values is None:
            values = torch.zeros(0, wide, device=msgs.payload.device)
        if not kernels.of(values).greatest(values) * scale <= FLOAT_MAX:
            raise PayloadError("a value is not finite once it is scaled.")
        return values, part, scale

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        values, part, scale = self._read(msgs, rnd)
        return part.scatter(values, scale)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        values, part, scale = self._read(msgs, rnd)
        return part.mean(values, scale, rnd.cohort)


@dataclass(frozen=True)
class Scaled(Compressor):
    """An unbiased compressor made contractive: for EF21.

    C(u) = Q(u) / (1 + omega): biased, and closer to u than Q(u) is.

    Wire: the inner compressor's message; the factor is applied when it is decoded.

    References: arXiv:2106.05203; proof in docs/derivations/composition.md.
    """

    inner: Compressor

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Compressor) or not hasattr(self.inner, "omega") or self.inner.agrees:
            raise ConfigError(
                f"Scaled(inner={self.inner!r}): the inner compressor is unbiased and states its omega, such as "
                "RandK(5) or QSGD(7)."
            )

    @property
    def fixed_length(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.fixed_length

    def check(self, n: int, d: int) -> None:
        self.inner.check(n, d)
        self.alpha(d)

    def alpha(self, d: int) -> float:
        """alpha = 1 / (1 + omega)."""
        return 1.0 / (1.0 + cast(Any, self.inner).omega(d))

    def capacity(self, n: int, d: int) -> int:
        """The inner compressor's."""
        return self.inner.capacity(n, d)

    def predicted_bits(self, n: int, d: int) -> float:
        """The inner compressor's."""
        return self.inner.predicted_bits(n, d)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        return self.inner.encode(u, rnd)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        return (self.inner.decode(msgs, rnd).double() * self.alpha(msgs.d)).float()


@dataclass(frozen=True)
class PerLayer(Compressor):
    """Another compressor for each slice of the coordinates, such as the layers of a network.

    C_i(u) = (C_i^1(u^1), ..., C_i^L(u^L)), u cut into consecutive slices of the given sizes, all drawn independently.

    One size may be None: that slice takes the rest. No layer may have a scale that all clients share.
    Wire: the length of the message of every layer whose length is not always its capacity, as uint32; then the
    messages of all layers, one behind the other.

    References: docs/derivations/composition.md.
    """

    sizes: tuple[int | None, ...]
    compressors: tuple[Compressor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # lists are welcome, and a value must be hashable
        object.__setattr__(self, "compressors", tuple(self.compressors))
        if not self.sizes or len(self.sizes) != len(self.compressors) or self.sizes.count(None) > 1:
            raise ConfigError(
                f"PerLayer with sizes {self.sizes} and {len(self.compressors)} compressors: there is one compressor "
                "for every size, and at most one size is None (the rest)."
            )
        for size in self.sizes:
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"PerLayer(sizes={self.sizes}): a size is an integer >= 1, or None for the rest.")
        for code in self.compressors:
            if not isinstance(code, Compressor) or code.agrees:
                raise ConfigError(
                    f"PerLayer with {code!r}: a layer's compressor is one without a shared scale; take scale='own'."
                )

    @property
    def fixed_length(self) -> bool:  # type: ignore[override]
        """If all layers are."""
        return all(code.fixed_length for code in self.compressors)

    @property
    def evidence(self) -> Literal["proved", "numerical"]:
        """The weakest of the layers'."""
        return "numerical" if any(code.evidence == "numerical" for code in self.compressors) else "proved"

    def _sizes(self, d: int) -> list[int]:
        rest = d - sum(size for size in self.sizes if size is not None)
        sizes = [rest if size is None else size for size in self.sizes]
        if sum(sizes) != d or min(sizes) < 1:
            raise ConfigError(
                f"PerLayer(sizes={self.sizes}) on d={d} coordinates: the sizes add up to d, and None stands for at "
                "least one."
            )
        return sizes

    def check(self, n: int, d: int) -> None:
        for code, size in zip(self.compressors, self._sizes(d), strict=True):
            code.check(n, size)

    def _have(self, constant: str) -> list[Any]:
        """The layers, if all of them state this constant. Raises AttributeError, so that `hasattr` says the truth."""
        if not all(hasattr(code, constant) for code in self.compressors):
            raise AttributeError(constant)
        return list(self.compressors)

    @property
    def omega(self) -> Callable[[int], float]:
        """omega(d) = the largest of the layers'."""
        layers = self._have("omega")
        return lambda d: max(code.omega(size) for code, size in zip(layers, self._sizes(d), strict=True))

    @property
    def alpha(self) -> Callable[[int], float]:
        """alpha(d) = the smallest of the layers'."""
        layers = self._have("alpha")
        return lambda d: min(code.alpha(size) for code, size in zip(layers, self._sizes(d), strict=True))

    @property
    def ab(self) -> Callable[[int, int], AB]:
        """ab(n, d): b = max b_l, a - b = max (a_l - b_l), and beside it a = max a_l, b = min b_l; c = sum c_l."""
        layers = self._have("ab")
        return lambda n, d: joined([code.ab(n, size) for code, size in zip(layers, self._sizes(d), strict=True)])

    def _prefixed(self) -> list[int]:
        """The layers whose length travels."""
        return [number for number, code in enumerate(self.compressors) if not code.fixed_length]

    def _capacities(self, n: int, d: int) -> list[int]:
        return [code.capacity(n, size) for code, size in zip(self.compressors, self._sizes(d), strict=True)]

    def capacity(self, n: int, d: int) -> int:
        """The sum of the layers', and 4 bytes for every layer of variable length."""
        return 4 * len(self._prefixed()) + sum(self._capacities(n, d))

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, d = checked_rows(u, rnd), u.shape[1]
        n = rnd.cohort
        sent = [
            code.encode(part.contiguous(), rnd.fork(f"PerLayer.{number}"))
            for number, (code, part) in enumerate(zip(self.compressors, u.split(self._sizes(d), 1), strict=True))
        ]
        if self.fixed_length:
            return Messages.of(in_a_row(*(msgs.payload for msgs in sent)), rnd, d)
        head = torch.stack([sent[number].nbytes for number in self._prefixed()], 1) if self._prefixed() else None
        payload = torch.zeros(len(u), self.capacity(n, d), dtype=torch.uint8, device=u.device)
        at = torch.zeros_like(rnd.slots)
        if head is not None:
            payload[:, : 4 * head.shape[1]] = head.to(torch.int32).view(torch.uint8)
            at += 4 * head.shape[1]
        for msgs in sent:
            rows, column = _cells(msgs.nbytes)
            payload[rows, at[rows] + column] = msgs.payload[rows, column]
            at = at + msgs.nbytes
        return Messages.of(payload, rnd, d, at)

    def _split(self, msgs: Messages, rnd: Round) -> list[Messages]:
        """Every layer's messages. Raises LengthError unless the stated lengths are possible and add up."""
        if self.fixed_length:
            return self._cut(msgs, rnd)
        payload, (m, wide) = msgs.payload, msgs.payload.shape
        caps, head, home = self._capacities(rnd.cohort, msgs.d), 4 * len(self._prefixed()), payload.device
        if wide < head or bool((msgs.nbytes < head).any()) or bool((msgs.nbytes > wide).any()):
            raise LengthError(f"rows of {msgs.nbytes.tolist()[:4]} bytes in {wide}: less than PerLayer's lengths take.")
        lengths = torch.tensor(caps, device=home).repeat(m, 1)
        octets = payload[:, :head].to(torch.int64).reshape(m, head // 4, 4)
        lengths[:, self._prefixed()] = (octets << torch.tensor([0, 8, 16, 24], device=home)).sum(2)
        bad = lengths > torch.tensor(caps, device=home)
        if bool(bad.any()) or not torch.equal(lengths.sum(1) + head, msgs.nbytes):
            raise LengthError(f"rows of {msgs.nbytes.tolist()[:4]} bytes: PerLayer's layers do not add up to them.")
        at, out = torch.full((m,), head, device=home), []
        for cap, length, size in zip(caps, lengths.T, self._sizes(msgs.d), strict=True):
            rows, column = _cells(length)
            part = torch.zeros(m, cap, dtype=torch.uint8, device=home)
            part[rows, column] = payload[rows, at[rows] + column]
            out.append(Messages(part, length.contiguous(), msgs.slots, size))
            at = at + length
        return out

    def _cut(self, msgs: Messages, rnd: Round) -> list[Messages]:
        """Every layer's messages, where all of them have one length."""
        caps = self._capacities(rnd.cohort, msgs.d)
        parts = msgs.checked(sum(caps)).split(caps, 1)
        inside = rnd if msgs.slots is rnd.slots else replace(rnd, slots=msgs.slots)
        sizes = self._sizes(msgs.d)
        return [Messages.of(part.contiguous(), inside, size) for part, size in zip(parts, sizes, strict=True)]

    def _layers(self, msgs: Messages, rnd: Round) -> list[tuple[Compressor, Messages, Round]]:
        forks = [rnd.fork(f"PerLayer.{number}") for number in range(len(self.compressors))]
        return list(zip(self.compressors, self._split(msgs, rnd), forks, strict=True))

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        return torch.cat([code.decode(part, fork) for code, part, fork in self._layers(msgs, rnd)], 1)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        return torch.cat([code.aggregate(part, fork) for code, part, fork in self._layers(msgs, rnd)])


def _cells(length: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the first length[i] bytes of every row."""
    sizes = length.cpu().numpy()
    pointer = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.repeat(np.arange(len(sizes)), sizes)
    columns = np.arange(pointer[-1]) - pointer[rows]
    return torch.as_tensor(rows, device=length.device), torch.as_tensor(columns, device=length.device)


def joined(layers: list[AB]) -> AB:
    """The AB inequalities of a vector whose slices have these, drawn independently (docs/derivations/composition.md).

    Every layer's k-th inequality (its last where it has fewer) is joined in two ways, all of them in `other`.
    """
    chain = [layers]
    while any(ab.other for ab in chain[-1]):
        chain.append([ab.other or ab for ab in chain[-1]])
    found = []
    for each in chain:
        weakest = max(each, key=lambda ab: ("proved", "numerical", "homogeneous").index(ab.evidence)).evidence
        gap, most, least = max(ab.a - ab.b for ab in each), max(ab.b for ab in each), min(ab.b for ab in each)
        c = sum(ab.c for ab in each)
        found.append(AB(gap + most, most, c, weakest, f"layers ({PAGE})"))
        if most > least:
            found.append(AB(max(ab.a for ab in each), least, c, weakest, f"layers ({PAGE})"))
    out = found.pop()
    while found:
        out = replace(found.pop(), other=out)
    return out
