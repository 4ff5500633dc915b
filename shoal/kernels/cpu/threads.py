"""Plain threads for compiled loops, which release the interpreter lock; as many as torch is told to use.

numba's own threading layers are not taken: with one of them a forked child dies, with another the process aborts when
two Python threads enter it at once. Here any number of callers may come at any time, and each works on its own share
while it waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

LEAST = 1 << 17  # coordinates from which on a second thread gains more than the tens of microseconds that it costs

_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # the threads stay behind in the parent


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, "shoal-kernels")
    return _pool


def spread(work: Callable[[int, int], object], size: int, unit: int = 1, least: int = LEAST) -> None:
    """Call work(lo, hi) for consecutive ranges that cover 0..size-1, on up to torch.get_num_threads() threads.

    Every range but the last is a multiple of `unit` long, and none is shorter than about `least`, so that small calls
    stay on the caller's thread. `work` writes to its own range alone; what it returns is dropped.
    """
    threads = min(torch.get_num_threads(), size // max(least, 1))
    if threads < 2:
        work(0, size)
        return
    step = -(-size // (threads * unit)) * unit
    rest = [_threads().submit(work, lo, min(lo + step, size)) for lo in range(step, size, step)]
    try:
        work(0, step)
    finally:
        wait(rest)  # nothing may still write to the caller's arrays once this returns
    for part in rest:
        part.result()
