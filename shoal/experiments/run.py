"""One run: a problem, a method, a step size, a budget; from Python `shoal.simulate`, from the shell `shoal run`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from shoal.core import Channel, Method, OnNonFinite, Problem, Recorder, Row, State
from shoal.descents import Step
from shoal.errors import CheckpointCorrupt, ConfigError, NonFiniteError, PeerLost
from shoal.experiments.checkpoint import Checkpoints, Found
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import Folder
from shoal.experiments.interrupts import Interrupts, Pulse, stopped
from shoal.experiments.prepared import Survey, check_settings, fingerprint, prepare
from shoal.experiments.recovery import Memory
from shoal.messages import Round
from shoal.problems.secants import Seen, Trail
from shoal.rng import checked_seed
from shoal.runtimes import Local, checked_policy, rounds
from shoal.runtimes.attempts import Attempts
from shoal.theory import Smoothness, StepSize
from shoal.wire import digest

if TYPE_CHECKING:
    import pyarrow
    from matplotlib.figure import Figure

Stopped = Literal["target", "rounds", "bits", "diverged"]
PATH_MAX = 4096  # bytes of a folder's name
EXPLODED = 1e12  # a run whose ||grad f||^2 has grown by this factor is called diverged


@dataclass(frozen=True)
class Run:
    """A finished run: one row a measured round, the final iterate and how it came about."""

    label: str
    method: Method
    step: StepSize
    gamma: float
    rows: list[Row]
    x: torch.Tensor = field(repr=False)
    stopped: Stopped
    note: str = ""
    target: float | None = None
    faults: list[dict[str, Any]] = field(default_factory=list)  # rounds that were skipped, or held without some clients
    facts: dict[str, Any] = field(default_factory=dict, repr=False)  # problem, seed, budget: what config.json holds
    moved: list[int] = field(default_factory=list)  # bytes that each rank has sent to others; empty in a simulator
    smoothness: Smoothness | None = field(default=None, repr=False)  # what the problem states
    seen: Seen = field(default=Seen(), repr=False)  # the largest L_-, L_+ and L_± between recorded points

    @property
    def sha256(self) -> str:
        """Of the final iterate's little-endian float32 bytes."""
        return hashlib.sha256(self.x.numpy().astype("<f4").tobytes()).hexdigest()

    def to_target(self, target: float | None = None) -> Row | None:
        """The first row that has `arrived` at the target; None if there is none."""
        goal = self.target if target is None else target
        return next((r for r in self.rows if arrived(r, self.rows[0], goal)), None)

    def result(self) -> dict[str, Any]:
        """What result.json holds."""
        used = {k: (float(v) if isinstance(v, float) else v) for k, v in self.step.constants.items()}
        facts = {"sha256": self.sha256, "rounds": self.rows[-1].round, "stopped": self.stopped, "note": self.note}
        facts |= {"faults": self.faults, "method": self.label, "resolved": compact(self.method), "gamma": self.gamma}
        stated = {} if self.smoothness is None else self.smoothness.facts()
        curved = {"smoothness": stated, "seen": {k: (float(v), v.status) for k, v in self.seen.facts().items()}}
        return (
            facts
            | {"theorem": self.step.theorem, "constants": used, "moved_bytes": self.moved}
            | {name: {k: list(v) for k, v in known.items()} for name, known in curved.items()}
            | {k: v for k, v in self.rows[-1]._asdict().items() if k != "round"}
        )

    def columns(self) -> dict[str, list[float]]:
        """Column name -> values."""
        return {name: [getattr(row, name) for row in self.rows] for name in Row._fields}

    def table(self) -> pyarrow.Table:
        """The rows as an Arrow table (extra [report])."""
        try:
            import pyarrow as pa
        except ImportError:
            raise ConfigError('a table needs pyarrow: pip install "shoal[report]".') from None
        return pa.table(self.columns())

    def plot(self, axis: str = "up_bits") -> Figure:
        """||grad f||^2 against a column of the rows, both on log scales (extra [report])."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigError('a plot needs matplotlib: pip install "shoal[report]".') from None
        if axis not in Row._fields:
            raise ConfigError(f"plot(axis={axis!r}): an axis is one of {', '.join(Row._fields)}.")
        figure = Figure(figsize=(6, 4), layout="constrained")
        panel = figure.subplots()
        panel.loglog([getattr(r, axis) for r in self.rows], [r.grad_norm_sq for r in self.rows], label=self.label)
        panel.set_xlabel(axis.replace("_", " ") + (" a client" if axis.endswith("bits") else ""))
        panel.set_ylabel("||grad f||²")
        panel.legend()
        return figure

    def save(self, path: str | Path) -> Path:
        """Write a run folder that `shoal report` reads."""
        folder = Folder(Path(path), self.facts)
        folder.begin()
        for row in self.rows:
            folder.record(row)
        folder.finish(self.result())
        return Path(path)


def arrived(row: Row, first: Row, target: float | None) -> bool:
    """Whether the target is reached: ||grad f||^2 <= target, and f is not above f(x^0).

    Far out, the gradient of a bounded loss vanishes as well: a step size that throws the iterate there has won nothing.
    """
    return target is not None and row.grad_norm_sq <= target and row.value <= first.value


class Settled(NamedTuple):
    """What all processes go by: `config` is the folder's, which only the first knows whole, `shaken` is everybody's."""

    method: Method
    theory: StepSize
    gamma: float
    smoothness: Smoothness
    config: dict[str, Any]
    shaken: dict[str, Any]


def execute(
    problem: Problem,
    method: Method,
    descent: Step,
    channel: Channel,
    *,
    seed: int,
    limit: int | None,
    bits: float | None,
    target: float | None,
    every: int = 1,
    chunk: int | None = None,
    folder: Folder | None = None,
    checkpoints: Checkpoints | None = None,
    memory: Memory | None = None,
    record: Recorder | None = None,
    on_nonfinite: OnNonFinite = "raise",
    interrupts: Interrupts,
    found: Found | None = None,
    rows: list[Row],
    faults: list[dict[str, Any]],
    trail: Trail,
) -> tuple[State, Stopped, str]:
    """Run until the target, the budget or divergence; final state, why it stopped, and a note. Goes on from what was
    `found`. `rows`, the rounds that were skipped or held without some clients, `faults`, and the trail, which is told
    the recorded points, are filled on the way."""
    state, rows[:], faults[:] = (None, [], []) if found is None else found[:3]
    trail.restore(**(Trail().arrays() if found is None else found.trail))
    if state is not None:
        channel.meter = replace(state.meter)
    if folder is not None:
        folder.begin(rows)
    before, began = rows[-1].seconds if rows else 0.0, time.perf_counter()
    pulse = Pulse(channel, state.index if state is not None else 0)
    events = rounds(method, descent, problem, channel, seed, state, chunk, on_nonfinite, trail)
    while True:
        try:
            event = next(events)
        except NonFiniteError as error:
            assert state is not None  # x^0 is yielded before anything is compressed
            if rows[-1].round < state.index:
                spent = state.meter.bits(channel.n)
                rows.append(Row(state.index, *event.measured, **spent, seconds=before + time.perf_counter() - began))
                if folder is not None:
                    folder.record(rows[-1])
            return state, "diverged", str(error)
        state = event.state
        if event.fault is not None:
            fault = {"round": state.index - 1, "clients": list(event.fault.clients), "said": str(event.fault)}
            faults.append(fault | {"policy": on_nonfinite})
        if memory is not None:
            memory.commit(state, trail)
        k, spent = state.index, state.meter.bits(channel.n)
        last = (limit is not None and k >= limit) or (bits is not None and spent["up_bits"] >= bits)
        if (k % every == 0 or last) and not (rows and rows[-1].round >= k):
            value, norm = event.measured
            row = Row(k, value, norm, **spent, seconds=before + time.perf_counter() - began)
            rows.append(row)
            if folder is not None:
                folder.record(row)
            if record is not None:
                record(row)
        reached = rows[-1]
        if not math.isfinite(reached.value + reached.grad_norm_sq) or (
            reached.grad_norm_sq > EXPLODED * max(rows[0].grad_norm_sq, 1e-300)
        ):
            return state, "diverged", "||grad f||^2 exploded"
        if arrived(reached, rows[0], target):
            return state, "target", ""
        if last:
            return state, "rounds" if limit is not None and k >= limit else "bits", ""
        asked, due = pulse(k, interrupts.asked, checkpoints is not None and checkpoints.due)
        if checkpoints is not None and (due or asked is not None):
            checkpoints.save(state, rows, faults, trail)
        if asked is not None:
            raise stopped(asked)


def simulate(
    problem: Problem,
    method: Method | str,
    *,
    rounds: int | None = None,
    bits: float | None = None,
    target: float | None = None,
    seed: int = 0,
    step: float | Literal["theory"] = "theory",
    multiple: float = 1.0,
    pl: bool = False,
    every: int = 1,
    chunk: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    record: Callable[[Row], None] | None = None,
    channel: Channel | None = None,
    attempts: Attempts | None = None,
    facts: dict[str, Any] | None = None,
    on_nonfinite: OnNonFinite = "raise",
    smoothness: Smoothness | None = None,
) -> Run:
    """Simulate a method on a problem, all n clients in this process.

    rounds, bits (uplink payload bits a client): the budget, at least one of them. target: stop at ||grad f||^2 <= it
    (with f no higher than at the start, see `arrived`).
    step: "theory" or a number; multiple: times that. pl: the PL theorem's step size. every: measure every so many
    rounds. chunk: clients at a time (default: what keeps temporaries at 4 MiB). out: a run folder, checkpointed every
    five seconds and on Ctrl-C; resume=True goes on from there, on as many processes as there are now, and ends at the
    identical iterate. record: called with each row. channel: where messages go (default: `Local`); every process gives
    the same arguments, and the first one writes rows and result. attempts: channels that follow one another as ranks
    are lost and replaced; the run goes on where all of them stood. facts: stored in config.json beside the settings.
    on_nonfinite: what becomes of a round in which a client has a NaN or an infinity: "raise" (the run ends, diverged),
    "skip" it, "drop" the client from it (docs/faults.md). smoothness: what is known of the problem (default: what the
    problem says; over several processes, what it says in the first, which alone needs all clients' data).
    Raises ConfigError before anything runs if the parts do not fit together.

        >>> import shoal
        >>> problem = shoal.Quadratics(n=10, d=100, noise=0.1, lam=0.01)
        >>> run = shoal.simulate(problem, "Marina(PermK())", rounds=200)
        >>> run.rows[-1].grad_norm_sq < run.rows[0].grad_norm_sq
        True
    """
    checked_seed(seed)
    if any(c is not None and (not isinstance(c, int) or c < 1) for c in (every, chunk)):
        raise ConfigError(f"every={every!r}, chunk={chunk!r}: integers, both count from 1.")
    made = parse(method, known_names(), Method) if isinstance(method, str) else method
    budget: dict[str, Any] = {"rounds": rounds, "bits": bits, "target": target}
    checked_policy(on_nonfinite, made)
    check_settings(problem, made, step=step, multiple=multiple, **budget)
    label = compact(made)
    channel = channel or (Local(problem.n) if attempts is None else attempts.channel)
    survey: Survey | None = None
    if len(channel.clients) < problem.n:
        whole, problem = problem, problem.only(channel.clients)
        # At the other ranks everybody else's data can go: the first one says what the whole problem is.
        survey = Survey(whole if channel.rank == 0 else problem, smoothness, channel, out is not None, chunk)
        del whole
    rows, faults, trail = list[Row](), list[dict[str, Any]](), Trail()
    asked: dict[str, Any] = {"problem": {"name": problem.name, "n": problem.n, "d": problem.d}, "method": label}
    asked |= {"seed": seed, **budget, "every": every, "on_nonfinite": on_nonfinite}
    asked["step"] = {"rule": "theory" if step == "theory" else "given", "multiple": multiple}
    folder: Folder | None = None
    checkpoints: Checkpoints | None = None
    memory: Memory | None = None
    interrupts = Interrupts()

    def concluded(known: Smoothness) -> Settled:
        """What follows from the constants."""
        ready, theory, gamma = prepare(problem, made, step=step, multiple=multiple, pl=pl, smoothness=known, **budget)
        config = asked | {"step": asked["step"] | {"gamma": gamma}}
        return Settled(ready, theory, gamma, known, config, config | {"resolved": compact(ready)})

    settled = concluded(smoothness or problem.smoothness()) if survey is None else None

    def begun(channel: Channel) -> tuple[Settled, Found | None]:
        """Everything that ranks do together before the first round of an attempt."""
        nonlocal settled, folder, checkpoints, memory
        restarted = attempts is not None and attempts.number > 0
        fresh = attempts is None or not (restarted and attempts.supervised)  # else a copy has taken a rank's place
        if survey is not None:
            channel.open(asked)  # before anything that takes long
            known = survey.share(channel, fresh, interrupts.heed)
            settled = settled or concluded(known)
            channel.open(settled.shaken)
        assert settled is not None
        config, descent = settled.config, Step(settled.gamma)
        if out is None:
            return settled, None
        if channel.rank == 0 and folder is None:
            # Identity is what the problem computes: a repr may hold an address, or leave out the split.
            looks = survey.start.facts if survey and survey.start else fingerprint(problem, chunk)
            config["problem"] = {**config["problem"], "start": looks}
            curved = {"smoothness": {k: list(v) for k, v in settled.smoothness.facts().items()}, "title": label}
            if restarted:  # its predecessor died behind its last word, which is said again
                (Path(out) / "result.json").unlink(missing_ok=True)
            described = {**curved, "described": repr(survey.problem if survey else problem), **(facts or {})}
            folder = Folder(Path(out), config, resume or restarted, described)
        # From the first rank: only it knows the fingerprint, and a folder named after the time may differ.
        said = digest(config) + os.fsencode(out).ljust(PATH_MAX, b"\0")
        heard = bytes(channel.together(torch.tensor(list(said), dtype=torch.uint8))[0].tolist())
        identity, place = heard[:8], Path(os.fsdecode(heard[8:].rstrip(b"\0")))
        checkpoints = Checkpoints(place, identity.hex(), channel)
        x = problem.start()
        server, workers = settled.method.init(x, Round.full(0, seed, channel.n, channel.clients))
        first = State(0, x, server, workers, descent.init(x))
        found = None
        if attempts is not None and attempts.supervised:
            memory = memory or Memory(place, identity, channel, checkpoints.world, first)
            if attempts.number > 0:
                found = memory.stand(attempts.channel, rows, faults)
        return settled, found or checkpoints.load(first)

    def ended(channel: Channel) -> Run:
        """One attempt, to its end."""
        known, found = begun(channel)
        state, stopped, note = execute(
            problem, known.method, Step(known.gamma), channel, seed=seed, limit=rounds, bits=bits, target=target,
            every=every, chunk=chunk, folder=folder, checkpoints=checkpoints, memory=memory, record=record,
            on_nonfinite=on_nonfinite, interrupts=interrupts, found=found, rows=rows, faults=faults, trail=trail,
        )  # fmt: skip
        run = Run(
            label, known.method, known.theory, known.gamma, rows, state.x, stopped, note, target, faults, known.config,
            channel.moved(), known.smoothness, trail.seen,
        )  # fmt: skip
        if folder is not None:
            folder.finish(run.result())
        if checkpoints is not None:
            channel.together(torch.zeros(1))  # the result is there: nobody is needed any more
            checkpoints.discard()
        return run

    with interrupts.held():
        try:
            while True:
                try:
                    run = ended(channel)
                    break
                except PeerLost as error:
                    if attempts is None:
                        raise
                    channel = attempts.again(error)
        except BaseException:  # whatever cut it, the rows so far are on the disk
            if folder is not None:
                folder.close()
            raise
    if memory is not None:
        memory.close(ended=True)
    return run


def load_result(path: Path) -> dict[str, Any] | None:
    """result.json of a finished run, or None."""
    file = path / "result.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else None
    except (ValueError, TypeError) as error:
        raise CheckpointCorrupt(f"{file}: {error}. Delete the file's folder to do the run again.") from None
