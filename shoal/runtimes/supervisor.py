"""Ranks on this machine, forked, watched and replaced.

    launcher ---- fork ----> the store's keeper: where ranks meet, and read which attempt is under way
        \\------- fork ----> rank 0, rank 1, ...: each leads a process group of its own

The launcher has imported everything before it forks, and computes nothing itself, so a replacement is at work in
milliseconds. A rank that dies by a signal begins a new attempt: it is replaced, and the others, who have seen its lines
end, meet it there (`shoal.runtimes.attempts`). A rank that ends by itself with an error is not replaced: the others
hear the reason from it. Ctrl-C and SIGTERM reach the launcher alone, which passes them on once, waits for `PATIENCE`
and then kills; where the launcher is killed, the kernel kills the rest.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
import torch.distributed as dist

from shoal.errors import PeerDied, PeerLost
from shoal.runtimes import crash

PATIENCE = 4.0  # seconds for a checkpoint after a signal
PARTING = {True: 10.0, False: 2.0}  # seconds for the others, once a rank has ended by itself, well or not
RESTARTS = 100
# torch asks a name server who 127.0.0.1 is, for its log, whenever a store connects; libc waits 5 s for a lost answer.
RESOLVER = "timeout:1 attempts:1"
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


def _fork(work: Callable[[], int | None]) -> int:
    """The child's process id. It ends with what `work` returns, whatever happens, and when its parent does."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status: int | None = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.setdefault("RES_OPTIONS", RESOLVER)
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status or 0)


def _keep(ports: int, orders: int, theirs: int) -> NoReturn:
    """The store's process: says its port, then writes every attempt it is told of where the ranks can read it."""
    os.close(theirs)  # or the end of the orders would never come
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("attempt", "0")
    os.write(ports, b"%d\n" % store.port)
    while order := os.read(orders, 64):
        store.set("attempt", order.split()[-1].decode())
        os.write(ports, b"\n")
    os._exit(0)


class Supervisor:
    """`ranks` processes that do `work`, each under the variables that torchrun would set."""

    def __init__(self, ranks: int, work: Callable[[], int | None], restarts: int = RESTARTS) -> None:
        self.world, self.work, self.left = ranks, work, restarts
        self.attempt, self.status, self.asked = 0, 0, 0
        self.running: dict[int, int] = {}  # process id -> rank
        self.until: float | None = None  # when patience ends
        self._said, answers = os.pipe()
        orders, self._orders = os.pipe()
        self.keeper = _fork(lambda: _keep(answers, orders, self._orders))
        os.close(answers)
        os.close(orders)
        self.port = int(self._answer() or 0)
        self._lost, self._tell = os.pipe()  # ranks name here whom they have waited for in vain
        os.set_blocking(self._lost, False)

    def _answer(self) -> bytes:
        line = os.read(self._said, 64)
        if not line:
            raise PeerLost("the process that keeps the store has died: go on with --resume.")
        return line

    def _start(self, rank: int) -> None:
        facts = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "TORCHELASTIC_RUN_ID": "shoal",
            "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": self.attempt,
            "SHOAL_SUPERVISOR": self._tell, "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip

        def begin() -> int | None:
            os.close(self._orders)  # or the keeper would not see the launcher's end
            os.environ.update({name: str(value) for name, value in facts.items()})
            crash.arm() if self.attempt == 0 else crash.disarm()
            torch.set_num_threads(1)
            return self.work()

        self.running[_fork(begin)] = rank

    def run(self) -> int:
        """Until all have ended: 0 if the first to end did so well, else the status of the first that did not."""
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        with _caught(woken, self._signaled):
            try:
                for rank in range(self.world):
                    self._start(rank)
                while self.running:
                    wait = None if self.until is None else max(0.0, self.until - time.monotonic())
                    ready, _, _ = select.select([wake, self._lost], [], [], wait)
                    if wake in ready:
                        os.read(wake, 4096)
                    if self._lost in ready:
                        self._kill(int(rank) for rank in os.read(self._lost, 4096).split())
                    self._bury()
                    if self.until is not None and time.monotonic() > self.until:
                        self._kill(self.running.values())
                return (self.asked and 128 + self.asked) or self.status
            finally:
                self._end()
                signal.set_wakeup_fd(-1)
                os.close(wake)
                os.close(woken)

    def _signaled(self, number: int) -> None:
        """The first is passed on; after the second nobody waits."""
        self.until = time.monotonic() + (0.0 if self.asked else PATIENCE)
        if not self.asked:
            self.asked = number
            for pid in self.running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if number == signal.SIGHUP else number)

    def _kill(self, ranks: Iterable[int]) -> None:
        named = set(ranks)
        for pid, rank in self.running.items():
            if rank in named:
                os.kill(pid, signal.SIGKILL)

    def _bury(self) -> None:
        """Everyone who has died by now; those who were killed are replaced together, in one attempt."""
        killed = []
        while self.running:
            pid, raw = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            status = os.waitstatus_to_exitcode(raw)
            if pid == self.keeper:
                self.keeper = 0
                self._kill(self.running.values())
                raise PeerLost("the process that keeps the store has died: go on with --resume.")
            rank = self.running.pop(pid)
            if status < 0:
                killed.append((rank, -status))
            elif self.until is None:
                self.until = time.monotonic() + PARTING[status == 0]
                self.status = status
        if not killed or self.until is not None:
            return
        if self.left < len(killed):
            rank, number = killed[0]
            raise PeerDied(f"rank {rank} was ended by signal {number}, after all the replacements that are allowed: "
                           "look for the reason (memory?), then go on with --resume.", [rank])  # fmt: skip
        self.left -= len(killed)
        self.attempt += 1
        os.write(self._orders, b"%d\n" % self.attempt)
        self._answer()
        for rank, _ in killed:
            self._start(rank)

    def _end(self) -> None:
        for pid in [*self.running, *([self.keeper] if self.keeper else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for handle in (self._said, self._orders, self._lost, self._tell):
            os.close(handle)


@contextmanager
def _caught(woken: int, signaled: Callable[[int], None]) -> Iterator[None]:
    """Signals end the wait in `select`, and say so before it."""
    before = {n: signal.signal(n, lambda number, frame: _heard(number, signaled)) for n in _SIGNALS}
    old = signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)


def _heard(number: int, signaled: Callable[[int], None]) -> None:
    if number != signal.SIGCHLD:
        signaled(number)


def launch(ranks: int, work: Callable[[], int | None], restarts: int = RESTARTS) -> int:
    """Do `work` in `ranks` forked processes; the exit status. Ranks that are killed are replaced, `restarts` at most.

    The caller has started no thread: a fork has but one.
    """
    return Supervisor(ranks, work, restarts).run()
