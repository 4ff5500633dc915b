"""Train a small network on several ranks with compressed messages: an optimizer of shoal's, or DDP with its hook.

    torchrun --standalone --nproc-per-node 4 examples/train.py --model cnn --optimizer ddp --compressor "TopK(0.05)"
    torchrun --standalone --nproc-per-node 4 examples/train.py --model gru --optimizer marina --text input.txt

--model cnn: digits, from a folder of MNIST's IDX files (--data), or else made up. --model gru: the next character of a
text (--text), or else of one that is made up. Every rank holds its own share of the data. With --checkpoint DIR the run
is saved as it goes, each rank its own file, on a disk of its own if it likes; the same command goes on from the newest
step that all ranks have saved, and ends at the same bits. So torchrun's --max-restarts brings back what was killed or
cut off (docs/ddp.md, "Pull the plug").
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import shoal
import shoal.ddp
import shoal.optim
from shoal import container, mnist
from shoal.data import OPENERS
from shoal.errors import CheckpointCorrupt, ConfigError, DataError, PeerLost, ResumeMismatch, ShoalError
from shoal.rng import checked_seed

USUAL = {  # compressor and step sizes of the two models where none are given; the step sizes are tuned by hand
    "ddp": ("Correlated(levels=16)", {"cnn": 0.05, "gru": 0.2}),
    "marina": ("Correlated(levels=16)", {"cnn": 0.05, "gru": 1.0}),
    "diana": ("QSGD(7)", {"cnn": 0.2, "gru": 1.0}),
    "ef21": ("TopK(0.05)", {"cnn": 0.2, "gru": 1.0}),
}
LENGTH = 32  # characters that the GRU sees
Samples = tuple[Tensor, Tensor]


class Convolutions(nn.Sequential):
    """Two convolutions and two linear layers: 80202 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


class Characters(nn.Module):
    """A GRU that gives the logits of each next character."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.gru = nn.GRU(32, 128, batch_first=True)
        self.head = nn.Linear(128, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """(N, symbols, length) of (N, length)."""
        return self.head(self.gru(self.embedding(text))[0]).transpose(1, 2)


# ------------------------------------------------------------------------------------------------ data
def digits(folder: Path | None, made: np.random.Generator, say: Any) -> tuple[Samples, Samples]:
    """(training samples, test samples)."""
    if folder is None:
        say("no --data: the digits are made up, ten fixed patterns in noise")
        coarse, labels = made.random((10, 7, 7)), made.integers(10, size=6000)
        patterns = coarse.repeat(4, 1).repeat(4, 2)  # four by four pixels each
        pixels = 0.5 * patterns[labels] + 0.5 * made.random((6000, 28, 28))
        cut = 5000
    else:
        parts = []
        for part in ("train", "t10k"):
            try:
                parts.append((mnist.images(folder, part), mnist.labels(folder, part)))
            except DataError:
                if part == "t10k":
                    raise
                say(f"{folder} has no training images: four fifths of the test images are trained on")
        pixels = np.concatenate([images for images, _ in parts]) / 255.0
        labels = np.concatenate([values for _, values in parts])
        cut = len(parts[0][0]) if len(parts) == 2 else len(pixels) * 4 // 5
    images, classes = torch.tensor(pixels[:, None], dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)
    return (images[:cut], classes[:cut]), (images[cut:], classes[cut:])


def characters(file: Path | None, made: np.random.Generator, say: Any) -> tuple[Samples, Samples, int]:
    """(training samples, test samples, number of symbols): windows of the text and the same one character on."""
    if file is None:
        say("no --text: it is made up, words of a small vocabulary at random")
        words = ["".join(made.choice(list("abcdefgh"), size=made.integers(2, 7))) for _ in range(40)]
        text = " ".join(made.choice(words, size=20000))
    else:
        try:
            with OPENERS.get(file.suffix, open)(file, "rb") as stream:
                text = stream.read().decode("utf-8")
        except (OSError, UnicodeDecodeError, EOFError) as error:
            raise DataError(
                f"--text {file}: {error}. It is a text in UTF-8, perhaps packed (.xz, .gz, .bz2)."
            ) from None
    if len(text) < 100 * LENGTH:
        raise DataError(f"--text {file}: {len(text)} characters; at least {100 * LENGTH} are needed.")
    known = sorted(set(text))
    codes = torch.tensor([known.index(c) for c in text[:1_000_000]])
    windows = codes[: (len(codes) - 1) // LENGTH * LENGTH].view(-1, LENGTH)
    targets = codes[1 : windows.numel() + 1].view(-1, LENGTH)
    cut = len(windows) * 9 // 10
    return (windows[:cut], targets[:cut]), (windows[cut:], targets[cut:]), len(known)


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers: two runs that print the same have the same model, bit for bit."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    """The share of right predictions."""
    right = [model(x).argmax(1) == y for x, y in zip(samples[0].split(500), samples[1].split(500), strict=True)]
    return float(torch.cat(right).float().mean())


# ------------------------------------------------------------------------------------------------ checkpoints
def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors go to `tensors`. A dict becomes pairs, since JSON's keys are strings only."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, pack(held, tensors)] for key, held in value.items()]}
    return {"list": [pack(held, tensors) for held in value]} if isinstance(value, list | tuple) else {"value": value}


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """What was packed."""
    ((kind, held),) = packed.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {key: unpack(inner, tensors) for key, inner in held}
    return [unpack(inner, tensors) for inner in held] if kind == "list" else held


def files(folder: Path, rank: int) -> dict[int, Path]:
    """This rank's files by step, in ascending order."""
    return {int(file.name[4:12]): file for file in sorted(folder.glob(f"step*.rank{rank}.shoal"))}


