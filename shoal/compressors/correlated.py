"""Correlated quantization: one bit a coordinate, and errors that cancel where clients agree.

Suresh, Sun, Ro, Yu, "Correlated quantization for distributed mean estimation and optimization", 2022,
arXiv:2203.04925 (Algorithm 1); MARINA with it: Panferov et al., 2024, arXiv:2401.05518. The bound for a shared scale,
the exact error and the O(1) shared randomness are ours: docs/derivations/correlated.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shoal import kernels, rng
from shoal.compressors.dither import checked_scale, read_scale
from shoal.core import FLOAT_MAX, Compressor, Messages, Round, Rows, Vector, as_bytes, checked_rows
from shoal.errors import ConfigError, PayloadError
from shoal.theory import AB


@dataclass(frozen=True)
class Correlated(Compressor):
    """CQ: one bit a coordinate, with rounding errors that cancel where clients agree.

    u_ij becomes r_i if U_ij < (u_ij + r_i) / (2 r_i), else -r_i, with U_ij = (place_ij + v_ij) / n, v_ij private
    and uniform on [0, 1), place_ij = (pi(i) + s_j) mod n for one shared permutation pi of the cohort a round and one
    shared shift s_j a coordinate. Over the n clients, the U_ij hit every stratum [s/n, (s+1)/n) once.

    scale="shared" (default): r = max_ij |u_ij|, on which all clients agree first (32 bits up and 32 down a client, not
    in the payload); "own": r_i = ||u_i||_2; "max": r_i = max_j |u_ij|, both in the message.
    numerical=True lets own scales use constants that survived a search but are not proved.
    Wire: r_i as float32 unless shared, then one bit a coordinate. 8 ceil(d/8) bits, and 32 more for an own scale.

    References: arXiv:2203.04925, arXiv:2401.05518.
    """

    scale: Literal["shared", "own", "max"] = "shared"
    numerical: bool = False

    def __post_init__(self) -> None:
        if self.scale not in ("shared", "own", "max"):
            raise ConfigError(f"Correlated(scale={self.scale!r}): the scale is 'shared', 'own' (l2) or 'max'.")
        if self.numerical and self.scale == "shared":
            raise ConfigError("Correlated(numerical=True): the shared scale's constants are proved; drop `numerical`.")

    @property
    def agrees(self) -> bool:  # type: ignore[override]
        """A shared scale is agreed on before `encode`."""
        return self.scale == "shared"

    def omega(self, d: int) -> float:
        """omega = d - 1 for an own scale (equality for l2). A shared scale has no omega: raises ConfigError."""
        if self.scale == "shared":
            raise ConfigError(
                "Correlated(scale='shared') has no omega: its error depends on the largest client. Use it in Marina, "
                "or take Correlated(scale='own')."
            )
        return d - 1.0

    def ab(self, n: int, d: int) -> AB:
        """shared: a = b = 1, c = d/n^2; for even n also a = lam, b = 1, c = d/(lam n^2), lam = sqrt(d)/n > 1.

        own: A = (d-1)/n, B = 0 (never worse than independent rounding), and a - b = d/n^2, b = 1 + (d-1)/(n-1).
        max: A = (d-1)/n, B = 0. With numerical=True, own and max: a - b = d/n^2, b = max(d/n, 1/2), not proved.
        All for every L_±; the shared and the own inequalities are our theorems (docs/derivations/correlated.md).
        """
        source = "docs/derivations/correlated.md"
        if self.scale == "shared":
            lam = math.sqrt(d) / n
            even = n % 2 == 0 and lam > 1.0
            other = AB(lam, 1.0, d / (lam * n**2), source=f"shared scale, even n ({source})") if even else None
            return AB(1.0, 1.0, d / n**2, source=f"shared scale: d R^2/n^2 + V ({source})", other=other)
        if self.numerical:
            b = max(d / n, 0.5)
            return AB(d / n**2 + b, b, evidence="numerical", source=f"own scales, searched, not proved ({source})")
        other = None
        if self.scale == "own" and n > 1:
            b = 1.0 + (d - 1.0) / (n - 1.0)
            other = AB(d / n**2 + b, b, source=f"own l2 scales ({source})")
        return AB((d - 1.0) / n, 0.0, source=f"never worse than independent rounding ({source})", other=other)

    def capacity(self, n: int, d: int) -> int:
        """ceil(d/8) bytes, and 4 for an own scale; always all used."""
        return (0 if self.agrees else 4) + (d + 7) // 8

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        """(m,) float32: max_j |u_ij|, exact."""
        u = checked_rows(u, rnd)
        return kernels.of(u).maxes(u)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, ops, d = checked_rows(u, rnd), kernels.of(u), u.shape[1]
        if self.agrees:
            r = self._agreed(rnd, len(u))
            if len(u) and float(ops.maxes(u).max()) > float(r[0]):
                raise ConfigError(f"the agreed scale {float(r[0]):g} is smaller than an entry; agree on max |u_ij|.")
        else:
            r = checked_scale(ops.norms(u) if self.scale == "own" else ops.maxes(u), rnd)
        place = rnd.permutation(rnd.cohort, "Correlated.places")[rnd.slots]
        shifts = rng.below(rnd.shared("Correlated.shifts"), d, rnd.cohort)
        private, ties = rnd.draw("Correlated.bits"), rnd.draw("Correlated.ties")
        bits = ops.encode_bits(u, r, private, ties, rnd.cohort, place, shifts)
        return Messages.of(bits if self.agrees else torch.cat([as_bytes(r[:, None]), bits], 1), rnd, d)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        bits, r = self._read(msgs, rnd)
        return kernels.of(bits).decode_bits(bits, r, msgs.d)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        bits, r = self._read(msgs, rnd)
        return kernels.of(bits).mean_bits(bits, r, msgs.d, rnd.cohort).float()

    def _agreed(self, rnd: Round, m: int) -> Tensor:
        if rnd.agreed is None:
            raise ConfigError(
                "Correlated(scale='shared') needs the scale that all clients agreed on: pass "
                "replace(rnd, agreed=float(prepare(u, rnd).max())), or take scale='own'."
            )
        if not 0.0 <= rnd.agreed <= FLOAT_MAX:
            raise PayloadError(f"the agreed scale {rnd.agreed!r} is not a finite number >= 0.")
        return torch.full((m,), rnd.agreed)

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor]:
        payload = msgs.checked(self.capacity(rnd.n, msgs.d))
        if self.agrees:
            return payload, self._agreed(rnd, len(payload))
        return payload[:, 4:], read_scale(payload)


def agree_locally(u: Rows, compressor: Compressor, rnd: Round) -> Round:
    """The round with the scale agreed on by the given rows alone: for whoever holds all clients in one place."""
    return replace(rnd, agreed=float(compressor.prepare(u, rnd).max())) if compressor.agrees else rnd


def exact_error(u: np.ndarray, r: np.ndarray, levels: int = 2) -> float:
    """E||(1/n) sum_i C_i(u_i) - ubar||^2 of correlated rounding of u (n, d) onto `levels` points over [-r_i, r_i].

    Exact for any inputs and scales, n >= 2, in O(n^2 d) (docs/derivations/correlated.md). With Delta_i the step,
    y_ij = frac((u_ij + r_i) / Delta_i), c_ijs = clip(n y_ij - s, 0, 1) for strata s = 0..n-1 and f = frac(n y):

        sum_j [ (1/n^3) sum_i Delta_i^2 f_ij (1 - f_ij)
              + (1/(n (n-1))) sum_i Var_s(Delta_i c_ijs - (1/n) sum_k Delta_k c_kjs) ]
    """
    u, r = np.asarray(u, np.float64), np.asarray(r, np.float64)
    n = len(u)
    step = 2.0 * r / (levels - 1)
    z = (u + r[:, None]) / np.where(step > 0, step, 1.0)[:, None]
    y = z - np.floor(z)
    f = n * y - np.floor(n * y)
    agreement = (step[:, None] ** 2 * f * (1.0 - f)).sum() / n**3
    c = np.clip(n * y[:, :, None] - np.arange(n), 0.0, 1.0) * step[:, None, None]  # client, coordinate, stratum
    return float(agreement + (c - c.mean(0)).var(axis=2).sum() / (n * (n - 1)))
