"""One rank of `test_runtimes`: runs the whole zoo over a gloo group, once over a channel that cuts messages and once
over one that does not, and prints, on rank 0, every trace as JSON.

Start it as `python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks_worker.py 1`; another number k
takes every k-th job.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import zoo  # noqa: E402

from shoal.core import Compressor  # noqa: E402
from shoal.errors import ConfigError  # noqa: E402
from shoal.messages import Messages, Round, Vector  # noqa: E402
from shoal.runtimes.replicated import Replicated, connected  # noqa: E402
from shoal.runtimes.sharded import Sharded  # noqa: E402

DIGEST = b"the zoo."


class TappedReplicated(zoo.Tap, Replicated):
    """A rank's channel, tapped after the gather: every rank sees all rows."""


class TappedSharded(Sharded):
    """A rank's channel, which never sees all rows: for the tap alone they are gathered whole, uncounted."""

    def __init__(self, n: int, digest: bytes) -> None:
        super().__init__(n, digest, cut="always")
        self.tap = TappedReplicated(n, digest)

    @property
    def heard(self) -> object:
        return self.tap.heard

    @heard.setter
    def heard(self, new: object) -> None:
        self.tap.heard = new

    def mean(self, up: Messages, code: Compressor, rnd: Round) -> Vector:
        self.tap.gather(up, code, rnd)
        return super().mean(up, code, rnd)


def refused() -> str:
    """What is said to ranks that would host no client."""
    try:
        Replicated(max(dist.get_world_size() - 1, 1), DIGEST)
    except ConfigError as error:
        return str(error)
    return ""


def main() -> None:
    """Traces of all jobs; every rank's are gathered and must be equal before rank 0 prints them."""
    torch.set_num_threads(1)
    with connected(zoo.MIXED.n, {"tests": "the zoo"}):
        kinds = (TappedReplicated, TappedSharded)
        jobs = dict(list(zoo.jobs().items())[:: int(sys.argv[1])])
        mine = [{name: job(partial(kind, zoo.MIXED.n, DIGEST)) for name, job in jobs.items()} for kind in kinds]
        short = TappedReplicated(zoo.MIXED.n, DIGEST)
        zoo.trace(zoo.MIXED, zoo.GD(), lambda: short, length=2, measure=False)
        everyone: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, short.meter.moved, len(short.clients), refused()))
        if dist.get_rank() == 0:
            traces, moved, hosted, said = zip(*everyone, strict=True)
            print(json.dumps({"traces": traces, "moved": moved, "hosted": hosted, "refused": said}))


if __name__ == "__main__":
    main()
