"""Independent stochastic rounding onto a grid over [-r, r], r = ||u||_2: QSGD and the one-bit quantizer.

QSGD: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", 2016, arXiv:1610.02132. Independent: the IQ of Panferov, Demidovich, Rammal, Richtarik, "Correlated
Quantization for Faster Nonconvex Distributed Optimization", 2024, arXiv:2401.05518. Its constant is d - 1; the d/4 of
public implementations belongs to three levels (docs/derivations/compressors.md). With more levels it is the same
rounding on a finer grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal import kernels
from shoal.core import Unbiased
from shoal.errors import ConfigError, PayloadError
from shoal.messages import (
    FLOAT_MAX,
    Messages,
    Round,
    Rows,
    Vector,
    checked_rows,
    not_finite,
    shaped_rows,
    within,
)
from shoal.slices import Slices


def checked_scale(r: Tensor, rnd: Round, gain: float = 1.0) -> Tensor:
    """r, if gain r is finite: the norm of finite rows can overflow. Raises NonFiniteError naming the client."""
    if not within(r, gain):
        bad = ~(r.double() * gain <= FLOAT_MAX)
        raise not_finite(bad, rnd, "the norm overflows float32")
    return r


def normed_rows(u: Rows, rnd: Round, gain: float = 1.0) -> tuple[Rows, Tensor]:
    """(u, (m,) norms), checked. Where a norm is finite so are the entries: only other rows need a second look."""
    u = shaped_rows(u, rnd)
    r = kernels.of(u).norms(u)
    if not within(r, gain):
        checked_rows(u, rnd)
    return u, checked_scale(r, rnd, gain)


def read_scale(payload: Tensor, gain: float = 1.0) -> Tensor:
    """(m,) float32 of the first four bytes. Raises PayloadError unless it is not negative, and gain times it finite."""
    scales: tuple[Tensor, bool] = kernels.of(payload).read_scales(payload, float(gain))
    if not scales[1]:
        raise PayloadError("a scale is not a finite number >= 0.")
    return scales[0]


class ScaledCodes(Unbiased):
    """A scale a row, then a code 0..points-1 a coordinate: what the quantizers of this library read alike.

    Wire: r as float32, then the codes in ceil(log2 points) bits each.
    """

    fixed_length = True

    @property
    def points(self) -> int:
        """How many codes there are."""
        raise NotImplementedError

    @property
    def _bits(self) -> int:
        return (self.points - 1).bit_length()

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(d ceil(log2 points) / 8) bytes, always all used."""
        return 4 + (d * self._bits + 7) // 8

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor]:
        """(packed codes, scales)."""
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        return payload[:, 4:], read_scale(payload)

    def _within(self, decoded: tuple[Tensor, bool]) -> Tensor:
        """What a kernel decoded, unless it met a code that stands for nothing."""
        values, beyond = decoded
        if beyond:
            raise PayloadError(f"{self!r}: a code lies outside 0..{self.points - 1}.")
        return values

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        code, r = self._read(msgs, rnd)
        if self.points == 2:
            return kernels.of(code).decode_bits(code, r, msgs.d)
        return self._within(kernels.of(code).decode_levels(code, r, self.points, msgs.d))

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        code, r = self._read(msgs, rnd)
        if self.points == 2:
            return kernels.of(code).mean_bits(code, r, msgs.d, rnd.cohort)
        return self._within(kernels.of(code).mean_levels(code, r, self.points, msgs.d, rnd.cohort))

    def slices(self, d: int, rnd: Round) -> Slices:
        """The scale in every slice; eight codes take whole bytes."""
        return Slices(lambda part, lo: self.aggregate(part, rnd), d, rnd.cohort, grain=8, size=self._bits, head=4)


@dataclass(frozen=True)
class Independent(ScaledCodes):
    """IQ: one bit a coordinate, or a few, each client rounding on its own.

    Each coordinate becomes one of its two neighbors among `levels` equidistant points over [-r, r], r = ||u||_2,
    unbiased and independently. levels = 2: r or -r, P(r) = (u_j + r) / (2 r). An odd number has zero among its points
    (QSGD's s is (levels - 1) / 2), an even one has not.

    Wire: r as float32 (rounded up), then the point's number, 0 for -r, in ceil(log2 levels) bits a coordinate.
    32 + 8 ceil(d ceil(log2 levels) / 8) bits.

    References: arXiv:2401.05518; more than two levels: docs/derivations/pointwise.md.
    """

    levels: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= 32767:
            raise ConfigError(f"Independent(levels={self.levels!r}): the number of points is an integer in 2..32767.")

    def omega(self, d: int) -> float:
        """2 levels: omega = d - 1, with equality for every u: sum_j (r^2 - u_j^2) = (d - 1) r^2.

        Even, q = levels - 1: (d - (q + sqrt(q^2 - 1))^-2) / q^2, the exact supremum for d >= 4, a bound below. Odd:
        that of QSGD.
        """
        if self.levels % 2:
            return QSGD((self.levels - 1) // 2).omega(d)
        q = self.levels - 1.0
        return (d - (q + math.sqrt(q * q - 1.0)) ** -2) / q**2

    @property
    def points(self) -> int:
        """The levels."""
        return self.levels

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, r = normed_rows(u, rnd)
        ops = kernels.of(u)
        private, ties = rnd.draw("Independent.bits"), rnd.draw("Independent.ties")
        if self.levels == 2:  # encode_levels gives the same bytes, but more slowly
            place = torch.zeros_like(rnd.slots)
            payload = ops.encode_bits(u, r, private, ties, 1, place, None, head=True)
        else:
            payload = ops.encode_levels(u, r, private, ties, self.levels, head=True)
        return Messages.of(payload, rnd, u.shape[1])


@dataclass(frozen=True)
class QSGD(ScaledCodes):
    """Stochastic rounding onto 2 s + 1 levels, each client on its own.

    u_j becomes r sign(u_j) xi_j / s, r = ||u||_2, xi_j one of the two integers around s |u_j| / r, unbiased.

    levels is the paper's s >= 1: the grid has 2 s + 1 points, zero among them.
    Wire: r as float32 (rounded up), then s + sign(u_j) xi_j in ceil(log2(2 s + 1)) bits a coordinate.

    References: arXiv:1610.02132; the exact omega is derived in docs/derivations/compressors.md.
    """

    levels: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= 16383:
            raise ConfigError(f"QSGD(levels={self.levels!r}): the number of levels s is an integer in 1..16383.")

    def omega(self, d: int) -> float:
        """omega = sqrt(d)/s - 1 for d >= 4 s^2 (the exact supremum), else at most d / (4 s^2)."""
        s = self.levels
        return math.sqrt(d) / s - 1.0 if d >= 4 * s * s else d / (4.0 * s * s)

    @property
    def points(self) -> int:
        """2 s + 1."""
        return 2 * self.levels + 1

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, r = normed_rows(u, rnd)
        ops = kernels.of(u)
        payload = ops.encode_levels(u, r, rnd.draw("QSGD.levels"), rnd.draw("QSGD.ties"), self.points, head=True)
        return Messages.of(payload, rnd, u.shape[1])
