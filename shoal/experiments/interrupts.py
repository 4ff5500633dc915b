"""Ctrl-C, SIGTERM and the clock: what asks a run to stop or to save, and when all of its processes act on it.

A signal reaches one process, and clocks differ; but a checkpoint, and an end, must come at one round everywhere. So the
processes ask each other now and then: every round where there is one process or rounds are slow, else after as many
rounds as take about `PERIOD`, a number that all of them derive from the same answers.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shoal.core import Channel

PERIOD = 0.25  # seconds between two questions: an exchange of 24 bytes costs a few milliseconds
FASTEST = 2**20  # rounds between them at most


def stopped(number: int) -> BaseException:
    """What ends a process that was sent SIGINT or SIGTERM."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(143)


class Interrupts:
    """Ctrl-C and SIGTERM wait for the end of a round, so that a checkpoint is always of a whole one; the second Ctrl-C
    does not wait."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number

    def heed(self) -> None:
        """Raises what a signal asked for, where there was one."""
        if self.asked is not None:
            raise stopped(self.asked)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Handlers in place; only the main thread can have any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Pulse:
    """What the processes of a channel have settled: the signal that one of them got, whether a checkpoint is due."""

    def __init__(self, channel: Channel, index: int) -> None:
        self.channel, self.at, self.stride, self.last = channel, index, 1, time.monotonic()
        self.alone = len(channel.together(torch.zeros(1))) == 1

    def __call__(self, index: int, asked: int | None, due: bool) -> tuple[int | None, bool]:
        """(the signal or None, whether to save now), alike in all processes; collective at rounds that all know."""
        if self.alone:
            return asked, due
        if index < self.at:
            return None, False
        now = time.monotonic()
        mine = torch.tensor([asked or 0, int(due), int(1e6 * (now - self.last))])
        told = torch.stack(self.channel.together(mine))
        number, save, took = told.max(0).values.tolist()
        fitting = int(self.stride * PERIOD * 1e6 / max(took, 1))
        self.stride = max(1, min(2 * self.stride, fitting, FASTEST))
        self.at, self.last = index + self.stride, now
        return number or None, bool(save)
