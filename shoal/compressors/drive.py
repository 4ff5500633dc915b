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
from shoal.compressors.rotation import Conditional, checked_norms, padded, rotate, rotate_back
from shoal.core import Messages, Round, Rows, as_bytes, checked_rows
from shoal.errors import ConfigError
from shoal.theory import AB, independent

SMALLEST = 64  # padded dimension from which on the numerical omega was measured and not exceeded
EXCESS = {b: 1.1 if b <= 2 else 1.5 for b in POINTS}  # what was measured there, over what uniform rotations would give
# The mean squared error of the 2^b points for a standard normal variable.
DISTORTION = {
    1: 0.36338022763241862, 2: 0.11748184782932913, 3: 0.03454776078850341, 4: 0.009501008008191758,
    5: 0.002504668355674644, 6: 0.0006442396653170146, 7: 0.0001634782299800852, 8: 4.1185082866990186e-05,
}  # fmt: skip


SIGNS = torch.tensor([-1.0, 1.0])


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
    _bits = 1
    _least = False

    def _table(self) -> Tensor:
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

    def _states(self, constant: str) -> bool:
        return constant == "alpha" if self._least else self.numerical and constant != "alpha"

    def _omega(self, d: int) -> float:
        """EXCESS (1/(1 - D_b) - 1), D_b the distortion of N(0, 1) at b bits: measured, not proved."""
        if padded(d) < SMALLEST:
            raise ConfigError(f"{self!r} on d={d}: its numerical constants were measured for d > {SMALLEST // 2}.")
        return EXCESS[self._bits] * (1.0 / (1.0 - DISTORTION[self._bits]) - 1.0)

    def _ab(self, n: int, d: int) -> AB:
        """A = omega / n, B = 0 if there were no bias; measured, not proved."""
        ab = independent(self._omega(d), n, "")
        return AB(ab.a, 0.0, evidence="numerical", source="measured, biased (docs/derivations/rotation.md)")

    def capacity(self, n: int, d: int) -> int:
        """4 + ceil(D bits / 8) bytes, always all used; D = 2^ceil(log2 d)."""
        return 4 + (padded(d) * self._bits + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, ops, table = checked_rows(u, rnd), kernels.of(u), self._table().to(u.device)
        D = padded(u.shape[1])
        checked_norms(u, rnd, math.sqrt(D) * float(table[-1] / table[len(table) // 2]))
        y, square = rotate(u, type(self).__name__, rnd.slots, rnd, self.rounds), ops.dots(u, u)
        if self._bits == 1:
            code = (y >= 0).long()
        else:
            size = torch.where(square > 0, square, 1.0).sqrt()
            code = torch.bucketize(y.double() * (math.sqrt(D) / size)[:, None], (table[1:].double() + table[:-1]) / 2)
        q = table[code]
        along = ops.dots(y, q)
        fit = along / ops.dots(q, q) if self._least else square / torch.where(along > 0, along, 1.0)
        scale = torch.where(along > 0, fit, 0.0).float()
        return Messages.of(torch.cat([as_bytes(scale[:, None]), ops.pack(code, self._bits)], 1), rnd, u.shape[1])

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        payload = msgs.checked(self.capacity(rnd.n, msgs.d))
        code = kernels.of(payload).unpack(payload[:, 4:].contiguous(), padded(msgs.d), self._bits)
        rows = self._table().to(code.device)[code] * read_scale(payload)[:, None]
        return rotate_back(rows, msgs.d, type(self).__name__, msgs.slots, rnd, self.rounds)


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

    def _table(self) -> Tensor:
        return SIGNS

    def _alpha(self, d: int) -> float:
        """1/2 in expectation over the signs, for any u and any number of rounds; tight at two equal entries."""
        return 1.0 if d == 1 else 0.5


@dataclass(frozen=True)
class Eden(Turned):
    """EDEN: b bits a coordinate after a rotation of the client's own: the normal law's best points, and one scale.

    C(u) = S R' q, q_j the Lloyd-Max point nearest to (R u)_j sqrt(D) / ||u||, S = ||u||^2 / <R u, q>; R of `rounds`
    rounds of random signs and Hadamard transforms on D = 2^ceil(log2 d).

    Unbiased for a uniform rotation, nearly so for two or three rounds in high dimension; no constant is proved.
    numerical=True states the omega that was measured for d > 32.
    Wire: S as float32, then the point's number, ascending, in `bits` bits a coordinate. 32 + 8 ceil(D bits / 8) bits.

    References: arXiv:2108.08842; the measured biases in docs/derivations/rotation.md.
    """

    bits: int = 2
    rounds: int = 2
    numerical: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in POINTS:
            raise ConfigError(f"Eden(bits={self.bits!r}): the number of bits a coordinate is an integer in 1..8.")
        self._checked()

    @property
    def _bits(self) -> int:  # type: ignore[override]
        return self.bits

    def _table(self) -> Tensor:
        return points(self.bits)
