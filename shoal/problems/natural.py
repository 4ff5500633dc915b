"""Networks on real data whose clients are people: writers of digits, speakers in plays; and a ResNet-18 on images.

    mnist_cnn    a small CNN; a client is one of the 539 writers of MNIST's training digits (arXiv:1905.10498)
    shakespeare  a causal model of characters; a client is a speaker with at least 1000 characters, 141 of them
    resnet18     with group normalization, d = 11 million, on MNIST padded to 3 x 32 x 32; clients are made by a split

Each is a `Module` with f_i = (n / N) sum of its samples' cross entropies; constants are estimates at x^0, from some
clients and samples (`Look`), since all of them would take an hour. Data go by a folder or by name (`shoal.files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shoal import mnist, splits
from shoal import shakespeare as plays
from shoal.errors import ConfigError, DataError
from shoal.problems import networks
from shoal.problems.curvature import Look
from shoal.problems.module import Module

LEAST = 1000  # characters of a speaker
WINDOW = 64  # characters of a sample
LOOK = Look(rounds=6, clients=8, precise=False)
BRIEFLY = Look(rounds=2, clients=2, samples=1, precise=False)  # at d = 11 million a product costs about a second


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """(m,): a sample's cross entropy, the mean over its characters where it has many."""
    each = functional.cross_entropy(scores, targets, reduction="none")
    return each if each.ndim == 1 else each.mean(1)


def mnist_cnn(data: str | Path = "mnist", n: int | None = None, rows: int | None = None, seed: int = 0) -> Module:
    """`networks.small_cnn` on MNIST by writer: the n with the most digits (all), at most `rows` of each, d = 5386.

    The seed is that of x^0. Raises ConfigError for n or rows below 1 or n above the number of writers, and DataError.
    """
    folder = mnist.located(data, with_writers=True)
    digits, images = mnist.labels(folder), mnist.images(folder)
    parts = _largest(splits.by_key(mnist.writers(folder)), n, rows, "writers")
    samples = [(_pixels(images[part])[:, None], torch.from_numpy(digits[part].astype(np.int64))) for part in parts]
    return Module(networks.small_cnn(seed), samples, cross_entropy, "mnist-cnn", LOOK)


def shakespeare(data: str | Path = plays.NAME, n: int | None = None, rows: int | None = None, seed: int = 0) -> Module:
    """`networks.character_model` by speaker: the n with the most text (all of at least 1000 characters), d = 9673.

    A sample is 64 characters and the 64 that follow each of them, one after the other without overlap, at most `rows`
    of each speaker; what is left at the end is dropped. The seed is that of x^0. Raises as `mnist_cnn` does.
    """
    whole = plays.text(plays.located(data))
    known = "".join(sorted(set(whole)))
    place = np.zeros(128, np.int64)
    place[[ord(c) for c in known]] = np.arange(len(known))
    said = [
        place[np.frombuffer(t.encode("ascii"), np.uint8)] for t in plays.speakers(whole).values() if len(t) >= LEAST
    ]
    if not said:
        raise DataError(f"no speaker has {LEAST} characters: the text is too short.")
    most = None if rows is None else rows * WINDOW + 1
    samples = [_windows(line) for line in _largest(said, n, most, "speakers")]
    return Module(networks.character_model(len(known), seed=seed), samples, cross_entropy, "shakespeare", LOOK)


def resnet18(
    data: str | Path = "mnist",
    n: int = 4,
    rows: int = 32,
    split: str = "iid",
    alpha: float | None = None,
    seed: int = 0,
) -> Module:
    """`networks.resnet18` on the first `rows` images of MNIST, shared out by `splits.split`; d = 11,173,962.

    Images are padded with zeros to 32 x 32 and repeated in three channels. The seed is that of the split and of x^0. A
    matrix of all clients' gradients has 45 MB a client. Raises ConfigError and DataError.
    """
    folder = mnist.located(data)
    images, digits = mnist.images(folder), mnist.labels(folder)
    if not 1 <= rows <= len(images):
        raise ConfigError(f"rows={rows!r}: MNIST has {len(images)} training images; take 1 to {len(images)} of them.")
    shown = functional.pad(_pixels(images[:rows]), (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
    targets = torch.from_numpy(digits[:rows].astype(np.int64))
    parts = splits.split(split, digits[:rows], n, seed, alpha)
    return Module(
        networks.resnet18(seed=seed), [(shown[p], targets[p]) for p in parts], cross_entropy, "resnet18", BRIEFLY
    )


def _pixels(images: NDArray[np.uint8]) -> Tensor:
    """From 0 to 1."""
    return torch.from_numpy(images.astype(np.float32) / np.float32(255))


def _windows(line: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(samples, WINDOW) characters, and the one that follows each of them."""
    end = (len(line) - 1) // WINDOW * WINDOW
    inputs, targets = (torch.from_numpy(line[at : end + at].reshape(-1, WINDOW).copy()) for at in (0, 1))
    return inputs, targets


def _largest(parts: Sequence[NDArray], n: int | None, rows: int | None, who: str) -> list[NDArray]:
    """The first `rows` of each of the n largest parts, in their own order; of equal ones the first."""
    if n is not None and not 1 <= n <= len(parts):
        raise ConfigError(f"n={n!r} clients: the data have {len(parts)} {who}, so n is in 1..{len(parts)}.")
    if rows is not None and rows < 1:
        raise ConfigError(f"rows={rows!r}: every client needs a sample; leave it out for all of them.")
    chosen = sorted(sorted(range(len(parts)), key=lambda i: (-len(parts[i]), i))[:n])
    return [parts[i][:rows] for i in chosen]
