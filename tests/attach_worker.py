"""One of two ranks for `test_attach.py`: torchrun's variables in the environment, what happened on stdout."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal.ddp
from shoal.errors import ShoalError


def said(work: Callable[[], object]) -> list[object]:
    """What is raised: its type, whom it names, its words."""
    try:
        work()
    except ShoalError as error:
        return [type(error).__name__, list(getattr(error, "ranks", ())), str(error)]
    return ["nothing", [], ""]


def trained(model: DistributedDataParallel, steps: int, stop: Callable[[int], None]) -> None:
    for step in range(steps):
        stop(step)
        model(torch.ones(4, 40)).sum().backward()


def main() -> None:
    rank, found = int(os.environ["RANK"]), {}
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40)))
    found["channel"] = said(lambda: shoal.ddp.attach(model, channel=["auto", "sharded"][rank]))
    found["size"] = said(lambda: shoal.ddp.attach(model, "TopK(5000)"))
    shoal.ddp.attach(model, timeout=20.0)

    def stop(step: int) -> None:
        if step == 2 and rank == 0:
            print(json.dumps(found), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    began = time.monotonic()
    found["lost"] = said(lambda: trained(model, 5, stop))
    found["again"] = said(lambda: trained(model, 1, stop))
    print(json.dumps({**found, "seconds": time.monotonic() - began}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
