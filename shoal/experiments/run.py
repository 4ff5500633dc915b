"""One run: a problem, a method, a step size, a budget; from Python `shoal.simulate`, from the shell `shoal run`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal import kernels
from shoal.core import Channel, Method, OnNonFinite, Problem, Recorder, Row, State
from shoal.descents import Step
from shoal.errors import CheckpointCorrupt, ConfigError, NonFiniteError, PeerLost
from shoal.experiments.checkpoint import Checkpoints, Found
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import Folder
from shoal.experiments.interrupts import Interrupts, Pulse
from shoal.experiments.recovery import Memory
from shoal.messages import Round
from shoal.problems.secants import Seen, Trail
from shoal.rng import checked_seed
from shoal.runtimes import Local, checked_policy, chunks, rounds
from shoal.runtimes.attempts import Attempts
from shoal.theory import Setting, Smoothness, StepSize
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


def prepare(
    problem: Problem,
    method: Method,
    *,
    rounds: int | None,
    bits: float | None,
    target: float | None,
    step: float | Literal["theory"],
    multiple: float,
    pl: bool,
    need_theory: bool = True,
) -> tuple[Method, StepSize, float]:
    """The method with numbers in every place, the theory's step size, and the step size to use.

    Raises ConfigError, before anything runs, for whatever does not fit together.
    """
    if not isinstance(problem, Problem) or not isinstance(method, Method):
        raise ConfigError(f"{method!r} on {problem!r}: a run takes a Problem and a Method, such as Marina(PermK()).")
    if rounds is None and bits is None:
        raise ConfigError("a run needs a budget: rounds=..., bits=..., or both.")
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise ConfigError(f"rounds={rounds!r}: an integer, at least one.")
    for name, value in (("bits", bits), ("target", target), ("multiple", multiple)):
        if value is not None and not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r}: it must be a positive finite number.")
    if step != "theory" and not (isinstance(step, int | float) and step > 0 and math.isfinite(step)):
        raise ConfigError(f"step={step!r}: a step size is 'theory' or a positive finite number.")
    method.check(problem.n, problem.d)
    constants = problem.smoothness()
    if pl and constants.mu is None:
        raise ConfigError(f"pl=True: no PL constant is known for {problem.name}; leave pl out.")
    setting = Setting(problem.n, problem.d, constants, rounds, bits, pl)
    method = method.resolved(setting)
    theory = method.step_size(setting)
    if theory.evidence == "proved" and any(status == "estimate" for _, status in constants.facts().values()):
        theory = replace(
            theory, theorem=f"{theory.theorem}; L estimated, which no theorem covers", evidence="numerical"
        )
    if step == "theory" and need_theory and theory.evidence == "none":
        raise ConfigError(
            f"{compact(method)} has no step size from theory here ({theory.theorem}); give one: step=0.1."
        )
    return method, theory, multiple * (theory.gamma if step == "theory" else step)


def fingerprint(problem: Problem, chunk: int | None = None) -> dict[str, Any]:
    """What tells one problem from another, whatever it is called: f(x^0), ||grad f(x^0)||^2 and a digest of all
    clients' values and gradients there."""
    x, digest, values, total = problem.start(), hashlib.sha256(), [], torch.zeros(problem.d, dtype=torch.float64)
    for part in chunks(problem.n, problem.d, chunk):
        value, rows = problem.evaluate(x, torch.arange(problem.n)[part])
        digest.update(value.numpy().tobytes())
        digest.update(rows.numpy().tobytes())
        values += value.tolist()
        kernels.of(rows).add_rows(rows, total)
    norm = kernels.of(total).square_norm(total / problem.n)
    return {"f": math.fsum(values) / problem.n, "grad_norm_sq": norm, "sha256": digest.hexdigest()}


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
            raise KeyboardInterrupt if asked == signal.SIGINT else SystemExit(143)


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
    "skip" it, "drop" the client from it (docs/faults.md).
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
    ready, theory, gamma = prepare(problem, made, step=step, multiple=multiple, pl=pl, **budget)
    label, descent = compact(made), Step(gamma)
    folder: Folder | None = None
    checkpoints: Checkpoints | None = None
    rule = "theory" if step == "theory" else "given"
    config: dict[str, Any] = {"problem": {"name": problem.name, "n": problem.n, "d": problem.d}, "method": label}
    config |= {"seed": seed, **budget, "step": {"rule": rule, "gamma": gamma, "multiple": multiple}, "every": every}
    config["on_nonfinite"] = on_nonfinite
    channel = channel or (Local(problem.n) if attempts is None else attempts.channel)
    smoothness, shaken = problem.smoothness(), None
    if len(channel.clients) < problem.n:
        # To six digits: what machines may differ in is the last bits, and those of gamma decide.
        constants = {k: f"{v:.6g}" for k, (v, _) in smoothness.facts().items()}
        shaken = config | {"resolved": compact(ready), "constants": constants}
    whole, rows, faults, trail = problem, list[Row](), list[dict[str, Any]](), Trail()
    if shaken is not None:
        problem = whole.only(channel.clients)
        if channel.rank > 0:
            whole = problem  # the others' data can go; the first rank says what the whole problem is
    memory: Memory | None = None
    interrupts = Interrupts()

    def begun(channel: Channel) -> Found | None:
        """Everything that ranks do together before the first round of an attempt."""
        nonlocal folder, checkpoints, memory
        if shaken is not None:
            channel.open(shaken)
        if out is None:
            return None
        if channel.rank == 0 and folder is None:
            # Identity is what the problem computes: a repr may hold an address, or leave out the split.
            config["problem"] = {**config["problem"], "start": fingerprint(whole, chunk)}
            known = {"smoothness": {k: list(v) for k, v in smoothness.facts().items()}, "title": label}
            replaced = attempts is not None and attempts.number > 0
            if replaced:  # its predecessor died behind its last word, which is said again
                (Path(out) / "result.json").unlink(missing_ok=True)
            folder = Folder(Path(out), config, resume or replaced, {**known, "described": repr(whole), **(facts or {})})
        # From the first rank: only it knows the fingerprint, and a folder named after the time may differ.
        said = digest(config) + os.fsencode(out).ljust(PATH_MAX, b"\0")
        heard = bytes(channel.together(torch.tensor(list(said), dtype=torch.uint8))[0].tolist())
        identity, place = heard[:8], Path(os.fsdecode(heard[8:].rstrip(b"\0")))
        checkpoints = Checkpoints(place, identity.hex(), channel)
        x = problem.start()
        server, workers = ready.init(x, Round.full(0, seed, channel.n, channel.clients))
        fresh = State(0, x, server, workers, descent.init(x))
        found = None
        if attempts is not None and attempts.supervised:
            memory = memory or Memory(place, identity, channel, checkpoints.world, fresh)
            if attempts.number > 0:
                found = memory.stand(attempts.channel, rows, faults)
        return found or checkpoints.load(fresh)

    def ended(channel: Channel) -> Run:
        """One attempt, to its end."""
        found = begun(channel)
        state, stopped, note = execute(
            problem, ready, descent, channel, seed=seed, limit=rounds, bits=bits, target=target, every=every,
            chunk=chunk, folder=folder, checkpoints=checkpoints, memory=memory, record=record,
            on_nonfinite=on_nonfinite, interrupts=interrupts, found=found, rows=rows, faults=faults, trail=trail,
        )  # fmt: skip
        run = Run(
            label, ready, theory, gamma, rows, state.x, stopped, note, target, faults, config, channel.moved(),
            smoothness, trail.seen,
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
