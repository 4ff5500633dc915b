"""Threads for compiled loops: as many as torch is told to use, and handed their work without the interpreter.

The caller writes its task on a board, and every thread takes the next piece until there are none. Threads of the crew
watch the board in compiled code for some hundred microseconds after the last task, so that the next costs about one
to hand out; then they sleep. Waking one takes its caller some tens: a large task does, and one of many. Nobody waits
for a thread that has not begun: whoever comes late, or finds another process on its core, finds less left to do. A
caller who finds the board taken works alone.

numba's own threading layers are not taken: with one of them a forked child dies, with another the process aborts when
two Python threads enter it at once.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from collections import deque
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numba import njit, types

from shoal.kernels.cpu.atomic import add, call, clock, load, outcome, pause, store, take, task

LEAST = 1 << 16  # coordinates a thread from which on another one that is awake gains more than it costs
WAKE = 8  # times as many, in all, from which on it pays to wake one
PIECES = 4  # a thread: who comes late leaves the others the rest
LINGER, AWAY = 300_000, 100_000  # nanoseconds: how long a thread watches the board; how long it may be kept from it
_TURN = 64  # looks at the board, after which a thread lets others have the core if there are any

# Words of the board, those that many threads write on lines of the cache of their own.
TICKET, OWNED, INSIDE, SEATS, NEXT = 0, 8, 16, 24, 32
SERIAL, FUNCTION, RECORD, SIZE, STEP, CORE, OVER, WORDS = 40, 41, 42, 43, 44, 45, 48, 56
_give_way = types.ExternalFunction("sched_yield", types.int32())
# Not every system says which core a thread is on, or lets it choose.
_LIBC = ctypes.CDLL(None)
_KNOWN = hasattr(_LIBC, "sched_getcpu") and hasattr(os, "sched_setaffinity")
_which = types.ExternalFunction("sched_getcpu" if _KNOWN else "sched_yield", types.int32())


@njit(cache=True, nogil=True)
def _pieces(board):
    """Pieces of the task on the board, until there are none."""
    function, record, size, step = board[FUNCTION], board[RECORD], board[SIZE], board[STEP]
    while True:
        lo = add(board, NEXT, step)
        if lo >= size:
            return
        call(function, record, lo, min(lo + step, size))


@njit(cache=True, nogil=True)
def _share(board, function, record, size, step, seats):
    """The whole task, with the help of at most `seats` other threads."""
    if not take(board, OWNED):
        call(function, record, 0, size)
        return
    board[SERIAL] += 1
    board[FUNCTION], board[RECORD], board[SIZE], board[STEP] = function, record, size, step
    board[CORE] = _which() if _KNOWN else -1
    store(board, SEATS, seats)
    store(board, NEXT, 0)
    store(board, TICKET, board[SERIAL])
    _pieces(board)
    store(board, TICKET, 0)
    turns = 0
    while load(board, INSIDE) > 0:  # nothing may still write to the caller's arrays once this returns
        pause()
        turns += 1
        if turns % _TURN == 0:
            _give_way()
    store(board, OWNED, 0)


@njit(cache=True, nogil=True)
def _watch(board, last):
    """Take part in every task but `last`, until there is none for `LINGER`, or others have had this core meanwhile:
    (the last task, -1). On its caller's core a thread gains nothing, and stops: (the last task, that core)."""
    turns, since = 0, 0
    while load(board, OVER) == 0:
        ticket = load(board, TICKET)
        if ticket != 0 and ticket != last:
            core = board[CORE]
            if core >= 0 and _which() == core:
                return last, core
            add(board, INSIDE, 1)
            if load(board, TICKET) == ticket:  # and stays: the caller closes the task, then waits for those inside
                if add(board, SEATS, -1) > 0:
                    _pieces(board)
                last = ticket
            add(board, INSIDE, -1)
        pause()
        turns += 1
        if turns % _TURN:
            continue
        began = clock()
        _give_way()
        now = clock()
        if ticket != 0:  # whose task it was is still at work
            since = 0
        elif since == 0:
            since = now
        if now - began > AWAY or (since > 0 and now - since > LINGER):
            break
    return last, -1


def _mine() -> set[int]:
    """The cores that the calling thread may be on; none where the system does not say."""
    try:
        return os.sched_getaffinity(0) if _KNOWN else set()
    except OSError:
        return set()


