"""Rotations that spread a vector evenly over its coordinates, and rounding onto a grid as wide as what is left.

Randomized Hadamard rotations before quantization: Suresh, Yu, Kumar, McMahan, "Distributed mean estimation with
limited communication", 2017, arXiv:1611.00429, which pads to a power of two; here two transforms overlap instead.
Constants, and what a rotation does to the constants of the compressor inside it: docs/derivations/rotation.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from shoal import kernels, rng
from shoal.compressors.correlated import Correlated
from shoal.compressors.dither import ScaledCodes
from shoal.core import Compressor, Unbiased
from shoal.errors import ConfigError, PayloadError
from shoal.kernels.reference.rotation import window
from shoal.messages import FLOAT_MAX, Messages, Round, Rows, Vector, checked_rows, measured_rows, not_finite, within
from shoal.slices import Slices
from shoal.theory import AB, independent


def checked_norms(u: Rows, rnd: Round, gain: float) -> Rows:
    """u, if every row's norm stays finite when multiplied by `gain`: no entry of any rotation is larger.

    Raises NonFiniteError naming the client.
    """
    norms = kernels.of(u).norms(u)
    if not within(norms, gain):
        bad = ~(norms.double() * gain <= FLOAT_MAX)
        raise not_finite(bad, rnd, f"a norm of {float(norms[bad][0]):g} overflows float32 times {gain:g}")
    return u


def sign_draws(stream: str, slots: Tensor, rnd: Round, rounds: int) -> list[kernels.Draw]:
    """The draws of a rotation's signs: S_1, S_2, ... of these slots."""
    slots = slots.to(rnd.slots.device)  # rng.SHARED lies on the CPU
    return [rnd.fork(f"{stream}{step}").draw("Rotation.signs", slots) for step in range(rounds)]


def checked_back(out: Rows) -> Rows:
    """Rows that were rotated back from received bytes. Raises PayloadError where they overflow."""
    if not kernels.of(out).greatest(out) <= FLOAT_MAX:
        raise PayloadError("a received vector overflows float32 when it is rotated back.")
    return out


def _draws(slots: Tensor, rnd: Round, d: int) -> list[kernels.Draw]:
    """Of S_1 and, where there is a second transform, S_2."""
    return sign_draws("Rotated", slots, rnd, 1 if window(d) == d else 2)


def rotate(u: Rows, slots: Tensor, rnd: Round) -> Rows:
    """(m, d) float32: R u, as `Rotated` has R, with signs of each slot's own or of rng.SHARED one row for all."""
    return kernels.of(u).rotate(u, _draws(slots, rnd, u.shape[1]))


def rotate_back(y: Rows, slots: Tensor, rnd: Round) -> Rows:
    """(m, d) float32: R' y. Raises PayloadError if that overflows."""
    return checked_back(kernels.of(y).rotate_back(y, _draws(slots, rnd, y.shape[1])))


def largest_square(n: int, d: int) -> float:
    """(2 ln(2 n d) + 2)/h, at least E max_ij (R u_i)_j^2 / max_i ||u_i||^2 for n vectors under one R."""
    return (2.0 * math.log(2 * n * d) + 2.0) / window(d)


class Conditional(Compressor):
    """A compressor that states a constant only for some parameters: `omega` is `_omega` where `_states("omega")`.

    What it does not state it does not have, so that methods refuse it before they run.
    """

    def _states(self, constant: str) -> bool:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in ("omega", "alpha", "ab", "alone") and self._states(name):
            return getattr(self, f"_{name}")
        raise AttributeError(f"{type(self).__name__} object has no attribute {name!r}")


@dataclass(frozen=True)
class Grid(ScaledCodes):
    """Stochastic rounding onto a grid as wide as the row's largest entry, each client on its own.

    u_j becomes one of the two grid points around it, unbiased; the grid has `levels` points r (2 i / (levels-1) - 1),
    i = 0..levels-1, r = max_j |u_j|. An odd number of levels has zero among them.
    Wire: r as float32, then i in b = ceil(log2 levels) bits a coordinate. 32 + 8 ceil(d b / 8) bits.

    References: docs/derivations/rotation.md; after a rotation (`Rotated(Grid(levels))`) it is that of arXiv:1611.00429.
    """

    levels: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= 32767:
            raise ConfigError(f"Grid(levels={self.levels!r}): the number of grid points is an integer in 2..32767.")

    def omega(self, d: int) -> float:
        """With q = (d-1)/(levels-1)^2: omega = q for even levels, (sqrt(1+4q) - 1)/2 for odd; exact suprema."""
        q = (d - 1) / (self.levels - 1) ** 2
        return q if self.levels % 2 == 0 else (math.sqrt(1.0 + 4.0 * q) - 1.0) / 2.0

    @property
    def points(self) -> int:
        """The levels."""
        return self.levels

    def encode(self, u: Rows, rnd: Round) -> Messages:
        (u, r), ops = measured_rows(u, rnd), kernels.of(u)
        payload = ops.encode_levels(u, r, rnd.draw("Grid.levels"), rnd.draw("Grid.ties"), self.levels, head=True)
        return Messages.of(payload, rnd, u.shape[1])


