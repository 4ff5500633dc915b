"""Independent stochastic rounding onto a grid over [-r, r], r = ||u||_2: QSGD and the one-bit quantizer.

QSGD: Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", 2016, arXiv:1610.02132. Independent: the IQ of Panferov, Demidovich, Rammal, Richtarik, "Correlated
Quantization for Faster Nonconvex Distributed Optimization", 2024, arXiv:2401.05518. Its constant is d - 1; the d/4 of
public implementations belongs to three levels (docs/derivations/compressors.md).
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


def independent_bits(u: Rows, r: Tensor, rnd: Round, name: str) -> Tensor:
    """(m, ceil(d/8)) uint8: each coordinate rounded to -r_i or r_i, independently."""
    place = torch.zeros(len(u), dtype=torch.int64)
    return kernels.of(u).encode_bits(u, r, rnd.draw(f"{name}.bits"), rnd.draw(f"{name}.ties"), 1, place, None)


@dataclass(frozen=True)
class Independent(Unbiased):
    """IQ: one bit a coordinate, each client rounding on its own.

    Each coordinate becomes r or -r, P(r) = (u_j + r) / (2 r), r = ||u||_2, independently.

    Wire: r as float32 (rounded up), then one bit a coordinate. 32 + 8 ceil(d/8) bits.

    References: arXiv:2401.05518.
    """

    fixed_length = True

    def omega(self, d: int) -> float:
        """omega = d - 1, with equality for every u: sum_j (r^2 - u_j^2) = (d - 1) r^2."""
        return d - 1.0

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(d/8) bytes, always all used."""
        return 4 + (d + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd)
        r = checked_scale(kernels.of(u).norms(u), rnd)
        return Messages.of(
            torch.cat([as_bytes(r[:, None]), independent_bits(u, r, rnd, "Independent")], 1), rnd, u.shape[1]
        )

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        payload = msgs.checked(self.capacity(rnd.n, msgs.d))
        return kernels.of(payload).decode_bits(payload[:, 4:], read_scale(payload), msgs.d)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        payload = msgs.checked(self.capacity(rnd.n, msgs.d))
        return kernels.of(payload).mean_bits(payload[:, 4:], read_scale(payload), msgs.d, rnd.cohort).float()


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
