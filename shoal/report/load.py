"""Run folders and race folders as arrays: the only place of the report that reads files.

A race folder holds `race.json` and one run folder for each run under `runs/`; a run folder holds `config.json`,
`metrics.jsonl` (one line a recorded round, appended while the run goes on) and, once the run has ended, `result.json`.
A folder whose run was cut off is loaded as far as it goes: a last line that was torn in the middle is dropped and
counted, and a missing `result.json` makes the run "interrupted". Nothing here needs more than numpy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, DataError

COLUMNS = (
    "round",
    "value",
    "grad_norm_sq",
    "up_bits",
    "down_bits",
    "up_framed_bits",
    "down_framed_bits",
    "seconds",
)
FORMAT = 1
Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run: its settings, its recorded rows as float64 columns of equal length, and its result if it ended.

    `label` is the method as the user wrote it; `step` is "theory" or "tuned"; `multiple` is the factor on the theory
    step; `trial` marks a try on the tuning seed, which no leaderboard counts. `torn` is the number of lines dropped.
    """

    id: str
    folder: Path
    label: str
    step: str
    multiple: float
    seed: int
    trial: bool
    config: Mapping[str, Any]
    columns: Mapping[str, Column]
    result: Mapping[str, Any] | None = None
    torn: int = 0

    @property
    def rows(self) -> int:
        return len(self.columns["round"])

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def stopped(self) -> str:
        """What ended it: "target", "rounds", "bits" or "diverged"; "interrupted" where there is no result."""
        return "interrupted" if self.result is None else str(self.result.get("stopped", "unknown"))

    @property
    def resolved(self) -> str | None:
        """The method with every default filled in, as the runner wrote it."""
        return None if self.result is None else self.result.get("resolved")

    @property
    def gamma(self) -> float | None:
        return None if self.result is None else _number(self.result.get("gamma"))

    @property
    def theorem(self) -> str | None:
        return None if self.result is None else self.result.get("theorem")

    @property
    def constants(self) -> Mapping[str, Any]:
        return {} if self.result is None else self.result.get("constants") or {}

    @property
    def p(self) -> float | None:
        """The probability of a full round, where the method has one: from the constants or from the resolved name."""
        if (stored := _number(self.constants.get("p"))) is not None:
            return stored
        found = re.search(r"\bp=([0-9.eE+-]+)", self.resolved or "")
        return _number(found.group(1)) if found else None

    @property
    def seen(self) -> Mapping[str, float]:
        """The largest L_-, L_+ and L_± between recorded points, under `Smoothness`'s names: lower bounds."""
        found = {} if self.result is None else self.result.get("seen") or {}
        return {str(name): float(value) for name, (value, _) in found.items()}

    def crossing(self, target: float | None) -> int | None:
        """The first row with ||grad f||^2 <= target and f <= f(x^0); None where there is none (or no target).

        Far out, the gradient of a bounded loss vanishes as well: an iterate thrown there has reached nothing.
        """
        if target is None or not self.rows:
            return None
        value = self.columns["value"]
        below = np.flatnonzero((self.columns["grad_norm_sq"] <= target) & (value <= value[0]))
        return int(below[0]) if below.size else None

    def quantity(self, name: str) -> Column:
        """A column, or one of the sums the report speaks of: total_bits, framed_bits (each both directions)."""
        if name == "total_bits":
            return self.columns["up_bits"] + self.columns["down_bits"]
        if name == "framed_bits":
            return self.columns["up_framed_bits"] + self.columns["down_framed_bits"]
        return self.columns[name]


@dataclass(frozen=True, eq=False)
class Race:
    """A race, or a single run seen as a race of one.

    `no_theorem` maps the methods that no theorem gives a step size here to the reason; they have tuned steps only, and
    their multiples are of 1/L_-. `skipped` counts run folders without a readable config.json.
    """

    folder: Path
    title: str
    problem: Mapping[str, Any]
    methods: tuple[str, ...]
    steps: tuple[str, ...]
    seeds: tuple[int, ...]
    target: float | None
    runs: tuple[RunRecord, ...]
    rounds: int | None = None
    bits: float | None = None
    smoothness: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    status: str = "done"
    no_theorem: Mapping[str, str] = field(default_factory=dict)
    skipped: int = 0

    @property
    def torn(self) -> int:
        """Lines cut off in the middle of writing, over all runs."""
        return sum(run.torn for run in self.runs)

    @cached_property
    def seen(self) -> Mapping[str, float]:
        """The largest L_-, L_+ and L_± along any of the runs; a try with too large a step may have been far out."""
        runs = [run for run in self.runs if not run.trial]
        names = dict.fromkeys(name for run in runs for name in run.seen)
        return {name: max(run.seen.get(name, 0.0) for run in runs) for name in names}

    @cached_property
    def curves(self) -> tuple[tuple[str, str], ...]:
        """The (label, step) pairs that have at least one recorded row outside the trials, in the race's order."""
        there = {(run.label, run.step) for run in self.runs if not run.trial and run.rows}
        return tuple((label, step) for step in self.steps for label in self.methods if (label, step) in there)

    def finals(self, label: str, step: str) -> tuple[RunRecord, ...]:
        """The runs that count for one line of the leaderboard, by seed."""
        mine = [r for r in self.runs if (r.label, r.step) == (label, step) and not r.trial and r.rows]
        return tuple(sorted(mine, key=lambda run: run.seed))

    def trials(self, label: str) -> tuple[RunRecord, ...]:
        """The step-size tries of a method, by multiple."""
        return tuple(sorted((r for r in self.runs if r.label == label and r.trial), key=lambda run: run.multiple))


