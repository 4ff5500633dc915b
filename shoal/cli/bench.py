"""shoal bench: how fast every compressor encodes, decodes and aggregates here, against a memory copy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoal.cli.options import With, app, err_console, out_console
from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.experiments import bench as benches
from shoal.experiments.bench import PARTS, Throughput
from shoal.experiments.expressions import known_names, parse
from shoal.experiments.folder import versions
from shoal.experiments.goals import Checked, check
from shoal.experiments.mean import defaults
from shoal.experiments.timing import machine_line

DIMS = "100000,1000000,10000000"
GOALS = (1_000_000, 10_000_000)  # what the goals are checked at, as far as --dim names them


@app.command()
def bench(
    compressors: Annotated[
        list[str] | None, typer.Argument(metavar="COMPRESSORS...", help="Expressions. Left out: every compressor.")
    ] = None,
    d: Annotated[str, typer.Option("--dim", "-d", help="Numbers of coordinates.")] = DIMS,
    repeat: Annotated[int, typer.Option(help="Samples; small d take more.")] = 7,
    threads: Annotated[str, typer.Option(help="Numbers of threads; more than there are cores are left out.")] = "1,2",
    json: Annotated[Path | None, typer.Option(help="Write the rows, the machine and the versions here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds at the largest d here (.png, .pdf, .svg).")] = None,
    with_file: With = None,
) -> None:
    """Encode, decode and aggregate, in nanoseconds a coordinate and against a memory copy in the same run.

    Without COMPRESSORS: all of them, and then the goals of the kernels at d = 1e6 and 1e7.

    [bold]shoal bench[/bold]
    [bold]shoal bench "Correlated()" "QSGD(7)" --dim 1000000 --json rows.json[/bold]
    """
    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first.")
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot {plot}: the file ends in .png, .pdf or .svg.")
    if with_file:
        err_console.print(f"running code from {', '.join(with_file)}: trusted, not sandboxed", highlight=False)
    names, dims, counts = known_names(with_file or ()), _numbers("--dim", d), _counts(threads)
    chosen = [parse(text, names, Compressor) for text in compressors] if compressors else everything(names)
    rows = _rows(chosen, dims, repeat, counts)
    for (size, count), some in groupby(rows, key=lambda row: (row.d, row.threads)):
        out_console.print(_table(f"d = {size:,}, {_said(count)}", list(some)))
    out_console.print(
        f"ns a coordinate (aggregate: of {benches.CLIENTS} messages, a client-coordinate), medians, of the CPU on one "
        "thread and of the clock on more; x copy: time of a memory copy of the same float32 numbers / time, 1 is as "
        "fast", style="dim", highlight=False,
    )  # fmt: skip
    held = [] if compressors else _checked([size for size in dims if size in GOALS], counts, repeat)
    named = ", ".join(f"{k} {v}" for k, v in versions().items())
    out_console.print(f"{machine_line()}; {named}", style="dim", highlight=False)
    if json is not None:
        benches.save(rows, held, json)
    if plot is not None:
        benches.plot(rows).savefig(plot)


def _checked(dims: list[int], counts: list[int], repeat: int) -> list[Checked]:
    """The goals, with a line that says which was last measured, and their table."""
    if not dims:
        return []
    found: list[Checked] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True) as progress:
        task = progress.add_task("goals", total=None)
        for goal in check(dims, counts, repeat):
            found.append(goal)
            progress.update(task, description=escape(f"{goal.name}, d = {goal.d:,}, {_said(goal.threads)}"))
    table = Table(title="Goals", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for column in ("d", "threads", "ns", "x copy", "goal"):
        table.add_column(column, justify="right", no_wrap=True)
    for goal in found:
        ratio = "" if goal.ratio is None else f"{goal.ratio:.2g}"
        wanted = f"[{'green' if goal.met else 'red'}]{'≤' if goal.ratio is None else '≥'} {goal.goal:.2g}[/]"
        table.add_row(escape(goal.name), f"{goal.d:,}", str(goal.threads), f"{goal.figure:.3g}", ratio, wanted)
    out_console.print(table)
    out_console.print(f"{sum(goal.met for goal in found)} of {len(found)} goals met", highlight=False)
    return found


def _said(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


def _counts(text: str) -> list[int]:
    """Numbers of threads that there are cores for. Raises ConfigError where none is left."""
    asked, cores = _numbers("--threads", text), len(os.sched_getaffinity(0))
    fit = [count for count in asked if count <= cores]
    if not fit:
        raise ConfigError(f"--threads {text}: this machine has {cores} cores for it.")
    return fit


def everything(names: dict[str, type]) -> list[Compressor]:
    """The default compressors of `shoal mean`, and what is not unbiased."""
    chosen = [parse(text, names, Compressor) for text in ("Dense()", "TopK(0.01)")] + defaults(names)
    return list(dict.fromkeys(chosen))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(float(part)) if float(part).is_integer() else -1 for part in text.split(",")]
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} {text}: numbers, as in --dim 100000,1000000 or --threads 1,2.") from None


def _rows(chosen: Sequence[Compressor], dims: list[int], repeat: int, counts: list[int]) -> list[Throughput]:
    """All rows, with a line that says which was last measured."""
    found: list[Throughput] = []
    total = len(chosen) * len(dims) * len(PARTS) * len(counts)
    timed = benches.throughput(chosen, dims, repeat, counts)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err_console)
    with bar as progress:
        task = progress.add_task("warming up", total=total)
        for row in timed:
            found.append(row)
            progress.update(task, description=escape(row.row.name), advance=1)
    return found


def _table(title: str, rows: list[Throughput]) -> Table:
    """A line a compressor: bits, and for each part its time, its ratio to a copy, where there is room GB a second."""
    wide = out_console.width >= 110
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("compressor", overflow="fold")
    table.add_column("bits", justify="right")
    for part in PARTS:
        for column in (f"{part}\nns", "\nx copy", "\nGB/s")[: 3 if wide else 2]:
            table.add_column(column, justify="right", no_wrap=True)
    for name, some in groupby(rows, key=lambda row: row.compressor):
        parts = {row.part: row for row in some}
        shown = [parts[part] for part in PARTS]
        cells = [
            cell
            for r in shown
            for cell in (f"{r.row.median:.3g}", f"{r.row.ratio:.2g}", f"{r.gigabytes:.3g}")[: 3 if wide else 2]
        ]
        table.add_row(escape(name), f"{shown[0].bits:.3g}", *cells)
    return table
