"""Compressors that treat each coordinate by itself: all or nothing, signs, three levels, powers of two.

Ternary: Wen et al., "TernGrad", 2017, arXiv:1705.07878. Sign: the scaled sign of Karimireddy, Rebjock, Stich, Jaggi,
"Error feedback fixes SignSGD and other gradient compression schemes", 2019, arXiv:1901.09847. Natural and
NaturalDithering: Horvath, Ho, Horvath, Sahu, Canini, Richtarik, "Natural compression for distributed deep learning",
2019, arXiv:1905.10988. Every constant is derived in docs/derivations/pointwise.md; that of NaturalDithering is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal import kernels, rng
from shoal.compressors.dither import ScaledCodes, normed_rows, read_scale
from shoal.core import Compressor, Unbiased
from shoal.errors import ConfigError, PayloadError
from shoal.messages import Messages, Round, Rows, Vector, as_bytes, checked_rows, finite_floats, joined, measured_rows
from shoal.slices import Slices


@dataclass(frozen=True)
class Bernoulli(Unbiased):
    """Everything with probability p, else nothing; each client tosses a coin of its own ("lazy").

    C_i(u) = u / p with probability p, else 0.

    Wire: the d values of u as float32, or no byte at all; the coin is derived from the round and the slot, so it costs
    nothing. 32 d bits or 0, in the mean 32 d p.

    References: docs/derivations/pointwise.md.
    """

    p: float

    def __post_init__(self) -> None:
        number = isinstance(self.p, int | float) and not isinstance(self.p, bool)
        if not number or not 2.0**-32 <= self.p <= 1.0:
            raise ConfigError(f"Bernoulli(p={self.p!r}): p is a probability of sending, in [2^-32, 1].")

    def omega(self, d: int) -> float:
        """omega = 1/p - 1, with equality for every u."""
        return 1.0 / self.p - 1.0

    def capacity(self, n: int, d: int) -> int:
        """4 d bytes, used with probability p."""
        return 4 * d

    def predicted_bits(self, n: int, d: int) -> float:
        """32 d p: the mean."""
        return 32.0 * d * self.p

    def sends(self, slots: Tensor, rnd: Round) -> Tensor:
        """(m,) bool: the slots' coins, which the receiver tosses as well. 64 random bits against ceil(2^64 p)."""
        # p 2^64 is an exact float, so that the ceiling is exact too.
        return rng.coins(rnd.draw("Bernoulli.coin", slots), math.ceil(self.p * 2.0**64))

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd, gain=lambda d: 1.0 / self.p)
        sends = self.sends(rnd.slots, rnd)
        return Messages.of(as_bytes(u) * sends[:, None], rnd, u.shape[1], 4 * u.shape[1] * sends)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        values, sends = self._read(msgs, rnd)
        values = kernels.divided(values.double(), self.p).float()
        if len(values) == len(sends):
            return values
        rows = torch.zeros(len(sends), msgs.d, device=values.device)
        rows[sends] = values
        return rows

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        values, _ = self._read(msgs, rnd)
        return kernels.of(values).mean_rows(values, rnd.cohort, self.p)

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Rows, Tensor]:
        """What the senders sent, in slot order, and who they are."""
        sends = self.sends(msgs.slots, rnd)
        payload = msgs.checked(4 * msgs.d * sends)
        count = int(sends.sum())
        if count == 0:
            return torch.zeros(0, msgs.d, device=payload.device), sends
        return finite_floats(payload if count == len(sends) else payload[sends], 1.0 / self.p), sends


@dataclass(frozen=True)
class Sign(Compressor):
    """The scaled sign: one bit a coordinate and the mean magnitude; biased.

    C(u) = (||u||_1 / d) sign(u), where sign(0) = +1: a single zero becomes the mean magnitude, a row of zeros stays
    zero because its mean magnitude is.

    Wire: ||u||_1 / d as float32 (rounded to nearest), then one bit a coordinate, set for u_j >= 0. 32 + 8 ceil(d/8)
    bits.

    References: arXiv:1901.09847; docs/derivations/pointwise.md.
    """

    fixed_length = True

    def alpha(self, d: int) -> float:
        """alpha = 1/d: the error is (1 - ||u||_1^2 / (d ||u||^2)) ||u||^2 for every u; tight where one u_j is not 0."""
        return 1.0 / d

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(d/8) bytes, always all used."""
        return 4 + (d + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd)
        ops = kernels.of(u)
        return Messages.of(joined(as_bytes(ops.mean_abs(u)[:, None]), ops.sign_bits(u)), rnd, u.shape[1])

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        return kernels.of(payload).decode_bits(payload[:, 4:], read_scale(payload), msgs.d)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        return kernels.of(payload).mean_bits(payload[:, 4:], read_scale(payload), msgs.d, rnd.cohort)

    def slices(self, d: int, rnd: Round) -> Slices:
        """The mean magnitude in every slice; eight signs a byte."""
        return Slices(lambda part, lo: self.aggregate(part, rnd), d, rnd.cohort, grain=8, size=1, head=4)


@dataclass(frozen=True)
class Ternary(Unbiased):
    """TernGrad: -r, 0 or r for each coordinate, r its row's largest magnitude.

    u_j becomes r sign(u_j) with probability |u_j| / r, else 0, r = max_j |u_j|, independently.

    Wire: r as float32 (exact), then 1 + sign as a digit 0..2 a coordinate, five digits a byte in base 3, the first the
    least significant, zeros beyond d. 32 + 8 ceil(d/5) bits: 1.6 a coordinate.

    References: arXiv:1705.07878; the exact omega is derived in docs/derivations/pointwise.md.
    """

    fixed_length = True

    def omega(self, d: int) -> float:
        """omega = (sqrt(d) - 1) / 2, the exact supremum: reached at (1, t, ..., t), t = 1 / (1 + sqrt(d))."""
        return (math.sqrt(d) - 1.0) / 2.0

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(d/5) bytes, always all used."""
        return 4 + (d + 4) // 5

    def encode(self, u: Rows, rnd: Round) -> Messages:
        (u, r), ops = measured_rows(u, rnd), kernels.of(u)
        d = u.shape[1]
        return Messages.of(ops.encode_trits(u, r, rnd.draw("Ternary.levels"), rnd.draw("Ternary.ties")), rnd, d)

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor]:
        """(packed digits, scales)."""
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        return payload[:, 4:], read_scale(payload)

    def _digits(self, decoded: tuple[Tensor, bool], d: int) -> Tensor:
        values, bad = decoded
        if bad:
            raise PayloadError(f"Ternary: a byte is not five digits in base 3, with zeros beyond d={d}.")
        return values

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        code, r = self._read(msgs, rnd)
        return self._digits(kernels.of(code).decode_trits(code, r, msgs.d), msgs.d)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        code, r = self._read(msgs, rnd)
        return self._digits(kernels.of(code).mean_trits(code, r, msgs.d, rnd.cohort), msgs.d)

    def slices(self, d: int, rnd: Round) -> Slices:
        """The scale in every slice; five digits a byte."""
        return Slices(lambda part, lo: self.aggregate(part, rnd), d, rnd.cohort, grain=5, size=1, head=4)


