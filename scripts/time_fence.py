"""What a fence costs: median microseconds of one, of gloo's all-gather of 8 kB alone, and of the two together; and of
an all-gather of 1 kB, which travels in the fence.

torchrun --standalone --nproc-per-node 4 scripts/time_fence.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from shoal.runtimes.group import group
from shoal.runtimes.peers import Peers

REPEATS = 500


def median(action: Callable[[], object]) -> float:
    """Microseconds, at this rank, after a twentieth of the repeats to warm up."""
    times = []
    for _ in range(REPEATS + REPEATS // 20):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times[REPEATS // 20 :])


def measure(peers: Peers) -> None:
    """Rank 0 prints."""
    mine = torch.zeros(8192, dtype=torch.uint8)
    out = [torch.empty_like(mine) for _ in range(peers.world)]
    fence = median(peers.barrier)
    alone = median(lambda: dist.all_gather(out, mine))
    both, inside = median(lambda: peers.all(mine)), median(lambda: peers.all(mine[:1024]))
    if peers.rank == 0:
        print(f"{peers.world} ranks: fence {fence:.0f} us, all-gather {alone:.0f} us, both {both:.0f} us; "
              f"1 kB in a fence {inside:.0f} us")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    with group() as peers:
        measure(peers)
