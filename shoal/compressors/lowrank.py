"""A matrix of low rank in place of a vector: one step of the power iteration from a random start.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", 2019,
arXiv:1905.13727. Theirs averages the factors over the clients and starts from the last step's; ours is a compressor of
one client's vector, without memory. Its alpha is ours: docs/derivations/lowrank.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors.rotation import checked_norms
from shoal.core import Compressor
from shoal.errors import ConfigError, PayloadError
from shoal.messages import FLOAT_MAX, Messages, Round, Rows, as_bytes, as_floats, checked_rows, joined


@dataclass(frozen=True)
class LowRank(Compressor):
    """The projection of the vector, read as a matrix, onto a few directions that a random start finds; biased.

    C(u) = P P' M: M is u as an a x b matrix, row by row, P has the `rank` orthonormal columns of M G, G a random
    b x rank matrix of the client's own, with independent entries, uniform on (-1, 1); for a < b the same for M'.

    shape=None: b = floor(sqrt(d)), a = ceil(d / b), and zeros fill the matrix. Else a b = d, such as a layer's shape.
    Not the all-reduced PowerSGD of the paper: nothing is shared, and the server adds the clients' matrices.
    Wire: P, then the other factor, M' P (for a < b: M P), both row by row as float32. 32 rank (a + b) bits.

    References: arXiv:1905.13727; alpha in docs/derivations/lowrank.md.
    """

    fixed_length = True

    rank: int = 1
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= 1024:
            raise ConfigError(f"LowRank(rank={self.rank!r}): the rank is an integer in 1..1024.")
        if self.shape is not None:
            sides = tuple(self.shape)
            if len(sides) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in sides):
                raise ConfigError(
                    f"LowRank(shape={self.shape!r}): a shape is (rows, columns), both at least 1, or None."
                )
            object.__setattr__(self, "shape", sides)  # a list is welcome, and a value must be hashable

    def sides(self, d: int) -> tuple[int, int]:
        """(a, b). Raises ConfigError where they do not suit d or the rank."""
        columns = math.isqrt(d)
        a, b = self.shape or (-(-d // columns), columns)
        if self.shape and a * b != d:
            raise ConfigError(f"LowRank(shape=({a}, {b})) on d={d} coordinates: the sides' product is d.")
        if self.rank > min(a, b):
            raise ConfigError(f"{self!r} on d={d} coordinates, {a} x {b}: the rank is at most the shorter side.")
        return a, b

    def check(self, n: int, d: int) -> None:
        self.sides(d)

    def alpha(self, d: int) -> float:
        """alpha = (1 - rank 2^-24) rank / min(a, b), in expectation over G, for every u; tight but for 2^-24."""
        return (1.0 - self.rank * 2.0**-24) * self.rank / min(self.sides(d))

    def capacity(self, n: int, d: int) -> int:
        """4 rank (a + b) bytes, always all used."""
        return 4 * self.rank * sum(self.sides(d))

    def _start(self, rnd: Round, columns: int) -> Tensor:
        """(m, columns, rank) float32: odd multiples of 2^-24, so that 0 is not among them."""
        draw = rnd.draw("LowRank.start")
        start: Tensor = kernels.of(draw.slots).symmetric(draw, columns * self.rank)
        return start.reshape(-1, columns, self.rank)

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u, d = checked_rows(u, rnd), u.shape[1]
        a, b = self.sides(d)
        # Twice the norm: what is rounded on the way stays finite.
        u = checked_norms(u, rnd, 2.0)
        u = (torch.nn.functional.pad(u, (0, a * b - d)) if a * b > d else u).reshape(-1, a, b)
        tall = u if a >= b else u.transpose(1, 2).contiguous()
        left, right = kernels.of(u).low_rank(tall, self._start(rnd, min(a, b)))
        return Messages.of(joined(as_bytes(left.flatten(1)), as_bytes(right.flatten(1))), rnd, d)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        a, b = self.sides(msgs.d)
        values = as_floats(msgs.checked(self.capacity(rnd.cohort, msgs.d)))
        cut = self.rank * max(a, b)
        left, right = (
            values[:, :cut].reshape(-1, max(a, b), self.rank),
            values[:, cut:].reshape(-1, min(a, b), self.rank),
        )
        rows = kernels.of(values).outer(*((left, right) if a >= b else (right, left)))
        rows = rows.flatten(1)
        rows = rows if a * b == msgs.d else rows[:, : msgs.d].contiguous()
        if not kernels.of(rows).greatest(rows) <= FLOAT_MAX:
            raise PayloadError(f"{self!r}: a product of the two factors is not finite.")
        return rows
