"""Compressed gradients for any module that is wrapped in DistributedDataParallel, by one line.

    handle = shoal.ddp.attach(ddp)

Each bucket of gradients that DDP fills becomes one message a rank, and every rank ends at the bitwise same mean. An
unbiased compressor works without memory. A biased one gets error feedback: what a message left out of a parameter's
gradient is added to its next gradient (Seide, Fu, Droppo, Li, Yu, "1-bit stochastic gradient descent", Interspeech
2014; Stich, Karimireddy, arXiv:1909.05350). Memories belong to parameters, because DDP forms new buckets after its
first step.

A hook may not wait: it hands the bucket to one thread, which does one exchange after the other in the order that DDP
gives on all ranks. What goes wrong there is raised when `backward` ends, as the error that it was.

This module has no `from __future__ import annotations`: DDP compares a hook's annotations with types.
"""

import atexit
import math
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from shoal.core import DENSE, Compressor
from shoal.errors import ConfigError, NonFiniteError, PeerLost, ResumeMismatch, WireError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import versions
from shoal.messages import Vector
from shoal.rng import checked_seed
from shoal.runtimes.reduce import GradBucket, Link, Traffic, dense_mean, feedback_of, rehearse, world_of

__all__ = ["Handle", "attach"]


class Scaler(Protocol):
    """What is asked of a `torch.amp.GradScaler`."""

    def is_enabled(self) -> bool: ...

    def get_scale(self) -> float: ...


class Part(NamedTuple):
    """A parameter's place in its bucket."""

    name: str
    lo: int
    hi: int


class Plan(NamedTuple):
    """What becomes of a bucket: some parameters are compressed together, the others sent as they are."""

    stream: str  # the random numbers' name: that of the first parameter
    coded: list[Part]
    plain: list[Part]


@dataclass
class Job:
    """A bucket on its way."""

    buffer: Tensor
    host: Vector  # the same numbers in this machine's memory; the buffer itself if that is there
    future: Any
    plan: Plan
    step: int
    scale: float | None  # of AMP, where the caller has a scaler
    last: bool


