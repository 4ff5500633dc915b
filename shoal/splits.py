"""Who gets which rows: four ways to share a data set out over n clients.

Every split is a partition: each row goes to exactly one client, and every client gets at least one. It is a function of
the labels and the seed alone, drawn from NumPy's PCG64, and not of anything that a run does.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

from shoal.errors import ConfigError

Part = NDArray[np.int64]
KINDS = ("iid", "contiguous", "label", "dirichlet")


def split(kind: str, labels: NDArray, n: int, seed: int = 0, alpha: float | None = None) -> list[Part]:
    """n arrays of row numbers, each ascending.

    "iid"         shuffled and cut into n parts whose sizes differ by at most 1
    "contiguous"  cut in the order of the file, same sizes
    "label"       sorted by label (ties in the order of the file), then cut: most clients see one class
    "dirichlet"   each class is shared out in proportions drawn from Dirichlet(alpha, ..., alpha), the smaller alpha the
                  more uneven; alpha is 0.5 unless given. Clients left without rows get one each, see `fill_empty`.

    The seed matters to "iid" and "dirichlet". Raises ConfigError for an unknown kind, n outside 1..rows, an alpha that
    is not positive, or an alpha given to another kind than "dirichlet".
    """
    labels = np.asarray(labels)
    if kind not in KINDS:
        raise ConfigError(f"split={kind!r}: a split is one of {', '.join(KINDS)}.")
    if not 1 <= n <= len(labels):
        raise ConfigError(
            f"n={n} clients for {len(labels)} rows: every client needs one, so n must be in 1..{len(labels)}."
        )
    if alpha is not None and kind != "dirichlet":
        raise ConfigError(f"alpha={alpha!r} with split={kind!r}: alpha belongs to split='dirichlet'; leave it out.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha={alpha!r}: the Dirichlet parameter must be positive; 0.1 gives very uneven splits.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"seed={seed!r}: the seed of a split is an integer that is not negative.")
    rng = Generator(PCG64(seed))
    if kind == "dirichlet":
        return dirichlet(labels, n, 0.5 if alpha is None else alpha, rng)
    order = {
        "iid": lambda: rng.permutation(len(labels)),
        "contiguous": lambda: np.arange(len(labels)),
        "label": lambda: np.argsort(labels, kind="stable"),
    }[kind]()
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, n)]


def dirichlet(labels: NDArray, n: int, alpha: float, rng: Generator) -> list[Part]:
    """Each class, shuffled, is cut at the rounded cumulative proportions of one Dirichlet draw over the n clients."""
    owned: list[list[int]] = [[] for _ in range(n)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(n, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for client, part in enumerate(np.split(rows, cuts)):
            owned[client].extend(part.tolist())
    return [np.sort(np.array(part, np.int64)) for part in fill_empty(owned)]


def fill_empty(owned: list[list[int]]) -> list[list[int]]:
    """Each client without rows, lowest id first, takes the last row of the richest (on a tie the lowest id)."""
    for client, rows in enumerate(owned):
        if not rows:
            richest = max(range(len(owned)), key=lambda i: (len(owned[i]), -i))
            owned[client] = [owned[richest].pop()]
    return owned


def similar(rows: int, n: int, similarity: float, seed: int = 0) -> list[Part]:
    """n parts of equal size that share rows: the homogeneity split of arXiv:2110.03300 as its public code draws it.

    The rows are shuffled and cut into n + 1 parts of floor(rows / (n + 1)); then the j-th row of each client's part
    is replaced, with probability `similarity`, by the j-th row of the part left over. 0: disjoint; 1: all the same.
    Raises ConfigError for fewer than n + 1 rows or a similarity outside [0, 1].
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1 or rows < n + 1:
        raise ConfigError(f"n={n!r} clients for {rows} rows: n >= 1 parts and one more to share need n + 1 rows.")
    if not 0 <= similarity <= 1:
        raise ConfigError(f"similarity={similarity!r}: the probability of a shared row, in [0, 1].")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"seed={seed!r}: the seed of a split is an integer that is not negative.")
    rng = Generator(PCG64(seed))
    size = rows // (n + 1)
    shared, *own = rng.permutation(rows)[: size * (n + 1)].reshape(n + 1, size)
    return [np.where(rng.random(size) < similarity, shared, part).astype(np.int64) for part in own]


def by_key(keys: NDArray) -> list[Part]:
    """Natural clients: one part, ascending, for each distinct key (a writer, a hospital), in the keys' own order."""
    _, which = np.unique(keys, return_inverse=True)
    order = np.argsort(which, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(which))[:-1])
