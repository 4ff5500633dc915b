"""One run: a problem, a method, a step size, a budget; from Python `shoal.simulate`, from the shell `shoal run`."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.core import Channel, Method, Problem, Recorder, Round, Row, State
from shoal.descents import Step
from shoal.errors import CheckpointCorrupt, ConfigError, NonFiniteError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import Folder
from shoal.rng import checked_seed
from shoal.runtimes import Local, rounds
from shoal.theory import Setting, StepSize

if TYPE_CHECKING:
    import pyarrow
    from matplotlib.figure import Figure

Stopped = Literal["target", "rounds", "bits", "diverged"]
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

    @property
    def sha256(self) -> str:
        """Of the final iterate's little-endian float32 bytes."""
        return hashlib.sha256(self.x.numpy().astype("<f4").tobytes()).hexdigest()

    def to_target(self, target: float | None = None) -> Row | None:
        """The first row with ||grad f||^2 <= target; None if there is none."""
        goal = self.target if target is None else target
        return next((r for r in self.rows if goal is not None and r.grad_norm_sq <= goal), None)

    def result(self) -> dict[str, Any]:
        """What result.json holds."""
        used = {k: (float(v) if isinstance(v, float) else v) for k, v in self.step.constants.items()}
        facts = {"sha256": self.sha256, "rounds": self.rows[-1].round, "stopped": self.stopped, "note": self.note}
        facts |= {"method": self.label, "resolved": compact(self.method), "gamma": self.gamma}
        return (
            facts
            | {"theorem": self.step.theorem, "constants": used}
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
        folder = Folder(Path(path), {"method": self.label, "target": self.target, "step": {"gamma": self.gamma}})
        for row in self.rows:
            folder.record(row)
        folder.finish(self.result())
        return Path(path)


class Interrupts:
    """Ctrl-C and SIGTERM wait for the end of the round, so that a checkpoint is always of a whole one; the second
    Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number

    @contextmanager
    def held(self) -> Iterator[None]:
        """Handlers in place; only the main thread can have any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
    need_proof: bool = True,
) -> tuple[Method, StepSize, float]:
    """The method with numbers in every place, the theory's step size, and the step size to use.

    Raises ConfigError, before anything runs, for whatever does not fit together.
    """
    if rounds is None and bits is None:
        raise ConfigError("a run needs a budget: rounds=..., bits=..., or both.")
    if rounds is not None and rounds < 1:
        raise ConfigError(f"rounds={rounds}: at least one.")
    for name, value in (("bits", bits), ("target", target), ("multiple", multiple)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r}: it must be a positive finite number.")
    if step != "theory" and not (isinstance(step, int | float) and step > 0 and math.isfinite(step)):
        raise ConfigError(f"step={step!r}: a step size is 'theory' or a positive finite number.")
    method.check(problem.n, problem.d)
    constants = problem.smoothness()
    if pl and constants.mu is None:
        raise ConfigError(f"pl=True: no PL constant is known for {problem.name}; leave pl out.")
    f0 = float(problem.evaluate(problem.start(), torch.arange(problem.n))[0].mean())
    setting = Setting(problem.n, problem.d, constants, rounds, bits, target, f0, pl)
    method = method.resolved(setting)
    theory = method.step_size(setting)
    if step == "theory" and need_proof and not theory.proved:
        raise ConfigError(
            f"{compact(method)} has no step size from theory here ({theory.theorem}); give one: step=0.1."
        )
    return method, theory, multiple * (theory.gamma if step == "theory" else step)


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
    record: Recorder | None = None,
) -> tuple[list[Row], State, Stopped, str]:
    """Run until the target, the budget or divergence; rows, final state, why it stopped, and a note."""
    rows: list[Row] = list(folder.rows) if folder else []
    before, began = rows[-1].seconds if rows else 0.0, time.perf_counter()
    state = None
    if folder is not None and folder.state is not None:
        x = problem.start()
        server, workers = method.init(x, Round.full(0, seed, channel.n, channel.clients))
        state = folder.restore(State(0, x, server, workers, descent.init(x)))
        if state is not None:
            channel.meter = state.meter
    interrupts, hosts_all = Interrupts(), len(channel.clients) == channel.n
    with interrupts.held():
        events = rounds(method, descent, problem, channel, seed, state, chunk)
        while True:
            try:
                event = next(events)
            except NonFiniteError as error:
                return rows, state or event.state, "diverged", str(error)
            state = event.state
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
                return rows, state, "diverged", "||grad f||^2 exploded"
            if target is not None and reached.grad_norm_sq <= target:
                return rows, state, "target", ""
            if last:
                return rows, state, "rounds" if limit is not None and k >= limit else "bits", ""
            if folder is not None and (folder.due or interrupts.asked is not None) and hosts_all:
                folder.checkpoint(state)
            if interrupts.asked is not None:
                raise KeyboardInterrupt if interrupts.asked == signal.SIGINT else SystemExit(143)


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
    facts: dict[str, Any] | None = None,
) -> Run:
    """Simulate a method on a problem, all n clients in this process.

    rounds, bits (uplink payload bits a client): the budget, at least one of them. target: stop at ||grad f||^2 <= it.
    step: "theory" or a number; multiple: times that. pl: the PL theorem's step size. every: measure every so many
    rounds. chunk: clients at a time (default: what keeps temporaries at 16 MiB). out: a run folder, checkpointed every
    five seconds and on Ctrl-C; resume=True goes on from there and ends at the identical iterate. record: called with
    each row. channel: where messages go (default: `Local`); a run over ranks is resumed by replaying it from round 0.
    facts: stored in config.json beside the run's own settings.
    Raises ConfigError before anything runs if the parts do not fit together.

        >>> import shoal
        >>> problem = shoal.Quadratics(n=10, d=100, noise=0.1, lam=0.01)
        >>> run = shoal.simulate(problem, "Marina(PermK())", rounds=200)
        >>> run.rows[-1].grad_norm_sq < run.rows[0].grad_norm_sq
        True
    """
    checked_seed(seed)
    if every < 1 or (chunk is not None and chunk < 1):
        raise ConfigError(f"every={every}, chunk={chunk}: both count from 1.")
    made = parse(method, known_names(), Method) if isinstance(method, str) else method
    label = compact(made)
    budget = {"rounds": rounds, "bits": bits, "target": target}
    ready, theory, gamma = prepare(problem, made, step=step, multiple=multiple, pl=pl, **budget)  # type: ignore[arg-type]
    descent = Step(gamma)
    folder = None
    if out is not None:
        config: dict[str, Any] = {
            "problem": {"name": problem.name, "n": problem.n, "d": problem.d, "repr": repr(problem)},
            "method": label,
        }
        rule = "theory" if step == "theory" else "given"
        config |= {"seed": seed, **budget, "step": {"rule": rule, "gamma": gamma, "multiple": multiple}, "every": every}
        known = {"smoothness": {k: list(v) for k, v in problem.smoothness().facts().items()}, "title": label}
        folder = Folder(Path(out), config, resume, known | (facts or {}))
    channel = channel or Local(problem.n)
    if len(channel.clients) < problem.n:
        problem = problem.only(channel.clients)
    try:
        rows, state, stopped, note = execute(
            problem, ready, descent, channel, seed=seed, limit=rounds, bits=bits, target=target, every=every,
            chunk=chunk, folder=folder, record=record,
        )  # fmt: skip
    except BaseException:  # whatever cut it, the rows so far are on the disk
        if folder is not None:
            folder.close()
        raise
    run = Run(label, ready, theory, gamma, rows, state.x, stopped, note, target)
    if folder is not None:
        folder.finish(run.result())
    return run


def load_result(path: Path) -> dict[str, Any] | None:
    """result.json of a finished run, or None."""
    file = path / "result.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else None
    except (ValueError, TypeError) as error:
        raise CheckpointCorrupt(f"{file}: {error}. Delete the file's folder to do the run again.") from None
