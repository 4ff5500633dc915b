"""`python -m benchmarks`: time what the library does on this machine, on one thread, and compare with the goals.

What each row means, and how it is measured, is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import clients, gpu, memory, race, round
from shoal.experiments.folder import versions
from shoal.experiments.timing import Row, machine_line

# (what measures, its table's title, how many of the samples asked for it takes)
BENCHES: dict[str, tuple[Callable[[int], Iterator[Row]], str, Callable[[int], int]]] = {
    "round": (round.measure, "one compressed round, n = d = 1000, gradients apart: CPU ns a client-coordinate", int),
    "race": (race.measure, "400 rounds, n = 400, d = 32: wall seconds a method, warm", lambda repeat: -(-repeat // 5)),
    "memory": (memory.measure, "memory added by MARINA + Correlated, one thread", lambda repeat: -(-repeat // 15)),
    "clients": (clients.measure, "gradients of 1000 autoencoder clients, and a loop over them: seconds a pass", int),
    "gpu": (gpu.measure, "kernels on a GPU at d = 2^27: ps a coordinate", int),
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", choices=BENCHES, action="append", help=" | ".join(BENCHES))
    parser.add_argument(
        "--repeat", metavar="N", type=int, default=15,
        help="samples of a round or a kernel (default 15); a fifth as many races, a fifteenth as many runs for memory",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all rows, the machine and the versions")
    chosen = parser.parse_args()
    if chosen.repeat < 1:
        parser.error(f"--repeat {chosen.repeat}: at least one sample.")
    if chosen.json is not None and not chosen.json.absolute().parent.is_dir():
        parser.error(f"--json {chosen.json}: there is no folder {chosen.json.absolute().parent}; make it first.")
    return chosen


def table(title: str, rows: list[Row]) -> Table:
    """The rows of one benchmark."""
    out = Table(title=title, title_justify="left")
    out.add_column(overflow="fold")
    for column in ("median", "quartiles", "x copy", "goal"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("of which", overflow="fold")
    for row in rows:
        low, high = row.quartiles
        goal = "" if row.goal is None else f"[{'green' if row.met else 'red'}]< {row.goal:.3g}[/]"
        shown = (f"{row.median:.3g} {row.unit}", f"{low:.3g} .. {high:.3g}", f"{row.ratio:.3g}" if row.ratio else "")
        out.add_row(row.name, *shown, goal, ", ".join(f"{what} {value:.3g}" for what, value in row.detail.items()))
    return out


def run_all(chosen: argparse.Namespace, err: Console) -> dict[str, list[Row]]:
    """Every benchmark that was asked for, with a line on the screen that says which row was last measured."""
    found: dict[str, list[Row]] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("compiling kernels (kept for the next time)", total=None)
        for name in chosen.only or BENCHES:
            measure, _, share = BENCHES[name]
            found[name] = []
            try:
                for row in measure(share(chosen.repeat)):
                    found[name].append(row)
                    progress.update(task, description=f"{name}: {row.name}: {row.median:.3g} {row.unit}")
            except OSError as error:
                err.print(f"{name} is left out: {error}", style="yellow", markup=False)
    return found


def main() -> int:
    """Exit status: 0 whether or not the goals were met; they depend on the machine."""
    chosen = options()
    torch.set_num_threads(1)
    out, err, machine, began = Console(), Console(stderr=True), machine_line(), time.perf_counter()
    if not out.is_terminal:
        out = Console(width=140)  # a log has no width of its own
    found = run_all(chosen, err)
    for name, rows in ((name, rows) for name, rows in found.items() if rows):
        out.print(table(BENCHES[name][1], rows))
    out.print("x copy: time of a memory copy of the same float32 numbers / time; 1 is as fast as a copy", style="dim")
    out.print(f"{machine}; {', '.join(f'{k} {v}' for k, v in versions().items())}", style="dim", highlight=False)
    goals = [row for rows in found.values() for row in rows if row.met is not None]
    if goals:
        out.print(
            f"{sum(bool(row.met) for row in goals)} of {len(goals)} goals met in {time.perf_counter() - began:.0f} s"
        )
    if chosen.json is not None:
        facts = {"format": 1, "machine": machine, "versions": versions(), "repeat": chosen.repeat}
        rows_out = [row.facts() for rows in found.values() for row in rows]
        chosen.json.write_text(json.dumps({**facts, "rows": rows_out}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
