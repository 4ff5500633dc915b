"""A rehearsal: one rank's part of an exchange as it is, among ranks that are threads of this process.

The channel, the frames, the signals and the counting are those of a run; nothing travels. One thread computes at a
time, so the seconds of rank 0 are what its part takes on this machine, and its steps say how many bytes go out before
it may go on. So nothing that is predicted from it has a formula of its own for what a channel sends.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor

from shoal.runtimes.lines import TIMEOUT, Lines
from shoal.runtimes.peers import Peers
from shoal.runtimes.signals import Signal


class Step(NamedTuple):
    """One exchange of rank 0: signals to all others and then, in a ring or straight to each, `nbytes` in all.

    `nbytes` of a ring is what every rank sends, (ranks - 1) times its own; straight, the most that any rank sends or
    receives.
    """

    kind: Literal["signals", "ring", "straight"]
    nbytes: int


class Spent(NamedTuple):
    """Seconds that something computed takes: by the clock, and of the CPU in all threads."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Spent:
        """The clocks as they stand."""
        return Spent(time.perf_counter(), time.process_time())

    def since(self, began: Spent) -> Spent:
        """What has passed from `began` to here."""
        return Spent(self.wall - began.wall, self.cpu - began.cpu)


def median(found: Sequence[Spent]) -> Spent:
    """Of each clock's seconds."""
    return Spent(statistics.median(one.wall for one in found), statistics.median(one.cpu for one in found))


@dataclass(frozen=True)
class Rehearsed:
    """What rank 0 did: its exchanges in their order, the bytes it sent in all, and what it computed between them."""

    steps: tuple[Step, ...]
    moved: int
    spent: Spent
    result: Any


class Over(Exception):
    """Rank 0 has what it came for: the others go home."""


class Stage:
    """Where ranks lay down what they send. Rank 0 plays on the caller's thread, and before it takes what the others
    have brought to an exchange each of them plays up to there, one after the other."""

    def __init__(self, world: int, play: Callable[[Peers], Any]) -> None:
        self.world, self.steps = world, list[Step]()
        self._apart = Spent(0.0, 0.0)  # what the others' parts took
        self._laid: list[list[Any]] = []
        self._go = [threading.Semaphore(0) for _ in range(world)]
        self._there = [threading.Semaphore(0) for _ in range(world)]
        self._errors: list[BaseException] = []
        self._over = False
        self._play = play
        self._threads = [threading.Thread(target=self._act, args=(r,), daemon=True) for r in range(1, world)]

    def run(self) -> Rehearsed:
        """Rank 0's part, from its first line to its last."""
        for thread in self._threads:
            thread.start()
        peers = Seat(self, 0)
        began = Spent.now()
        try:
            result = self._play(peers)
            spent = Spent.now().since(began).since(self._apart)
        finally:
            self._over = True
            for r in range(1, self.world):
                self._go[r].release()
            for thread in self._threads:
                thread.join()
        return Rehearsed(tuple(self.steps), peers.moved, spent, result)

    def _act(self, rank: int) -> None:
        self._go[rank].acquire()
        try:
            if not self._over:
                self._play(Seat(self, rank))
        except Over:
            pass
        except BaseException as error:  # raised again where rank 0 waits
            self._errors.append(error)
        finally:
            self._there[rank].release()

    def meet(self, rank: int, number: int, mine: Any) -> list[Any]:
        """What every rank brings to the exchange of this number."""
        began = Spent.now()
        while len(self._laid) <= number:
            self._laid.append([None] * self.world)
        self._laid[number][rank] = mine
        if rank == 0:
            for other in range(1, self.world):
                self._go[other].release()
                self._there[other].acquire()
                if self._errors:
                    raise self._errors[0]
            if number > 1:
                self._laid[number - 2] = []  # all have read it
            found = list(self._laid[number])
            passed = Spent.now().since(began)
            self._apart = Spent(self._apart.wall + passed.wall, self._apart.cpu + passed.cpu)
            return found
        self._there[rank].release()
        self._go[rank].acquire()
        if self._over:
            raise Over
        return list(self._laid[number])


class Prompter:
    """`Lines` of a thread: signals are packed, counted, and handed over."""

    def __init__(self, stage: Stage, rank: int) -> None:
        self.stage, self.rank, self.timeout, self.attempt, self.number, self.meetings = stage, rank, TIMEOUT, 0, 0, 0

    def meet(self, mine: Any) -> list[Any]:
        """What every rank brings to this rank's next meeting."""
        self.meetings += 1
        return self.stage.meet(self.rank, self.meetings - 1, mine)

    def exchange(self, mine: Signal) -> tuple[list[Signal], int]:
        """As `Lines.exchange`."""
        self.number += 1
        sent = len(mine.pack()) * (self.stage.world - 1)
        signals = self.meet(mine)
        if self.rank == 0:
            self.stage.steps.append(Step("signals", sent))
        return signals, sent

    def close(self, error: BaseException | None = None, waiting: bool = False) -> None:
        """Nobody waits on a line."""


class Seat(Peers):
    """`Peers` of a thread: fences, checks and counts are those of a run."""

    def __init__(self, stage: Stage, rank: int) -> None:
        self.group, self.world, self.rank, self.moved = None, stage.world, rank, 0
        self.stage, self.prompter = stage, Prompter(stage, rank)
        self.lines = cast(Lines, self.prompter)
        self.digest, self.round = bytes(8), 0

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        if self.rank == 0:
            nbytes = mine.numel() * mine.element_size() * (self.world - 1)
            self.stage.steps.append(Step("ring", nbytes))
        # A copy, as it would arrive: a receiver may write into what it has received.
        return [row.clone() for row in self.prompter.meet(mine)]

    def _swapped(self, mine: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        everyone = self.prompter.meet(list(mine))
        if self.rank == 0:
            sent = [sum(len(p) for q, p in enumerate(row) if q != r) for r, row in enumerate(everyone)]
            heard = [sum(len(row[r]) for q, row in enumerate(everyone) if q != r) for r in range(self.world)]
            self.stage.steps.append(Step("straight", max(sent + heard)))
        return [row[self.rank].clone() for row in everyone]


def rehearsed(world: int, play: Callable[[Peers], Any]) -> Rehearsed:
    """`play` of `world` ranks, seen by rank 0. Every rank plays the same until rank 0 has ended."""
    return Stage(world, play).run()
