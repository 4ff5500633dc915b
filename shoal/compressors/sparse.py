"""RandK and TopK: k of d coordinates, as they are.

RandK: see Gorbunov et al., "MARINA: Faster Non-Convex Distributed Learning with Compression", 2021, arXiv:2102.07845.
TopK: see Richtarik, Sokolov, Fatkhullin, "EF21", 2021, arXiv:2106.05203.
Constants are derived in docs/derivations/compressors.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from shoal import kernels, rng
from shoal.compressors.blocks import Listed
from shoal.core import Compressor, Unbiased
from shoal.errors import ConfigError, PayloadError
from shoal.messages import FLOAT_MAX, Messages, Round, Rows, Vector, as_bytes, checked_rows, finite_floats


def checked_k(k: int | float, name: str) -> None:
    """Raise ConfigError unless k is a count >= 1 or a fraction in (0, 1)."""
    whole = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    if not whole and not (isinstance(k, float) and 0.0 < k < 1.0):
        raise ConfigError(f"{name}(k={k!r}): k is a number of coordinates (an integer >= 1) or a fraction in (0, 1).")


def kept(k: int | float, d: int, name: str) -> int:
    """The number of coordinates that k stands for at this d. Raises ConfigError if k > d."""
    if k > d:
        raise ConfigError(
            f"{name}(k={k}) on d={d} coordinates: k must be in 1..{d}, or a fraction such as {name}(0.1)."
        )
    return k if isinstance(k, int) else max(1, round(k * d))


def uniform_pointer(rows: Tensor, k: int) -> Tensor:
    """(m + 1,) int64, on the device of the m rows: each has k entries. Not to be written to."""
    return _pointer(rows.shape[0], k, rows.device)


@lru_cache(maxsize=64)
def _pointer(m: int, k: int, device: torch.device) -> Tensor:
    return torch.arange(0, (m + 1) * k, k, device=device)


@dataclass(frozen=True)
class RandK(Unbiased):
    """k random coordinates of each client, scaled up to be unbiased.

    C_i(u) = (d/k) u_S: S a uniform k-subset of the coordinates, independent for each client.

    k is a count or a fraction of d. Wire: the k values in ascending order of their coordinates, float32; the subset is
    derived from the round and the slot, so it costs nothing. 32 k bits.

    References: arXiv:2102.07845.
    """

    fixed_length = True

    k: int | float

    def __post_init__(self) -> None:
        checked_k(self.k, "RandK")

    def check(self, n: int, d: int) -> None:
        kept(self.k, d, "RandK")

    def omega(self, d: int) -> float:
        """omega = d/k - 1, with equality for every u."""
        return d / kept(self.k, d, "RandK") - 1.0

    def capacity(self, n: int, d: int) -> int:
        """4 k bytes, always all used."""
        return 4 * kept(self.k, d, "RandK")

    def support(self, slots: Tensor, d: int, rnd: Round) -> tuple[Listed, float]:
        """What the clients at these slots send, and the factor of it."""
        index = rng.support(rnd.draw("RandK.support", slots), d, kept(self.k, d, "RandK"))
        k = index.shape[1]
        return Listed(index.reshape(-1), uniform_pointer(index, k), d), d / k

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd, gain=lambda d: d / kept(self.k, d, "RandK"))
        d = u.shape[1]
        sent, _ = self.support(rnd.slots, d, rnd)
        return Messages.of(as_bytes(sent.gather(u, kept(self.k, d, "RandK"))), rnd, d)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        values, sent, scale = self._read(msgs, rnd)
        return sent.scatter(values, scale)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        values, sent, scale = self._read(msgs, rnd)
        return sent.mean(values, scale, rnd.cohort)

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Listed, float]:
        payload = msgs.checked(self.capacity(rnd.cohort, msgs.d))
        sent, scale = self.support(msgs.slots, msgs.d, rnd)
        return finite_floats(payload, scale), sent, scale


@dataclass(frozen=True)
class TopK(Compressor):
    """The k coordinates of largest magnitude; biased.

    C(u) is u there and zero elsewhere; ties go to the lowest index.

    k is a count or a fraction of d. Wire: the k values in ascending order of their coordinates, float32, then their
    indices in ceil(log2 d) bits each. 32 k + 8 ceil(k ceil(log2 d) / 8) bits.

    References: arXiv:2106.05203.
    """

    fixed_length = True

    k: int | float

    def __post_init__(self) -> None:
        checked_k(self.k, "TopK")

    def check(self, n: int, d: int) -> None:
        kept(self.k, d, "TopK")

    def alpha(self, d: int) -> float:
        """alpha = k/d: what is kept is at least the average; tight at u = (1, ..., 1)."""
        return kept(self.k, d, "TopK") / d

    def capacity(self, n: int, d: int) -> int:
        """4 k + ceil(k ceil(log2 d) / 8) bytes, always all used."""
        k = kept(self.k, d, "TopK")
        return 4 * k + (k * (d - 1).bit_length() + 7) // 8

    def encode(self, u: Rows, rnd: Round) -> Messages:
        u = checked_rows(u, rnd)
        d = u.shape[1]
        return Messages.of(kernels.of(u).encode_topk(u, kept(self.k, d, "TopK")), rnd, d)

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        values, index, pointer = self._read(msgs, rnd)
        return kernels.of(values).scatter(values, index, pointer, msgs.d, 1.0)

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        values, index, pointer = self._read(msgs, rnd)
        return kernels.of(values).mean_sparse(values, index, pointer, msgs.d, 1.0, rnd.cohort).float()

    def _read(self, msgs: Messages, rnd: Round) -> tuple[Tensor, Tensor, Tensor]:
        d, k = msgs.d, kept(self.k, msgs.d, "TopK")
        payload = msgs.checked(self.capacity(rnd.cohort, d))
        ops = kernels.of(payload)
        values, index, good = ops.decode_topk(payload, k, d)
        if not good:
            raise PayloadError(f"TopK(k={k}): indices must ascend within 0..{d - 1}.")
        if not ops.greatest(values) <= FLOAT_MAX:
            raise PayloadError("a value is not finite.")
        return values, index, uniform_pointer(payload, k)