@dataclass(frozen=True)
class Rotated(Conditional):
    """A random rotation, another compressor, and the rotation back: no coordinate stays large.

    C(u) = R' Q(R u), Q = `inner`. With h the greatest power of two that is at most d, H the Hadamard matrix and random
    signs S_1, S_2, R takes coordinates 0..h-1 through H S_1 / sqrt(h), then coordinates d-h..d-1 of what comes out
    through H S_2 / sqrt(h); the first is all where d = h. R is orthogonal, so that nothing is padded.

    shared=True: all clients have the same signs, and what `inner` says of the n clients together stays true. False:
    each has its own; for an inner compressor whose clients are independent.
    Wire: the message of `inner`; the signs are derived (bit j mod 32 of word floor(j / 32), j = 0..h-1).

    References: arXiv:1611.00429; constants in docs/derivations/rotation.md.
    """

    inner: Compressor
    shared: bool = True

    @property
    def fixed_length(self) -> bool:  # type: ignore[override]
        """As the inner one."""
        return self.inner.fixed_length

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Compressor):
            raise ConfigError(f"Rotated(inner={self.inner!r}): what is rotated is a compressor, e.g. Rotated(Grid(4)).")
        if not isinstance(self.shared, bool):
            raise ConfigError(f"Rotated(shared={self.shared!r}): True, one rotation for all clients, or False.")
        joint = not isinstance(self.inner, Unbiased) and not hasattr(self.inner, "alpha")
        if not self.shared and joint:
            raise ConfigError(
                f"Rotated({self.inner!r}, shared=False): clients that compress together need one rotation: drop "
                "`shared=False`."
            )

    @property
    def agrees(self) -> bool:  # type: ignore[override]
        """Whether `inner` does."""
        return self.inner.agrees

    def _states(self, constant: str) -> bool:
        return hasattr(self.inner, constant)

    def _omega(self, d: int) -> float:
        """That of `inner`; for Grid(k) at most (d/h) (2 ln 2d + 2)/(k-1)^2, the mean over the signs."""
        omega: float = self.inner.omega(d)  # type: ignore[attr-defined]
        if isinstance(self.inner, Grid):
            return min(omega, d * largest_square(1, d) / (self.inner.levels - 1) ** 2)
        return omega

    def _alone(self, n: int, d: int) -> float:
        """That of `inner`."""
        return self.inner.alone(n, d)  # type: ignore[attr-defined]

    def _alpha(self, d: int) -> float:
        """That of `inner`."""
        return self.inner.alpha(d)  # type: ignore[attr-defined]

    def _ab(self, n: int, d: int) -> AB:
        """That of `inner`; where it says c max ||u_i||^2 of a shared scale, also c (2 ln(2 n d) + 2)/h: the mean square
        of the largest of all rotated entries."""
        if isinstance(self.inner, Unbiased):
            return independent(self._omega(d), n, f"independent, omega = {self._omega(d):.6g}")
        ab: AB = self.inner.ab(n, d)  # type: ignore[attr-defined]
        gain = largest_square(n, d)
        shared = isinstance(self.inner, Correlated) and self.inner.scale == "shared" and self.inner.blocks == 1
        if not shared or gain >= 1.0:
            return ab
        source = f"shared scale after a rotation (docs/derivations/rotation.md) of: {ab.source}"
        return replace(ab, c=gain * ab.c, source=source, other=ab)

    def check(self, n: int, d: int) -> None:
        self.inner.check(n, d)

    def capacity(self, n: int, d: int) -> int:
        """That of `inner`."""
        return self.inner.capacity(n, d)

    def predicted_bits(self, n: int, d: int) -> float:
        """Those of `inner`."""
        return self.inner.predicted_bits(n, d)

    def peeled(self, u: Rows, rnd: Round) -> tuple[Compressor, Rows, Round]:
        """`inner`, and the rotated rows. Raises NonFiniteError."""
        # d times the norm bounds what any of the compressors makes of a rotated row, there and back.
        u = checked_norms(checked_rows(u, rnd), rnd, float(u.shape[1]))
        return self.inner, rotate(u, rng.SHARED if self.shared else rnd.slots, rnd), rnd.fork("Rotated")

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        """What `inner` brings, of the rotated rows."""
        inner, rows, own = self.peeled(u, rnd)
        return inner.prepare(rows, own)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        inner, rows, own = self.peeled(u, rnd)
        return inner.encode(rows, own)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        rows = self.inner.decode(msgs, rnd.fork("Rotated"))
        return rotate_back(rows, rng.SHARED if self.shared else msgs.slots, rnd)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        if not self.shared:
            return super().aggregate(msgs, rnd)
        # One rotation is linear: the mean is rotated back once, not every row.
        return rotate_back(self.inner.aggregate(msgs, rnd.fork("Rotated"))[None], rng.SHARED, rnd)[0]

    def slices(self, d: int, rnd: Round) -> Slices | None:
        """Those of `inner`, where the rotation is shared: their mean is rotated back."""
        inner = self.inner.slices(d, rnd.fork("Rotated")) if self.shared else None
        if inner is None:
            return None
        whole = inner.finish
        return replace(inner, finish=lambda mean: rotate_back(whole(mean)[None], rng.SHARED, rnd)[0])
