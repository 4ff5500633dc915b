"""`python -m benchmarks.advise`: what `shoal advise` predicts of the exchanges and steps of `benchmarks.slow_link`,
beside what they take.

On every link the ranks first measure what is predicted from (a step, the compressors, the line), all at the same time,
as they share this machine's cores; then come the exchanges and the steps. Two predictions: with the line that the ranks
measured, and with the rate that the link was given and no more. Needs root and iproute2, as slow_link does.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.slow_link.__main__ import OURS, measured, said
from benchmarks.slow_link.links import Link, links, missing
from benchmarks.slow_link.work import WIDE, wide
from shoal.core import Compressor
from shoal.experiments import workload
from shoal.experiments.advise import advice
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import versions, write_json
from shoal.experiments.line import Line, measured_line
from shoal.experiments.timing import machine_line, normal_rows
from shoal.experiments.workload import Bucket, Workload
from shoal.runtimes.group import group
from shoal.runtimes.peers import Peers
from shoal.runtimes.ranks import channel_of

JOBS = ("exchange", "step")
LATENCY = 0.1  # ms, that a told line has
CLOSE = 0.25  # how far a prediction may be off


def work_of(job: str, repeat: int, peers: Peers) -> Workload:
    """The job of slow_link, as it is predicted: the exchange of all gradients alone, or a step of its model."""
    if job == "step":
        return workload.measured(wide, job, repeat, lambda label, share: None, peers)
    d = 4 * WIDE * WIDE
    return Workload(job, 0.0, 0.0, (Bucket(d, 0, 0.0),), tuple(normal_rows(1, d, k)[0] for k in range(4)))


def predicted(peers: Peers, ways: list[str], repeat: int, rate: float) -> dict[str, Any]:
    """Seconds of every job and way, with the line as measured and as told. Collective."""
    codes = [parse(way, known_names(), Compressor) for way in ways]
    line, told, out = measured_line(peers), Line.told(rate, LATENCY), dict[str, Any]()
    for job in JOBS:
        result = advice(
            codes, work_of(job, repeat, peers), peers.world, line, channel_of("auto"), repeat=repeat, peers=peers
        )
        known = {way.name: way for way in result.ways}
        for name, way in [
            ("float32", result.plain),
            *((n, known[compact(c)]) for n, c in zip(ways, codes, strict=True)),
        ]:
            out[f"{job} {name}"] = [result.step(way), result.step(way, told)]
    return {"seconds": out, "mbit": line.bandwidth, "latency_ms": 1e3 * line.latency}


def table(link: Link, rows: list[dict[str, Any]], line: dict[str, Any]) -> Table:
    """A line a job and way."""
    found = f"measured by the ranks: {line['mbit']:.3g} Mbit/s, {line['latency_ms']:.2g} ms"
    out = Table(title=f"{link}; {found}", title_justify="left")
    for column in ("job", "way", "seconds", "predicted", "/ seconds", "from the rate alone", "/ seconds"):
        out.add_column(column, justify="left" if column in ("job", "way") else "right", no_wrap=column != "way")
    for row in rows:
        cells = []
        for guess in (row["predicted"], row["told"]):
            ratio = guess / row["measured"]
            cells += [f"{guess:.3g}", f"[{'green' if abs(ratio - 1) <= CLOSE else 'red'}]{ratio:.2f}[/]"]
        out.add_row(row["job"], row["way"], f"{row['measured']:.3g}", *cells)
    return out


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.advise", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rate", type=float, nargs="+", default=[10.0, 100.0, 1000.0], help="Mbit/s a line, each way")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5, help="of everything that is timed (default 5)")
    parser.add_argument("--way", action="append", help=f"a compressor (default {OURS}); float32 always")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--rank", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    why = None if chosen.rank else missing()
    if why is not None:
        parser.error(f"{why}.")
    if chosen.ranks < 2 or chosen.repeat < 1 or min(chosen.rate) <= 0:
        parser.error("at least two ranks and one repetition, rates above 0.")
    chosen.way = chosen.way or OURS
    return chosen


def main() -> int:
    """Exit status 0 when everything ran, however far off."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was made is taken down again
    chosen = options()
    if chosen.rank:
        torch.set_num_threads(1)
        with group() as peers:
            facts = predicted(peers, chosen.way, chosen.repeat, chosen.rank)
            if peers.rank == 0:
                print(json.dumps(facts), flush=True)
        return 0
    out, rows = Console(), list[dict[str, Any]]()
    out = out if out.is_terminal else Console(width=120)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        bar = progress.add_task("", total=None)
        for link in (Link(rate) for rate in chosen.rate):
            progress.update(bar, description=f"{link}: predicting")
            words = [
                sys.executable,
                "-m",
                "benchmarks.advise",
                "--rank",
                str(link.rate),
                "--repeat",
                str(chosen.repeat),
            ]
            words += [word for way in chosen.way for word in ("--way", way)]
            with links(chosen.ranks, link) as places:
                (line,) = (json.loads(text) for text in said(places, words))
            here = []
            asked = argparse.Namespace(ranks=chosen.ranks, repeat=chosen.repeat, way=["float32", *chosen.way], data="",
                                       accuracy=1.0, batch=1)  # fmt: skip
            for job in JOBS:
                progress.update(bar, description=f"{link}: {job}")
                for found in measured(link, job, asked):
                    guess = line["seconds"][f"{job} {found.way}"]
                    here.append({"rate": link.rate, "job": job, "way": found.way, "predicted": guess[0],
                                 "told": guess[1], "measured": float(np.median(found.seconds))})  # fmt: skip
            rows += here
            out.print(table(link, here, line))
    for which, words in (("predicted", "with the measured line"), ("told", "from the rate alone")):
        close = sum(abs(row[which] / row["measured"] - 1) <= CLOSE for row in rows)
        out.print(f"within {CLOSE:.0%} {words}: {close} of {len(rows)}", highlight=False)
    out.print(machine_line(), style="dim", highlight=False)
    if chosen.json is not None:
        write_json(chosen.json, {"format": 1, "machine": machine_line(), "versions": versions(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
