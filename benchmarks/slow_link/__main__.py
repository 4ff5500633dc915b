"""`python -m benchmarks.slow_link`: what compression is worth on slow links, against what torch has built in.

Ranks in network namespaces of this machine, their lines shaped both ways (root, iproute2). Three jobs: the exchange of
25 MiB of gradients alone, whole steps of a model of that size, and a network trained on MNIST to an accuracy. What the
rows mean, and figures, are in docs/slow-links.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.slow_link.links import Link, Place, links, missing
from benchmarks.slow_link.work import Found, Task
from shoal.experiments.folder import versions
from shoal.experiments.timing import machine_line

OURS = [
    "Correlated()", "Rotated(Correlated())", "Drive(numerical=True)", "Eden(1, numerical=True)",
    "Eden(2, numerical=True)",
]  # fmt: skip
BUILT_IN = ["float32", "fp16"]  # PowerSGD has to be asked for: with more than one bucket it hung on gloo
TITLES = {
    "exchange": "the mean of 25 MiB of gradients, alone",
    "step": "a whole step of a model with 25 MiB of gradients",
    "mnist": "a network of 1.2 million parameters on MNIST, to the test accuracy",
}
PORT = 29531


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_link", description=__doc__.partition("\n")[0])
    parser.add_argument("--job", choices=TITLES, action="append", help="default: exchange and step; mnist with --data")
    parser.add_argument("--rate", type=float, nargs="+", default=[10.0, 100.0, 1000.0], help="Mbit/s a line, each way")
    parser.add_argument("--delay", type=float, default=0.0, help="ms one way (carried in user space; default 0)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=7, help="repetitions of an exchange or a step (default 7)")
    parser.add_argument("--way", action="append", help=f"float32, fp16, PowerSGD(rank), or a compressor of {OURS} ...")
    parser.add_argument("--data", default="", help="a folder of MNIST's files")
    parser.add_argument("--accuracy", type=float, default=0.97, help="of mnist (default 0.97)")
    parser.add_argument("--batch", type=int, default=16, help="images a rank in a step of mnist (default 16)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all rows, the machine and the versions")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the table: .png, .pdf or .svg")
    chosen = parser.parse_args()
    why = missing()
    if why is not None:
        parser.error(f"{why}.")
    if chosen.ranks < 2 or min(chosen.repeat, chosen.batch) < 1 or min(chosen.rate) <= 0 or chosen.delay < 0:
        parser.error("at least two ranks, one repetition and one image, rates above 0 and no negative delay.")
    jobs = chosen.job or ["exchange", "step", *(["mnist"] if chosen.data else [])]
    if "mnist" in jobs and not chosen.data:
        parser.error("--job mnist needs --data, a folder of MNIST's files.")
    chosen.job = jobs
    return chosen


def ways(job: str, chosen: argparse.Namespace) -> list[str]:
    """What is compared in this job."""
    return chosen.way or [*BUILT_IN, *(OURS[:2] if job == "mnist" else OURS)]


def said(places: list[Place], words: list[str]) -> Iterator[str]:
    """What rank 0 prints, line by line, of these words run as a rank in every place. Raises RuntimeError where a rank
    fails."""
    started = []
    for rank, place in enumerate(places):
        env = {
            "RANK": rank, "WORLD_SIZE": len(places), "MASTER_ADDR": places[0].address, "MASTER_PORT": PORT,
            "GLOO_SOCKET_IFNAME": place.device, "OMP_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        there = os.environ | {name: str(value) for name, value in env.items()}
        started.append(subprocess.Popen(place.command(words), env=there, stdout=pipe, text=True))
    threading.Thread(target=_watch, args=(started,), daemon=True).start()
    try:
        assert started[0].stdout is not None
        yield from started[0].stdout
    finally:
        for process in started:
            process.terminate()
        status = [process.wait() for process in started]
    if any(code > 0 for code in status):
        raise RuntimeError(f"the ranks ended with {status}; what they said stands above.")


def _watch(started: list[subprocess.Popen[str]]) -> None:
    """Where one rank fails, the others would wait for it, some of them for ever."""
    while any(process.poll() is None for process in started):
        if any(process.returncode for process in started):
            for process in started:
                process.kill()
        time.sleep(0.5)


def measured(link: Link, job: str, chosen: argparse.Namespace) -> Iterator[Found]:
    """One row a way, as they come."""
    with links(chosen.ranks, link) as places:
        task = Task(job, ways(job, chosen), chosen.repeat, places[0].device, chosen.data, chosen.accuracy, chosen.batch)
        for line in said(places, [sys.executable, "-m", "benchmarks.slow_link.work", json.dumps(asdict(task))]):
            yield Found(**json.loads(line))


def table(title: str, rows: list[Found]) -> Table:
    """The rows of one job on one link, beside plain DDP's."""
    out = Table(title=title, title_justify="left")
    out.add_column("", overflow="fold")
    for column in ("seconds", "quartiles", "against float32", "MB sent a rank", "against float32", "steps"):
        out.add_column(column, justify="right", no_wrap=True)
    plain = next((row for row in rows if row.way == "float32" and row.seconds), None)
    for row in rows:
        if not row.seconds or (row.reached is None and row.note):
            out.add_row(row.way, "[red]not reached[/]" if row.seconds else "[red]failed[/]", row.note, "", "", "", "")
            continue
        low, middle, high = np.percentile(row.seconds, [25, 50, 75])
        faster = f"{np.median(plain.seconds) / middle:.2f} x faster" if plain else ""
        fewer = f"{plain.sent / row.sent:.1f} x fewer" if plain and row.sent else ""
        band = f"{low:.3g} .. {high:.3g}" if len(row.seconds) > 1 else ""
        out.add_row(row.way, f"{middle:.3g}", band, faster, f"{row.sent / 1e6:.2f}", fewer, str(row.steps))
    return out


