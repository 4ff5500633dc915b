"""Tasks over spawned processes: one that raises, or takes its process down, is reported and stops no other.

A standard pool is broken for good when a worker dies. Here every worker has a pipe of its own, so that its end is
seen, is blamed on the task it had, and another worker takes the next one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Tell = Callable[[float], None]  # how much of the task is done
Work = Callable[[str, Tell], None]  # a module's function: a worker imports it by name
PATIENCE = 30.0  # seconds that an interrupted task has for the end of its round and a checkpoint


def _serve(pipe: Connection, work: Work, parent: int) -> None:
    """Tasks until the pipe closes. A Ctrl-C reaches this process through its parent alone, and once."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # the parent was killed: nobody will ask for our results

    threading.Thread(target=watch, daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while True:
            task = pipe.recv_bytes().decode()
            _send(pipe, ["done", _tried(work, task, lambda fraction: _send(pipe, ["at", fraction]))])
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        return


def _tried(work: Work, task: str, tell: Tell) -> str | None:
    """What went wrong, in one line, or None."""
    try:
        work(task, tell)
    except BrokenPipeError:  # the parent has gone
        raise
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _send(pipe: Connection, said: list[Any]) -> None:
    pipe.send_bytes(json.dumps(said).encode())


class _Worker:
    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()  # or its end would never be seen here
        self.task = ""

    def hear(self) -> list[Any]:
        """["at", fraction] or ["done", error]; the end of the process is an error as well."""
        try:
            return list(json.loads(self.pipe.recv_bytes()))
        except (EOFError, ConnectionResetError):
            self.process.join()
            return ["lost", f"its process ended with status {self.process.exitcode}"]

    def give(self, task: str) -> None:
        self.task = task
        with suppress(BrokenPipeError):  # it has died since: `hear` says so
            self.pipe.send_bytes(task.encode())

    def stop(self, until: float) -> None:
        """End the process: at once where it waits for a task, else when its interrupted task lets it."""
        self.process.join(max(0.0, until - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Workers inherit the mask: a Ctrl-C must not hit one that is still importing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(
    work: Work,
    tasks: Sequence[str],
    workers: int | None = None,
    on_news: Callable[[str, float], None] = lambda task, fraction: None,
    on_end: Callable[[str, str | None], None] = lambda task, error: None,
) -> None:
    """Do every task once, in order of their start. on_news(task, fraction), on_end(task, None or what went wrong).

    workers: processes (default: one a core; 0: this process, which a dying task takes along). An interrupt is passed on
    to the tasks that run, and then let through.
    """
    if workers == 0:
        for task in tasks:
            on_end(task, _tried(work, task, lambda fraction, task=task: on_news(task, fraction)))  # type: ignore[misc]
        return
    waiting, crew = deque(tasks), []
    try:
        for _ in range(min(workers or os.cpu_count() or 1, len(waiting))):
            with _uninterrupted():
                crew.append(_Worker(work))
            crew[-1].give(waiting.popleft())
        while busy := {worker.pipe: worker for worker in crew if worker.task}:
            for pipe in wait(list(busy), timeout=0.5):
                worker = busy[pipe]  # type: ignore[index]
                kind, value = worker.hear()
                if kind == "at":
                    on_news(worker.task, value)
                    continue
                on_end(worker.task, value)
                worker.task = ""
                if kind == "lost":
                    crew.remove(worker)
                    worker.pipe.close()
                if waiting:
                    if kind == "lost":
                        with _uninterrupted():
                            worker = _Worker(work)
                            crew.append(worker)
                    worker.give(waiting.popleft())
    finally:  # every worker waits for a task, or all are interrupted
        for worker in crew:
            if worker.process.is_alive() and worker.process.pid:
                os.kill(worker.process.pid, signal.SIGINT)
        until = time.monotonic() + PATIENCE
        for worker in crew:
            worker.stop(until)
