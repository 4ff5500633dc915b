"""One rank of `python -m benchmarks.slow_link`: averages gradients in every way in turn, and times it.

Started with torchrun's variables and one argument, a JSON object (`Task`); rank 0 prints a JSON line a way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from shoal import ddp, mnist
from shoal.core import Compressor
from shoal.experiments.expressions import known_names, parse
from shoal.runtimes.reduce import Link

RATE, MOMENTUM = 0.05, 0.9  # SGD's learning rate and momentum, the same for all
LOOK = 10  # steps between two looks at the test images, which the clock does not see
WIDE = 1280  # four layers of 1280 x 1280 are 25 MiB of gradients


@dataclass(frozen=True)
class Task:
    """What to do: job "exchange" (25 MiB of gradients and no model), "step" (a model of that size) or "mnist"."""

    job: str
    ways: list[str]
    repeat: int
    device: str  # whose bytes are counted
    data: str = ""
    goal: float = 0.97
    batch: int = 16  # a rank's images in a step of mnist
    steps: int = 1200  # of mnist, at most
    seconds: float = 600.0  # of a way of mnist, at most


@dataclass(frozen=True)
class Found:
    """One way's figures: seconds of each repetition, bytes this rank put on its line, and where mnist arrived."""

    way: str
    seconds: list[float]
    sent: float
    steps: int = 0
    reached: float | None = None
    note: str = ""


def sent(device: str) -> int:
    """Bytes that the device has sent, headers of all protocols included, as this namespace counts them."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == device:
            return int(counts.split()[8])
    raise OSError(f"there is no device {device} here")


def attached(way: str, model: DistributedDataParallel) -> AbstractContextManager[object]:
    """The way's hook in place; a compressor's is shoal's."""
    if way == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif way.startswith("PowerSGD"):
        rank = int(way.removeprefix("PowerSGD(").removesuffix(")"))
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=10)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif way != "float32":
        return ddp.attach(model, way)
    return nullcontext()


# ------------------------------------------------------------------------------------------------ one exchange
def exchange(way: str, task: Task) -> Found:
    """The mean of one vector a rank, from when all are ready until all have it."""
    u = torch.randn(4 * WIDE * WIDE, generator=torch.Generator().manual_seed(dist.get_rank()))
    if way in ("float32", "fp16"):

        def once(k: int) -> None:
            dist.all_reduce(u.half() if way == "fp16" else u.clone())

        return _timed(way, once, task)
    code = parse(way, known_names(), Compressor)
    link = Link("auto")
    link.meet({"way": way})
    try:
        return _timed(way, lambda k: link.reduce(code, u, link.round(k, 0)), task)
    finally:
        link.close()


def _timed(way: str, once: Callable[[int], object], task: Task) -> Found:
    """The first repetition compiles and connects, and is thrown away."""
    once(0)
    taken, before = [], sent(task.device)
    for k in range(task.repeat):
        dist.barrier()
        began = time.perf_counter()
        once(k + 1)
        dist.barrier()
        taken.append(time.perf_counter() - began)
    return Found(way, taken, (sent(task.device) - before) / task.repeat, task.repeat)


# ------------------------------------------------------------------------------------------------ a model's step
def wide(
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer]:
    """A model with 25 MiB of gradients, wrapped, its loss and SGD: also what `shoal advise` takes."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDE, WIDE, bias=False), nn.Tanh())]
    model = wrap(nn.Sequential(*layers))
    inputs = torch.randn(16, WIDE, generator=torch.Generator().manual_seed(int(os.environ.get("RANK", "0"))))
    return model, lambda: model(inputs).square().mean(), torch.optim.SGD(model.parameters(), lr=0.01)


def step(way: str, task: Task) -> Found:
    """Whole steps of a model with 25 MiB of gradients: forward, backward with the exchange, and SGD."""
    model, loss, optimizer = wide(DistributedDataParallel)
    assert isinstance(model, DistributedDataParallel)
    with attached(way, model):

        def once(k: int) -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        for k in range(12 if way.startswith("PowerSGD") else 2):  # buckets are formed anew; PowerSGD starts late
            once(k)
        return _timed(way, once, task)


# ------------------------------------------------------------------------------------------------ to an accuracy
def digits(task: Task, part: str) -> tuple[Tensor, Tensor]:
    """This rank's share of the images, normalized, and their labels."""
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    pictures = torch.from_numpy(mnist.images(task.data, part)[mine].copy()).float()[:, None]
    return (pictures / 255 - 0.1307) / 0.3081, torch.from_numpy(mnist.labels(task.data, part)[mine].astype("int64"))


def network() -> nn.Module:
    """Two convolutions and two dense layers, 1.2 million parameters: PyTorch's example for MNIST without dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Over all ranks' test images. Each rank holds the same model."""
    with torch.no_grad():
        right = sum(
            float((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    counts = torch.tensor([right, float(len(labels))], dtype=torch.float64)
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def train(way: str, task: Task) -> Found:
    """Seconds until the test accuracy is reached, looked at every `LOOK` steps with the clock stopped."""
    images, labels = digits(task, "train")
    looked, known = digits(task, "t10k")
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    loss, order = nn.CrossEntropyLoss(), torch.Generator().manual_seed(dist.get_rank())
    with attached(way, model):
        clock, before, seen, taken = 0.0, sent(task.device), 0, 0
        for k in range(task.steps):
            dist.barrier()
            began = time.perf_counter()
            some = torch.randint(len(labels), (task.batch,), generator=order)
            optimizer.zero_grad()
            loss(model(images[some]), labels[some]).backward()
            optimizer.step()
            clock += time.perf_counter() - began
            if k % LOOK < LOOK - 1:
                continue
            taken += sent(task.device) - before
            seen, at = k + 1, accuracy(model.module, looked, known)
            spent = torch.tensor([clock], dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            before = sent(task.device)
            if at >= task.goal or float(spent) > task.seconds:
                break
        return Found(way, [clock], taken, seen, at if at >= task.goal else None, f"{100 * at:.1f} %")


JOBS: dict[str, Callable[[str, Task], Found]] = {"exchange": exchange, "step": step, "mnist": train}


def found(task: Task) -> Iterator[Found]:
    """Every way in turn; one that cannot run here says why, and the next begins."""
    for way in task.ways:
        try:
            yield JOBS[task.job](way, task)
        except (RuntimeError, ValueError, TypeError) as error:
            yield Found(way, [], 0.0, note=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        dist.barrier()


def main() -> None:
    """Do the task."""
    torch.set_num_threads(1)
    given: dict[str, Any] = json.loads(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for one in found(Task(**given)):
        if int(os.environ["RANK"]) == 0:
            print(json.dumps(asdict(one)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