def save(folder: Path, step: int, rank: int, state: Any) -> None:
    """This rank's file of the step, whole or not at all. Two stay: ranks may be one save apart when they are cut."""
    tensors: dict[str, Tensor] = {}
    meta = {"state": pack(state, tensors)}
    container.write(folder / f"step{step:08d}.rank{rank}.shoal", meta, tensors)
    for old in list(files(folder, rank).values())[:-2]:
        old.unlink()


def saved(folder: Path, rank: int) -> Any:
    """This rank's state of the newest step that all ranks have whole; None if there is none. Collective."""
    states = {}
    for step, file in files(folder, rank).items():
        try:
            held = container.read(file)
            states[step] = unpack(held.meta["state"], held.tensors)
        except CheckpointCorrupt as error:
            print(f"rank {rank}: passed over: {error}", file=sys.stderr)
    mine = torch.tensor([*sorted(states)[-2:], -1, -1][:2])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    common = set.intersection(*(set(steps.tolist()) for steps in theirs)) - {-1}
    return states[max(common)] if common else None


# ------------------------------------------------------------------------------------------------ training
class Trainer:
    """A model with one of the four ways to train it; `parts` are what a checkpoint holds."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, samples: int) -> None:
        way, seed, (code, usual) = args.optimizer, args.seed, USUAL[args.optimizer]
        code, lr = args.compressor or code, usual[args.model] if args.lr is None else args.lr
        self.model, self.handle, self.forward = model, None, model
        self.label = f"{way} with {code}, lr {lr:g}"
        if way == "ddp":
            self.forward = DistributedDataParallel(model)
            self.handle = shoal.ddp.attach(self.forward, code, start=5, seed=seed, timeout=args.timeout)
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        else:
            kind = {"marina": shoal.optim.Marina, "diana": shoal.optim.Diana, "ef21": shoal.optim.EF21}[way]
            self.optimizer = kind(model.parameters(), lr, code, seed=seed, timeout=args.timeout)
        self.run = {  # what a checkpoint must agree in
            "model": args.model, "way": self.label, "seed": seed, "batch": args.batch, "samples": samples,
            "world": dist.get_world_size(),
        }  # fmt: skip

    def batch(self, usual: int) -> int:
        """MARINA's steps with gradients instead of differences take eight times as many samples."""
        return usual * 8 if getattr(self.optimizer, "full", False) else usual

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """The loss of this rank's batch before the step."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = cross_entropy(self.forward(inputs), targets)
            loss.backward()
            return loss.detach()

        return float(self.optimizer.step(closure))

    def state(self, step: int) -> dict[str, Any]:
        """Of this rank."""
        state = {"run": self.run, "step": step}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state if self.handle is None else state | {"ddp": self.handle.state_dict()}

    def load(self, state: dict[str, Any], folder: Path, inputs: Tensor, targets: Tensor) -> int:
        """Take up that state; its step. Raises ResumeMismatch for another run's."""
        for name, value in self.run.items():
            if state["run"].get(name) != value:
                raise ResumeMismatch(
                    f"{folder} was saved with {name} {state['run'].get(name)!r}, now it is {value!r}: give the same "
                    "options, or another --checkpoint."
                )
        if self.handle is not None:
            # DDP forms new buckets after its first backward, and a bucket is one message: the step after the saved
            # one must meet the buckets that it would have met in a run that was not cut.
            cross_entropy(self.forward(inputs), targets).backward()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.handle is not None:
            self.handle.load_state_dict(state["ddp"])
        return state["step"]

    def stats(self) -> Any:
        """What this rank has sent."""
        return (self.handle or self.optimizer).stats()

    def close(self) -> None:
        """Before the process group is destroyed."""
        (self.handle or self.optimizer).close()


