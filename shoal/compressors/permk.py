"""PermK: each client sends its own block of one shared random permutation of the coordinates.

Szlendak, Tyurin, Richtarik, "Permutation Compressors for Provably Faster Distributed Nonconvex Optimization", 2021,
arXiv:2110.03300. The constants for n > d where d does not divide n are ours: docs/derivations/compressors.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors.sparse import uniform_pointer
from shoal.core import Compressor, Messages, Round, Rows, Vector, as_bytes, checked_rows, finite_floats
from shoal.theory import AB


@dataclass(frozen=True)
class PermK(Compressor):
    """Each client sends its own block of one shared random permutation: no error where clients agree.

    d >= n: the coordinates are cut into n shuffled blocks, lengths differing by at most one, and C_i(u) = n u on
    client i's block. d < n: each client sends one coordinate, C_i(u) = d u_j e_j, and every coordinate is sent by
    floor(n/d) or ceil(n/d) clients.

    Wire: the block's values in the permutation's order, float32; the permutation is derived from the round.
    32 d/n bits (floor or ceiling), or 32.

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

    def capacity(self, n: int, d: int) -> int:
        """4 ceil(d/n) bytes, or 4."""
        return 4 * max(1, -(-d // n))

    def predicted_bits(self, n: int, d: int) -> float:
        """32 max(d/n, 1): exactly what a round costs a client, on average over the clients."""
        return 32.0 * max(d / n, 1.0)

    def support(self, slots: Tensor, d: int, rnd: Round) -> tuple[Tensor, Tensor, int]:
        """(index, pointer, scale): the client at slots[i] sends index[pointer[i]:pointer[i+1]], times `scale`."""
        n = rnd.cohort
        order = rnd.permutation(d, "PermK.coordinates").cpu().numpy()
        # The block goes to a shuffled owner: with n not dividing d the blocks differ in length, and a fixed owner
        # would make C_0 biased. See docs/derivations/compressors.md.
        owner = rnd.permutation(n, "PermK.owners")[slots].cpu().numpy()
        if d < n:
            return torch.as_tensor(order[owner % d], device=slots.device), uniform_pointer(slots, 1), d
        short, longer = divmod(d, n)
        start, length = owner * short + np.minimum(owner, longer), short + (owner < longer)
        pointer = np.concatenate([[0], np.cumsum(length)])
        spread = np.arange(pointer[-1]) + np.repeat(start - pointer[:-1], length)
        return torch.as_tensor(order[spread], device=slots.device), torch.as_tensor(pointer, device=slots.device), n

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd, gain=lambda d: min(rnd.cohort, d))
        d = u.shape[1]
        index, pointer, _ = self.support(rnd.slots, d, rnd)
        values = kernels.of(u).gather(u, index, pointer, self.capacity(rnd.cohort, d) // 4)
        return Messages.of(as_bytes(values), rnd, d, 4 * pointer.diff())

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        values, index, pointer, scale = self._read(msgs, rnd)
        return kernels.of(values).scatter(values, index, pointer, msgs.d, scale)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        values, index, pointer, scale = self._read(msgs, rnd)
        return kernels.of(values).mean_sparse(values, index, pointer, msgs.d, scale, rnd.cohort).float()

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor, Tensor, int]:
        index, pointer, scale = self.support(msgs.slots, msgs.d, rnd)
        return finite_floats(msgs.checked(4 * pointer.diff()), scale), index, pointer, scale