def drawn(found: dict[tuple[str, str], list[Found]], path: Path) -> None:
    """A panel a job: seconds of each way, one group of bars a link, on a log scale."""
    from matplotlib.figure import Figure

    jobs = list(dict.fromkeys(job for job, _ in found))
    figure = Figure(figsize=(6.4 * len(jobs), 4.6), layout="constrained")
    for panel, job in zip(np.atleast_1d(figure.subplots(1, len(jobs))), jobs, strict=True):
        lines = [link for name, link in found if name == job]
        for i, link in enumerate(lines):
            rows = [row for row in found[job, link] if row.seconds and not (row.reached is None and row.note)]
            places = [j + 0.8 * (i + 0.5) / len(lines) - 0.4 for j, _ in enumerate(rows)]
            panel.bar(places, [float(np.median(row.seconds)) for row in rows], 0.8 / len(lines), label=link)
            panel.set_xticks(range(len(rows)), [row.way for row in rows], rotation=30, ha="right")
        panel.set_yscale("log")
        panel.set_ylabel("seconds")
        panel.set_title(TITLES[job], fontsize=10)
        panel.legend()
    figure.savefig(path, dpi=160)


def main() -> int:
    """Exit status 0 when everything ran, whatever came out."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was made is taken down again
    chosen = options()
    out, err, found = Console(), Console(stderr=True), dict[tuple[str, str], list[Found]]()
    if not out.is_terminal:
        out = Console(width=140)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, refresh_per_second=2) as progress:
        bar = progress.add_task("starting", total=None)
        for job in chosen.job:
            for link in (Link(rate, chosen.delay) for rate in chosen.rate):
                rows = found[job, str(link)] = []
                progress.update(bar, description=f"{job}, {link}: starting {chosen.ranks} ranks")
                for row in measured(link, job, chosen):
                    rows.append(row)
                    progress.update(bar, description=f"{job}, {link}: {row.way} done")
                out.print(table(f"{TITLES[job]}: {chosen.ranks} ranks, {link}", rows))
    machine = machine_line()
    out.print(f"{machine}; {', '.join(f'{k} {v}' for k, v in versions().items())}", style="dim", highlight=False)
    if chosen.json is not None:
        rows_out: list[dict[str, Any]] = [
            {"job": job, "link": link, **asdict(row)} for (job, link), rows in found.items() for row in rows
        ]
        facts = {"format": 1, "ranks": chosen.ranks, "machine": machine, "versions": versions()}
        chosen.json.write_text(json.dumps({**facts, "rows": rows_out}, indent=1) + "\n")
    if chosen.plot is not None:
        drawn(found, chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
