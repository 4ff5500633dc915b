"""One vector a rank, averaged over the ranks of a group: what `shoal.ddp` and `shoal.optim` stand on.

    u (d,) -> [prepare] -> agree -> encode -> mean (d,)

Each rank is one client. A vector that is not finite on one rank is an error of all of them, in the same step and before
any state moves.

The bytes travel over a gloo group of its own, whatever group the caller computes with: its collectives are then in no
one else's order, may be called from a thread, and take messages from the host's memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.core import Channel, Compressor
from shoal.errors import ConfigError, NonFiniteError, ShoalError
from shoal.messages import Messages, Round, Vector
from shoal.runtimes.group import checked_timeout
from shoal.runtimes.peers import Peers, in_use
from shoal.runtimes.ranks import channel_of

GradBucket = dist.GradBucket  # what a hook of DDP must be annotated with


class Reduced(NamedTuple):
    """What a rank knows after the exchange."""

    mean: Vector
    sent: Messages  # its own message, one row
    rnd: Round  # with what was agreed: what `sent` is decoded with
    encoding: float  # seconds


@dataclass(frozen=True)
class Traffic:
    """What one rank has sent and spent so far. Bytes: payloads, the same in frames, and what it really moved.

    `up` and the like are the mean over the ranks; `down` is what agreements cost, since every rank makes the mean
    itself. `dense` is what `up` would be in float32. Seconds: `wire` waits for the slowest rank, too.
    """

    steps: int
    dense: int
    up: float
    down: float
    up_framed: float
    down_framed: float
    moved: int
    encode_seconds: float
    wire_seconds: float
    decode_seconds: float

    def per_step(self) -> dict[str, float]:
        """All of it divided by the number of steps (zero before the first)."""
        return {k: v / max(1, self.steps) for k, v in vars(self).items() if k != "steps"}


class Timed(Peers):
    """Peers that say how long was spent in collectives."""

    seconds = 0.0

    def all(self, mine: Tensor, *more: Any) -> list[Tensor]:
        """As `Peers.all`."""
        began = time.perf_counter()
        try:
            return super().all(mine, *more)
        finally:
            self.seconds += time.perf_counter() - began

    def swap(self, mine: Sequence[Tensor], sizes: Sequence[int], *more: Any) -> list[Tensor]:
        """As `Peers.swap`."""
        began = time.perf_counter()
        try:
            return super().swap(mine, sizes, *more)
        finally:
            self.seconds += time.perf_counter() - began

    def gather(self, mine: Tensor, most: Sequence[int], *more: Any) -> list[Tensor]:
        """As `Peers.gather`."""
        began = time.perf_counter()
        try:
            return super().gather(mine, most, *more)
        finally:
            self.seconds += time.perf_counter() - began


def feedback_of(code: Compressor, asked: bool | None, name: str) -> bool:
    """Whether what a message left out is remembered: asked=None, where a compressor is biased.

    Raises ConfigError where theory says that memories would grow, and for a compressor that states nothing.
    """
    unbiased, contractive = hasattr(code, "omega") or hasattr(code, "ab"), hasattr(code, "alpha")
    if not unbiased and not contractive:
        raise ConfigError(f"{name} states no omega, ab or alpha: nothing says that it converges.")
    if asked and not contractive:
        scaled = f"Scaled({name})" if hasattr(code, "omega") and not code.agrees else "TopK(0.01)"
        raise ConfigError(
            f"error_feedback=True with {name}: memories of a compressor without alpha may grow. Leave it out "
            f"(it is unbiased), or take a contractive one, such as {scaled}."
        )
    return not unbiased if asked is None else asked


def world_of(group: dist.ProcessGroup | None) -> int:
    """How many ranks a group has (None: the world). Raises ConfigError where there is none."""
    if not dist.is_initialized():
        raise ConfigError('there is no process group: call torch.distributed.init_process_group("gloo") first.')
    return dist.get_world_size(group)


def rehearse(code: Compressor, n: int, d: int) -> None:
    """Compress and average zeros: kernels are compiled here, where no other rank waits for this one."""
    rnd, u = Round.full(0, 0, n), torch.zeros(n, d)
    if code.agrees:
        rnd = replace(rnd, agreed=float(code.prepare(u, rnd).max()))
    sent = code.encode(u, rnd)
    code.decode(sent, rnd)
    code.aggregate(sent, rnd)


def dense_mean(buffer: Tensor, group: dist.ProcessGroup) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook."""
    work = dist.all_reduce(buffer.div_(dist.get_world_size(group)), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


@contextmanager
def _told(channel: Channel, rnd: Round) -> Iterator[None]:
    """What is not finite here is an error of all ranks."""
    try:
        yield
    except NonFiniteError as error:
        channel.fail(error, rnd)


def reduce(channel: Channel, code: Compressor, u: Vector, rnd: Round, fit: bool = True) -> Reduced:
    """The mean of C_i(u_i) over all ranks, u_i being what rank i brings. Collective.

    fit=False on any rank, a NaN, an infinity or a value that overflows when it is compressed: NonFiniteError on all
    ranks, with all such clients; no message was exchanged then.
    """
    row, began, waited = u[None], time.perf_counter(), 0.0
    with _told(channel, rnd):
        if not fit:
            client = int(rnd.clients[0])
            raise NonFiniteError(f"client {client}, round {rnd.index}: a NaN or an infinity.", [client])
        inner, rows, own = code.peeled(row, rnd)
        scalar = inner.prepare(rows, own) if code.agrees else None
    if scalar is not None:
        asked = time.perf_counter()
        rnd = replace(rnd, agreed=channel.agree(scalar, rnd))
        own = replace(own, agreed=rnd.agreed)
        waited = time.perf_counter() - asked
    with _told(channel, rnd):
        sent = inner.encode(rows, own)
    encoding = time.perf_counter() - began - waited
    return Reduced(channel.mean(sent, code, rnd), sent, rnd, encoding)


class Link:
    """This rank's end of an exchange with all ranks of `group` (default: the world). Collective, as is `meet`.

    `kind` names a channel. `over` is a group to exchange bytes with in place of a new one of gloo's; it must have the
    same ranks, and is not destroyed by `close`.
    """

    def __init__(
        self,
        kind: str,
        group: dist.ProcessGroup | None = None,
        over: dist.ProcessGroup | None = None,
        timeout: float = 60.0,
    ) -> None:
        make = channel_of(kind)
        timeout = checked_timeout(timeout)
        world_of(group)
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        if over is not None and dist.get_process_group_ranks(over) != ranks:
            raise ConfigError(
                f"process_group has ranks {dist.get_process_group_ranks(over)}, the model's has {ranks}: take the "
                "same ranks, or leave it out."
            )
        if over is not None and in_use(over):
            # They would share lines: the first to close would end the other, and threads would mix their exchanges.
            raise ConfigError(
                f"process_group carries another exchange of shoal's: make one for each, new_group({ranks}, "
                'backend="gloo"), close the other first, or leave it out.'
            )
        if over is None and len(ranks) < dist.get_world_size():
            # Groups of a part of the world get names that torch gives twice once one of them was destroyed.
            raise ConfigError(
                f"ranks {ranks} are not the whole world: make the group on all ranks, new_group({ranks}, "
                'backend="gloo"), and pass it as process_group.'
            )
        self._own = over is None
        self.group: dist.ProcessGroup | None = over or dist.new_group(ranks, timedelta(seconds=timeout), backend="gloo")
        self._make, self.peers, self.closed = make, Timed(self.group, timeout=timeout), False
        self.rank, self.world = self.peers.rank, self.peers.world
        self.channel: Channel | None = None
        self.steps, self.dense, self.encoding, self.spent = 0, 0, 0.0, 0.0

    def meet(self, facts: Mapping[str, object]) -> None:
        """Open the channel, if all ranks say the same of every fact. Raises ConfigMismatch on all ranks otherwise."""
        self.peers.handshake(dict(facts))
        meter = None if self.channel is None else self.channel.meter
        self.channel = self._make(self.world, self.peers.digest, self.peers)
        self.channel.meter = meter or self.channel.meter

    def round(self, index: int, seed: int) -> Round:
        """The round in which each rank is the client of its number."""
        return Round.full(index, seed, self.world, torch.tensor([self.rank]))

    def reduce(self, code: Compressor, u: Vector, rnd: Round, fit: bool = True) -> Reduced:
        """`reduce`, with the time that it took."""
        assert self.channel is not None
        self.peers.round = rnd.index
        began, wire = time.perf_counter(), self.peers.seconds
        done = reduce(self.channel, code, u, rnd, fit)
        self.encoding += done.encoding
        self.spent += time.perf_counter() - began - done.encoding - (self.peers.seconds - wire)
        self.dense += 4 * len(u)
        return done

    def mean(self, code: Compressor, u: Vector, rnd: Round) -> Vector:
        """The mean alone, of what all ranks know to be finite: no flags are exchanged."""
        assert self.channel is not None
        began, wire = time.perf_counter(), self.peers.seconds
        out = self.channel.mean(code.encode(u[None], rnd), code, rnd)
        self.spent += time.perf_counter() - began - (self.peers.seconds - wire)
        self.dense += 4 * len(u)
        return out

    def traffic(self) -> Traffic:
        """What this rank has sent and spent."""
        if self.channel is None:
            return Traffic(self.steps, 0, 0.0, 0.0, 0.0, 0.0, self.peers.moved, 0.0, self.peers.seconds, 0.0)
        m, n = self.channel.meter, self.world
        sizes = (m.up / n, m.down / n, m.up_framed / n, m.down_framed / n)
        return Traffic(
            self.steps, self.dense, *sizes, self.peers.moved, self.encoding, self.peers.seconds, self.spent
        )  # fmt: skip

    def close(self, wait: bool = True, error: BaseException | None = None) -> None:
        """Leave, once all ranks have come here (wait=False: at once, and tell them the error), and destroy the own
        group."""
        if self.closed:
            return
        alive = dist.is_initialized()
        with suppress(ShoalError, RuntimeError, ValueError):  # a lost rank, or all groups were destroyed before
            if wait and alive:
                self.peers.barrier()
        self.peers.close(error)
        with suppress(RuntimeError, ValueError):
            if self._own and alive:
                dist.destroy_process_group(self.group)
        self.closed, self.group, self.peers.group = True, None, None  # a group must not outlive its runtime
