"""A sweep: the points of a grid over processes, each in a folder of its own named by its hash, each run once.

    OUT/sweep.json         what was asked, and which points that makes
    OUT/points/KEY/        the run folder of a point, as `shoal run` leaves it
    OUT/failed/KEY.txt     why a point has no result
    OUT/results.parquet    a row a point: its settings, then its result

A point with a result is read and not run again; one that was cut goes on from its checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from shoal.core import Method, Problem, Row
from shoal.errors import CheckpointCorrupt, ConfigError, ResumeMismatch
from shoal.experiments import pool
from shoal.experiments.expressions import known_names, parse
from shoal.experiments.folder import machine, make_folder, versions, write_json
from shoal.experiments.grid import SweepSpec
from shoal.experiments.prepared import prepare
from shoal.experiments.run import load_result, simulate
from shoal.experiments.spec import RunSpec

COLUMNS = (  # of the results, after the settings
    "stopped", "last_round", "value", "grad_norm_sq", "up_bits", "down_bits", "up_framed_bits", "down_framed_bits",
    "seconds", "gamma", "theorem", "constants", "resolved", "note", "sha256",
    *(f"L_{name}{what}" for name in ("minus", "plus", "pm") for what in ("", "_status", "_seen")),
)  # fmt: skip


@lru_cache(maxsize=2)
def _problem(spec_json: str) -> Problem:
    """Kept: the points of a problem follow each other, and the constants of data take a while."""
    spec = RunSpec.model_validate_json(spec_json)
    return spec.problem.build(spec.files)


def _of(spec: RunSpec) -> tuple[Problem, Method, dict[str, Any]]:
    """The problem, the method, and the settings that a run is prepared and run with."""
    alone = RunSpec(problem=spec.problem, method="GD()", files=spec.files)
    method: Method = parse(spec.method, known_names(spec.files), Method)
    options = {name: getattr(spec, name) for name in ("rounds", "bits", "target", "step", "multiple", "pl")}
    return _problem(alone.model_dump_json()), method, options


def run_point(task: str, tell: pool.Tell) -> None:
    """Run a point, [folder, settings] in JSON, to its end; what a worker does."""
    folder, stored = json.loads(task)
    spec, said = RunSpec.model_validate(stored), 0.0
    problem, method, options = _of(spec)

    def record(row: Row) -> None:
        nonlocal said
        if time.monotonic() - said > 0.3:
            said = time.monotonic()
            tell(min(1.0, max(row.round / (spec.rounds or 1e18), row.up_bits / (spec.bits or 1e18))))

    simulate(
        problem, method, seed=spec.seed, every=spec.every, chunk=spec.chunk, out=folder, resume=True, record=record,
        facts={"spec": stored}, **options,
    )  # fmt: skip


def check(spec: SweepSpec) -> dict[str, RunSpec]:
    """The points, every one of which can be run. Raises ConfigError, with the point's settings, before any work."""
    points = spec.points()
    for point in points.values():
        try:
            problem, method, options = _of(point)
            prepare(problem, method, **options)
        except ConfigError as error:
            raise ConfigError(f"{point.method} on {point.problem.name}, seed {point.seed}: {error}") from None
    return points


def cost(spec: RunSpec) -> float:
    """A guess of a point's work, to tell the time left by: rounds times clients, coordinates, and a fixed part."""
    n, d = spec.problem.clients or 20, spec.problem.dim or 100
    rounds = spec.rounds or (spec.bits or 0.0) / (8.0 * d)
    return rounds * (n * d + 50_000.0)


class Progress:
    """What is done, in points and as a share of the guessed work."""

    def __init__(self, points: Mapping[str, RunSpec], finished: set[str]) -> None:
        self.costs = {key: cost(point) for key, point in points.items() if key not in finished}
        self.total, self.began, self.failed = len(points), time.monotonic(), 0
        self.done, self._ended, self._running = len(finished), 0.0, dict[str, float]()

    def at(self, key: str, fraction: float) -> None:
        """A running point says how far it is."""
        self._running[key] = fraction

    def end(self, key: str, error: str | None) -> None:
        """A point has ended."""
        self._running.pop(key, None)
        self._ended += self.costs[key]
        self.done += 1
        self.failed += error is not None

    @property
    def share(self) -> float:
        """Of the work of this session, 0 to 1."""
        whole = sum(self.costs.values())
        running = sum(fraction * self.costs[key] for key, fraction in self._running.items())
        return (self._ended + running) / whole if whole else 1.0

    @property
    def left(self) -> float | None:
        """Seconds, should the rest go on like what is done; None where next to nothing is."""
        spent, share = time.monotonic() - self.began, self.share
        return spent * (1.0 - share) / share if share > 1e-3 else None


