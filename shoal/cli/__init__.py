"""The command line: race, run, sweep, reproduce, plan, mean, advise, bench, report, list.

What a command does is in experiments and report.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal import __version__, compressors, data, kernels, methods, problems, report
from shoal.cli import advise, bench, mean, plan, race, reproduce, run, sweep
from shoal.cli.options import With, app, err_console, out_console, spoken
from shoal.errors import CheckpointWarning
from shoal.experiments import sweep as sweeps
from shoal.experiments.expressions import known_names
from shoal.experiments.prepared import searching
from shoal.experiments.spec import ON_FILES
from shoal.report import mean as means
from shoal.report import mean_text

__all__ = ["advise", "app", "bench", "main", "mean", "plan", "race", "reproduce", "run", "sweep"]


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="The folder of a race, run, sweep or means, finished or not.")],
) -> None:
    """Read a folder of results again: the leaderboard, report.html, and the figures; or a sweep's table."""
    if sweeps.is_sweep(folder):
        sweep.show(folder)
        return
    if means.is_mean(folder):
        mean_text.print_means(means.load(folder), out_console)
        page = means.write(folder)
    else:
        report.print_leaderboard(report.load(folder), out_console)
        page = report.write(folder)
    out_console.print(f"[bold]report:[/bold] {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


@app.command("list")
def list_command(
    show_race: Annotated[
        bool, typer.Option("--race", help="Print the default race's file, to copy and change.")
    ] = False,
    with_file: With = None,
) -> None:
    """Methods, compressors and problems: a line each, with the paper."""
    if show_race:
        typer.echo(race.default_race(), nl=False)
        return
    table = Table("name", "what it is", "source", title="Use them in expressions such as 'Marina(RandK(k=10), p=0.1)'.")
    for kind, module in (("methods", methods), ("compressors", compressors), ("problems", problems)):
        table.add_section()
        table.add_row(f"[bold]{kind}[/bold]", "", "")
        for name in module.__all__:
            entry = getattr(module, name)
            if inspect.isclass(entry):
                table.add_row(_signature(entry), *map(escape, _described(entry)))
    for name, origin in data.BUNDLED.items():
        table.add_row(name, "bundled data for Classification", escape(origin))
    for name, (kind, called, _, build) in ON_FILES.items():
        if not inspect.ismethod(build):  # a class stands above
            table.add_row(name, f"on {kind}: --data FOLDER, or --data {called}", "docs/problems.md")
    for name, entry in known_names(with_file or ()).items():
        if name not in {n for m in (methods, compressors, problems) for n in m.__all__}:
            table.add_row(_signature(entry), *map(escape, _described(entry)))
    Console(width=max(out_console.width, 120) if not out_console.is_terminal else None).print(table)


def _signature(entry: type) -> str:
    names = [p.name for p in inspect.signature(entry).parameters.values() if p.name not in ("hosted", "args", "kwargs")]
    return escape(f"{entry.__name__}({', '.join(names)})")


def _described(entry: type) -> tuple[str, str]:
    """(first line of the docstring, arXiv ids of the class, else of its module)."""
    module = inspect.getmodule(entry)
    first = inspect.cleandoc(entry.__doc__ or "").split("\n")[0]
    for text in (entry.__doc__ or "", (module.__doc__ or "") if module else ""):
        papers = list(dict.fromkeys(re.findall(r"arXiv:\d{4}\.\d{5}", text)))
        if papers:
            return first, ", ".join(papers)
    return first, "textbook"


def _version(value: bool) -> None:
    if value:
        out_console.print(f"shoal {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """A warning as a line: what happened, and not where in the code."""
    err_console.print(f"[bold]note:[/bold] {escape(' '.join(str(message).split()))}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command; every error that can be expected is one line and a non-zero exit."""
    warnings.simplefilter("always", CheckpointWarning)
    warnings.showwarning = _note  # type: ignore[assignment]
    kernels.when_compiling(lambda: err_console.print("compiling kernels (once: they are kept)", style="dim"))
    try:
        spoken(app)
    except SystemExit as ended:
        if searching():  # a thread inside torch would make the interpreter's end an abort
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1)
        raise
