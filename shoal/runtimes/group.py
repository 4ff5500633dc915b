"""The start of a group: torchrun's ranks find each other within a deadline, or say who did not come.

The lines come first, under a deadline of our own, because gloo keeps none while it connects: a rank that dies then
leaves the others waiting for ever. Keys carry the attempt, since torchrun's restarts find the store of the dead attempt
with its addresses still in it. The store is kept by torchrun's agent, or by rank 0 where there is none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shoal.errors import ConfigError, PeerTimeout
from shoal.runtimes.lines import TIMEOUT, Lines, meet
from shoal.runtimes.peers import Peers


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise ConfigError(f"{name}={os.environ.get(name)!r}: start the ranks with torchrun, which sets it.") from None


def checked_timeout(seconds: float) -> float:
    """Seconds that a rank waits for another. Raises ConfigError unless positive and at most a day."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.0 < seconds <= 86400.0:
        raise ConfigError(f"timeout={seconds!r}: seconds that a rank waits for another, above 0, at most 86400.")
    return float(seconds)


def _bounded(action: Callable[[], Any], timeout: float, watch: Callable[[], None], late: PeerTimeout) -> Any:
    """What `action` returns, or raises `late`: in a thread, since torch's connecting may outlast its own timeout."""
    done: list[Any] = []
    failed: list[RuntimeError] = []

    def act() -> None:
        try:
            done.append(action())
        except RuntimeError as error:
            failed.append(error)

    thread, end = threading.Thread(target=act, daemon=True), time.monotonic() + timeout
    thread.start()
    while thread.is_alive():
        thread.join(0.01)
        watch()
        if thread.is_alive() and time.monotonic() > end:
            raise late
    if failed:
        raise failed[0]
    return done[0]


def _store(rank: int, timeout: float) -> dist.Store:
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT")
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    wait = timedelta(seconds=timeout)
    mend = "look whether rank 0, or torchrun, runs there"
    late = PeerTimeout(f"no store at {host}:{port} within {timeout:g} s: {mend}.", [0])
    try:
        return _bounded(
            lambda: dist.TCPStore(host, port, is_master=keeps, timeout=wait, wait_for_workers=False),
            timeout, lambda: None, late,
        )  # fmt: skip
    except RuntimeError as error:
        raise late from error


def _open_gloo(store: dist.Store, lines: Lines) -> None:
    """gloo's own connections, while the lines are watched."""
    wait = timedelta(seconds=lines.timeout)
    late = PeerTimeout(f"gloo did not connect within {lines.timeout:g} s, though all ranks are there.")

    def connect() -> None:
        dist.init_process_group("gloo", store=store, rank=lines.rank, world_size=lines.world, timeout=wait)
        if lines.closed:  # given up meanwhile: another attempt may be under way
            dist.destroy_process_group()

    # torch puts this count into its keys. A start that was given up leaves it raised here, and not in a new process:
    # the two would wait for each other under different keys.
    dist.distributed_c10d._world.group_count = 0
    try:
        _bounded(connect, lines.timeout, lambda: lines.watch(0.0), late)
    except RuntimeError as error:
        lines.inquire(str(error).splitlines()[0])


@contextmanager
def group(timeout: float = TIMEOUT, still: Callable[[], None] = lambda: None) -> Iterator[Peers]:
    """The ranks that torchrun (or RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says, connected within `timeout` seconds;
    none waits longer than that for another. At the end all say farewell, and why. `still`: see `lines.meet`.

    Raises PeerTimeout and PeerDied, naming the ranks.
    """
    timeout, rank, world = checked_timeout(timeout), _number("RANK"), _number("WORLD_SIZE")
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    store = dist.PrefixStore(f"shoal/{attempt}", _store(rank, timeout))
    lines = meet(store, rank, world, timeout, attempt, still)
    try:
        _open_gloo(dist.PrefixStore("gloo", store), lines)
        peers = Peers(lines=lines)
        yield peers
        peers.barrier()
    except BaseException as error:
        lines.close(error)
        raise
    finally:
        lines.close()
        if dist.is_initialized():
            dist.destroy_process_group()
