"""Correlated quantization: a bit or a few a coordinate, and errors that cancel where clients agree.

Suresh, Sun, Ro, Yu, "Correlated quantization for distributed mean estimation and optimization", 2022,
arXiv:2203.04925 (Algorithm 1); MARINA with it: Panferov et al., 2024, arXiv:2401.05518. The bound for a shared scale,
the exact error, the O(1) shared randomness, and the constants for k points and for blocks of coordinates are ours:
docs/derivations/correlated.md. (PermK+CQ, with groups of equal size and full norms, is from arXiv:2401.05518.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal import kernels, rng
from shoal.compressors.blocks import ALL, Dealt, alike, cut, dealt_bound, taken
from shoal.compressors.dither import QSGD, checked_scale, normed_rows, read_scale
from shoal.compressors.strata import strata_error, supremum_max, supremum_norm
from shoal.core import Compressor
from shoal.errors import ConfigError, PayloadError
from shoal.kernels import Draw
from shoal.messages import (
    FLOAT_MAX,
    Messages,
    Round,
    Rows,
    Vector,
    checked_rows,
    largest,
    measured_rows,
    shaped_rows,
    topped_rows,
)
from shoal.slices import Slices, Tally
from shoal.theory import AB


class Split(NamedTuple):
    """Of each row: its group's coordinates, its group's size, and its place there."""

    block: Dealt
    size: Tensor  # (m,) int64
    place: Tensor  # (m,) int64


def grid_omega(d: int, levels: int) -> float:
    """omega of independent rounding onto `levels` points over [-||u||, ||u||], ends included.

    d - 1 for two (equality); QSGD's for odd numbers, where 0 is a point; at most d / (levels - 1)^2 for even ones.
    """
    if levels == 2:
        return d - 1.0
    return QSGD(levels // 2).omega(d) if levels % 2 else d / (levels - 1.0) ** 2


@dataclass(frozen=True)
class Correlated(Compressor):
    """CQ: one bit or a few a coordinate, errors cancel where clients agree (odd levels: correlated QSGD).

    u_ij becomes r_i if U_ij < (u_ij + r_i) / (2 r_i), else -r_i, with U_ij = (place_ij + v_ij) / n, v_ij private
    and uniform on [0, 1), place_ij = (pi(i) + s_j) mod n for one shared permutation pi of the cohort a round and one
    shared shift s_j a coordinate. Over the n clients, the U_ij hit every stratum [s/n, (s+1)/n) once.

    scale="shared" (default): r = max_ij |u_ij|, on which all clients agree first (32 bits up and 32 down a client, not
    in the payload); "own": r_i = ||u_i||_2; "max": r_i = max_j |u_ij|, both in the message.
    numerical=True lets own scales use constants that survived a search but are not proved.
    levels=k rounds in the same way between the two neighbors of u_ij among k points, 2 r_i / (k-1) apart.
    blocks=sigma: a shared permutation cuts the clients into sigma groups (sizes differ by at most one), and coordinate
    j belongs to group (j + t_b) mod sigma, with one shared uniform shift t_b for each b = floor(j / sigma). A client of
    a group of m sends its group's coordinates alone, times n/m, its U_ij in the strata of the m; an own scale is that
    of these coordinates. scale="full", for blocks alone: r_i = ||u_i||_2 of all coordinates, as PermK+CQ has it, with
    constants that are up to sigma times those of "own" for the same bits (one block: "own" is the same law).
    Wire: r_i as float32 unless shared, then ceil(log2 k) = b bits a coordinate sent, ascending.
    8 ceil(b d/(8 sigma)) bits where sigma divides d, and 32 more for an own scale.

    An odd number of levels, scale="own", is correlated QSGD with s = (k-1)/2: QSGD's grid and law for each client.

    References: arXiv:2203.04925, arXiv:2401.05518.
    """

    scale: Literal["shared", "own", "max", "full"] = "shared"
    numerical: bool = False
    levels: int = 2
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.scale not in ("shared", "own", "max", "full"):
            raise ConfigError(f"Correlated(scale={self.scale!r}): the scale is 'shared', 'own' (l2), 'max' or 'full'.")
        if self.numerical and self.scale == "shared":
            raise ConfigError("Correlated(numerical=True): the shared scale's constants are proved; drop `numerical`.")
        for name, value, least, most in (("levels", self.levels, 2, 256), ("blocks", self.blocks, 1, 2**31)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"Correlated({name}={value!r}): {name} is an integer in {least}..{most}.")
        if self.scale == "full" and self.blocks == 1:
            raise ConfigError("Correlated(scale='full', blocks=1) is scale='own': take that, or blocks=2 or more.")
        if self.numerical and (self.levels, self.blocks) != (2, 1):
            raise ConfigError("Correlated(numerical=True): searched for levels=2, blocks=1 alone; drop `numerical`.")

    def __repr__(self) -> str:
        more = "".join(
            f", {k}={v}" for k, v, usual in (("levels", self.levels, 2), ("blocks", self.blocks, 1)) if v != usual
        )
        return f"Correlated(scale={self.scale!r}, numerical={self.numerical}{more})"

    @property
    def agrees(self) -> bool:  # type: ignore[override]
        """A shared scale is agreed on before `encode`."""
        return self.scale == "shared"

    @property
    def fixed_length(self) -> bool:  # type: ignore[override]
        """Blocks differ in length where their number does not divide d."""
        return self.blocks == 1

    def check(self, n: int, d: int) -> None:
        if self.blocks > min(n, d):
            raise ConfigError(
                f"Correlated(blocks={self.blocks}) with n={n} clients and d={d} coordinates: every block needs a "
                f"client and a coordinate, so blocks is in 1..{min(n, d)}."
            )

    def omega(self, d: int) -> float:
        """omega of independent rounding on the grid (d - 1 for one bit), for an own scale and one block.

        A shared scale has none, and blocks have none that DIANA may use: raises ConfigError.
        """
        if self.scale == "shared":
            raise ConfigError(
                "Correlated(scale='shared') has no omega: its error depends on the largest client. Use it in Marina, "
                "or take Correlated(scale='own')."
            )
        if self.blocks > 1:
            raise ConfigError(
                f"Correlated(blocks={self.blocks}) has no omega: clients of a group share their block, and their "
                "errors are correlated either way. Use it in Marina, or take one block: Correlated(scale='own')."
            )
        return grid_omega(d, self.levels)

    def ab(self, n: int, d: int) -> AB:
        """shared: a = b = 1, c = d/N^2, N = n (k-1); for even N also a = lam = sqrt(d)/N > 1, b = 1, c = d/(lam N^2).

        own: A = omega/n, B = 0 (never worse than independent rounding), and a - b = d/N^2, b = 1 + omega/(n-1).
        max: A = omega/n, B = 0. With numerical=True, own and max: a - b = d/n^2, b = max(d/n, 1/2), not proved.
        omega is that of k points, d - 1 for one bit. With blocks, the n/sigma clients and d/sigma coordinates of a
        group take the places of n and d (own scales: ceil(d/sigma)), and (sigma-1)/(n-1) is added to A and B of the
        own scales. full: as own in blocks, but omega and a - b of all d coordinates.
        All for every L_±; the shared and the own inequalities are our theorems (docs/derivations/correlated.md).
        """
        self.check(n, d)
        sizes = [int(m) for m in cut(n, self.blocks)[1]]
        source = "docs/derivations/correlated.md"
        if self.numerical:
            b = max(d / n, 0.5)
            return AB(d / n**2 + b, b, evidence="numerical", source=f"own scales, searched, not proved ({source})")
        if self.scale == "shared":
            return self._shared(d, sizes, source)
        sigma, longest = self.blocks, d if self.scale == "full" else -(-d // self.blocks)
        omega = grid_omega(d, self.levels)
        if self.scale != "full":  # the scale depends on which coordinates are sent, and so on how many they are
            omega = dealt_bound(lambda b: grid_omega(b, self.levels), d, sigma)
        error = omega * sum(1.0 / m for m in sizes) / sigma
        drawn = sum((n - m) / (m * (n - 1)) for m in sizes) / sigma if n > 1 else 0.0
        other = None
        if self.scale != "max" and n > 1:
            gap = longest * sum(1.0 / (m * (self.levels - 1)) ** 2 for m in sizes) / sigma
            more = omega * sum(n / (m * (n - 1)) for m in sizes if m > 1) / sigma
            other = AB(gap + 1.0 + more, 1.0 + more, source=f"{self.scale} l2 scales ({source})")
        return AB(error + drawn, drawn, source=f"never worse than independent rounding ({source})", other=other)

    def _shared(self, d: int, sizes: list[int], source: str) -> AB:
        """V from the clients' differences, and (d/sigma) sum over the groups of 1 / (m (k-1))^2 times R^2."""
        strata = [m * (self.levels - 1) for m in sizes]
        c = d / self.blocks * sum(1.0 / s**2 for s in strata)
        lam = math.sqrt(d) / strata[0] if self.blocks == 1 else math.sqrt(c)
        even = lam > 1.0 and all(s % 2 == 0 for s in strata)
        other = AB(lam, 1.0, c / lam, source=f"shared scale, even n ({source})") if even else None
        return AB(1.0, 1.0, c, source=f"shared scale: d R^2/n^2 + V ({source})", other=other)

    def homogeneous(self, n: int, d: int) -> AB:
        """E||(1/n) sum C_i(u) - u||^2 <= a ||u||^2 where all clients hold one u: the exact supremum for one block.

        N = n (k-1). shared and max: (d-1)/N^2 for odd N, (sqrt(1 + 4(d-1)/N^2) - 1)/2 for even N. own:
        `supremum_norm`, 2 sqrt(d)/N - 1 for even N and d >= N^2, about d/N^2 otherwise. Blocks: the mean over groups
        (exact for shared and full scales and groups of equal size, else a bound).
        """
        self.check(n, d)
        supremum = supremum_norm if self.scale in ("own", "full") else supremum_max
        a = 0.0
        for m in cut(n, self.blocks)[1]:
            one = partial(supremum, N=int(m) * (self.levels - 1))
            a += one(d) if self.scale in ("shared", "full") else dealt_bound(one, d, self.blocks)
        return AB(a / self.blocks, 0.0, evidence="homogeneous", source="equal inputs (docs/derivations/strata.md)")

    def present(self, n: int, d: int, m: int) -> AB:
        """Of the mean over the m clients that arrived of n expected, against these clients' mean.

        Whichever they are, as long as that does not depend on the round's random numbers. shared: a = b = 1,
        c = d (n-m+1) / (n m (k-1)^2). own, max: A = omega/m, B = 0; own also b = 1 + omega/(n-1),
        a - b = omega (n-m)/(m (n-1)) + d (m-1)/(m n (n-1) (k-1)^2). Blocks have none: raises ConfigError.
        """
        if self.blocks > 1:
            raise ConfigError(f"{self!r}: constants for absent clients are stated for one block alone; take blocks=1.")
        if not 1 <= m <= n:
            raise ConfigError(f"{self!r}: m={m} clients of n={n} arrived; m is in 1..{n}.")
        source, cells = "absent clients (docs/derivations/strata.md)", d / (self.levels - 1.0) ** 2
        if self.scale == "shared":
            return AB(1.0, 1.0, cells * (n - m + 1) / (n * m), source=source)
        omega, other = grid_omega(d, self.levels), None
        if self.scale == "own" and n > 1:
            b = 1.0 + omega / (n - 1)
            gap = omega * (n - m) / (m * (n - 1)) + cells * (m - 1) / (m * n * (n - 1))
            other = AB(b + gap, b, source=source)
        return AB(omega / m, 0.0, source=source, other=other)

    @property
    def _bits(self) -> int:
        return (self.levels - 1).bit_length()

    def capacity(self, n: int, d: int) -> int:
        """ceil(b ceil(d/sigma) / 8) bytes, b = ceil(log2 k), and 4 for an own scale; all used by the longest block."""
        self.check(n, d)
        return self._start + (-(-d // self.blocks) * self._bits + 7) // 8

    def predicted_bits(self, n: int, d: int) -> float:
        """8 times the shortest block's bytes, and 32 to agree on a scale: never more than the mean."""
        return 8.0 * (self._start + (d // self.blocks * self._bits + 7) // 8) + (32.0 if self.agrees else 0.0)

    @property
    def _start(self) -> int:
        return 0 if self.agrees else 4

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        """(m,) float32: max_j |u_ij|, exact."""
        return measured_rows(u, rnd, self._gain(rnd.cohort))[1]

    def _gain(self, n: int) -> Callable[[int], float]:
        return lambda d: n / (n // min(n, self.blocks))  # of a client of the smallest group

    def encode(self, u: Rows, rnd: Round) -> Messages:
        if self.levels == 2 and self.blocks == 1 and self._has_agreed(rnd):
            return self._looked_at_and_rounded(u, rnd)
        u, r = self._scaled(u, rnd)
        d = u.shape[1]
        self.check(rnd.cohort, d)
        if self.blocks == 1:
            return Messages.of(self._rounded(u, r, rnd, rnd.cohort, _order(rnd)), rnd, d)
        part, wide = self._split(rnd.slots, d, rnd), self.capacity(rnd.cohort, d)
        values, lengths = part.block.gather(u, -(-d // self.blocks)), part.block.lengths()
        payload, nbytes = None, self._start + (lengths * self._bits + 7) // 8
        for rows, (length, size) in alike(lengths, part.size):
            scales = r if r is None or rows is ALL else r[rows]
            place, own = (part.place, rnd) if rows is ALL else (part.place[rows], rnd.rows(rows))
            sent = self._rounded(taken(values, rows, length), scales, own, size, place)
            if rows is ALL and sent.shape[1] == wide:
                return Messages.of(sent, rnd, d, nbytes)
            if payload is None:
                payload = torch.zeros(len(u), wide, dtype=torch.uint8, device=u.device)
            payload[rows, : sent.shape[1]] = sent
        if payload is None:
            payload = torch.zeros(0, wide, dtype=torch.uint8, device=u.device)
        return Messages.of(payload, rnd, d, nbytes)

    def _looked_at_and_rounded(self, u: Rows, rnd: Round) -> Messages:
        """One bit with a shared scale, in one pass over the rows."""
        u, r = shaped_rows(u, rnd), self._agreed(rnd, u.shape[0])
        code, within = kernels.of(u).encode_within(u, r, *self._draws(rnd, rnd.cohort, _order(rnd)))
        if not within:
            topped_rows(u, rnd, self._gain(rnd.cohort))  # what is no number is named
            raise _too_small(r)
        return Messages.of(code, rnd, u.shape[1])

    def _scaled(self, u: Rows, rnd: Round) -> tuple[Rows, Tensor | None]:
        """u, checked, and (m,) scales; None where they are those of a block."""
        gain = self._gain(rnd.cohort)
        if self.agrees:
            (u, top), r = topped_rows(u, rnd, gain), self._agreed(rnd, u.shape[0])
            if top > largest(r):
                raise _too_small(r)
            return u, r
        if self.blocks == 1:
            return normed_rows(u, rnd) if self.scale == "own" else measured_rows(u, rnd)
        u = checked_rows(u, rnd, gain)
        return u, kernels.of(u).norms(u) if self.scale == "full" else None

    def _rounded(self, u: Rows, r: Tensor | None, rnd: Round, strata: int, place: Tensor | Draw) -> Tensor:
        """(m, bytes) uint8: rows of a whole message's coordinates rounded among `strata` clients, their scale first."""
        ops, head = kernels.of(u), not self.agrees
        if r is None:
            r = ops.norms(u) if self.scale == "own" else ops.maxes(u)
        if head:
            r = checked_scale(r, rnd, rnd.cohort / strata)
        private, ties, *shared = self._draws(rnd, strata, place)
        if self.levels == 2:
            return ops.encode_bits(u, r, private, ties, *shared, head)
        return ops.encode_levels(u, r, private, ties, self.levels, *shared, head)

    def _draws(self, rnd: Round, strata: int, place: Tensor | Draw) -> tuple[Draw, Draw, int, Tensor | Draw, Draw]:
        """What a kernel rounds with: (private, ties, strata, place, shifts)."""
        lot = rnd.fork(f"groups of {strata}") if self.blocks > 1 else rnd  # no number is drawn twice in a round
        return rnd.draw("Correlated.bits"), rnd.draw("Correlated.ties"), strata, place, lot.shared("Correlated.shifts")

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        if self.blocks > 1:
            values, part = self._read_blocks(msgs, rnd)
            return part.block.scatter(values, 1.0)
        code, r = self._read(msgs.checked(self.capacity(rnd.cohort, msgs.d)), rnd)
        return self._values(code, r, msgs.d)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        if self.blocks > 1:
            values, part = self._read_blocks(msgs, rnd)
            return part.block.mean(values, 1.0, rnd.cohort)
        code, r = self._read(msgs.checked(self.capacity(rnd.cohort, msgs.d)), rnd)
        if self.levels == 2:
            return kernels.of(code).mean_bits(code, r, msgs.d, rnd.cohort)
        return self._within(kernels.of(code).mean_levels(code, r, self.levels, msgs.d, rnd.cohort))

    def slices(self, d: int, rnd: Round) -> Slices | None:
        """One block: an own scale in every slice; eight codes take whole bytes. Of blocks, none."""
        if self.blocks > 1:
            return None
        tally = Tally(float(self._agreed(rnd, 1)[0]), self.levels) if self.agrees else None
        return Slices(
            lambda part, lo: self.aggregate(part, rnd), d, rnd.cohort, grain=8, size=self._bits, head=self._start,
            tally=tally,
        )  # fmt: skip

    def _has_agreed(self, rnd: Round) -> bool:
        """Whether there is a scale that all clients agreed on, and can be one."""
        return self.agrees and rnd.agreed is not None and 0.0 <= rnd.agreed * self._gain(rnd.cohort)(0) <= FLOAT_MAX

    def _agreed(self, rnd: Round, m: int) -> Tensor:
        if rnd.agreed is None:
            raise ConfigError(
                "Correlated(scale='shared') needs the scale that all clients agreed on: pass "
                "replace(rnd, agreed=float(prepare(u, rnd).max())), or take scale='own'."
            )
        if not self._has_agreed(rnd):
            raise PayloadError(f"the agreed scale {rnd.agreed!r} is not a finite number >= 0.")
        return torch.full((m,), rnd.agreed, device=rnd.slots.device)

    def _read(self, payload: Tensor, rnd: Round, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """(packed codes, scales)."""
        r = self._agreed(rnd, len(payload)) if self.agrees else read_scale(payload, gain)
        return payload[:, self._start :], r

    def _values(self, code: Tensor, r: Tensor, d: int) -> Tensor:
        ops = kernels.of(code)
        if self.levels == 2:
            return ops.decode_bits(code, r, d)
        return self._within(ops.decode_levels(code, r, self.levels, d))

    def _within(self, decoded: tuple[Tensor, bool]) -> Tensor:
        values, beyond = decoded
        if beyond:
            raise PayloadError(f"Correlated(levels={self.levels}): a code lies outside 0..{self.levels - 1}.")
        return values

    def _places(self, slots: Tensor, rnd: Round) -> Tensor:
        return rng.places(_order(rnd), rnd.cohort, slots)

    def _split(self, slots: Tensor, d: int, rnd: Round) -> Split:
        """Who sends what: one permutation of the clients gives the groups, and the places in them."""
        self.check(rnd.cohort, d)
        at, (first, size) = self._places(slots, rnd).cpu().numpy(), cut(rnd.cohort, self.blocks)
        group = np.searchsorted(first, at, side="right") - 1
        part, sizes, place = (torch.as_tensor(x, device=slots.device) for x in (group, size[group], at - first[group]))
        return Split(Dealt(rnd.shared("Correlated.blocks"), part, self.blocks, d), sizes, place)

    def _read_blocks(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Split]:
        """((m, longest block) values of C_i, zeros behind a shorter block; where they belong)."""
        part, n = self._split(msgs.slots, msgs.d, rnd), rnd.cohort
        lengths = part.block.lengths()
        payload, wide = msgs.checked(self._start + (lengths * self._bits + 7) // 8), -(-msgs.d // self.blocks)
        values = None
        for rows, (length, size) in alike(lengths, part.size):
            code, r = self._read(taken(payload, rows, self._start + (length * self._bits + 7) // 8), rnd, n / size)
            read = (self._values(code, r, length).double() * (n / size)).float()
            if rows is ALL and length == wide:
                return read, part
            if values is None:
                values = torch.zeros(len(payload), wide, device=payload.device)
            values[rows, :length] = read
        return torch.zeros(0, wide, device=payload.device) if values is None else values, part


def _too_small(r: Tensor) -> ConfigError:
    return ConfigError(f"the agreed scale {float(r[0]):g} is smaller than an entry; agree on max |u_ij|.")


def _order(rnd: Round) -> Draw:
    """The permutation of the cohort that gives every client its place."""
    return rnd.shared("Correlated.places")


def agree_locally(u: Rows, compressor: Compressor, rnd: Round) -> Round:
    """The round with the scale agreed on by the given rows alone: for whoever holds all clients in one place."""
    return replace(rnd, agreed=float(compressor.prepare(u, rnd).max())) if compressor.agrees else rnd


def exact_error(u: np.ndarray, r: np.ndarray, levels: int = 2, strata: int | None = None) -> float:
    """E||(1/m) sum_i C_i(u_i) - ubar||^2 of correlated rounding of u (m, d) onto `levels` points over [-r_i, r_i].

    strata = n >= m: how many clients were expected, whichever m of them arrived (default: m, all of them). Exact for
    any inputs and scales, in O((m + n) d): `strata_error`.
    """
    u, r = np.asarray(u, np.float64), np.asarray(r, np.float64)
    step = 2.0 * r / (levels - 1)
    z = (u + r[:, None]) / np.where(step > 0, step, 1.0)[:, None]
    return strata_error(z, step, len(u) if strata is None else strata)
