"""shoal mean: estimate the mean of n vectors with many compressors, and say which to take."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shoal.cli.options import With, again, app, err_console, new_folder, out_console
from shoal.errors import ConfigError
from shoal.experiments.folder import make_folder
from shoal.experiments.mean import MeanEstimate, mean_estimation
from shoal.experiments.vectors import DRAWN, Inputs, given, made, read
from shoal.report import mean as page
from shoal.report import mean_text

PATIENCE = 2.0  # seconds without a progress bar
DEFAULT_DATA = "gaussian"
SPREADS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]  # of near-identical vectors, where none is named
OPTION = {"n": "clients", "d": "dim", "spread": "data"}  # what a sweep takes the place of


@app.command()
def mean(
    context: typer.Context,
    compressors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMPRESSORS...", help="Expressions such as 'RandK(0.03)'. Left out: all unbiased ones."
        ),
    ] = None,
    n: Annotated[int, typer.Option("--clients", "-n", help="Number of vectors.")] = 16,
    d: Annotated[int, typer.Option("--dim", "-d", help="Coordinates.")] = 4096,
    data: Annotated[str, typer.Option(help=", ".join(DRAWN) + " (S a number; left out, it is swept).")] = DEFAULT_DATA,
    vectors: Annotated[
        list[Path] | None,
        typer.Option(help="A .npy or .safetensors file with the vectors, a row a client; can be given several times."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Independent rounds, at least 2 (default: 200; fewer for long vectors).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of made vectors and of all compressors.")] = 0,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="WHAT=VALUES", help="n=2,4,8 or d=64,1024 or spread=0.01,0.1,1: one point each."),
    ] = None,
    with_file: With = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; must be empty or new.")] = None,
) -> None:
    """How well does each compressor estimate the mean of n vectors, for how many bits, and how fast?

    [bold]shoal mean[/bold]
    [bold]shoal mean --clients 16 --dim 1048576 --data near-identical[/bold]
    [bold]shoal mean --data near-identical:0.1 "Correlated()" "RandK(0.03)" --sweep n=2,4,8,16,32[/bold]
    [bold]shoal mean --vectors gradients.npy[/bold]
    """
    asked = {name for name in context.params if _on_command_line(context, name)}
    swept, values = _sweep(sweep)
    _refuse(asked, swept, bool(vectors))
    if data == "near-identical" and swept is None and not vectors:
        data, swept, values = DEFAULT_DATA, "spread", SPREADS
    points = _read(vectors, swept, values) if vectors else _made(data, n, d, seed, swept, values)
    torch.set_num_threads(1)
    if with_file:
        err_console.print(f"running code from {', '.join(with_file)}: trusted, not sandboxed", highlight=False)
    name = points[0].name if swept != "spread" else "near-identical"
    folder = out or new_folder("mean", name.replace(":", "-"))
    fresh = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)  # it must be known to be writable before anything is measured
    try:
        result = _measured(points, compressors, rounds, seed, swept, with_file or ())
    except BaseException:
        with suppress(OSError):  # what is not empty stays
            for path in fresh:
                path.rmdir()
        raise
    result.save(folder, again())
    _close(folder)


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _sweep(text: str | None) -> tuple[str | None, list[float]]:
    """("n", [2, 4, 8]) of "n=2,4,8"."""
    if text is None:
        return None, []
    what, _, listed = text.partition("=")
    try:
        values: list[float] = [float(v) if what == "spread" else int(v) for v in listed.split(",")]
    except ValueError:
        values = []
    if what not in ("n", "d", "spread") or not values or not all(0 < v < math.inf for v in values):
        raise ConfigError(f"--sweep {text}: n=2,4,8 or d=64,1024 or spread=0.01,0.1,1, positive numbers.")
    if sorted(set(values)) != values:
        raise ConfigError(f"--sweep {text}: values must ascend, each once.")
    return what, values


def _refuse(asked: set[str], swept: str | None, files: bool) -> None:
    """An option that would be ignored is a mistake."""
    if files:
        unused = asked & {"n", "d", "data"}
        if unused or swept == "spread":
            words = ", ".join(f"--{OPTION.get(name, name)}" for name in sorted(unused)) or "--sweep spread"
            raise ConfigError(f"--vectors brings the vectors: leave out {words}.")
    if swept in asked or (swept == "spread" and "data" in asked):
        raise ConfigError(f"--sweep {swept} sets it: leave out --{OPTION[swept]}.")


def _made(family: str, n: int, d: int, seed: int, swept: str | None, values: list[float]) -> list[Inputs]:
    if swept == "n":
        return [made(family, int(v), d, seed, v) for v in values]
    if swept == "d":
        return [made(family, n, int(v), seed, v) for v in values]
    if swept == "spread":
        return [made(f"near-identical:{v:g}", n, d, seed, v) for v in values]
    return [made(family, n, d, seed)]


def _read(files: list[Path], swept: str | None, values: list[float]) -> list[Inputs]:
    """The vectors in the files; in a sweep the first n of them, or their first d coordinates."""
    rows, name = read(files), ", ".join(file.name for file in files)
    if swept is None:
        return [given(rows, name)]
    have = rows.shape[0 if swept == "n" else 1]
    if values[-1] > have:
        raise ConfigError(f"--sweep {swept}={values[-1]:g}: the files have {swept} = {have}.")
    return [given(rows[: int(v)] if swept == "n" else rows[:, : int(v)], name, v) for v in values]


def _measured(
    points: list[Inputs],
    compressors: list[str] | None,
    rounds: int | None,
    seed: int,
    swept: str | None,
    files: Sequence[str],
) -> MeanEstimate:
    """The measurements, with a bar on the screen once they take longer than two seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=err_console, speed_estimate_period=600.0)  # compressors differ in speed
    task, began, shown = bar.add_task("", total=1.0), time.monotonic(), False

    def progress(label: str, share: float) -> None:
        nonlocal shown
        if not shown and time.monotonic() - began > PATIENCE:
            bar.start()
            shown = True
        if shown:
            bar.update(task, description=escape(label), completed=share)

    try:
        return mean_estimation(points, compressors, rounds, seed, sweep=swept, files=files, progress=progress)
    finally:
        if shown:
            bar.stop()


def _close(folder: Path) -> None:
    mean_text.print_means(page.load(folder), out_console)
    out_console.print(f"all of it: {escape(str(folder))}", highlight=False, soft_wrap=True)
    try:
        written = page.write(folder)
    except ConfigError as error:  # the extra is missing: the numbers stand, the page does not
        err_console.print(f"[yellow]no report.html:[/yellow] {escape(str(error))}", highlight=False, soft_wrap=True)
    else:
        out_console.print(f"[bold]report:[/bold] {escape(str(written.resolve()))}", highlight=False, soft_wrap=True)
