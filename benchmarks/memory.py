"""How much memory a simulated round takes: the peak of a process of its own, in multiples of n d float32 numbers.

Linux keeps the peak of a process (VmHWM) and resets it on request (/proc/self/clear_refs). It is reset before each
round, and what the round added is peak - resident size before it. MARINA with Correlated has both kinds of round: round
0 is full (4 d bytes a client in messages), round 1 is compressed. Both are run on quadratics, gradients included.
What the clients' states hold between rounds stands in a row of its own. Run as a module, this file is that process.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks import ROOT
from shoal import Correlated, Marina, Quadratics
from shoal.descents import Step
from shoal.experiments.timing import Row
from shoal.runtimes import Local, rounds

NEVER = 1e-9  # the coin never falls on heads: round 0 alone is full
ROUND_GOAL = (3.0, 200e6)  # a round adds less than 3 times 4 n d bytes, and 200 MB
TOTAL_GOAL = 4.0  # GB, the whole process at n = d = 10000
CLEAR = Path("/proc/self/clear_refs")


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is what is resident, VmHWM the most that was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: memory can be measured on Linux only.")


class Peak:
    """Bytes at the peak of a `with` block: `added` to what was resident before it, and `whole`."""

    added, whole = 0, 0

    def __enter__(self) -> Peak:
        # What an earlier block freed and the allocator kept would be handed to this one, which would seem to need less.
        with suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        self._before = status("VmRSS")
        CLEAR.write_text("5")  # from here on the peak is the block's
        return self

    def __exit__(self, *error: object) -> None:
        self.whole = status("VmHWM")
        self.added = self.whole - self._before


def child(n: int, d: int) -> dict[str, float]:
    """Bytes that the states, a full round, a compressed round and measuring f take, and the largest peak of all."""
    method, step = Marina(Correlated(), p=NEVER), Step(1e-3)
    for event in islice(rounds(method, step, Quadratics(n=4, d=64), Local(4), seed=0), 3):
        event.evaluate(event.state.x)  # compiled here: a compiler's memory is no round's
    began, peaks = time.perf_counter(), {}
    events = rounds(method, step, Quadratics(n=n, d=d, noise=0.1, lam=1e-6), Local(n), seed=0)
    for what in ("states", "full round", "compressed round"):
        with Peak() as peaks[what]:
            event = next(events)
    with Peak() as peaks["measuring f"]:
        event.evaluate(event.state.x)
    added: dict[str, float] = {what: peak.added for what, peak in peaks.items()}
    return added | {"total": max(peak.whole for peak in peaks.values()), "seconds": time.perf_counter() - began}


def measured(n: int, d: int) -> dict[str, float]:
    """What `child` says in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", str(n), str(d)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def measure(repeat: int) -> Iterator[Row]:
    """Rows in multiples of 4 n d bytes at n = 2000, d = 10000; the whole process at n = d = 10000, once.

    Raises OSError where the system keeps no peak that can be reset.
    """
    if not CLEAR.exists():
        raise OSError(f"memory needs {CLEAR}, which Linux has: run it there.")
    kinds = ("states", "full round", "compressed round", "measuring f")
    n, d = 2000, 10_000
    size, (times, extra) = 4 * n * d, ROUND_GOAL
    runs = [measured(n, d) for _ in range(repeat)]
    for what in kinds:
        goal = times + extra / size if "round" in what else None
        detail = {"MB": float(np.median([run[what] for run in runs])) / 1e6}
        yield Row("memory", f"n={n}, d={d}: {what}", "x 4nd", [run[what] / size for run in runs], None, goal, detail)
    n = d = 10_000
    run = measured(n, d)
    detail = {what: run[what] / (4 * n * d) for what in kinds} | {"seconds": run["seconds"]}
    yield Row("memory", f"n={n}, d={d}: whole process", "GB", [run["total"] / 1e9], None, TOTAL_GOAL, detail)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(child(int(sys.argv[1]), int(sys.argv[2]))))