@dataclass(frozen=True)
class Natural(Unbiased):
    """Natural compression: each coordinate goes to a neighboring power of two, without a scale.

    u_j = ±2^e (1 + f), 0 <= f < 1, becomes ±2^(e+1) with probability f, else ±2^e: f has 23 bits and so has the random
    number, hence E C(u) = u exactly. Zeros stay zeros. Magnitudes below 2^-126 go to 0 or 2^-126, unbiased as well;
    from 2^127 on, where the upper neighbor is beyond float32, `encode` raises NonFiniteError.

    Wire: float32's 8 exponent bits, then its sign, as one number of 9 bits a coordinate. 8 ceil(9 d / 8) bits.

    References: arXiv:1905.10988; docs/derivations/pointwise.md.
    """

    fixed_length = True

    def omega(self, d: int) -> float:
        """omega = 1/8, the supremum, approached at |u_j| = 4/3 2^e; for entries that are 0 or at least 2^-126."""
        return 0.125

    def capacity(self, n: int, d: int) -> int:
        """ceil(9 d / 8) bytes, always all used."""
        return (9 * d + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd, gain=lambda d: 2.0)
        return Messages.of(kernels.of(u).encode_natural(u, rnd.draw("Natural.bits")), rnd, u.shape[1])

    def _powers(self, decoded: tuple[Tensor, bool]) -> Tensor:
        values, bad = decoded
        if bad:
            raise PayloadError("Natural: the exponent 255 is no power of two in float32.")
        return values

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        return self._powers(kernels.of(payload).decode_natural(payload, msgs.d))

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        return self._powers(kernels.of(payload).mean_natural(payload, msgs.d, rnd.cohort))

    def slices(self, d: int, rnd: Round) -> Slices:
        """Eight coordinates in nine bytes."""
        return Slices(lambda part, lo: self.aggregate(part, rnd), d, rnd.cohort, grain=8, size=9)


@dataclass(frozen=True)
class NaturalDithering(ScaledCodes):
    """Natural dithering: stochastic rounding onto the norm times 0, 2^(1-s), ..., 1/2, 1.

    |u_j| / r becomes one of its two neighbors among these, unbiased, and keeps its sign; r = ||u||_2, and levels is the
    paper's s >= 1. (s = 1 has the levels of QSGD(1).)

    Wire: r as float32 (rounded up), then s + sign(u_j) l in ceil(log2(2 s + 1)) bits a coordinate, level l standing for
    2^(l-s) r and level 0 for zero.

    References: arXiv:1905.10988; omega is ours, docs/derivations/pointwise.md.
    """

    levels: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= 127:
            raise ConfigError(f"NaturalDithering(levels={self.levels!r}): the number of levels s is in 1..127.")

    def omega(self, d: int) -> float:
        """With l = 2^(1-s): l sqrt(d) - 1 where l sqrt(d) >= 9/4 (the exact supremum), else at most 1/8 + 2 d l^2 / 9.

        s = 1 has one cell only, as QSGD(1): sqrt(d) - 1 for d >= 4 (exact), else at most d / 4.
        """
        reach = 2.0 ** (1 - self.levels) * math.sqrt(d)
        if self.levels == 1:
            return reach - 1.0 if d >= 4 else d / 4.0
        return reach - 1.0 if reach >= 2.25 else 0.125 + 2.0 * reach**2 / 9.0

    @property
    def points(self) -> int:
        """2 s + 1."""
        return 2 * self.levels + 1

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, r = normed_rows(u, rnd)
        ops = kernels.of(u)
        payload = ops.encode_natural_levels(u, r, rnd.draw("NaturalDithering.levels"), self.levels)
        return Messages.of(payload, rnd, u.shape[1])

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        code, r = self._read(msgs, rnd)
        return self._within(kernels.of(code).decode_natural_levels(code, r, self.levels, msgs.d))

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        code, r = self._read(msgs, rnd)
        return self._within(kernels.of(code).mean_natural_levels(code, r, self.levels, msgs.d, rnd.cohort))
