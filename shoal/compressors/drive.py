"""DRIVE and EDEN: an own rotation for each client, then a few bits a coordinate and one scale.

DRIVE: Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "DRIVE: One-bit Distributed Mean
Estimation", 2021, arXiv:2105.08339. EDEN: Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean
Estimation for Federated Learning", 2022, arXiv:2108.08842. Their proofs are for uniform rotations; with Hadamard
rotations the estimates are biased. What is proved and what was measured: docs/derivations/rotation.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors.dither import read_scale
from shoal.compressors.lloyd import POINTS
from shoal.compressors.rotation import Conditional, checked_back, checked_norms, sign_draws
from shoal.errors import ConfigError
from shoal.kernels.reference.turned import Part
from shoal.messages import FLOAT_MAX, Messages, Round, Rows, checked_rows, largest, shaped_rows
from shoal.theory import AB, independent

SMALLEST = 64  # padded dimension from which on the numerical omega was measured and not exceeded
EXCESS = {b: 1.2 if b <= 2 else 1.5 for b in POINTS}  # more than any search found, over what uniform rotations give
# The mean squared error of the 2^b points for a standard normal variable.
DISTORTION = {
    1: 0.36338022763241862, 2: 0.11748184782932913, 3: 0.03454776078850341, 4: 0.009501008008191758,
    5: 0.002504668355674644, 6: 0.0006442396653170146, 7: 0.0001634782299800852, 8: 4.1185082866990186e-05,
}  # fmt: skip


SIGNS = torch.tensor([-1.0, 1.0])


def padded(d: int) -> int:
    """The least power of two that is at least d: to so many coordinates these rotations pad with zeros."""
    return 1 << (d - 1).bit_length()


@cache
def points(bits: int) -> Tensor:
    """(2^bits,) float32, ascending: the Lloyd-Max points of N(0, 1)."""
    half = torch.tensor(POINTS[bits], dtype=torch.float32)
    return torch.cat([-half.flip(0), half])


class Turned(Conditional):
    """What Drive and Eden share: y = R_i u with client i's own rotation, q_j the point nearest to y_j sqrt(D) / ||u||,
    and R_i' S q sent back, S = ||u||^2 / <y, q> or, for the least error, <y, q> / ||q||^2."""

    fixed_length = True

    rounds: int
    numerical: bool
    _least = False

    def _parts(self, D: int) -> list[tuple[int, int]]:
        """(coordinates, bits each) in the order of the rotated coordinates; what is left over is not sent."""
        return [(D, 1)]

    def _table(self, bits: int) -> Tensor:
        raise NotImplementedError

    def _checked(self) -> None:
        name = type(self).__name__
        if self.rounds not in (1, 2, 3) or isinstance(self.rounds, bool):
            raise ConfigError(f"{name}(rounds={self.rounds!r}): a rotation is made of 1, 2 or 3 rounds of signs.")
        if self.numerical and (self.rounds == 1 or self._least):
            raise ConfigError(
                f"{self!r}: the numerical constants were measured for two rounds or more and the scale that is nearly "
                "unbiased; nothing like them holds otherwise."
            )

    @property
    def evidence(self) -> Literal["proved", "numerical"]:
        """The constants that `numerical` lets in were measured; alpha is proved."""
        return "numerical" if self.numerical else "proved"

    def _states(self, constant: str) -> bool:
        return constant == "alpha" if self._least else self.numerical and constant != "alpha"

    def _omega(self, d: int) -> float:
        """EXCESS (1/(1 - D_b) - 1), D_b the mean distortion of N(0, 1) at these bits: measured, not proved."""
        if padded(d) < SMALLEST:
            raise ConfigError(f"{self!r} on d={d}: its numerical constants were measured for d > {SMALLEST // 2}.")
        parts, D = self._parts(padded(d)), padded(d)
        kept = sum(count * (1.0 - DISTORTION[bits]) for count, bits in parts) / D
        return EXCESS[parts[0][1]] * (1.0 / kept - 1.0)

    def _ab(self, n: int, d: int) -> AB:
        """A = omega / n, B = 0 if there were no bias; measured, not proved."""
        ab = independent(self._omega(d), n, "")
        return AB(ab.a, 0.0, evidence="numerical", source="measured, biased (docs/derivations/rotation.md)")

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(D bits / 8) bytes, always all used, D = 2^ceil(log2 d); two streams where some have a bit more."""
        return 4 + bytes_of(self, padded(d))

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = shaped_rows(u, rnd)
        D = padded(u.shape[1])
        payload, square = kernels.of(u).encode_turned(u, self._draws(rnd.slots, rnd), D, parts_of(self, D), self._least)
        self._checked_squares(u, square, rnd)
        return Messages.of(payload, rnd, u.shape[1])

    def _draws(self, slots: Tensor, rnd: Round) -> list[kernels.Draw]:
        return sign_draws(type(self).__name__, slots, rnd, self.rounds)

    def _checked_squares(self, u: Rows, square: Tensor, rnd: Round) -> None:
        """Raise as `checked_rows` and `checked_norms` do, unless all that is made of u stays finite."""
        gain = gain_of(self, padded(u.shape[1]))
        # One pass instead of three: only what comes near the end of float32 is looked at again.
        if not math.sqrt(largest(square)) * (gain * (1.0 + 1e-6)) <= FLOAT_MAX:
            checked_norms(checked_rows(u, rnd), rnd, gain)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        payload, D = msgs.checked(self.capacity(rnd.cohort, msgs.d)), padded(msgs.d)
        ops, scale, draws = kernels.of(payload), read_scale(payload), self._draws(msgs.slots, rnd)
        return checked_back(ops.decode_turned(payload, scale, draws, D, parts_of(self, D), msgs.d))


@cache
def parts_of(turned: Turned, D: int) -> tuple[Part, ...]:
    """The parts of a message, with their points."""
    return tuple(Part(count, turned._table(bits)) for count, bits in turned._parts(D))


@cache
def bytes_of(turned: Turned, D: int) -> int:
    """What the parts take."""
    return sum((count * bits + 7) // 8 for count, bits in turned._parts(D))


@cache
def gain_of(turned: Turned, D: int) -> float:
    """How much larger than ||u|| the scale and what is sent back can be."""
    parts = turned._parts(D)
    table, root = turned._table(parts[0][1]), math.sqrt(sum(count for count, _ in parts))
    least = float(table[len(table) // 2])
    return D / root * max(float(table[-1]) / least, 1.0 / (least * root))


@dataclass(frozen=True)
class Drive(Turned):
    """DRIVE: one bit a coordinate, the sign after a rotation of the client's own, and one scale.

    C(u) = S R' sign(R u), R of `rounds` rounds of random signs and Hadamard transforms on D = 2^ceil(log2 d).

    scale="unbiased": S = ||u||^2 / ||R u||_1, which would be unbiased for a uniform rotation and is nearly so for two
    or three rounds in high dimension; no constant is proved. scale="least": S = ||R u||_1 / D, the least error; biased,
    alpha = 1/2 (proved). numerical=True states the omega that was measured for d > 32.
    Wire: S as float32, then D bits, set where the sign is +. 32 + 8 ceil(D/8) bits.

    References: arXiv:2105.08339; alpha and the measured biases in docs/derivations/rotation.md.
    """

    scale: Literal["unbiased", "least"] = "unbiased"
    rounds: int = 2
    numerical: bool = False

    def __post_init__(self) -> None:
        if self.scale not in ("unbiased", "least"):
            raise ConfigError(f"Drive(scale={self.scale!r}): the scale is 'unbiased' or 'least'.")
        self._checked()

    @property
    def _least(self) -> bool:  # type: ignore[override]
        return self.scale == "least"

    def _table(self, bits: int) -> Tensor:
        return SIGNS

    def _alpha(self, d: int) -> float:
        """1/2 in expectation over the signs, for any u and any number of rounds; tight at two equal entries."""
        return 1.0 if d == 1 else 0.5


@dataclass(frozen=True)
class Eden(Turned):
    """EDEN: b bits a coordinate after a rotation of the client's own: the normal law's best points, and one scale.

    C(u) = S R' q, q_j the Lloyd-Max point nearest to (R u)_j sqrt(D) / ||u||, S = ||u||^2 / <R u, q>; R of `rounds`
    rounds of random signs and Hadamard transforms on D = 2^ceil(log2 d).

    bits may be any number in [1/64, 8]. Between b and b + 1, the first floor(bits D) - b D of the rotated coordinates
    have b + 1 bits, the others b. Below 1, the first K = max(1, floor(bits D)) have one bit, y' is that part of R u,
    and S = (D/K) ||y'||^2 / <y', q>; the others are zero.
    Unbiased for a uniform rotation, nearly so for two or three rounds in high dimension; no constant is proved.
    numerical=True states the omega that was measured for d > 32 (bits >= 1).
    Wire: S as float32, then the point's number, ascending, in as many bits a coordinate: those with b + 1 bits, then,
    from a byte of their own on, those with b. 32 + 8 ceil(D bits / 8) bits for whole `bits`.

    References: arXiv:2108.08842; the measured biases in docs/derivations/rotation.md.
    """

    bits: float = 2
    rounds: int = 2
    numerical: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.bits, int | float) and not isinstance(self.bits, bool)
        if not number or not 1 / 64 <= self.bits <= 8:
            raise ConfigError(f"Eden(bits={self.bits!r}): the number of bits a coordinate is a number in [1/64, 8].")
        if self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))  # 2.0 is 2, also where it is printed
        self._checked()
        if self.numerical and self.bits < 1:
            raise ConfigError(f"{self!r}: the numerical constants were measured for one bit a coordinate or more.")

    def _parts(self, D: int) -> list[tuple[int, int]]:
        whole = int(self.bits)
        more = max(1 if whole == 0 else 0, math.floor(self.bits * D) - whole * D)
        parts = [(more, whole + 1), (D - more, whole)]
        return [(count, bits) for count, bits in parts if count and bits]

    def _table(self, bits: int) -> Tensor:
        return points(bits)