class Cores:
    """Where the thread that makes this may be: on its last caller's cores, but for the one that the caller is on.

    A system may well wake a thread on the core of the one that wakes it, or leave the two there for many milliseconds
    though another core is idle.
    """

    def __init__(self) -> None:
        self.thread, self.given = threading.get_native_id(), _mine()
        self.chosen: set[int] | None = None

    def leave(self, core: int) -> bool:
        """Go to another core; False where there is none."""
        return self.choose(self.given - {core})

    def choose(self, some: set[int]) -> bool:
        """Be on some of these; False where there are none, or they are not given."""
        try:
            os.sched_setaffinity(self.thread, some)
        except OSError:
            self.chosen = None
            return False
        self.chosen = some
        return True


class Crew:
    """A board, and the threads that watch it. They start when they are first needed, and end with the process."""

    def __init__(self) -> None:
        self.board = np.zeros(WORDS, np.int64)
        self.size, self.growing = 0, threading.Lock()
        self.asleep: deque[tuple[threading.Lock, Cores]] = deque()  # the bells of those who sleep
        self.called = 0.0  # when there was a task last

    def serve(self) -> None:
        bell, cores, last = threading.Lock(), Cores(), 0
        bell.acquire()
        while True:
            last, core = _watch(self.board, last)
            if core >= 0:
                if cores.leave(core):
                    continue
                last = int(self.board[TICKET])  # nothing to be gained here
            if self.board[TICKET] in (0, last):  # else a caller came who took this thread to be awake
                self.asleep.append((bell, cores))
                bell.acquire()

    def call(self, most: int, large: bool) -> int:
        """How many threads there are to help, at most so many; started and woken for a task that is `large`, or
        follows on the last."""
        last, self.called = self.called, time.perf_counter()
        if not large and self.called - last > LINGER / 1e9:
            return min(most, self.size - len(self.asleep))
        given = _mine()
        others = given - {_LIBC.sched_getcpu()} if given else given
        if given and not others:  # a user's choice, perhaps: threads keep to it
            return 0
        if self.size < most and self.size < (os.cpu_count() or 1):
            self.grow(min(most, os.cpu_count() or 1))
        for _ in range(min(most, len(self.asleep))):
            try:
                bell, cores = self.asleep.pop()
            except IndexError:  # another caller woke it
                break
            cores.given = given
            if given and cores.chosen != others:
                cores.choose(others)
            bell.release()
        return min(most, self.size)

    def grow(self, size: int) -> None:
        with self.growing:
            while self.size < size:
                name = f"shoal-kernels-{self.size}"
                threading.Thread(target=self.serve, name=name, daemon=True).start()
                self.size += 1

    def dismiss(self) -> None:
        """Nobody watches any longer: the interpreter ends."""
        self.board[OVER] = 1


_crew = Crew()


def _forget() -> None:
    global _crew
    _crew = Crew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # the threads stay behind in the parent
atexit.register(lambda: _crew.dismiss())


def _shared(board, size, step, seats, args):  # type: ignore[no-untyped-def]
    work = task(kernel, args)  # type: ignore[name-defined]  # noqa: F821
    _share(board, work[0], work[1], size, step, seats)
    return outcome(work[1])


@cache
def _sharing(kernel: Any) -> Any:
    """`_shared` for this kernel, compiled. It has the kernel's place in its file: so numba finds it again."""
    own, template = kernel.py_func, _shared.__code__
    name = f"{own.__name__}_shared"
    code = template.replace(
        co_name=name, co_qualname=name, co_filename=own.__code__.co_filename,
        co_firstlineno=own.__code__.co_firstlineno,
    )  # fmt: skip
    function = FunctionType(code, {**globals(), "kernel": kernel, "__name__": own.__module__}, name)
    return njit(cache=True, nogil=True)(function)


def spread(
    kernel: Any, args: tuple[Any, ...], size: int, unit: int = 1, least: int = LEAST, pieces: int = PIECES
) -> bool:
    """Call kernel(*args, lo, hi) for consecutive ranges that cover 0..size-1, on up to torch.get_num_threads() threads.

    Every range but the last is a multiple of `unit` long, and no thread is called for less than about `least`, so that
    small calls stay on the caller's thread; it takes about `pieces` ranges. The kernel is compiled, writes to its own
    range alone, and returns nothing or a bool: whether one of them is True.
    """
    threads = min(torch.get_num_threads(), size // max(least, 1)) if size >= 2 * least else 1
    helpers = _crew.call(threads - 1, size >= WAKE * least) if threads > 1 else 0
    if helpers < 1:
        return kernel(*args, 0, size) is True
    step = -(-size // (pieces * (helpers + 1) * unit)) * unit
    return _sharing(kernel)(_crew.board, size, step, helpers, args)
