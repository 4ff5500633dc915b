"""Whether to compress the gradients of DistributedDataParallel, and with what: predicted from what is measured here.

    exchange = codec + sum over its steps of (latency + bytes / bandwidth)
    step     = forward, backward and update, and what of the exchanges does not fit beside the backward pass

The codec's seconds and the bytes are those of rank 0 in a rehearsal of the very exchange (`shoal.runtimes.rehearsal`),
bucket by bucket; float32 is gloo's ring, as DistributedDataParallel uses it. docs/advise.md says what is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.core import DENSE, Compressor
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact
from shoal.experiments.line import Line, shared
from shoal.experiments.measurement import stated
from shoal.experiments.workload import Bucket, Tell, Workload
from shoal.messages import Round
from shoal.runtimes.peers import Peers
from shoal.runtimes.ranks import Make
from shoal.runtimes.reduce import feedback_of, reduce
from shoal.runtimes.rehearsal import Rehearsed, Step, median, rehearsed

WORTH = 1.05  # times shorter: less than that is no reason to compress
NEAR = 1.2  # times as long as the shortest step: among those the least error is named
SLOWEST, FASTEST = 1e-2, 1e6  # Mbit/s between which a break-even is looked for
DEFAULTS = (
    "Correlated()", "Correlated(levels=9)", "Rotated(Correlated())", "QSGD(7)", "Drive(numerical=True)",
    "Eden(2, numerical=True)", "TopK(0.01)",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ one way
@dataclass(frozen=True)
class Part:
    """The exchange of one bucket: the codec's seconds, the channel's steps, and the bytes that a rank sends."""

    codec: float
    steps: tuple[Step, ...]
    moved: int


@dataclass(frozen=True)
class Way:
    """A way of averaging gradients. `parts` is None for float32's all-reduce.

    `bits`: what a rank sends a coordinate; `error`: ||mean of messages - mean||^2 over the mean squared norm, measured
    in one round; `bound`: what the compressor states of its expectation, None where it states nothing.
    """

    name: str
    parts: tuple[Part, ...] | None
    bits: float
    error: float = 0.0
    bound: float | None = 0.0
    proved: bool = True

    def exchanges(self, work: Workload, world: int, line: Line, stretch: float) -> list[tuple[float, float]]:
        """(codec, on the line) seconds of every bucket."""
        if self.parts is None:
            return [(0.0, line.all_reduce(world, 4.0 * (b.coded + b.plain))) for b in work.buckets]
        return [(stretch * p.codec, sum(line.seconds(s, world) for s in p.steps)) for p in self.parts]

    def step(self, work: Workload, world: int, line: Line, stretch: float = 1.0) -> float:
        """Seconds of a whole step. Buckets queue for one thread, as they are filled; codecs, and what the line asks of
        the cores, take their time from gradients that are still being computed. `stretch`: what is computed takes so
        much longer."""
        late, end = 0.0, 0.0
        for k, (codec, wire) in enumerate(self.exchanges(work, world, line, stretch)):
            end = max(end, stretch * work.buckets[k].ready + late) + codec + wire
            if k < len(work.buckets) - 1:
                late += codec + (line.computing(self.parts[k].steps) if self.parts is not None else 0.0)
        return max(end, stretch * work.compute + late) + stretch * work.update


def float32(work: Workload, world: int) -> Way:
    """What DistributedDataParallel does without a hook."""
    return Way("float32 all-reduce", None, 64.0 * (world - 1) / world)


def compressed(
    code: Compressor, work: Workload, world: int, make: Make, repeat: int, peers: Peers | None = None
) -> Way:
    """What `shoal.ddp.attach` does with this compressor, rehearsed `repeat` times after one that is not counted.

    Under `peers` every rank rehearses at the same time, and `line.shared` counts. Raises ConfigError where the
    compressor does not fit a bucket.
    """
    name = compact(code)
    feedback = feedback_of(code, None, name)
    parts, errors, bounds, sizes, proved = [], 0.0, list[float | None](), 0.0, True
    for bucket, rows in zip(work.buckets, work.parts(), strict=True):
        play = _played(code, feedback, world, make, bucket, rows)
        done = rehearsed(world, play)
        if peers is not None:
            peers.barrier()  # behind the first: what one rank still compiles or loads would cost the others' cores
        # Results are not kept: the next rehearsal takes their memory, as the next step of a training does.
        codec = shared(peers, median([rehearsed(world, play).spent for _ in range(repeat)]))
        parts.append(Part(codec, done.steps, done.moved))
        if bucket.coded:
            error, size, bound, sure = _errors(code, world, [u for u, _ in rows], done)
            errors, sizes, proved = errors + error, sizes + size, proved and sure
            bounds.append(bound)
        sizes += sum(float(v.double().square().sum()) for _, v in rows) / len(rows)
    known = None if None in bounds else sum(b for b in bounds if b is not None) / (sizes or 1.0)
    bits = 8 * sum(part.moved for part in parts) / work.d
    return Way(name, tuple(parts), bits, errors / (sizes or 1.0), known, proved)


def _played(
    code: Compressor, feedback: bool, world: int, make: Make, bucket: Bucket, rows: Sequence[tuple[Tensor, Tensor]]
) -> Callable[[Peers], Tensor]:
    """One bucket as `shoal.ddp` exchanges it; the mean of what was compressed comes back."""
    into = torch.empty(bucket.coded + bucket.plain)  # DistributedDataParallel's

    def play(peers: Peers) -> Tensor:
        channel, me = make(world, bytes(8), peers), torch.tensor([peers.rank])
        rnd, (u, plain) = Round.full(0, 0, world, me), rows[peers.rank % len(rows)]
        if not bucket.coded:
            return into.copy_(reduce(channel, DENSE, plain, rnd).mean)
        if feedback:
            u = u + torch.zeros_like(u)
        done = reduce(channel, code, u, rnd, fit=bool(torch.isfinite(plain).all()))
        if feedback:
            code.decode(done.sent, done.rnd)[0].sub_(u)
        if bucket.plain:
            into[bucket.coded :] = channel.mean(DENSE.encode(plain[None], rnd), DENSE, rnd)
        into[: bucket.coded] = done.mean
        return into[: bucket.coded]

    return play


def _errors(
    code: Compressor, world: int, rows: Sequence[Tensor], done: Rehearsed
) -> tuple[float, float, float | None, bool]:
    """(squared error, mean squared norm, stated bound of the former, whether that is proved) of one bucket."""
    turns = [rank % len(rows) for rank in range(world)]
    kept = torch.stack([u.double() for u in rows])
    mean = torch.bincount(torch.tensor(turns), minlength=len(rows)).double() @ kept / world
    norms = [float(kept[i].square().sum()) for i in turns]
    size, found = sum(norms) / world, float((done.result.double() - mean).square().sum())
    ab = stated(code, world, kept.shape[1])
    if ab is None:
        alpha = code.alpha(kept.shape[1]) if hasattr(code, "alpha") else None
        return found, size, None if alpha is None else (1.0 - float(alpha)) * size, code.evidence == "proved"
    center, top = float(mean.square().sum()), max(norms)
    values = [
        (max(0.0, one.a * size - one.b * center + one.c * top), one.evidence == "proved")
        for one in ab.all()
        if one.evidence != "homogeneous"
    ]
    least = min(values, default=None)
    return found, size, None if least is None else least[0], least is not None and least[1]


# ------------------------------------------------------------------------------------------------ all ways
@dataclass(frozen=True)
class Advice:
    """All ways, the shortest step first, on one line with one workload."""

    work: Workload
    world: int
    line: Line
    stretch: float
    ways: tuple[Way, ...]

    def step(self, way: Way, line: Line | None = None) -> float:
        """Seconds of a step."""
        return way.step(self.work, self.world, line or self.line, self.stretch)

    def exchange(self, way: Way) -> float:
        """Seconds of all exchanges of a step, one after the other."""
        return sum(map(sum, way.exchanges(self.work, self.world, self.line, self.stretch)))

    @property
    def plain(self) -> Way:
        """float32."""
        return next(way for way in self.ways if way.parts is None)

    @property
    def best(self) -> Way:
        """The shortest step."""
        return self.ways[0]

    def gain(self, way: Way) -> float:
        """How many times shorter a step is than with float32."""
        return self.step(self.plain) / self.step(way)

    @property
    def worth(self) -> bool:
        """Whether a step gets shorter by more than a twentieth."""
        return self.gain(self.best) > WORTH

    def even(self, way: Way) -> float | None:
        """Mbit/s up to which this way's steps are shorter than float32's; None where they nowhere are, infinity where
        they are up to 1 Tbit/s."""

        def longer(bandwidth: float) -> bool:
            line = self.line.at(bandwidth)
            return self.step(way, line) >= self.step(self.plain, line)

        low, high = SLOWEST, FASTEST
        if way.parts is None or longer(low):
            return None
        if not longer(high):
            return float("inf")
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if longer(middle) else (middle, high)
        return low

    def verdict(self) -> list[str]:
        """What to do, in sentences."""
        best, plain = self.best, self.plain
        others = [way for way in self.ways if way.parts is not None]
        said = []
        if self.worth:
            said.append(f"compress: {best.name} makes a step {self.gain(best):.2g} x shorter.")
            near = [way for way in others if self.step(way) <= NEAR * self.step(best)]
            least = min(near, key=lambda way: way.error)
            if least.error < best.error:
                less = best.error / least.error if least.error else float("inf")
                said.append(f"{least.name}, {self.gain(least):.2g} x shorter, has {less:.2g} x less error.")
        else:
            said.append(
                f"do not compress: at this bandwidth the float32 exchange takes {_ms(self.exchange(plain))}, and a "
                f"step with it {_ms(self.step(plain))}; {self._rival(others)}."
            )
        shown = best if self.worth else min(others, key=self.step, default=plain)
        even = self.even(shown)
        if even == float("inf"):
            said.append(f"{shown.name} is ahead at every bandwidth up to {FASTEST / 1e6:g} Tbit/s.")
        elif even is not None:
            said.append(f"break-even of {shown.name} and float32: {even:.3g} Mbit/s.")
        return said

    def _rival(self, others: Sequence[Way]) -> str:
        if not others:
            return "no compressor was asked for"
        rival = min(others, key=self.step)
        return f"with {rival.name} it would be {_ms(self.step(rival))}"

    def facts(self) -> dict[str, Any]:
        """Everything that is printed, for JSON."""
        rows = [
            {
                "way": way.name, "step_seconds": self.step(way), "exchange_seconds": self.exchange(way),
                "codec_seconds": None if way.parts is None else self.stretch * sum(p.codec for p in way.parts),
                "gain": self.gain(way), "bits": way.bits, "error": way.error, "bound": way.bound,
                "proved": way.proved, "break_even_mbit": self.even(way),
                "moved": None if way.parts is None else [p.moved for p in way.parts],
            }
            for way in self.ways
        ]  # fmt: skip
        work = self.work
        return {
            "ranks": self.world, "bandwidth_mbit": self.line.bandwidth, "latency_ms": 1e3 * self.line.latency,
            "across_bytes_per_second": self.line.across, "busy_seconds_per_exchange_and_byte": self.line.busy,
            "model": work.name, "d": work.d, "compute_seconds": self.stretch * work.compute,
            "update_seconds": self.stretch * work.update, "stretch": self.stretch,
            "buckets": [{"coded": b.coded, "plain": b.plain, "ready_seconds": self.stretch * b.ready}
                        for b in work.buckets],
            "rows": rows, "compress": self.worth, "verdict": self.verdict(),
        }  # fmt: skip


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def advice(
    codes: Sequence[Compressor],
    work: Workload,
    world: int,
    line: Line,
    make: Make,
    *,
    stretch: float = 1.0,
    repeat: int = 5,
    peers: Peers | None = None,
    tell: Tell = lambda label, share: None,
) -> Advice:
    """Every way's step, predicted. Raises ConfigError, before anything is rehearsed, for what does not fit."""
    if world < 2 or repeat < 1:
        raise ConfigError(f"--ranks {world} --repeat {repeat}: at least two ranks and one repetition.")
    for code in codes:
        feedback_of(code, None, compact(code))
        for d in {bucket.coded for bucket in work.buckets} - {0}:
            code.check(world, d)
    ways = [float32(work, world)]
    for k, code in enumerate(codes):
        tell(compact(code), k / len(codes))
        ways.append(compressed(code, work, world, make, repeat, peers))
    return Advice(work, world, line, stretch, tuple(sorted(ways, key=lambda w: w.step(work, world, line, stretch))))
