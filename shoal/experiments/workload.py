"""What a training step computes, and when which gradients are there: measured from a model of the user's.

    def setup():
        model = torch.nn.Linear(784, 10)
        images, labels = next(iter(loader))
        return model, lambda: torch.nn.functional.cross_entropy(model(images), labels)

`setup` returns a module and a function without arguments that runs the forward pass and returns the loss; an optimizer
may stand third. Buckets are those of DistributedDataParallel: parameters from the last to the first, a bucket full once
it has reached 1 MiB (the first) or 25 MiB (the others).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.experiments.expressions import module_of
from shoal.experiments.line import shared
from shoal.experiments.timing import normal_rows
from shoal.problems.networks import resnet18, small_cnn
from shoal.runtimes.peers import Peers
from shoal.runtimes.rehearsal import Spent, median

FIRST, CAP = 1 << 20, 25 << 20  # bytes: DistributedDataParallel's defaults
BACKWARD = 2 / 3  # of a step, where nobody measured it: the gradients of inputs and of weights cost a forward each
WARM = 2  # steps that are not counted
ROWS = 4  # different gradients that are kept, of the last steps
MIN_NUMEL = 1024  # smaller parameters are sent as they are: the default of shoal.ddp.attach
Tell = Callable[[str, float], None]  # (what is being measured, the share of all work that is done)
CONTRACT = "it returns (module, function of nothing that returns the loss) or (module, function, optimizer)"


@dataclass(frozen=True)
class Bucket:
    """Numbers that are compressed, numbers that are sent as they are, and seconds from the start of a step until the
    last of their gradients is there."""

    coded: int
    plain: int
    ready: float


@dataclass(frozen=True)
class Workload:
    """A step on one rank: `compute` seconds of forward and backward, `update` of what waits for the last mean (the
    copy back and the optimizer), the buckets in the order in which they are filled, and a few gradients, one bucket
    behind the other, compressed numbers in front."""

    name: str
    compute: float
    update: float
    buckets: tuple[Bucket, ...]
    gradients: tuple[Tensor, ...]

    @property
    def d(self) -> int:
        """All numbers of a gradient."""
        return sum(b.coded + b.plain for b in self.buckets)

    def parts(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For each bucket, (compressed, plain) of every gradient that is kept."""
        sizes = [size for b in self.buckets for size in (b.coded, b.plain)]
        cut = [g.split(sizes) for g in self.gradients]
        return [[(c[2 * i], c[2 * i + 1]) for c in cut] for i in range(len(self.buckets))]


def filled(sizes: Sequence[int], first: int = FIRST, cap: int = CAP) -> list[list[int]]:
    """Indices of float32 parameters of these sizes, bucket by bucket as DistributedDataParallel fills them."""
    out: list[list[int]] = [[]]
    nbytes, limit = 0, first
    for i in reversed(range(len(sizes))):
        out[-1].append(i)
        nbytes += 4 * sizes[i]
        if nbytes >= limit:
            out.append([])
            nbytes, limit = 0, cap
    return [bucket for bucket in out if bucket]


