"""The start of a group: torchrun's ranks find each other within a deadline, or say who did not come.

The lines come first, under a deadline of our own, because gloo keeps none while it connects: a rank that dies then
leaves the others waiting for ever. The store is kept by torchrun's agent, or by rank 0 where there is none, and may
outlive an attempt, with the addresses of the dead in it. Under `shoal.runtimes.supervisor` keys carry the attempt.
torchrun's count of restarts will not do for that: on two machines it may differ, since an agent that restarts only
because the other did counts nothing (torch 2.13). So there a rank's newest door replaces its last one, all ranks whose
doors are open meet, and rank 0 names the keys under which gloo's addresses of this meeting stand.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from shoal.errors import ConfigError, PeerTimeout
from shoal.runtimes.lines import TIMEOUT, Lines
from shoal.runtimes.meeting import meet
from shoal.runtimes.peers import Peers
from shoal.runtimes.signals import HELLO, Signal


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


def _named(store: dist.Store, lines: Lines) -> str:
    """A name that only those who have met here know: rank 0's. The own door is closed, and leaves the store."""
    with suppress(RuntimeError):
        store.delete_key(f"lines/{lines.rank}")
    word = os.urandom(8).hex().encode()
    signals, _ = lines.exchange(Signal(HELLO, lines.rank, lines.world, lines.number, attempt=lines.attempt, body=word))
    lines.number = 0  # the caller's exchanges are counted from here
    return f"gloo/{signals[0].body.decode()}"


@contextmanager
def group(timeout: float = TIMEOUT, still: Callable[[], None] = lambda: None) -> Iterator[Peers]:
    """The ranks that torchrun (or RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says, connected within `timeout` seconds;
    none waits longer than that for another. At the end all say farewell, and why. `still`: see `meeting.meet`.

    Raises PeerTimeout and PeerDied, naming the ranks.
    """
    timeout, rank, world = checked_timeout(timeout), _number("RANK"), _number("WORLD_SIZE")
    supervised = "SHOAL_SUPERVISOR" in os.environ
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) if supervised else 0
    store = dist.PrefixStore(f"shoal/{attempt}", _store(rank, timeout))
    lines = meet(store, rank, world, timeout, attempt, still)
    try:
        _open_gloo(dist.PrefixStore("gloo" if supervised else _named(store, lines), store), lines)
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


@contextmanager
def connect(timeout: float = TIMEOUT) -> Iterator[None]:
    """`init_process_group("gloo")` and its end, for scripts under torchrun whose ranks may be killed or cut off.

        with shoal.connect(timeout=60):
            ...  # DistributedDataParallel, shoal.ddp.attach, shoal.optim, torch.distributed

    torchrun's `--max-restarts` works under it, on several machines too, where with torch 2.13's own start the ranks of
    the second attempt read the addresses of the dead first one. timeout: seconds in which all must come, and after
    which a rank that does not answer is lost. At the end all wait for each other; who leaves by an error tells them.

    Raises ConfigError without torchrun's variables; PeerTimeout and PeerDied, naming the ranks.
    """
    with group(timeout):
        yield
