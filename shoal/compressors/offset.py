"""Correlated quantization on a grid that starts elsewhere: at random, or so that zero is cheap for odd n.

The random offset is the idea of Algorithm 2 of Suresh, Sun, Ro, Yu, "Correlated quantization for distributed mean
estimation and optimization", 2022, arXiv:2203.04925. Its width (one stratum), the mend for odd n, the bounds and the
exact errors are ours: docs/derivations/offset.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors.dither import checked_scale, read_scale
from shoal.compressors.strata import supremum_max, supremum_norm
from shoal.core import Compressor
from shoal.errors import ConfigError, PayloadError
from shoal.kernels import Draw
from shoal.messages import (
    FLOAT_MAX,
    Messages,
    Round,
    Rows,
    Vector,
    largest,
    measured_rows,
    topped_rows,
)
from shoal.slices import Slices
from shoal.theory import AB


@dataclass(frozen=True)
class CorrelatedOffset(Compressor):
    """CQ on a grid with an offset: the same error for all inputs on which clients agree, or small entries cheap.

    As Correlated(scale, levels=k), with N = n (k-1) strata, but [-r, r] takes only T of them, each 2 r/T wide; points
    are n strata apart and start c_j strata below -r, the same for all clients.

    offset="random" (default): T = N - 1, c_j uniform on [0, 1), shared, one a coordinate. Clients that agree on u
    leave (2/3) d r^2/(N-1)^2, whatever u is: a bound by 1/3 below that of Correlated for large N, better from N = 6 on.
    offset="even": c_j = 0 and T the largest even number <= N, so that zero lies between two strata for odd N too
    (for k = 2 and odd n the points are -r and r (n+1)/(n-1)). For even N it rounds as Correlated does.

    scale="shared" (default): r = max_ij |u_ij|, agreed on first; "own": r_i = ||u_i||_2, in the message.
    Wire: r_i as float32 unless shared, then ceil(log2 k) = b bits a coordinate. 8 ceil(b d/8) bits, and 32 more for an
    own scale. c_j is derived, in multiples of 2^-16.

    References: arXiv:2203.04925 (Algorithm 2); constants: docs/derivations/offset.md.
    """

    fixed_length = True
    offset: Literal["random", "even"] = "random"
    scale: Literal["shared", "own"] = "shared"
    levels: int = 2

    def __post_init__(self) -> None:
        if self.offset not in ("random", "even"):
            raise ConfigError(f"CorrelatedOffset(offset={self.offset!r}): the offset is 'random' or 'even'.")
        if self.scale not in ("shared", "own"):
            raise ConfigError(f"CorrelatedOffset(scale={self.scale!r}): the scale is 'shared' or 'own' (l2).")
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= 256:
            raise ConfigError(f"CorrelatedOffset(levels={self.levels!r}): levels is an integer in 2..256.")

    @property
    def agrees(self) -> bool:  # type: ignore[override]
        """A shared scale is agreed on before `encode`."""
        return self.scale == "shared"

    def check(self, n: int, d: int) -> None:
        if n * (self.levels - 1) < 2:
            raise ConfigError(
                f"{self!r} with n={n}, d={d}: one stratum leaves no room for an offset; take levels=3, or Correlated."
            )

    def steps(self, n: int) -> int:
        """T: how many of the N = n (k-1) strata cover [-r, r]."""
        strata = n * (self.levels - 1)
        return strata - 1 if self.offset == "random" or strata % 2 else strata

    def _gain(self, n: int) -> float:
        """The largest magnitude of a grid point, for r = 1: (N + 1)/(N - 1), or 1."""
        strata = n * (self.levels - 1)
        return 1.0 if self.steps(n) == strata else (strata + 1.0) / (strata - 1.0)

    def _checked_gain(self, n: int) -> Callable[[int], float]:
        def gain(d: int) -> float:
            self.check(n, d)
            return self._gain(n)

        return gain

    def ab(self, n: int, d: int) -> AB:
        """shared: a = b = 1, c = g d/T^2, g = 2/3 ("random") or 1 ("even").

        "even" also has a = lam = sqrt(d)/T > 1, b = 1, c = d/(lam T^2). own: A = omega/n, B = 0, with
        omega = d n^2/T^2; and a - b = g d/T^2, b = 1 + omega/(n-1). Proofs: docs/derivations/offset.md.
        """
        self.check(n, d)
        T, source = self.steps(n), "docs/derivations/offset.md"
        c = d / T**2 if self.offset == "even" else 2.0 * d / (3.0 * T**2)
        if self.scale == "own":
            omega, other = d * (n / T) ** 2, None
            if n > 1:
                b = 1.0 + omega / (n - 1)
                other = AB(b + c, b, source=f"own l2 scales ({source})")
            return AB(omega / n, 0.0, source=f"never worse than independent rounding ({source})", other=other)
        lam = d**0.5 / T if self.offset == "even" else 1.0
        other = AB(lam, 1.0, c / lam, source=f"shared scale, even T ({source})") if lam > 1.0 else None
        return AB(1.0, 1.0, c, source=f"shared scale ({source})", other=other)

    def homogeneous(self, n: int, d: int) -> AB:
        """E||(1/n) sum C_i(u) - u||^2 <= a ||u||^2 where all clients hold one u: the exact supremum.

        "random": a = (2/3) d/(N-1)^2, for own scales with equality. "even": that of N' = T strata in Correlated.
        """
        self.check(n, d)
        T = self.steps(n)
        supremum = supremum_norm if self.scale == "own" else supremum_max
        a = 2.0 * d / (3.0 * T**2) if self.offset == "random" else supremum(d, T)
        return AB(a, 0.0, evidence="homogeneous", source="equal inputs (docs/derivations/offset.md)")

    @property
    def _bits(self) -> int:
        return (self.levels - 1).bit_length()

    @property
    def _start(self) -> int:
        return 0 if self.agrees else 4

    def capacity(self, n: int, d: int) -> int:
        """ceil(b d / 8) bytes, b = ceil(log2 k), and 4 for an own scale; always all used."""
        self.check(n, d)
        return self._start + (d * self._bits + 7) // 8

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        """(m,) float32: max_j |u_ij|, exact."""
        return measured_rows(u, rnd, self._checked_gain(rnd.cohort))[1]

    def encode(self, u: Rows, rnd: Round) -> Messages:
        (u, top), n = topped_rows(u, rnd, self._checked_gain(rnd.cohort)), rnd.cohort
        ops, d = kernels.of(u), u.shape[1]
        if self.agrees:
            r = self._agreed(rnd, len(u))
            if top > largest(r):
                raise ConfigError(f"the agreed scale {float(r[0]):g} is smaller than an entry; agree on max |u_ij|.")
        else:
            r = checked_scale(ops.norms(u), rnd, self._gain(n))
        place, shifts = rnd.shared("CorrelatedOffset.places"), rnd.shared("CorrelatedOffset.shifts")
        private, ties = rnd.draw("CorrelatedOffset.bits"), rnd.draw("CorrelatedOffset.ties")
        offsets, head = self._offsets(d, rnd), not self.agrees
        code = ops.encode_strata(u, r, private, ties, self.levels, n, place, shifts, self.steps(n), offsets, head)
        return Messages.of(code, rnd, d)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        code, r = self._read(msgs, rnd)
        n = rnd.cohort
        return kernels.of(code).decode_strata(code, r, n, self.steps(n), self._offsets(msgs.d, rnd))

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        return self._mean(msgs, self._offsets(msgs.d, rnd), rnd)

    def _mean(self, msgs: Messages, offsets: Tensor | Draw, rnd: Round) -> Vector:
        (code, r), n = self._read(msgs, rnd), rnd.cohort
        return kernels.of(code).mean_strata(code, r, n, self.steps(n), offsets, n).float()

    def slices(self, d: int, rnd: Round) -> Slices:
        """An own scale in every slice; eight codes take whole bytes. A slice has its own coordinates' offsets."""
        drawn = self._offsets(d, rnd)
        offsets = kernels.of(drawn.slots).halves(drawn, d)[0].to(torch.int32) if isinstance(drawn, Draw) else drawn
        return Slices(
            lambda part, lo: self._mean(part, offsets[lo : lo + part.d], rnd), d, rnd.cohort, grain=8, size=self._bits,
            head=self._start,
        )  # fmt: skip

    def _offsets(self, d: int, rnd: Round) -> Tensor | Draw:
        """(d,) int32: c_j 2^16; or the draw of them."""
        if self.offset == "even":
            return torch.zeros(d, dtype=torch.int32, device=rnd.slots.device)
        return rnd.shared("CorrelatedOffset.offsets")

    def _agreed(self, rnd: Round, m: int) -> Tensor:
        if rnd.agreed is None:
            raise ConfigError(
                f"{self!r} needs the scale that all clients agreed on: pass "
                "replace(rnd, agreed=float(prepare(u, rnd).max())), or take scale='own'."
            )
        if not 0.0 <= rnd.agreed * self._gain(rnd.cohort) <= FLOAT_MAX:
            raise PayloadError(f"the agreed scale {rnd.agreed!r} is not a finite number >= 0 with room for the grid.")
        return torch.full((m,), rnd.agreed, device=rnd.slots.device)

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor]:
        """((m, d) numbers of grid points, scales)."""
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        r = self._agreed(rnd, len(payload)) if self.agrees else read_scale(payload, self._gain(rnd.cohort))
        code = kernels.of(payload).unpack(payload[:, self._start :], msgs.d, self._bits)
        if len(code) and int(code.max()) >= self.levels:
            raise PayloadError(f"{self!r}: a code lies outside 0..{self.levels - 1}.")
        return code, r