def run(args: argparse.Namespace, rank: int, world: int, console: Console) -> None:
    """Train, and say on rank 0 how it went."""
    say = console.print if rank == 0 else lambda text, **style: None
    made = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    if args.model == "cnn":
        train, test = digits(args.data, made, say)
        model: nn.Module = Convolutions()
    else:
        train, test, symbols = characters(args.text, made, say)
        model = Characters(symbols)
    mine = tuple(part[rank::world] for part in train)
    writer = board(args.tensorboard) if args.tensorboard and rank == 0 else None
    trainer, first = Trainer(model, args, len(mine[0])), 0
    if args.checkpoint:
        try:
            args.checkpoint.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--checkpoint {args.checkpoint}: {error.strerror}. Name a folder to write in.") from None
        state = saved(args.checkpoint, rank)
        if state is not None:
            first = trainer.load(state, args.checkpoint, mine[0][:1], mine[1][:1])
            say(f"going on from step {first}, the newest that all ranks have saved")
    d = sum(p.numel() for p in model.parameters())
    say(f"{args.model}, {d} parameters, {world} ranks with {len(mine[0])} samples each; {trainer.label}")
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, loss = time.perf_counter(), float("nan")
    with Progress(*columns, console=console, disable=rank != 0) as progress:
        task = progress.add_task("", total=args.steps, completed=first, loss=loss)
        for step in range(first, args.steps):
            drawn = np.random.default_rng([args.seed, step, rank])  # a function of the step: a resumed run draws alike
            chosen = torch.from_numpy(drawn.integers(len(mine[0]), size=trainer.batch(args.batch)))
            loss = trainer.step(mine[0][chosen], mine[1][chosen])
            progress.update(task, completed=step + 1, loss=loss)
            if writer is not None:
                writer.add_scalar("loss", loss, step)
                writer.add_scalar("bytes", trainer.stats().up, step)
            if args.checkpoint and ((step + 1) % args.every == 0 or step + 1 == args.steps):
                save(args.checkpoint, step + 1, rank, trainer.state(step + 1))
    seconds, sent = time.perf_counter() - began, trainer.stats()
    if rank == 0:
        say(f"loss {loss:.4f}, accuracy {accuracy(model, test):.2%} of {test[1].numel()}, {seconds:.1f} s")
        say(f"a rank sent {sent.up / 1e6:.3f} MB in {sent.steps} steps, {sent.dense / max(sent.up, 1):.1f} times less "
            f"than float32; encoding {sent.encode_seconds:.2f} s, wire {sent.wire_seconds:.2f} s, decoding "
            f"{sent.decode_seconds:.2f} s")  # fmt: skip
        say(f"SHA-256 of the model: {fingerprint(model)}", soft_wrap=True)
    if writer is not None:
        writer.close()
    trainer.close()


def board(folder: Path) -> Any:
    """TensorBoard's writer, if it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard.") from None
    try:
        return SummaryWriter(folder)
    except OSError as error:
        raise ConfigError(f"--tensorboard {folder}: {error.strerror}. Name a folder to write in.") from None


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("cnn", "gru"), default="cnn")
    parser.add_argument("--optimizer", choices=tuple(USUAL), default="ddp")
    parser.add_argument("--compressor", help="such as 'Correlated()'; `shoal list` has all")
    parser.add_argument("--data", type=Path, help="folder of MNIST's IDX files")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="samples a rank")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="folder to save in, and to go on from if there is something")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds without an answer until a rank is lost")
    parser.add_argument("--tensorboard", type=Path, help="folder of its logs")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 4 examples/train.py ...")
    return args


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that cannot work on any rank."""
    for name in ("steps", "batch", "every"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: at least 1.")
    if args.lr is not None and not 0.0 <= args.lr < math.inf:
        raise ConfigError(f"--lr {args.lr:g}: a finite number, not negative.")
    checked_seed(args.seed)


def main() -> int:
    """Exit status: 0, or 2 after one line about what was wrong."""
    args, console = parsed(), Console(stderr=True)
    torch.set_num_threads(1)
    try:
        check(args)
        with shoal.connect(args.timeout):
            run(args, dist.get_rank(), dist.get_world_size(), console)
    except ShoalError as error:
        # A lost rank is told by each that misses it, since rank 0 may be the one; what is wrong for all, by rank 0.
        if isinstance(error, PeerLost) or os.environ["RANK"] == "0":
            print(f"rank {os.environ['RANK']}: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