def assumed(numel: int, compute: float) -> Workload:
    """A step of `compute` seconds whose gradients come evenly in its last two thirds; made of normal numbers.

    Raises ConfigError for no numbers or a time that is not positive.
    """
    if numel < 1 or not 0 < compute < float("inf"):
        raise ConfigError(f"--numel {numel} --compute {1e3 * compute:g}: at least one number, and ms above 0.")
    ends, end = list[int](), 0
    while end < numel:
        end = min(numel, end + (FIRST if not ends else CAP) // 4)
        ends.append(end)
    ready = [compute * (1 - BACKWARD + BACKWARD * end / numel) for end in ends]
    sizes = np.diff([0, *ends]).tolist()
    buckets = tuple(Bucket(size, 0, when) for size, when in zip(sizes, ready, strict=True))
    rows = tuple(normal_rows(1, numel, k)[0] for k in range(ROWS))
    return Workload(f"{numel:,} numbers", compute, 0.0, buckets, rows)


# ------------------------------------------------------------------------------------------------ models
def _digits() -> tuple[Any, ...]:
    return _classified(small_cnn(), (32, 1, 28, 28))


def _pictures() -> tuple[Any, ...]:
    return _classified(resnet18(), (8, 3, 32, 32))


def _classified(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Normal numbers as images: time does not depend on what they show."""
    batches = [normal_rows(shape[0], int(np.prod(shape[1:])), k).reshape(shape) for k in range(ROWS)]
    labels, turn = torch.arange(shape[0]) % 10, iter(range(1 << 62))
    return model, lambda: nn.functional.cross_entropy(model(batches[next(turn) % ROWS]), labels)


BUILT_IN = {"mnist-cnn": _digits, "resnet18": _pictures}


def found(text: str) -> Callable[[], Any]:
    """The function that `text` names: file.py:function, which is run as trusted code, or a built-in model.

    Raises ConfigError where there is none.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not name:
        raise ConfigError(f"{text!r} is no model: FILE.py:FUNCTION, or one of {', '.join(BUILT_IN)}.")
    if not path.is_file():
        raise ConfigError(f"{text!r}: there is no file {path}.")
    setup = getattr(module_of(path, file), name, None)
    if not callable(setup):
        raise ConfigError(f"{file} defines no function {name}: {CONTRACT}.")
    return setup


def _built(setup: Callable[[], Any], name: str) -> tuple[nn.Module, Callable[[], Tensor], Any]:
    try:
        made = setup()
    except Exception as error:
        raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error
    whole = isinstance(made, tuple | list) and len(made) in (2, 3) and isinstance(made[0], nn.Module)
    if not whole or not callable(made[1]) or not (len(made) == 2 or hasattr(made[2], "step")):
        raise ConfigError(f"{name} returned {type(made).__name__}: {CONTRACT}.")
    held = {k: p for k, p in made[0].named_parameters() if p.requires_grad}
    if not held:
        raise ConfigError(f"{name}: its module has no parameter that is trained.")
    wrong = [f"{k} ({p.dtype}, {p.device})" for k, p in held.items() if p.dtype != torch.float32 or p.is_cuda]
    if wrong:
        raise ConfigError(
            f"{name}: {', '.join(wrong[:3])}: a step is timed with float32 parameters on the CPU. For another device "
            "time a step there, and give --numel and --compute."
        )
    return made[0], made[1], made[2] if len(made) == 3 else None


class Flat:
    """Gradients as DistributedDataParallel handles them: each is copied into its bucket when it is there, and all of
    them back when the backward pass is over."""

    def __init__(self, held: Sequence[nn.Parameter]) -> None:
        self.held, sizes = held, [p.numel() for p in held]
        self.groups = filled(sizes)
        order = [i for group in self.groups for i in sorted(group, key=lambda i: sizes[i] < MIN_NUMEL)]
        self.whole = torch.empty(sum(sizes))
        places = dict(zip(order, self.whole.split([sizes[i] for i in order]), strict=True))
        self.views = [places[i].view_as(p) for i, p in enumerate(held)]
        self.when: dict[int, float] = {}  # a parameter's number -> the clock when its gradient was in the bucket
        self._hooks = [p.register_post_accumulate_grad_hook(self._noting(i)) for i, p in enumerate(held)]

    def _noting(self, i: int) -> Callable[[Tensor], None]:
        def note(p: Tensor) -> None:
            assert p.grad is not None
            self.views[i].copy_(p.grad)
            self.when[i] = time.perf_counter()

        return note

    def begin(self) -> None:
        """In front of a step."""
        self.when.clear()
        for p in self.held:
            p.grad = None

    def back(self) -> None:
        """Behind a backward pass in which every parameter got a gradient."""
        for p, view in zip(self.held, self.views, strict=True):
            assert p.grad is not None
            p.grad.copy_(view)

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def measured(setup: Callable[[], Any], name: str, repeat: int, tell: Tell, peers: Peers | None = None) -> Workload:
    """Steps of the model that `setup` builds: medians of `repeat` of them, after two that are not counted.

    Under `peers` all ranks take their steps at the same time, and `line.shared` counts.

    Raises ConfigError for what is not a model (see the module), a loss that is no number, and parameters that get no
    gradient.
    """
    model, loss, optimizer = _built(setup, name)
    held = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    flat, gradients = Flat([p for _, p in held]), list[Tensor]()
    when, computed, updated = list[list[float]](), list[Spent](), list[Spent]()
    for k in range(WARM + repeat):
        tell(f"{name}: step {k + 1} of {WARM + repeat}", k / (WARM + repeat))
        flat.begin()
        if peers is not None:
            peers.barrier()
        began = Spent.now()
        _backward(loss, name)
        missing = [held[i][0] for i in range(len(held)) if i not in flat.when]
        if missing:
            raise ConfigError(f"{name}: {', '.join(missing[:3])} got no gradient: use them, or requires_grad_(False).")
        middle = Spent.now()
        flat.back()
        if optimizer is not None:
            optimizer.step()
        updated.append(Spent.now().since(middle))
        computed.append(middle.since(began))
        when.append([flat.when[i] - began.wall for i in range(len(held))])
        gradients.append(flat.whole.clone())
        del gradients[:-ROWS]
    flat.close()
    mine = median(computed[WARM:])
    compute, update = shared(peers, mine), shared(peers, median(updated[WARM:]))
    ready = compute / mine.wall * np.median(when[WARM:], axis=0)  # of the slowest rank
    sizes = [p.numel() for _, p in held]
    buckets = [_bucket([sizes[i] for i in group], max(float(ready[i]) for i in group)) for group in flat.groups]
    return Workload(name, compute, update, tuple(buckets), tuple(gradients))


def _backward(loss: Callable[[], Tensor], name: str) -> None:
    try:
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(f"{name}: the function returned {type(value).__name__}, not a loss of one number.")
        value.backward()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: a step ended with {type(error).__name__}: {error}") from error


def _bucket(sizes: list[int], ready: float) -> Bucket:
    return Bucket(sum(s for s in sizes if s >= MIN_NUMEL), sum(s for s in sizes if s < MIN_NUMEL), ready)
