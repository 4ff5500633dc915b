"""Plain threads for compiled loops, which release the interpreter lock; as many as torch is told to use.

numba's own threading layers are not taken: with one of them a forked child dies, with another the process aborts when
two Python threads enter it at once. Here any number of callers may come at any time, and each works on its own share
while it waits. A queue and a lock a share are all there is: handing over costs as much as computing many coordinates.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

LEAST = 1 << 17  # coordinates from which on a second thread gains more than the tens of microseconds that it costs


class Share:
    """A range of somebody's work, and whether it is done."""

    def __init__(self, work: Callable[[int, int], object], lo: int, hi: int) -> None:
        self.work, self.lo, self.hi = work, lo, hi
        self.error: BaseException | None = None
        self.open = threading.Lock()  # an Event is several times slower
        self.open.acquire()

    def run(self) -> None:
        try:
            self.work(self.lo, self.hi)
        except BaseException as error:  # raised again where the work was given out
            self.error = error
        finally:
            self.open.release()


class Crew:
    """One queue, and the threads that serve it. They start when they are first needed, and end with the process."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Share] = SimpleQueue()
        self.size, self.growing = 0, threading.Lock()

    def serve(self) -> None:
        while True:
            self.queue.get().run()

    def give(self, shares: list[Share]) -> None:
        with self.growing:
            while self.size < min(len(shares), os.cpu_count() or 1):
                threading.Thread(target=self.serve, name=f"shoal-kernels-{self.size}", daemon=True).start()
                self.size += 1
        for share in shares:
            self.queue.put(share)


_crew = Crew()


def _forget() -> None:
    global _crew
    _crew = Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # the threads stay behind in the parent


def spread(work: Callable[[int, int], object], size: int, unit: int = 1, least: int = LEAST) -> None:
    """Call work(lo, hi) for consecutive ranges that cover 0..size-1, on up to torch.get_num_threads() threads.

    Every range but the last is a multiple of `unit` long, and none is shorter than about `least`, so that small calls
    stay on the caller's thread. `work` writes to its own range alone; what it returns is dropped.
    """
    if size < 2 * least:
        work(0, size)
        return
    threads = min(torch.get_num_threads(), size // max(least, 1))
    if threads < 2:
        work(0, size)
        return
    step = -(-size // (threads * unit)) * unit
    rest = [Share(work, lo, min(lo + step, size)) for lo in range(step, size, step)]
    _crew.give(rest)
    try:
        work(0, min(step, size))
    finally:
        for share in rest:  # nothing may still write to the caller's arrays once this returns
            share.open.acquire()
    for share in rest:
        if share.error is not None:
            raise share.error
