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
from shoal.core import FLOAT_MAX, Messages, Round, Rows, Unbiased, Vector, as_bytes, as_floats, checked_rows
from shoal.errors import ConfigError, NonFiniteError, PayloadError


def checked_scale(r: Tensor, rnd: Round, gain: float = 1.0) -> Tensor:
    """r, if gain r is finite: the norm of finite rows can overflow. Raises NonFiniteError naming the client."""
    bad = ~(r.double() * gain <= FLOAT_MAX)
    if bool(bad.any()):
        raise NonFiniteError(f"client {int(rnd.clients[bad][0])}, round {rnd.index}: the norm overflows float32.")
    return r


def read_scale(payload: Tensor, gain: float = 1.0) -> Tensor:
    """(m,) float32 of the first four bytes. Raises PayloadError unless it is not negative, and gain times it finite."""
    r = as_floats(payload[:, :4])[:, 0]
    if not bool(((r.double() * gain <= FLOAT_MAX) & (r >= 0)).all()):
        raise PayloadError("a scale is not a finite number >= 0.")
    return r


@dataclass(frozen=True)
class Independent(Unbiased):
    """IQ: one bit a coordinate, or a few, each client rounding on its own.

    Each coordinate becomes one of its two neighbors among `levels` equidistant points over [-r, r], r = ||u||_2,
    unbiased and independently. levels = 2: r or -r, P(r) = (u_j + r) / (2 r). An odd number has zero among its points
    (QSGD's s is (levels - 1) / 2), an even one has not.

    Wire: r as float32 (rounded up), then the point's number, 0 for -r, in ceil(log2 levels) bits a coordinate.
    32 + 8 ceil(d ceil(log2 levels) / 8) bits.

    References: arXiv:2401.05518; more than two levels: docs/derivations/pointwise.md.
    """

    fixed_length = True
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
    def _bits(self) -> int:
        return (self.levels - 1).bit_length()

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(d ceil(log2 levels) / 8) bytes, always all used."""
        return 4 + (d * self._bits + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, ops = checked_rows(u, rnd), kernels.of(u)
        r = checked_scale(ops.norms(u), rnd)
        private, ties = rnd.draw("Independent.bits"), rnd.draw("Independent.ties")
        if self.levels == 2:  # encode_levels gives the same bytes, but more slowly
            place = torch.zeros_like(rnd.slots)
            code = ops.encode_bits(u, r, private, ties, 1, place, None)
        else:
            code = ops.encode_levels(u, r, private, ties, self.levels)
        return Messages.of(torch.cat([as_bytes(r[:, None]), code], 1), rnd, u.shape[1])

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor]:
        payload = msgs.checked(self.capacity(rnd.n, msgs.d))
        if self.levels == 2:
            return payload[:, 4:], read_scale(payload)
        code = kernels.of(payload).unpack(payload[:, 4:], msgs.d, self._bits)
        if len(code) and int(code.max()) >= self.levels:
            raise PayloadError(f"Independent(levels={self.levels}): a point lies outside 0..{self.levels - 1}.")
        return code, read_scale(payload)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        code, r = self._read(msgs, rnd)
        ops = kernels.of(code)
        return ops.decode_bits(code, r, msgs.d) if self.levels == 2 else ops.decode_levels(code, r, self.levels)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        code, r = self._read(msgs, rnd)
        if self.levels == 2:
            return kernels.of(code).mean_bits(code, r, msgs.d, rnd.cohort).float()
        return kernels.of(code).mean_levels(code, r, self.levels, rnd.cohort).float()


@dataclass(frozen=True)
class QSGD(Unbiased):
    """Stochastic rounding onto 2 s + 1 levels, each client on its own.

    u_j becomes r sign(u_j) xi_j / s, r = ||u||_2, xi_j one of the two integers around s |u_j| / r, unbiased.

    levels is the paper's s >= 1: the grid has 2 s + 1 points, zero among them.
    Wire: r as float32 (rounded up), then s + sign(u_j) xi_j in ceil(log2(2 s + 1)) bits a coordinate.

    References: arXiv:1610.02132; the exact omega is derived in docs/derivations/compressors.md.
    """

    fixed_length = True

    levels: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= 16383:
            raise ConfigError(f"QSGD(levels={self.levels!r}): the number of levels s is an integer in 1..16383.")

    def omega(self, d: int) -> float:
        """omega = sqrt(d)/s - 1 for d >= 4 s^2 (the exact supremum), else at most d / (4 s^2)."""
        s = self.levels
        return math.sqrt(d) / s - 1.0 if d >= 4 * s * s else d / (4.0 * s * s)

    @property
    def _bits(self) -> int:
        return (2 * self.levels).bit_length()

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(d ceil(log2(2 s + 1)) / 8) bytes, always all used."""
        return 4 + (d * self._bits + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, ops = checked_rows(u, rnd), kernels.of(u)
        r = checked_scale(ops.norms(u), rnd)
        code = ops.encode_levels(u, r, rnd.draw("QSGD.levels"), rnd.draw("QSGD.ties"), 2 * self.levels + 1)
        return Messages.of(torch.cat([as_bytes(r[:, None]), code], 1), rnd, u.shape[1])

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor]:
        payload = msgs.checked(self.capacity(rnd.n, msgs.d))
        code = kernels.of(payload).unpack(payload[:, 4:], msgs.d, self._bits)
        if len(code) and int(code.max()) > 2 * self.levels:
            raise PayloadError(f"QSGD(levels={self.levels}): a level lies outside 0..{2 * self.levels}.")
        return code, read_scale(payload)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        code, r = self._read(msgs, rnd)
        return kernels.of(code).decode_levels(code, r, 2 * self.levels + 1)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        code, r = self._read(msgs, rnd)
        return kernels.of(code).mean_levels(code, r, 2 * self.levels + 1, rnd.cohort).float()