def sweep(
    spec: SweepSpec,
    out: Path,
    command: str = "",
    resume: bool = False,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_failure: Callable[[RunSpec, str], None] = lambda point, error: None,
) -> list[dict[str, Any]]:
    """Run the points that have no result into `out`; the table of all. KeyboardInterrupt leaves a folder that
    resume=True finishes. A point that fails is told to on_failure, stands in the table, and is tried again on resuming.
    """
    points = check(spec)
    stored = json.loads(spec.model_dump_json())
    if resume and (out / "sweep.json").exists():
        if _settings(out)["spec"] != stored:
            raise ResumeMismatch(f"{out} holds another sweep; resume it with: shoal sweep --resume {out}")
        command = _settings(out)["command"]
    else:
        make_folder(out)
    facts = {"format": 1, "kind": "sweep", "title": spec.title, "command": command, "spec": stored}
    facts |= {"points": {key: json.loads(point.model_dump_json()) for key, point in points.items()}}
    facts |= {"versions": versions(), "machine": machine()}
    write_json(out / "sweep.json", facts)
    (out / "failed").mkdir(exist_ok=True)
    finished = {key for key in points if load_result(out / "points" / key) is not None}
    progress, tasks = Progress(points, finished), {}
    for key, point in points.items():
        if key not in finished:
            (out / "failed" / f"{key}.txt").unlink(missing_ok=True)
            tasks[json.dumps([str(out / "points" / key), json.loads(point.model_dump_json())])] = key

    def on_news(task: str, fraction: float) -> None:
        progress.at(tasks[task], fraction)
        on_progress(progress)

    def on_end(task: str, error: str | None) -> None:
        key = tasks[task]
        progress.end(key, error)
        if error is not None:
            (out / "failed" / f"{key}.txt").write_text(error + "\n")
            on_failure(points[key], error)
        on_progress(progress)

    on_progress(progress)
    try:
        pool.run(run_point, list(tasks), workers, on_news, on_end)
    finally:
        write_results(out, table(out))
    return table(out)


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (folder / "sweep.json").is_file()


def load_spec(folder: Path) -> SweepSpec:
    """The sweep in a folder."""
    return SweepSpec.read(_settings(folder)["spec"])


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "sweep.json"
    try:
        facts = dict(json.loads(file.read_text()))
        if facts["format"] != 1:
            raise ValueError(f"format {facts['format']!r}, and this version reads 1")
        return facts | {"spec": facts["spec"], "points": dict(facts["points"]), "command": str(facts["command"])}
    except OSError:
        raise ConfigError(f"{folder} holds no sweep: there is no sweep.json.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointCorrupt(
            f"{file}: {type(error).__name__}: {error}. Begin the sweep in another folder."
        ) from None


def table(folder: Path) -> list[dict[str, Any]]:
    """A row a point, in the grid's order: `key`, `status` (done, failed or open), the settings, the results.

    Fields of the problem are called problem.noise and so on; a result that is not there is None.
    """
    # Stored keys and not today's: a file that changed since does not make another point of what was run.
    return [_row(folder, key, settings) for key, settings in _settings(folder)["points"].items()]


def _row(folder: Path, key: str, settings: dict[str, Any]) -> dict[str, Any]:
    result, settings = load_result(folder / "points" / key), dict(settings)
    failed = (folder / "failed" / f"{key}.txt").exists()
    status = "done" if result is not None else "failed" if failed else "open"
    problem = {f"problem.{name}": value for name, value in settings.pop("problem").items()}
    settings |= {"step": str(settings["step"]), "files": ";".join(settings["files"])}
    found = result or {}
    found |= {"last_round": found.get("rounds"), "constants": json.dumps(found["constants"]) if found else None}
    found |= _curvature(found)
    return {"key": key, "status": status} | problem | settings | {name: found.get(name) for name in COLUMNS}


def _curvature(result: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of L_-, L_+ and L_±: as stated, the status of that, and the largest seen along the run."""
    columns: dict[str, Any] = {}
    for name, (value, status) in result.get("smoothness", {}).items():
        columns |= {f"L_{name}": value, f"L_{name}_status": status}
    return columns | {f"L_{name}_seen": value for name, (value, _) in result.get("seen", {}).items()}


def write_results(folder: Path, rows: list[dict[str, Any]]) -> None:
    """results.parquet; skipped where the extra [report] is not installed (`table` reads the folder itself)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    beside = folder / f".results.parquet.{os.getpid()}"
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), beside)
    os.replace(beside, folder / "results.parquet")
