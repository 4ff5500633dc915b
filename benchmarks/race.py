"""Seconds a method on a small problem, where fixed costs decide: 400 clients, 32 coordinates, 400 rounds.

The problem is the quadratic one with noise = 0 and lam = 1e-6; f and its gradient are measured before every round, as
a race does. Wall time, warm: what numba compiled is loaded before the clock starts. Two rows more time a whole new
process that does the same run, from the interpreter's start to its end: cold, with an empty numba cache, and then with
the cache that the first one left. Run as a module, this file is that process.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks import ROOT
from shoal import Quadratics, simulate
from shoal.experiments.timing import Row, cpu_seconds

N, D, ROUNDS = 400, 32, 400
METHODS = ("Marina(Correlated())", "Marina(RandK(1))", "Marina(PermK())", "Marina(Independent())")
GOAL = 1.0  # seconds a method


def one_race(method: str, rounds: int = ROUNDS) -> None:
    """Run the method at its theory's step size, measured every round."""
    simulate(Quadratics(n=N, d=D, noise=0.0, lam=1e-6), method, rounds=rounds)


def fresh(method: str, cache: str) -> tuple[float, float]:
    """(wall, CPU) seconds of a new process whose compiled kernels are kept in the folder `cache`."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command, surroundings = [sys.executable, "-m", "benchmarks.race", method], {**os.environ, "NUMBA_CACHE_DIR": cache}
    subprocess.run(command, cwd=ROOT, env=surroundings, check=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repeat: int) -> Iterator[Row]:
    """A row a method, and two for new processes: with nothing compiled, and with what the first one compiled."""
    for method in METHODS:
        one_race(method, rounds=2)
        walls, busy = [], []
        for _ in range(repeat):
            began = time.perf_counter()
            busy.append(cpu_seconds(partial(one_race, method)))
            walls.append(time.perf_counter() - began)
        cpu = float(np.median(busy))
        yield Row("race", method, "s", walls, None, GOAL, {"cpu s": cpu, "cpu ms a round": 1e3 * cpu / ROUNDS})
    with tempfile.TemporaryDirectory() as empty:
        for what in ("cold", "cached"):
            wall, cpu = fresh(METHODS[0], empty)
            yield Row("race", f"{METHODS[0]}, new process, {what}", "s", [wall], None, None, {"cpu s": cpu})


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_race(sys.argv[1])