def load(folder: str | Path) -> Race:
    """The race in `folder`, or the single run in it.

    Raises ConfigError where the folder is neither, DataError where a file in it is damaged other than by a torn end.
    """
    folder = Path(folder)
    if (folder / "race.json").is_file():
        return _race(folder)
    if (folder / "config.json").is_file():
        return _single(folder)
    what = "holds neither race.json nor config.json" if folder.is_dir() else "is not a folder"
    raise ConfigError(f"{folder} {what}: name a folder that `shoal race` or `shoal run` wrote.")


def _race(folder: Path) -> Race:
    facts = _settings(folder / "race.json")
    runs, skipped = [], 0
    for path in sorted((folder / "runs").glob("*/")):
        try:
            runs.append(_run(path))
        except (FileNotFoundError, json.JSONDecodeError):
            # The race was cut off between making the folder and writing its settings: there is nothing to show yet.
            skipped += 1
    return Race(
        folder=folder,
        title=str(facts.get("title") or "A race"),
        methods=_ordered(facts.get("methods", ()), (run.label for run in runs)),
        steps=_ordered(facts.get("steps", ()), (run.step for run in runs if not run.trial)),
        seeds=tuple(int(seed) for seed in facts.get("seeds", ())),
        runs=tuple(runs),
        status=str(facts.get("status", "running")),
        no_theorem={str(label): str(reason) for label, reason in facts.get("no_theorem", {}).items()},
        skipped=skipped,
        **_common(facts),
    )


def _single(folder: Path) -> Race:
    """One run as a race: its only method, its only seed."""
    try:
        run = _run(folder)
    except json.JSONDecodeError as broken:
        raise DataError(f"{folder / 'config.json'} is not JSON ({broken.msg}): run it again.") from None
    facts = _common(run.config)
    return Race(
        folder=folder,
        title=str(run.config.get("title") or f"{run.label} on {facts['problem'].get('name', 'a problem')}"),
        methods=(run.label,),
        steps=(run.step,),
        seeds=(run.seed,),
        runs=(run,),
        status="done" if run.finished else "interrupted",
        **facts,
    )


def _common(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What race.json and config.json say alike."""
    return {
        "problem": facts.get("problem") or {},
        "target": _number(facts.get("target")),
        "rounds": facts.get("rounds"),
        "bits": _number(facts.get("bits")),
        "smoothness": {name: (float(value), str(how)) for name, (value, how) in facts.get("smoothness", {}).items()},
        "command": str(facts.get("command", "")),
        "versions": {str(name): str(version) for name, version in facts.get("versions", {}).items()},
        "machine": str(facts.get("machine", "")),
    }


def _run(folder: Path) -> RunRecord:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_format(folder / "config.json", config)
    # In a race, the race says which line of the leaderboard a run belongs to; alone, its own step settings do.
    place = {"multiple": 1.0} | (config.get("step") or {}) | (config.get("race") or {})
    multiple = float(place["multiple"])
    columns, torn = read_metrics(folder / "metrics.jsonl")
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        result = None
    except json.JSONDecodeError:
        result, torn = None, torn + 1
    return RunRecord(
        id=folder.name,
        folder=folder,
        label=str(place.get("label", config.get("method", "unknown"))),
        step=str(place.get("step", place.get("rule", "theory" if multiple == 1.0 else "tuned"))),
        multiple=multiple,
        seed=int(place.get("seed", config.get("seed", 0))),
        trial=bool(place.get("trial", False)),
        config=config,
        columns=columns,
        result=result,
        torn=torn,
    )


def read_metrics(path: Path) -> tuple[dict[str, Column], int]:
    """The columns of a metrics.jsonl and how many torn lines (0 or 1) were dropped from its end.

    Raises DataError where a line before the last is not JSON or a row lacks a column: that is damage, not a cut.
    """
    rows: list[dict[str, Any]] = []
    torn = 0
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
    for i, line in enumerate(lines[: last + 1]):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError:
            if i < last:
                raise DataError(
                    f"{path}, line {i + 1} is not a JSON object: the file is damaged; run it again."
                ) from None
            torn = 1
            continue
        # A resumed run repeats the rounds since its checkpoint; the rows written last are the run's own.
        while rows and row.get("round", 0) <= rows[-1].get("round", 0):
            rows.pop()
        rows.append(row)
    return {name: _column(path, name, rows) for name in COLUMNS}, torn


def _column(path: Path, name: str, rows: list[dict[str, Any]]) -> Column:
    try:
        return np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path} has a row without a number for {name!r}: this is not a file of shoal's.") from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as broken:
        raise DataError(f"{path} is not JSON ({broken.msg}, line {broken.lineno}): run the race again.") from None
    _check_format(path, facts)
    return facts


def _check_format(path: Path, facts: Any) -> None:
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise DataError(f"{path} has format {found!r}: this version reads format {FORMAT}; use the one that wrote it.")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _ordered(stated: Any, found: Any) -> tuple[str, ...]:
    """The stated names in their order, then any others that turned up in the runs."""
    return tuple(dict.fromkeys([str(name) for name in stated] + sorted(set(found))))
