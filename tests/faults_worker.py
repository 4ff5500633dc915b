"""Ranks with faults in them: this process keeps the store and forks every scenario's ranks; prints JSON for
`test_faults`.

Start it as `python tests/faults_worker.py matrix` (or deaths, nan): one import of torch for all scenarios.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import faults  # noqa: E402

from shoal.errors import ShoalError  # noqa: E402
from shoal.runtimes import group as start  # noqa: E402
from shoal.runtimes.peers import Peers  # noqa: E402
from shoal.runtimes.replicated import Replicated  # noqa: E402
from shoal.runtimes.signals import Signal  # noqa: E402

attempts = 0


def keeper() -> int:
    """The port of a store that a process of its own keeps: a process that forks must have no threads."""
    reads, writes = os.pipe()
    lives, held = os.pipe()
    if os.fork() == 0:
        os.close(held)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writes, str(store.port).encode())
        os.read(lives, 1)  # until the other end is closed, with the process that holds it
        os._exit(0)
    os.close(lives)
    return int(os.read(reads, 10))


PORT = keeper()
STORE = dist.TCPStore("127.0.0.1", PORT, is_master=False, wait_for_workers=False)


def told(error: BaseException) -> dict[str, Any]:
    """What a rank reports of an error."""
    return {"error": type(error).__name__, "said": str(error), "ranks": list(getattr(error, "ranks", ())),
            "round": getattr(error, "round", None), "at": time.monotonic()}  # fmt: skip


def forked(world: int, job: Callable[[int], Any], meddle: Callable[[list[int]], None] | None = None) -> list[Any]:
    """What `job(rank)` returns, or raised, in `world` forked processes; None for one that was killed."""
    global attempts
    attempts += 1
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempts)}
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(job, rank, Path(folder) / str(rank))
            pids.append(pid)
        if meddle:
            meddle(pids)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
        files = [Path(folder) / str(rank) for rank in range(world)]
        found = [json.loads(file.read_text()) if file.exists() else None for file in files]
    assert signal.SIGABRT not in [os.WTERMSIG(end) for end in ends if os.WIFSIGNALED(end)], "a rank aborted"
    return found


def _child(job: Callable[[int], Any], rank: int, file: Path) -> None:
    os.environ["RANK"] = str(rank)
    signal.alarm(20)  # nothing may hang: a rank that does is reported as none
    try:
        result = job(rank)
    except Exception as error:
        result = told(error)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(result))
    beside.rename(file)
    os._exit(0)


def caught(action: Callable[[], Any]) -> dict[str, Any]:
    """What an action raised, and after how many seconds."""
    began = time.monotonic()
    try:
        action()
    except ShoalError as error:
        return told(error) | {"seconds": time.monotonic() - began}
    return {"error": None, "said": "", "seconds": time.monotonic() - began}


# ------------------------------------------------------------------------------------------------ mismatches
@contextmanager
def changed(channel: Replicated, change: dict[str, Any]):
    """The next signals of this rank say something else."""
    lines = channel.peers.lines
    exchange = lines.exchange
    lines.exchange = lambda mine: exchange(mine._replace(**change))  # type: ignore[method-assign]
    try:
        yield
    finally:
        lines.exchange = exchange  # type: ignore[method-assign]


def one_case(channel: Replicated, case: faults.Case) -> dict[str, Any]:
    """The case at this rank; then an exchange in which nothing is wrong."""
    guilty = channel.peers.rank == case.rank
    call = case.other if guilty and case.other else case.call
    with changed(channel, case.change if guilty else {}):
        seen = caught(lambda: faults.CALLS[call](channel))
    after = [int(row[0]) for row in channel.peers.all(torch.tensor([channel.peers.rank]))]
    return seen | {"goes on": after == list(range(channel.peers.world))}


def matrix() -> list[list[dict[str, Any]]]:
    """[rank][case]: what every rank makes of every case of the matrix, in one group that survives them all."""

    def job(rank: int) -> list[dict[str, Any]]:
        with start.group(10.0) as peers:
            channel = Replicated(5, b"8 bytes.", peers)
            return [one_case(channel, case) for case in faults.CASES]

    return forked(3, job)


# ------------------------------------------------------------------------------------------------ lost ranks
def running(rank: int, peers: Peers) -> None:
    """Rounds of exchanges until something ends them."""
    peers.digest = b"8 bytes."
    for peers.round in range(100_000):
        peers.all(torch.tensor([rank]))
        peers.all(torch.full((1000,), rank))  # too many bytes for a signal
        peers.swap([torch.zeros(rank + r, dtype=torch.uint8) for r in range(peers.world)],
                   [rank + r for r in range(peers.world)])  # fmt: skip


def die(how: int = signal.SIGKILL) -> None:
    """Leaves the time behind."""
    client().set(f"died{attempts}", str(time.monotonic()))
    os.kill(os.getpid(), how)


def client() -> dist.Store:
    """The store, seen from a forked rank."""
    return dist.TCPStore("127.0.0.1", PORT, is_master=False, wait_for_workers=False)


def death(place: str, victims: list[int], world: int = 4) -> dict[str, Any]:
    """Every rank's report where `victims` die at this place, and how long after it the last survivor knew."""

    def job(rank: int) -> Any:
        mine = rank in victims
        if mine and place == "start":
            die()
        if mine and place == "lines":
            meet = start.meet
            start.meet = lambda *a, **k: (meet(*a, **k), die())[0]  # type: ignore[assignment]
        with start.group(5.0) as peers:
            if mine and place == "round":
                at = 20

                def fence(kind: int, body: bytes, nbytes: int = 0) -> list[Signal]:
                    if peers.lines.number > at:
                        die()
                    return Peers._fence(peers, kind, body, nbytes)

                peers._fence = fence  # type: ignore[method-assign]
            if mine and place == "exchange":
                gather = dist.all_gather
                dist.all_gather = lambda *a, **k: die() if peers.lines.number > 20 else gather(*a, **k)
            if mine and place == "own error":
                peers.all = lambda *a, **k: 1 // 0  # type: ignore[method-assign]
            if mine and place == "done":
                peers.digest, peers.round = b"8 bytes.", 0
                return "left early"
            running(rank, peers)

    found = forked(world, job)
    died = float(STORE.get(f"died{attempts}")) if STORE.check([f"died{attempts}"]) else None
    late = [one["at"] - died for one in found if one is not None and died is not None and "at" in one]
    return {"place": place, "victims": victims, "reports": found, "seconds": max(late, default=None)}


