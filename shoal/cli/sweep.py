"""shoal sweep: every combination of settings, in parallel, resumable, into one table."""

from __future__ import annotations

import math
import shlex
import signal
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from shoal.cli.options import UNREACHED, Out, again, app, err_console, fail, given, new_folder, out_console
from shoal.errors import ConfigError
from shoal.experiments import sweep as sweeps
from shoal.experiments.folder import make_folder
from shoal.experiments.grid import SweepSpec, values
from shoal.experiments.spec import RunSpec
from shoal.experiments.sweep import Progress

SHOWN = (
    "status",
    "stopped",
    "last_round",
    "grad_norm_sq",
    "up_bits",
    "gamma",
    "seconds",
    "L_minus_seen",
    "L_plus_seen",
    "L_pm_seen",
)


@app.command()
def sweep(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="A TOML file with [run] and [over], or several [[grids]].")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUES", help="A field that varies, e.g. problem.noise=0,0.05 or 'method=A();B()'."
        ),
    ] = None,
    fixed: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field that all points share.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core).")] = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(help="Finish the sweep in this folder; points with a result stay.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Show the table of the sweep in this folder, and run none.")
    ] = None,
) -> None:
    """A run for every combination of values, over processes; one table of all results.

    A field is any setting of a run: method, rounds, bits, target, seed, step, multiple, ..., problem.name,
    problem.clients, problem.noise, .... A point that fails is reported and stops no other.
    [bold]shoal sweep --set problem.name=quadratics --set rounds=500 --over problem.noise=0,0.1
    --over "method=Marina(PermK()),Marina(RandK(10))" --over seed=0,1,2[/bold]
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: at least one process.")
    for option, folder, beside in (("--table", table, set()), ("--resume", resume, {"workers"})):
        extra = sorted(given(context) - beside - {option.removeprefix("--")})
        if folder is not None and extra:
            raise ConfigError(f"{option} takes its settings from the folder: leave out {', '.join(extra)}.")
    if table is not None:
        show(table)
        return
    if resume is not None:
        spec, folder = sweeps.load_spec(resume), resume
    else:
        spec = _spec(file, over or [], fixed or [])
        folder = out or new_folder("sweep", file.stem if file else "grid")
    run(spec, folder, again(), resume is not None, workers, f"shoal sweep --resume {shlex.quote(str(folder))}")
    rows = show(folder)
    open_points = sum(row["status"] != "done" for row in rows)
    if open_points:
        fail(f"{open_points} of {len(rows)} points have no result; see {folder / 'failed'}.", UNREACHED)


def _spec(file: Path | None, over: list[str], fixed: list[str]) -> SweepSpec:
    """The file's sweep with what was given in place of what it says, in every grid."""
    settings = {}
    for text in fixed:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {text!r}: FIELD=VALUE, for instance rounds=500.")
        settings[name.strip()] = value.strip()
    axes = dict(map(values, over))
    if len(axes) + len(settings) < len(over) + len(fixed):
        raise ConfigError("--over and --set: each field at most once.")
    if file is None:
        return SweepSpec.read({"run": settings, "over": axes})
    try:
        read = SweepSpec.read(tomllib.loads(file.read_text()))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}.") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}.") from None
    return SweepSpec.of(title=read.title, grids=tuple(grid.changed(settings, axes) for grid in read.grids))


def run(spec: SweepSpec, folder: Path, command: str, resuming: bool, workers: int | None, advice: str) -> None:
    """Run a sweep under a progress bar with the time left."""
    if not resuming:
        sweeps.check(spec)  # a wrong sweep is one line, before anything is made
        make_folder(folder)
    with shown() as (on_progress, on_failure):
        try:
            sweeps.sweep(spec, folder, command, resuming, workers, on_progress, on_failure)
        except KeyboardInterrupt:
            fail(f"interrupted; go on with: {advice}", 130)


@contextmanager
def shown() -> Iterator[tuple[Callable[[Progress], None], Callable[[RunSpec, str], None]]]:
    """What shows a sweep's progress and its failures, while the context lasts."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may start background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    said = time.monotonic()
    bars = Bars(*columns, TextColumn("{task.fields[left]}"), TimeElapsedColumn(), console=err_console)
    bar = bars.add_task("points", total=None, left="")

    def on_progress(progress: Progress) -> None:
        nonlocal said
        bars.start()  # at the first news: what is wrong before is one line alone
        left = f"about {_duration(progress.left)} left" if progress.left and progress.done < progress.total else ""
        bars.update(bar, total=progress.total, completed=progress.done, left=left)
        if not err_console.is_terminal and time.monotonic() - said > 10.0:
            said = time.monotonic()
            err_console.print(f"{progress.done} of {progress.total} points done{left and '; '}{left}")

    def on_failure(point: RunSpec, error: str) -> None:
        where = f"{point.method} on {point.problem.name}, seed {point.seed}"
        err_console.print(f"[red]failed:[/red] {escape(f'{where}: {error}')}", highlight=False, soft_wrap=True)

    try:
        yield on_progress, on_failure
    finally:
        bars.stop()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show(folder: Path) -> list[dict[str, Any]]:
    """Print the table of a sweep: the settings that differ, and the results."""
    rows = sweeps.table(folder)
    sweeps.write_results(folder, rows)
    settings = list(rows[0])[2 : -len(sweeps.COLUMNS)]
    varied = [name for name in settings if len({str(row[name]) for row in rows}) > 1]
    shown = Table(*varied, *SHOWN, title=escape(f"{sweeps.load_spec(folder).title}: {folder}"))
    for row in rows:
        shown.add_row(*(escape(_cell(row[name])) for name in (*varied, *SHOWN)))
    Console(width=max(out_console.width, 160) if not out_console.is_terminal else None, emoji=False).print(shown)
    done = sum(row["status"] == "done" for row in rows)
    file = folder / "results.parquet"
    text = f"{done} of {len(rows)} points done" + (f"; the whole table: {file.resolve()}" if file.exists() else "")
    out_console.print(escape(text), highlight=False, soft_wrap=True)
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 and math.isfinite(value) else f"{value:.4g}"
    return str(value)
