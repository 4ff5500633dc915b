"""PermK: the coordinates are dealt at random among the clients, and each sends its own.

Szlendak, Tyurin, Richtarik, "Permutation Compressors for Provably Faster Distributed Nonconvex Optimization", 2021,
arXiv:2110.03300, deals blocks of one random permutation. That its theorem needs no more than which client has one
coordinate, and the constants for n > d where d does not divide n, are ours: docs/derivations/compressors.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal import rng
from shoal.compressors.blocks import Dealt, Listed
from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector, as_bytes, checked_rows, finite_floats
from shoal.theory import AB


@dataclass(frozen=True)
class PermK(Compressor):
    """Every coordinate is sent by one random client, each client sends d/n of them: no error where clients agree.

    d >= n: coordinate j is sent by the client in slot (j + s_b) mod n, with one shared uniform shift s_b for each block
    b = floor(j / n) of n coordinates, and C_i(u) = n u on what client i sends. d < n: each client sends one coordinate,
    C_i(u) = d u_j e_j, and every coordinate is sent by floor(n/d) or ceil(n/d) clients.

    Wire: the values by ascending coordinate, float32; the shifts are derived from the round. 32 d/n bits (floor or
    ceiling), or 32.

    References: arXiv:2110.03300.
    """

    def ab(self, n: int, d: int) -> AB:
        """A = B = 1 for d >= n, with equality: identical inputs are aggregated without error.

        For d < n, n = q d + r: A = (d - t)/n, B = 1 - t, t = d q (d (q-1) + 2 r) / (n (n-1)), with equality;
        r = 0 gives A = B = (d-1)/(n-1).
        """
        if n == 1:
            return AB(0.0, 0.0, source="PermK with n = 1 is the identity")
        if d >= n:
            return AB(1.0, 1.0, source="PermK, d >= n: A = B = 1 (arXiv:2110.03300)")
        q, r = divmod(n, d)
        t = d * q * (d * (q - 1) + 2 * r) / (n * (n - 1))
        return AB((d - t) / n, 1.0 - t, source="PermK, d < n (docs/derivations/compressors.md)")

    def alone(self, n: int, d: int) -> float:
        """min(n, d) - 1, with equality: each coordinate is sent with probability 1/min(n, d), times that number."""
        return min(n, d) - 1.0

    def present(self, n: int, d: int, m: int) -> AB:
        """Of the mean over the m of n clients that arrived: A = (min(n, d) - t)/m, B = 1 - t, with equality.

        t as in `ab`, 0 for d >= n: what the absent own is lost, and n - m of them cost (n/m - 1) M more.
        """
        ab = self.ab(n, d)
        if not 1 <= m <= n:
            raise ConfigError(f"PermK(): m={m} clients of n={n} arrived; m is in 1..{n}.")
        return AB(ab.a * n / m, ab.b, source="PermK, absent clients (docs/derivations/strata.md)")

    def capacity(self, n: int, d: int) -> int:
        """4 ceil(d/n) bytes, or 4."""
        return 4 * max(1, -(-d // n))

    def predicted_bits(self, n: int, d: int) -> float:
        """32 max(d/n, 1): exactly what a round costs a client, on average over the clients."""
        return 32.0 * max(d / n, 1.0)

    def support(self, slots: Tensor, d: int, rnd: Round) -> tuple[Dealt | Listed, int]:
        """What the clients at these slots send, and the factor of it."""
        n = rnd.cohort
        if d >= n:
            return Dealt(rnd.shared("PermK.shifts"), slots, n, d), n
        order = rnd.permutation(d, "PermK.coordinates")
        owner = rng.places(rnd.shared("PermK.owners"), n, slots)
        return Listed(order[owner % d], torch.arange(len(slots) + 1, device=slots.device), d), d

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd, gain=lambda d: min(rnd.cohort, d))
        d = u.shape[1]
        kept, _ = self.support(rnd.slots, d, rnd)
        return Messages.of(as_bytes(kept.gather(u, self.capacity(rnd.cohort, d) // 4)), rnd, d, 4 * kept.lengths())

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        values, kept, scale = self._read(msgs, rnd)
        return kept.scatter(values, scale)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        values, kept, scale = self._read(msgs, rnd)
        return kept.mean(values, scale, rnd.cohort)

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Dealt | Listed, int]:
        kept, scale = self.support(msgs.slots, msgs.d, rnd)
        return finite_floats(msgs.checked(4 * kept.lengths()), scale), kept, scale