class Handle:
    """What `attach` returns: statistics, a state for checkpoints, and the end of it.

    Raises the errors of `attach`. A context manager: leaving it closes it.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        compressor: Compressor,
        error_feedback: bool,
        link: Link,
        start: int,
        min_numel: int,
        seed: int,
        scaler: Scaler | None,
    ) -> None:
        self.compressor, self.error_feedback = compressor, error_feedback
        self.start, self.min_numel, self.seed = start, min_numel, seed
        self.step = 0
        self._link, self._scaler, self._ddp_group = link, scaler, ddp.process_group
        self._names = {id(p): name for name, p in ddp.module.named_parameters()}
        self._sizes = {k: p.numel() for k, p in ddp.module.named_parameters()}
        self._frozen = {k for k, p in ddp.module.named_parameters() if not p.requires_grad}
        self._memory: dict[str, Vector] = {}
        self._staged: dict[str, Vector] = {}  # memories of a step that is not complete
        self._plans: dict[tuple[tuple[str, ...], bool], Plan] = {}
        self._skipped: NonFiniteError | None = None  # of the step under way
        self._broken: BaseException | None = None  # for good
        self._open = True
        self._gate = ddp.register_forward_pre_hook(self._fence)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="shoal.ddp", daemon=True)
        self._thread.start()
        atexit.register(self.close, wait=False)

    # -------------------------------------------------------------------------------------------- in backward
    def submit(self, bucket: GradBucket) -> Any:
        """A future of the bucket's mean; called by DDP."""
        buffer = bucket.buffer()
        if not self._open:
            return dense_mean(buffer, self._ddp_group)
        if torch._C._current_graph_task_id() == -1:
            raise ConfigError(
                "a rank has run out of inputs under DDP.join, which calls hooks outside of backward: give all ranks as "
                "many batches, or join(throw_on_early_termination=True)."
            )
        future: Any = Future(devices=[buffer.device] if buffer.is_cuda else None)
        plan = self._plan([self._names[id(p)] for p in bucket.parameters()], dense=self.step < self.start)
        scaler = self._scaler if self._scaler is not None and self._scaler.is_enabled() else None
        host = buffer if buffer.device.type == "cpu" else buffer.cpu()
        scale = None if scaler is None else scaler.get_scale()
        self._jobs.put(Job(buffer, host, future, plan, self.step, scale, bucket.is_last()))
        if bucket.is_last():
            self.step += 1
            engine = torch.autograd.Variable._execution_engine
            # DDP waits for its futures in a callback that it queues after this one; what a callback queues comes last.
            engine.queue_callback(lambda: engine.queue_callback(self._settle))
        return future

    def _plan(self, names: list[str], dense: bool) -> Plan:
        known = self._plans.get((tuple(names), dense))
        if known is not None:
            return known
        plan, lo = Plan(f"ddp.{names[0]}", [], []), 0
        for name in names:
            size = self._sizes[name]
            small = dense or size < self.min_numel
            (plan.plain if small else plan.coded).append(Part(name, lo, lo + size))
            lo += size
        self._plans[tuple(names), dense] = plan
        return plan

    def _fence(self, ddp: DistributedDataParallel, _: Any) -> None:
        """In front of the buffers that DDP broadcasts by itself: it would wait for a lost rank for as long as its own
        group does, and name nobody."""
        if not self._open or not ddp.will_sync_module_buffers():
            return
        if self._broken is None:
            try:
                self._link.peers.barrier()
            except (PeerLost, WireError) as error:
                self._broken = error
        if self._broken is not None:
            raise self._broken

    def _settle(self) -> None:
        """The end of `backward`: raise what went wrong in the thread."""
        if self._broken is not None:
            raise self._broken
        if self._skipped is not None:
            error, self._skipped = self._skipped, None
            if self._scaler is None or not self._scaler.is_enabled():
                raise error

    # -------------------------------------------------------------------------------------------- in the thread
    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._serve(job)
            except BaseException as error:  # kept for `_settle`: an error in here must not leave backward waiting
                if self._broken is None:
                    self._broken = error
                    self._link.peers.close(error)  # the others are told, and wait no longer
            if self._broken is not None:
                with suppress(Exception):
                    job.buffer.fill_(math.nan)
            job.future.set_result(job.buffer)

    def _serve(self, job: Job) -> None:
        if self._broken is not None:
            return
        try:
            if self._skipped is None:
                self._average(job)
        except NonFiniteError as error:  # the same on all ranks
            self._skipped = error
        if self._skipped is not None:
            self._staged.clear()
            # A GradScaler then skips the step on all ranks alike; without one nobody takes this for a gradient.
            job.buffer.fill_(math.nan if job.scale is None else math.inf)
        if job.last:
            self._memory |= self._staged
            self._staged = {}
            self._link.steps += 1
        if job.buffer.is_cuda:
            torch.cuda.current_stream(job.buffer.device).synchronize()

    def _average(self, job: Job) -> None:
        """Write the mean into the bucket, and stage what the message left out. Raises NonFiniteError on all ranks."""
        rnd, plan = self._link.round(job.step, self.seed).fork(job.plan.stream), job.plan
        plain = self._gathered(job, plan.plain)
        if not plan.coded:
            self._put(job, plan.plain, self._link.reduce(DENSE, plain, rnd).mean)
        else:
            u = self._gathered(job, plan.coded)
            if self.error_feedback:
                u = u + torch.cat([self._remembered(part.name) for part in plan.coded])
            done = self._link.reduce(self.compressor, u, rnd, fit=bool(torch.isfinite(plain).all()))
            if self.error_feedback:
                left = u - self.compressor.decode(done.sent, done.rnd)[0]
                self._staged |= {p.name: e for p, e in self._split(plan.coded, left)}
            if len(plain):  # the flags have been looked at: no exchange of their own
                self._put(job, plan.plain, self._link.mean(DENSE, plain, rnd))
            self._put(job, plan.coded, done.mean)
        if job.host is not job.buffer:
            job.buffer.copy_(job.host)
        if job.scale is not None and not bool(torch.isfinite(job.host).all()):
            raise NonFiniteError(f"step {job.step}: the mean overflows float32 when scaled by {job.scale:g}.")

    def _gathered(self, job: Job, parts: list[Part]) -> Vector:
        """These parameters' gradients, without AMP's scale; in place where they stand side by side."""
        if all(a.hi == b.lo for a, b in pairwise(parts)):
            whole = job.host[parts[0].lo : parts[-1].hi] if parts else job.host[:0]
        else:
            whole = torch.cat([job.host[p.lo : p.hi] for p in parts])
        return whole if job.scale is None else whole / job.scale

    def _put(self, job: Job, parts: list[Part], mean: Vector) -> None:
        mean = mean if job.scale is None else mean * job.scale
        for part, values in self._split(parts, mean):
            job.host[part.lo : part.hi] = values

    @staticmethod
    def _split(parts: list[Part], whole: Vector) -> list[tuple[Part, Vector]]:
        return list(zip(parts, whole.split([p.hi - p.lo for p in parts]), strict=True))

    def _remembered(self, name: str) -> Vector:
        held = self._memory.get(name)
        return torch.zeros(self._sizes[name]) if held is None else held

    # -------------------------------------------------------------------------------------------- between steps
    def stats(self) -> Traffic:
        """What this rank has sent and spent since `attach`; `stats().per_step()` by step."""
        return self._link.traffic()

    def state_dict(self) -> dict[str, Any]:
        """Tensors, ints and strings: what `load_state_dict` of the same rank needs to go on to the same bits.

        A memory's key has the rank in it, since torch.distributed.checkpoint keeps one copy of equal keys.
        """
        state: dict[str, Any] = self._facts() | {"step": self.step}
        if self.error_feedback:
            state |= {self._key(name): self._remembered(name) for name in self._kept()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of the same rank in an equal group. Raises ResumeMismatch for any other; call it on all
        ranks between two steps, and for the bits of a run that was not cut after one `backward` on any data: only then
        does DDP form its final buckets, and a bucket is one message."""
        for name, value in self._facts().items():
            if state.get(name) != value:
                raise ResumeMismatch(f"the state's {name} is {state.get(name)!r}, here it is {value!r}: attach alike.")
        step, own = state.get("step"), {}
        if not isinstance(step, int) or step < 0:
            raise ResumeMismatch(f"the state's step is {step!r}: a number of steps, as state_dict() has it.")
        for name in self._kept() if self.error_feedback else ():
            held, size = state.get(self._key(name)), self._sizes[name]
            if not isinstance(held, Tensor) or held.shape != (size,):
                raise ResumeMismatch(
                    f"the state has no {self._key(name)} of {size} numbers: it is another rank's, or another "
                    "model's. Each rank loads what it saved."
                )
            own[name] = held.detach().to("cpu", torch.float32).clone()
        self._memory, self.step = own, step

    def _kept(self) -> list[str]:
        """The parameters that a memory may belong to."""
        return [k for k, size in self._sizes.items() if size >= self.min_numel and k not in self._frozen]

    def _facts(self) -> dict[str, Any]:
        return {
            "world": self._link.world, "seed": self.seed, "compressor": compact(self.compressor), "start": self.start,
            "min_numel": self.min_numel, "error_feedback": self.error_feedback,
        }  # fmt: skip

    def _key(self, name: str) -> str:
        return f"memory.rank{self._link.rank}.{name}"

    def close(self, wait: bool = True) -> None:
        """End the thread and the group of its own, when all ranks have come here; before destroy_process_group.

        From then on DDP averages as it does without a hook. A second call does nothing.
        """
        if not self._open:
            return
        self._open = False
        self._gate.remove()
        atexit.unregister(self.close)
        self._jobs.put(None)
        self._thread.join()
        self._link.close(wait and self._broken is None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(wait=kind is None)


def _hook(state: Any, bucket: GradBucket) -> Future[Tensor]:
    """What DDP calls. A function: DDP asks a hook for its name, which objects and partials have not."""
    return state.submit(bucket)


def attach(
    ddp: DistributedDataParallel,
    compressor: str | Compressor = "Rotated(Correlated())",
    error_feedback: bool | None = None,
    *,
    start: int = 0,
    min_numel: int = 1024,
    seed: int = 0,
    scaler: Scaler | None = None,
    channel: str = "auto",
    process_group: Any = None,
    timeout: float = 60.0,
) -> Handle:
    """Compress the gradients of a wrapped module from its next `backward` on. Collective: all ranks call it.

    error_feedback=None: for biased compressors (an `alpha` is all they have), not for unbiased ones (`omega`, `ab`).
    The default costs one bit a coordinate: the shared rotation makes all entries alike, where else the largest sets
    the scale of all. start: so many steps are dense before. min_numel: smaller parameters are sent as they are.
    scaler: the GradScaler, if there is one; memories then hold unscaled gradients, an overflow on one rank makes all
    ranks skip. Randomness is a function of (seed, step, first parameter of the bucket).
    process_group: where bytes travel, instead of a gloo group of its own. timeout: seconds after which a rank counts as
    lost.

    Raises ConfigError for what cannot work, ConfigMismatch where ranks differ. Errors of later exchanges come out of
    `backward`: NonFiniteError on all ranks where one has a NaN or an infinity (no memory has changed then, gradients
    are NaN, and the next step may follow); the others end compression for good: every later `backward` raises again.

    References: arXiv:1909.05350 (error feedback); docs/derivations/compressors.md.
    """
    code = parse(compressor, known_names(), Compressor) if isinstance(compressor, str) else compressor
    if not isinstance(code, Compressor):
        raise ConfigError(f"compressor={code!r}: a compressor, or text such as 'Correlated()'.")
    if error_feedback is not None and not isinstance(error_feedback, bool):
        raise ConfigError(f"error_feedback={error_feedback!r}: True, False, or None for what the compressor needs.")
    feedback = feedback_of(code, error_feedback, compact(code))
    if scaler is not None and not (hasattr(scaler, "get_scale") and hasattr(scaler, "is_enabled")):
        raise ConfigError(f"scaler={scaler!r}: a torch.amp.GradScaler, or None.")
    sizes = _checked_model(ddp)
    for name, value, least in (("start", start, 0), ("min_numel", min_numel, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: an integer, at least {least}.")
    checked_seed(seed)
    coded = [d for d in sizes.values() if d >= min_numel]
    _check_sizes(code, world_of(ddp.process_group), coded, min_numel)
    link = Link(channel, ddp.process_group, process_group, timeout)
    try:
        if coded:
            rehearse(code, link.world, min(coded))
        link.meet({
            "kind": "ddp", "compressor": compact(code), "error_feedback": feedback, "start": start,
            "min_numel": min_numel, "seed": seed, "scaler": scaler is not None, "parameters": sizes,
            "channel": channel, "versions": versions(),
        })  # fmt: skip
    except BaseException:
        link.close(wait=False)
        raise
    handle = Handle(ddp, code, feedback, link, start, min_numel, seed, scaler)
    try:
        ddp.register_comm_hook(handle, _hook)
    except RuntimeError as error:
        handle.close(wait=False)
        raise ConfigError("this module has a communication hook already: wrap it in DDP again, or drop one.") from error
    return handle


def _checked_model(ddp: DistributedDataParallel) -> dict[str, int]:
    """Sizes of the parameters. Raises ConfigError for a module that cannot be served."""
    if not isinstance(ddp, DistributedDataParallel):
        raise ConfigError(f"attach takes a module in DistributedDataParallel, got {type(ddp).__name__}: wrap it first.")
    if ddp.mixed_precision is not None:
        raise ConfigError("DistributedDataParallel(mixed_precision=...) has a hook of its own: use autocast instead.")
    held = {k: p for k, p in ddp.module.named_parameters() if p.requires_grad}
    wrong = [f"{k} ({p.dtype})" for k, p in held.items() if p.dtype != torch.float32]
    if wrong:
        raise ConfigError(
            f"parameters {', '.join(wrong[:3])}: messages are of float32. Keep float32 parameters and use autocast."
        )
    sparse = [k for k, m in ddp.module.named_modules() if getattr(m, "sparse", False) is True]
    if sparse:
        raise ConfigError(f"{', '.join(sparse[:3])}: sparse gradients cannot be compressed; take sparse=False.")
    return {k: p.numel() for k, p in held.items()}


def _check_sizes(code: Compressor, n: int, sizes: list[int], min_numel: int) -> None:
    """Raise ConfigError unless the smallest and the largest bucket that DDP may form can be compressed."""
    for d in {min(sizes), sum(sizes)} if sizes else ():
        try:
            code.check(n, d)
        except ConfigError as error:
            raise ConfigError(
                f"{error} (DDP forms the buckets; the smallest may have d={min(sizes)}. Take a fraction, or a larger "
                f"min_numel than {min_numel}.)"
            ) from None
