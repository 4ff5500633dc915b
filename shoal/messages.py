"""The round, the rows and the messages: what goes into a compressor and what comes out of it.

A round says whose rows and holds every random number; a message is bytes, which are what travels and what is counted.
The checks stand here too: `checked_rows` or parts of it in every `encode`, `Messages.checked` in every `decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from shoal import kernels, rng
from shoal.errors import ConfigError, LengthError, NonFiniteError, PayloadError

Vector = Tensor  # (d,) float32
Rows = Annotated[Tensor, "one row a hosted client"]  # (m, d) float32; in a state, the annotation is read by the driver
FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Round:
    """Which round, whose rows, and every random number of it.

    `clients` (m,) are the ids of the clients hosted here that take part; `slots` (m,) their places 0..cohort-1 among
    this round's messages (with full participation slots = clients, cohort = n). `agreed` is the scalar all clients
    settled on this round, where the compressor asked for one. `members` (cohort,) are the ids of all who take part, in
    slot order, wherever they are hosted; None where everyone does.
    """

    index: int
    seed: int
    n: int
    clients: Tensor
    slots: Tensor
    cohort: int
    agreed: float | None = None
    prefix: str = ""
    members: Tensor | None = None

    @staticmethod
    def full(index: int, seed: int, n: int, clients: Tensor | None = None) -> Round:
        """A round in which all n clients take part, seen by the process that hosts `clients` (default: all)."""
        ids = torch.arange(n) if clients is None else clients
        return Round(index, seed, n, ids, ids, n)

    def among(self, members: Tensor) -> Round:
        """The same round with these clients alone, (cohort,) ascending int64 ids: a client's place is its slot.

        A client that stands there twice has two slots, and sends twice. Raises ConfigError for anything else.
        """
        known = members.dtype == torch.int64 and members.ndim == 1 and len(members) > 0
        if not known or int(members[0]) < 0 or int(members[-1]) >= self.n or bool((members.diff() < 0).any()):
            raise ConfigError(f"cohort {members.tolist()!r}: ids of the clients 0..{self.n - 1}, int64, ascending.")
        slots = torch.isin(members, self.clients).nonzero()[:, 0]
        return replace(self, clients=members[slots], slots=slots, cohort=len(members), members=members)

    def draw(self, stream: str, slots: Tensor | None = None) -> kernels.Draw:
        """The named stream of the given slots (default: the hosted rows', private)."""
        return kernels.Draw(
            self.slots if slots is None else slots, self.index, rng.stream_id(self.prefix + stream), self.seed
        )

    def shared(self, stream: str) -> kernels.Draw:
        """The named stream that all clients and the server derive alike."""
        return self.draw(stream, rng.SHARED if self.slots.is_cpu else rng.SHARED.to(self.slots.device))

    def uniform(self, d: int, stream: str) -> Tensor:
        """(m, d) float32 on [0, 1), private to each row."""
        return rng.uniform(self.draw(stream), d)

    def coin(self, p: float, stream: str) -> bool:
        """Heads with probability p, the same for all."""
        return rng.shared_uniform(self.index, rng.stream_id(self.prefix + stream), self.seed) < p

    def permutation(self, d: int, stream: str) -> Tensor:
        """(d,) int64: a shared uniform permutation."""
        return rng.permutation(self.shared(stream), d)

    def server(self) -> Round:
        """The server's own randomness: one row whose slot no client has."""
        slot = rng.SERVER.to(self.slots.device)
        return self._but(clients=slot, slots=slot)

    def everyone(self) -> Round:
        """The same round with the rows of all who take part, wherever they are hosted: what the server sends to."""
        ids = torch.arange(self.n) if self.members is None else self.members
        return replace(self, clients=ids, slots=torch.arange(self.cohort))

    def fork(self, name: str) -> Round:
        """A second, independent use of the same streams in one round."""
        return self._but(prefix=f"{self.prefix}{name}/")

    def to(self, device: torch.device | str) -> Round:
        """The same round for rows on this device: what it draws lies there, and is the same everywhere."""
        return replace(self, clients=self.clients.to(device), slots=self.slots.to(device))

    def rows(self, part: slice | Tensor) -> Round:
        """The same round for some of the hosted rows."""
        if isinstance(part, slice) and part == slice(None):
            return self
        slots = self.slots[part]
        return self._but(clients=slots if self.clients is self.slots else self.clients[part], slots=slots)

    def _but(self, **fields: Any) -> Round:
        """The same round with other values of these fields. `replace` takes several times as long, and a rotation forks
        for each of its steps."""
        other = object.__new__(Round)
        other.__dict__.update(self.__dict__, **fields)
        return other


@dataclass(frozen=True)
class Messages:
    """Row i is payload[i, :nbytes[i]], of slot slots[i]. These bytes are what travels and what is counted."""

    payload: Tensor  # (m, capacity) uint8, zero beyond nbytes
    nbytes: Tensor  # (m,) int64
    slots: Tensor  # (m,) int64
    d: int

    @staticmethod
    def of(payload: Tensor, rnd: Round, d: int, nbytes: Tensor | None = None) -> Messages:
        """Rows of bytes, all of them in use unless `nbytes` says otherwise."""
        if nbytes is None:
            nbytes = _alike(*payload.shape, payload.device)
        return Messages(payload, nbytes, rnd.slots, d)

    @property
    def shared(self) -> bool:
        """Whether this is the server's one row, which all clients hear."""
        return self.slots.numel() == 1 and self.slots.item() == rng.SERVER.item()

    def rows(self, part: slice | Tensor) -> Messages:
        """What these rows' clients hear of a downlink: their own rows, or the one row for all."""
        return self if self.shared else Messages(self.payload[part], self.nbytes[part], self.slots[part], self.d)

    def checked(self, lengths: int | Tensor) -> Tensor:
        """The payload, if every row is exactly as long as the code says. Raises LengthError otherwise.

        The first line of every `decode`: no byte is read before its length is right.
        """
        wide, nbytes, m = self.payload.shape[1], self.nbytes, self.nbytes.numel()
        if isinstance(lengths, int):
            right, most = nbytes.item() == lengths if m == 1 else bool((nbytes == lengths).all()), lengths
        else:
            right = torch.equal(nbytes, lengths)
            most = int(largest(lengths)) if m and right else 0
        if right and most <= wide:
            return self.payload if most == wide or m == 0 else self.payload[:, :most]
        expected = torch.as_tensor(lengths).expand(nbytes.shape).tolist()
        raise LengthError(f"rows of {nbytes.tolist()[:4]} bytes in {wide}; the code says {expected[:4]}.")


@lru_cache(maxsize=64)
def _alike(m: int, length: int, device: torch.device) -> Tensor:
    """(m,) int64: the lengths of rows that are all as long. Not to be written to."""
    return torch.full((m,), length, device=device)


def as_bytes(x: Tensor) -> Tensor:
    """The little-endian bytes of a contiguous (m, c) float32 tensor: (m, 4 c) uint8."""
    x = x.contiguous()
    # A single number counts as contiguous whatever its stride, which a view as bytes does not accept.
    return (x if x.stride(-1) == 1 else x.as_strided(x.shape, (x.shape[1], 1))).view(torch.uint8)


def as_floats(b: Tensor) -> Tensor:
    """(m, c) float32 of (m, 4 c) bytes."""
    if not b.numel():
        return torch.zeros(b.shape[0], b.shape[1] // 4, device=b.device)
    b = b.contiguous()
    if b.shape[0] == 1 and b.stride(0) % 4:  # how far it is to the row that is not there matters to `view` alone
        b = b.as_strided(b.shape, (b.shape[1], 1))
    aligned = b.storage_offset() % 4 == 0 and b.stride(0) % 4 == 0 and b.stride(1) == 1
    return (b if aligned else b.clone(memory_format=torch.contiguous_format)).view(torch.float32)


def joined(*parts: Tensor) -> Tensor:
    """(m, c) uint8: the parts of every row, one behind the other.

    On the CPU by numpy: for some ten thousand bytes torch takes its threads, which keep a core busy for milliseconds.
    """
    if not parts[0].is_cpu:
        return torch.cat(parts, 1)
    whole = np.concatenate([part.cpu().numpy() for part in parts], 1)
    return torch.as_tensor(whole, device=parts[0].device)


def finite_floats(b: Tensor, gain: float = 1.0) -> Tensor:
    """(m, c) float32 of received bytes. Raises PayloadError unless they stay finite when multiplied by `gain`."""
    values = as_floats(b)
    if not kernels.of(values).greatest(values) * gain <= FLOAT_MAX:
        raise PayloadError("a value is not finite, or not once it is scaled.")
    return values


def shaped_rows(u: Rows, rnd: Round) -> Rows:
    """u itself (contiguous, detached), if these are rows of the round. Raises ConfigError for a wrong shape, dtype or
    device."""
    shape = u.shape
    if len(shape) != 2 or u.dtype != torch.float32 or shape[0] != rnd.slots.shape[0] or shape[1] == 0:
        raise ConfigError(
            f"compressing {tuple(shape)} {u.dtype} for {len(rnd.slots)} clients: rows are (m, d) float32 with d >= 1."
        )
    if u.device != rnd.slots.device:
        raise ConfigError(f"rows on {u.device} in a round on {rnd.slots.device}: take rnd.to(u.device).")
    return (u.detach() if u.requires_grad else u).contiguous()


def measured_rows(u: Rows, rnd: Round, gain: Callable[[int], float] = lambda d: 1.0) -> tuple[Rows, Tensor]:
    """u as `checked_rows` has it, and (m,) max_j |u_ij|, for whom that is more than a check."""
    u = shaped_rows(u, rnd)
    factor, top = gain(u.shape[1]), kernels.of(u).maxes(u)
    if not within(top, factor):
        raise _overflowing(top, rnd, factor)
    return u, top


def _overflowing(top: Tensor, rnd: Round, factor: float) -> NonFiniteError:
    """The error about rows whose largest entries, (m,), are not all finite once they are scaled."""
    bad = ~(top.double() * factor <= FLOAT_MAX)
    value = float(top[bad][0])
    what = f"overflows float32 when scaled by {factor:g}" if value < float("inf") else "is not finite"
    return not_finite(bad, rnd, f"an entry of magnitude {value:g} {what}")


def not_finite(bad: Tensor, rnd: Round, what: str) -> NonFiniteError:
    """The error about the rows that are `bad` (m,) bool: says `what` of the first, and knows all their clients."""
    clients = rnd.clients[bad].tolist()
    if clients[0] == int(rng.SERVER):
        return NonFiniteError(f"the server, round {rnd.index}: {what}.")
    return NonFiniteError(f"client {clients[0]}, round {rnd.index}: {what}.", clients)


def within(r: Tensor, gain: float = 1.0) -> bool:
    """Whether gain times each of these numbers is finite, in float32; a NaN is not. (One look at the largest.)"""
    return largest(r) * gain <= FLOAT_MAX


def largest(r: Tensor) -> float:
    """The largest of these numbers, NaN if one is, 0 if there are none. Of a single one there is nothing to reduce."""
    size = r.numel()
    return (r if size == 1 else r.max()).item() if size else 0.0


def topped_rows(u: Rows, rnd: Round, gain: Callable[[int], float] = lambda d: 1.0) -> tuple[Rows, float]:
    """u as `checked_rows` has it, and max_ij |u_ij| over all rows."""
    u = shaped_rows(u, rnd)
    factor, ops = gain(u.shape[1]), kernels.of(u)
    top: float = ops.greatest(u)
    if not top * factor <= FLOAT_MAX:
        raise _overflowing(ops.maxes(u), rnd, factor)
    return u, top


def checked_rows(u: Rows, rnd: Round, gain: Callable[[int], float] = lambda d: 1.0) -> Rows:
    """u itself (contiguous, detached), if it can be compressed: the first line of most `encode`s.

    Raises ConfigError for a wrong shape, dtype or device, NonFiniteError for a NaN, an infinity, or a finite value that
    overflows float32 once multiplied by `gain(d)`. Names the client.
    """
    return topped_rows(u, rnd, gain)[0]
