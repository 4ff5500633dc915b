"""One rank of `test_runtimes`: runs the whole zoo over a gloo group and prints, on rank 0, every trace as JSON.

Start it as `python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks_worker.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import zoo  # noqa: E402

from shoal.errors import ConfigError  # noqa: E402
from shoal.runtimes.replicated import Replicated, connected  # noqa: E402

DIGEST = b"the zoo."


class TappedReplicated(zoo.Tap, Replicated):
    """A rank's channel, tapped after the gather: every rank sees all rows."""


def refused() -> str:
    """What is said to ranks that would host no client."""
    try:
        Replicated(dist.get_world_size() - 1, DIGEST)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    """Traces of all jobs; every rank's are gathered and must be equal before rank 0 prints them."""
    torch.set_num_threads(1)
    with connected(zoo.MIXED.n, {"tests": "the zoo"}):
        mine = {name: job(lambda: TappedReplicated(zoo.MIXED.n, DIGEST)) for name, job in zoo.jobs().items()}
        short = TappedReplicated(zoo.MIXED.n, DIGEST)
        zoo.trace(zoo.MIXED, zoo.GD(), lambda: short, length=2, measure=False)
        everyone: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, short.meter.moved, len(short.clients), refused()))
        if dist.get_rank() == 0:
            traces, moved, hosted, said = zip(*everyone, strict=True)
            print(json.dumps({"traces": traces, "moved": moved, "hosted": hosted, "refused": said}))


if __name__ == "__main__":
    main()
