"""`python -m benchmarks.ranks`: what an exchange of gradients between ranks moves, and how long it takes.

One client a rank, d coordinates each: a round of one-bit correlated quantization over each channel, its scale agreed
before, beside the all-reduce of float32 that DistributedDataParallel does. Bytes are those that the ranks count, and
those that the loopback interface counts (with the headers of TCP and IP). Ranks run in a network namespace of their own
(`unshare -rn`), so that nothing else is on the interface; with --mbit it carries so many Mbit/s a rank (`tc`).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from shoal.compressors import Correlated
from shoal.experiments.timing import machine_line, normal_rows
from shoal.messages import Round
from shoal.runtimes.peers import Peers
from shoal.runtimes.ranks import KINDS
from shoal.runtimes.replicated import connected

ALL_REDUCE = "all-reduce"


def on_the_interface() -> int:
    """Bytes that the loopback interface of this network namespace has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def raise_loopback() -> None:
    """A new namespace has an interface that is down: set its flags UP and RUNNING."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS


def rank(d: int, seconds: float) -> list[dict[str, Any]]:
    """One rank's part: every kind of exchange, again and again for some seconds, after one that is not counted."""
    world, me = dist.get_world_size(), torch.tensor([dist.get_rank()])
    code, rnd, found = Correlated(), Round.full(1, 0, world), []
    u = normal_rows(1, d, int(me))  # every rank's are its own: sums of the same gradients would be shorter
    scale = code.prepare(u, rnd.rows(me))
    dist.all_reduce(scale, dist.ReduceOp.MAX)
    rnd = replace(rnd, agreed=float(scale))
    mine = code.encode(u, rnd.rows(me))
    rows = u[0].clone()

    def measured(kind: str, exchange: Callable[[], object], moved: Callable[[], int]) -> None:
        exchange()
        dist.barrier()
        bytes_before, moved_before, rounds = on_the_interface(), moved(), 0
        dist.barrier()
        began, spent = time.perf_counter(), 0.0
        while spent < seconds:
            exchange()
            rounds += 1
            spent = time.perf_counter() - began
            more = torch.tensor([float(spent < seconds)])
            dist.broadcast(more, 0)  # all ranks stop together
            spent = 0.0 if float(more) else seconds
        lasted = (time.perf_counter() - began) / rounds
        dist.barrier()
        everyone: list[Any] = [None] * world
        on_interface = on_the_interface() - bytes_before
        dist.all_gather_object(everyone, (moved() - moved_before) // rounds)
        found.append({"ranks": world, "d": d, "kind": kind, "rounds": rounds, "seconds": lasted, "moved": everyone,
                      "interface": on_interface / rounds})  # fmt: skip

    for kind, make in KINDS.items():
        channel = make(world, b"a bench.", Peers())
        measured(kind, lambda c=channel: c.mean(mine, code, rnd), lambda c=channel: c.meter.moved)
    measured(ALL_REDUCE, lambda: dist.all_reduce(rows), lambda: 0)
    return found


def inside(worlds: list[int], d: int, mbit: float, seconds: float) -> list[dict[str, Any]]:
    """In a namespace of its own: the ranks of every world, one launch after the other."""
    raise_loopback()
    found: list[dict[str, Any]] = []
    for world in worlds:
        if mbit:
            rate = f"{mbit * world:g}mbit"
            limit = ["tbf", "rate", rate, "burst", "256kb", "latency", "2s"]
            subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", *limit], check=True)
        print(f"{world} ranks", file=sys.stderr)
        launch = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", "29500"]
        words = ["--rank", "--dim", str(d), "--seconds", str(seconds)]
        done = subprocess.run(
            [sys.executable, *launch, "--nproc-per-node", str(world), "-m", "benchmarks.ranks", *words],
            stdout=subprocess.PIPE, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )  # fmt: skip
        found += json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]], d: int) -> Table:
    """Bytes a rank and seconds an exchange."""
    out = Table(title=f"d = {d:,}, one client a rank, one bit a coordinate", title_justify="left")
    for column in ("ranks", "exchange", "moved a rank", "on the interface, a rank", "bits a coordinate", "seconds"):
        out.add_column(column, justify="left" if column == "exchange" else "right")
    for row in rows:
        a_rank = row["interface"] / row["ranks"]
        moved = max(row["moved"])
        bits = 8 * (moved or a_rank) / d
        said = f"{moved:,}" if moved else ""
        out.add_row(str(row["ranks"]), row["kind"], said, f"{a_rank:,.0f}", f"{bits:.3f}", f"{row['seconds']:.3g}")
    return out


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--worlds", default="2,4,8", help="numbers of ranks (default 2,4,8)")
    parser.add_argument("--dim", type=int, default=6_500_000, help="coordinates (default 6.5 million: 26 MB)")
    parser.add_argument("--mbit", type=float, default=0.0, help="Mbit/s a rank (default: as fast as it goes)")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each exchange is repeated (default 3)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Three processes deep: the command, the same in a namespace, and there the ranks."""
    chosen = options()
    if chosen.rank:
        torch.set_num_threads(1)
        with connected(int(os.environ["WORLD_SIZE"]), {"bench": "ranks"}):
            rows = rank(chosen.dim, chosen.seconds)
            if dist.get_rank() == 0:
                print(json.dumps(rows))
        return 0
    if chosen.inside:
        worlds = [int(world) for world in chosen.worlds.split(",")]
        print(json.dumps(inside(worlds, chosen.dim, chosen.mbit, chosen.seconds)))
        return 0
    again = [sys.executable, "-m", "benchmarks.ranks", "--inside", *sys.argv[1:]]
    done = subprocess.run(["unshare", "-rn", *again], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print("error: no namespace, or no `tc` for --mbit: see above.", file=sys.stderr)
        return 1
    rows = json.loads(done.stdout.splitlines()[-1])
    if chosen.json:
        print(json.dumps(rows))
        return 0
    out = Console()
    (out if out.is_terminal else Console(width=120)).print(table(rows, chosen.dim))
    print(machine_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
