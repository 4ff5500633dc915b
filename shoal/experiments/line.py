"""A rank's line, and the cores that ranks of one machine share: measured between ranks, or told."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shoal.errors import ConfigError
from shoal.runtimes.peers import Peers
from shoal.runtimes.rehearsal import Spent, Step, median

# Of an Ethernet frame with the usual 1500 bytes, what TCP's and IP's headers and TCP's timestamps leave.
PAYLOAD = 1448 / 1514
SEGMENT = 1 << 20  # bytes: the longest piece of gloo's all-reduce
SPELL, LEAST = 0.1, 1 << 19  # seconds of an all-to-all that is timed, and bytes at least: what is predicted is like it
BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine


@dataclass(frozen=True)
class Line:
    """A rank's line: bytes of payload a second in each direction, and seconds one way.

    across: bytes a second of an all-to-all, where that was measured: ranks that send to each other all at once do not
    fill their lines. busy: seconds, an exchange and a byte, for which what travels keeps the cores that a rank computes
    with: nothing where it was not measured.
    """

    rate: float
    latency: float
    across: float | None = None
    busy: tuple[float, float] = (0.0, 0.0)

    @staticmethod
    def told(bandwidth: float, latency: float) -> Line:
        """Of `bandwidth` Mbit/s and `latency` ms. Raises ConfigError unless the first is positive, the second not
        negative."""
        if not 0 < bandwidth < float("inf") or not 0 <= latency < float("inf"):
            raise ConfigError(
                f"--bandwidth {bandwidth:g} --latency {latency:g}: Mbit/s above 0, and milliseconds, 0 or more."
            )
        return Line(bandwidth * 1e6 / 8 * PAYLOAD, latency / 1e3)

    def at(self, bandwidth: float) -> Line:
        """The same line with another bandwidth, in Mbit/s: all-to-alls fill as much of it, cores are kept as long."""
        rate = Line.told(bandwidth, 0.0).rate
        return replace(self, rate=rate, across=self.across and rate * self.across / self.rate)

    @property
    def bandwidth(self) -> float:
        """Mbit/s, with the headers of frames."""
        return self.rate * 8 / 1e6 / PAYLOAD

    def ring(self, pieces: int, nbytes: float) -> float:
        """Seconds until a rank has sent, and got, an even number of pieces, nbytes together, of which two are under
        way at a time: a piece goes out when the one before it is out and the second before it has come in."""
        piece = nbytes / pieces / self.rate
        return (pieces / 2 - 1) * max(2 * piece, piece + self.latency) + 2 * piece + self.latency

    def all_reduce(self, world: int, nbytes: float) -> float:
        """Of gloo: a ring that adds up, then one that hands round, in pieces of at most 1 MiB, two or more a rank."""
        segments = max(2, int(-(-nbytes // (world * SEGMENT))))
        return 2 * self.ring((world - 1) * segments, nbytes * (world - 1) / world) if world > 1 else 0.0

    def seconds(self, step: Step, world: int) -> float:
        """Of one exchange of a channel."""
        if step.kind == "ring":
            return self.ring(2 * (world - 1), step.nbytes)
        rate = self.across or self.rate if step.kind == "straight" else self.rate
        return self.latency + step.nbytes / rate

    def computing(self, steps: Sequence[Step]) -> float:
        """Of these exchanges, what the cores have to do."""
        each, byte = self.busy
        return each * len(steps) + byte * sum(step.nbytes for step in steps)


def measured_line(peers: Peers, repeat: int = 5) -> Line:
    """The line between these ranks: medians, of the slowest rank. Collective.

    From all-gathers: a few bytes travel in the signals, which is one latency. Many go behind them, and take one more
    for every rank that they pass; their number grows until it takes half a second, or 16 MiB a rank. And from an
    all-to-all that takes `SPELL` seconds at this rate, or has `LEAST` bytes a rank: on a slow line several that send to
    one overflow its queue, and wait for what was lost.
    """
    others = peers.world - 1
    if others < 1:
        raise ConfigError("one rank has no line: start at least two, or give --ranks, --bandwidth and --latency.")

    def gathering(size: int) -> Callable[[], object]:
        mine = torch.zeros(size, dtype=torch.uint8)
        return lambda: peers.all(mine, "bytes to time the link")

    size, (latency, each) = 1 << 16, _timed(peers, gathering(64), repeat)
    slow = _timed(peers, gathering(size), 1).wall
    while slow < 0.5 and size < 1 << 24:
        size *= 4
        slow = _timed(peers, gathering(size), 1).wall
    slow = _timed(peers, gathering(size), repeat).wall
    rate = others * size / max(slow - (others + 1) * latency, 1e-6)
    piece = max(LEAST, min(1 << 24, int(rate * SPELL))) // others  # all ranks know the same rate
    pieces, sizes = [torch.zeros(piece, dtype=torch.uint8)] * peers.world, [piece] * peers.world
    slow, cpu = _timed(peers, lambda: peers.swap(pieces, sizes, "bytes to time the link"), repeat)
    across = min(rate, others * piece / max(slow - 2 * latency, 1e-6))
    return Line(rate, latency, across, (each, max(0.0, cpu - 2 * each) / (others * piece)))


def _timed(peers: Peers, exchange: Callable[[], object], repeat: int) -> Spent:
    """Medians: of the slowest rank by the clock, and of the busiest cores."""
    taken = list[Spent]()
    for _ in range(repeat + (repeat > 1)):
        peers.barrier()
        began = Spent.now()
        exchange()
        taken.append(Spent.now().since(began))
    return _of_all(peers, median(taken[repeat > 1 :]))


# ------------------------------------------------------------------------------------------------ shared cores
def cores() -> tuple[int, int]:
    """(A number that ranks say alike if they share cores, how many cores those are)."""
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    machine = BOOT.read_text() if BOOT.is_file() else platform.node()
    return zlib.crc32(f"{machine} {own}".encode()), len(own)


def shared(peers: Peers | None, spent: Spent) -> float:
    """Seconds until all ranks have computed what they do at the same time: of the slowest by the clock, or what ranks
    that share cores keep these busy, if that is more. Collective; by the clock where there are no peers.

    While a rank waits for a message another may have its core, so that each alone can look faster than all are.
    """
    if peers is None:
        return spent.wall
    return max(_of_all(peers, spent))


def _of_all(peers: Peers, spent: Spent) -> Spent:
    """Of the slowest rank by the clock; and how long what all ranks compute keeps the cores that they share."""
    where, count = cores()
    mine = torch.tensor([spent.wall, spent.cpu, where, count], dtype=torch.float64)
    said = [row.tolist() for row in peers.all(mine, "seconds")]
    busy = [sum(cpu for _, cpu, there, _ in said if there == where) / count for _, _, where, count in said]
    return Spent(max(wall for wall, *_ in said), max(busy))
