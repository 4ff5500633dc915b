"""Kill ranks with SIGKILL, at named places or at random moments, and compare what comes out with a run without faults.

    python scripts/kills.py --points           # every place of shoal.runtimes.crash, on every rank
    python scripts/kills.py --kills 100        # random ranks at random moments, from the start on
    python scripts/kills.py --kills 20 --at-once 2    # two at the same moment; as many as ranks: a checkpoint must do

Each trial is a run over ranks on this machine, under the supervisor that `shoal run --ranks` has. Printed at the end:
how many trials ended at the identical iterate with one row a round, and how long it took from the kill to the next
round that is done for the first time. Exit status 1 unless all did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from shoal.core import Row
from shoal.errors import ShoalError
from shoal.experiments import checkpoint
from shoal.experiments.run import simulate
from shoal.problems import Quadratics
from shoal.runtimes.attempts import Attempts
from shoal.runtimes.crash import POINTS
from shoal.runtimes.replicated import connected
from shoal.runtimes.supervisor import launch

PROBLEM = Quadratics(n=8, d=40, noise=0.3, lam=0.1)
METHODS = ("EF21(TopK(4))", "Marina(Correlated(), p=0.3)", "Diana(RandK(4))", "GD()")
TIMEOUT = 20.0
FIRST = ("joining", "mid-checkpoint")  # places that are passed before round 0


def rank(method: str, rounds: int, out: Path, victims: Sequence[int], moment: float | None, told: Path) -> int:
    """What each rank does; where it is one of the victims, a process of its own kills it at that moment."""
    checkpoint.EVERY = -1.0  # at every round where the ranks ask each other
    me, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    if me in victims and attempt == "0" and moment is not None:
        prey = os.getpid()
        if os.fork() == 0:
            time.sleep(max(0.0, moment - time.monotonic()))
            if os.getppid() == prey:
                told.write_text(f"{time.monotonic()}")
                os.kill(prey, signal.SIGKILL)
            os._exit(0)
    times = (out.parent / f"{out.name}-rank{me}-{attempt}").open("w", buffering=1)

    def record(row: Row) -> None:
        times.write(f"{time.monotonic()} {row.round}\n")

    try:
        config = {"method": method, "rounds": rounds}
        with Attempts(lambda still: connected(PROBLEM.n, config, timeout=TIMEOUT, still=still), TIMEOUT) as attempts:
            simulate(PROBLEM, method, rounds=rounds, out=out, attempts=attempts, record=record)
    except ShoalError as error:
        print(f"rank {me}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def recovery(out: Path, killed: float) -> float | None:
    """Seconds from the kill to the first row of a round that no rank had before it; None if it came after the end."""
    rows = [line.split() for file in out.parent.glob(f"{out.name}-rank*") for line in file.read_text().splitlines()]
    seen = [(float(at), int(index)) for at, index in rows]
    best = max((index for at, index in seen if at <= killed), default=-1)
    return min((at - killed for at, index in seen if at > killed and index > best), default=None)


def trial(
    out: Path, ranks: int, rounds: int, method: str, victims: Sequence[int], delay: float | None
) -> tuple[str, float | None]:
    """(what went wrong or "", seconds to recover)."""
    told = out.with_suffix(".killed")
    moment = None if delay is None else time.monotonic() + delay
    status = launch(ranks, lambda: rank(method, rounds, out, victims, moment, told))
    result = json.loads((out / "result.json").read_text()) if (out / "result.json").exists() else {}
    if result:
        checkpoint.tidy(out)
    lines = (out / "metrics.jsonl").read_text().splitlines() if result else []
    seconds = recovery(out, float(told.read_text())) if told.exists() else None
    if status or result.get("sha256") != EXPECTED[method]:
        return f"status {status}, sha256 {result.get('sha256')}", seconds
    if [json.loads(line)["round"] for line in lines] != list(range(rounds + 1)):
        return "not one row a round", seconds
    if delay is None and not list(out.parent.glob(f"{out.name}-rank{victims[0]}-1")):
        return "nobody was killed", seconds
    left = [p.name for p in out.iterdir() if p.name not in KEPT]
    return (f"left behind: {left}" if left else ""), seconds


EXPECTED: dict[str, str] = {}
KEPT = {"config.json", "metrics.jsonl", "metrics.parquet", "result.json"}


def main() -> int:
    """Do the trials, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", action="store_true", help="every named place on every rank")
    parser.add_argument("--kills", type=int, default=0, help="how many random kills")
    parser.add_argument("--at-once", type=int, default=1, help="how many ranks a random kill takes")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["SHOAL_CRASH"] = ""
    for method in METHODS:
        EXPECTED[method] = simulate(PROBLEM, method, rounds=given.rounds).sha256
    if not 1 <= given.at_once <= given.ranks:
        parser.error(f"--at-once {given.at_once} of {given.ranks} ranks")
    cells = [(p, [r]) for p in POINTS for r in range(given.ranks)] if given.points else []
    draw, bad, times, lasted = random.Random(given.seed), [], [], []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        work = [*cells, *(("random", draw.sample(range(given.ranks), given.at_once)) for _ in range(given.kills))]
        for k, (place, victims) in enumerate(track(work, "killing", console=console, transient=True)):
            method, index = METHODS[k % len(METHODS)], 0 if place in FIRST else given.rounds // 2 + k % 2
            delay = draw.uniform(0.0, statistics.median(lasted) if lasted else 1.0) if place == "random" else None
            os.environ["SHOAL_CRASH"] = "" if place == "random" else f"{place}:{victims[0]}:{index}"
            began = time.monotonic()
            wrong, seconds = trial(Path(folder) / f"{k}", given.ranks, given.rounds, method, victims, delay)
            lasted.append(time.monotonic() - began)
            if wrong:
                bad.append(f"{place}, ranks {victims}, {method}, delay {delay}: {wrong}")
            if seconds is not None:
                times.append(seconds)
    print("\n".join(bad), end="\n" * bool(bad))
    print(f"{len(work) - len(bad)} of {len(work)} runs ended at the identical iterate")
    if times:
        middle, longest, run = statistics.median(times), max(times), statistics.median(lasted)
        print(f"from kill -9 to the next new round: median {middle:.3f} s, longest {longest:.3f} s, "
              f"{len(times)} measured; a whole run {run:.2f} s")  # fmt: skip
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
