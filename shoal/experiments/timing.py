"""How benchmarks time what they run: CPU time of one thread, each sample beside a memory copy, medians of the samples.

A copy of the same float32 numbers is timed just before each sample, so that a row says how far from a memory copy it
is: ratio = median of t_copy / t over the pairs, 1.0 is as fast as a copy, and most of what a slow or busy machine does
to one it does to the other. CPU time leaves out the time that other processes take, but not what they do to caches and
memory bandwidth.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

clock = time.thread_time_ns  # this thread's CPU time: rich's own thread and other processes are not in it


@dataclass(frozen=True)
class Row:
    """One line of the table: samples in `unit`, their ratio to a memory copy, and the goal they should stay below."""

    bench: str
    name: str
    unit: str
    samples: list[float]
    ratio: float | None = None
    goal: float | None = None
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    @property
    def met(self) -> bool | None:
        """Whether the median is below the goal; None where there is no goal."""
        return None if self.goal is None else self.median < self.goal

    def facts(self) -> dict[str, Any]:
        """The row as JSON has it."""
        low, high = self.quartiles
        return {
            "bench": self.bench, "name": self.name, "unit": self.unit, "median": self.median, "lower_quartile": low,
            "upper_quartile": high, "samples": len(self.samples), "ratio_to_copy": self.ratio, "goal": self.goal,
            "met": self.met, "detail": self.detail,
        }  # fmt: skip


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread in one call."""
    began = clock()
    call()
    return (clock() - began) / 1e9


REST, AWAKE, RUN = 0.02, 0.005, 5  # seconds of nothing, seconds of calls that are not counted, and calls that are


def wall_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call on the wall clock: what several threads are timed by. The median of a few in a row.

    The rest before them lets threads that OpenMP left spinning go to sleep, and the calls that are not counted wake
    those that this call uses: both take milliseconds, which no figure of a kernel should hold.
    """
    time.sleep(REST)
    began = time.perf_counter()
    while time.perf_counter() - began < AWAKE:
        call()
    taken = []
    for _ in range(RUN):
        start = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - start) / 1e9)
    return float(np.median(taken))


def beside(
    call: Callable[[], Any], other: Callable[[], Any], repeat: int, *, wall: bool = False
) -> tuple[list[float], float]:
    """(seconds of `repeat` calls, the other's time / the call's).

    The ratio is the median over pairs, one right after the other. The first pair compiles, loads and touches the pages,
    and is thrown away.
    """
    seconds, pairs = wall_seconds if wall else cpu_seconds, []
    for _ in range(repeat + 1):
        yardstick = seconds(other)
        pairs.append((seconds(call), yardstick))
    return [t for t, _ in pairs[1:]], float(np.median([yardstick / t for t, yardstick in pairs[1:]]))


FAR = 1 << 27  # bytes: so many that no cache holds them until their turn comes again


def turns(floats: int) -> int:
    """How many vectors of so many float32 numbers take turns, so that each comes from memory and none from a cache."""
    return max(1, -(-FAR // (4 * floats)))


def beside_copy(
    call: Callable[[], Any], floats: int, repeat: int, *, wall: bool = False, far: bool = False
) -> tuple[list[float], float]:
    """`beside` the copy of so many float32 numbers into a ready buffer; with `far`, `turns` of both take turns.

    Several threads copy on the kernels' own ones: those of OpenMP, which torch would take, keep a core busy after it.
    """
    count = turns(floats) if far else 1
    pairs = cycle([(np.ones(floats, np.float32), np.ones(floats, np.float32)) for _ in range(count)])
    if not wall:
        return beside(call, lambda: np.copyto(*next(pairs)), repeat)
    from shoal.kernels.cpu.buffers import copied  # without compiled kernels there is but one thread
    from shoal.kernels.cpu.threads import spread

    return beside(call, lambda: spread(copied, next(pairs), floats, 1024), repeat, wall=True)


def normal_rows(m: int, d: int, seed: int) -> torch.Tensor:
    """(m, d) float32 standard normal numbers, the same on every machine."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal((m, d), np.float32))


def processor() -> str:
    """The processor's model as the kernel names it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def machine_line() -> str:
    """The machine in a line: cores this process may use, processor, memory, load."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {processor()}, {memory:.0f} GiB, {platform.system()}; load {os.getloadavg()[0]:.1f}"