def stopped(victim: int, timeout: float = 1.0) -> dict[str, Any]:
    """A rank is stopped for three times as long as the others wait for it, then goes on."""

    def job(rank: int) -> Any:
        with start.group(timeout) as peers:
            client().set(f"running{attempts}.{rank}", "")
            running(rank, peers)

    began = 0.0

    def meddle(pids: list[int]) -> None:
        nonlocal began
        STORE.wait([f"running{attempts}.{rank}" for rank in range(len(pids))])
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(pids[victim], signal.SIGSTOP)
        time.sleep(3 * timeout)
        os.kill(pids[victim], signal.SIGCONT)

    found = forked(3, job, meddle)
    return {"reports": found, "seconds": [one["at"] - began for one in found]}


def deaths() -> dict[str, Any]:
    """Every place, and every rank as the victim once."""
    cells = [(place, [rank]) for place in ("round", "exchange") for rank in range(4)]
    cells += [("round", [1, 2]), ("exchange", [0, 3]), ("lines", [1]), ("own error", [2]), ("done", [1])]
    return {
        "deaths": [death(*cell) for cell in cells],
        "absent": death("start", [2], 3),
        "stopped": [stopped(0), stopped(2)],
    }


# ------------------------------------------------------------------------------------------------ not finite
def nan() -> list[Any]:
    """[rank]: what every rank sees of each of the runs, and of the grid of clients and rounds."""

    def job(rank: int) -> Any:
        with start.group(10.0) as peers:
            found = {name: run(lambda n: Replicated(n, b"8 bytes.", peers)) for name, run in faults.runs().items()}
            grid = [faults.grid_row(lambda n: Replicated(n, b"8 bytes.", peers), k) for k in range(8)]
            with_raise = faults.raised(lambda n: Replicated(n, b"8 bytes.", peers))
            return {"runs": found, "grid": grid, "raised": with_raise}

    return forked(4, job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"matrix": matrix, "deaths": deaths, "nan": nan}[sys.argv[1]]()))
