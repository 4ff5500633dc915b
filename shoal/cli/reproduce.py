"""shoal reproduce: published experiments again, each with a report of claim, figure and verdict."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal.cli.options import app, fail, out_console
from shoal.cli.sweep import shown
from shoal.errors import ConfigError
from shoal.experiments.reproduce import REPRODUCTIONS, Outcome, Reproduction
from shoal.experiments.reproduce import reproduce as run_reproduction


@app.command()
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Which; --list names them.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them, one after the other.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Name them, with the paper, and run none.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: the claim's direction in seconds.")] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="A LIBSVM file that does not come along (w8a, a9a), or MNIST's folder."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core; 0: this one).")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results, one in it for each; what is done stays.")] = Path(
        "reproductions"
    ),
) -> None:
    """Published experiments again. Writes report.md: the paper's claim, our figure, whether they agree, and why.

    What was cut goes on where it was: the same command again.
    [bold]shoal reproduce cq-ratio cq-parity[/bold]
    [bold]shoal reproduce --all --quick[/bold]
    """
    if listing:
        table = Table("name", "what it is", "paper")
        for one in REPRODUCTIONS.values():
            table.add_row(one.name, escape(one.title), escape(one.paper))
        out_console.print(table)
        return
    if workers is not None and workers < 0:
        raise ConfigError(f"--workers {workers}: at least one process, or 0 for this one.")
    wanted = list(REPRODUCTIONS) if every else names or []
    unknown = [name for name in wanted if name not in REPRODUCTIONS]
    if unknown or not wanted:
        said = f"{unknown[0]!r} is none of them" if unknown else "which one"
        raise ConfigError(f"{said}: give one or more of {', '.join(REPRODUCTIONS)}, or --all.")
    without = [name for name in wanted if not REPRODUCTIONS[name].can_run(quick, data or [])]
    if without and not every:
        needs = REPRODUCTIONS[without[0]].needs
        raise ConfigError(f"{without[0]} needs {needs}: --data FOLDER, or --quick, which does without.")
    done: dict[str, Outcome] = {}
    for name in wanted:
        if name in without:
            out_console.print(f"left out: {name}, which needs {REPRODUCTIONS[name].needs}: --data FOLDER.")
            continue
        folder = out / (f"{name}-quick" if quick else name)
        done[name] = _one(REPRODUCTIONS[name], folder, quick, data or [], workers)
    _show(done)


def _one(what: Reproduction, folder: Path, quick: bool, data: list[Path], workers: int | None) -> Outcome:
    with shown() as (on_progress, on_failure):
        try:
            outcome = run_reproduction(what, folder, quick, data, workers, on_progress, on_failure)
        except KeyboardInterrupt:
            fail(f"interrupted; the same command goes on with {shlex.quote(str(folder))}.", 130)
    report = (folder / "report.md").resolve()
    out_console.print(f"[bold]report:[/bold] {escape(str(report))}", highlight=False, soft_wrap=True)
    return outcome


def _show(done: dict[str, Outcome]) -> None:
    """All findings in one table, and the names of those with a claim that was not confirmed."""
    table = Table("reproduction", "claim", "known from", "our figure", "verdict")
    for name, outcome in done.items():
        for k, found in enumerate(outcome.findings):
            cells = ("" if k else name, found.claim, found.basis, found.figure, found.verdict)
            table.add_row(*map(escape, cells), end_section=k + 1 == len(outcome.findings))
    Console(width=max(out_console.width, 160) if not out_console.is_terminal else None, emoji=False).print(table)
    missed = [name for name, outcome in done.items() if any(f.verdict == "disagrees" for f in outcome.findings)]
    if missed:
        out_console.print(f"not as claimed: {', '.join(missed)}; the reports say why.")
