"""The linear autoencoder of the PermK paper: nonconvex, real data, and a dial for how much the clients agree.

Szlendak, Tyurin, Richtarik, "Permutation Compressors for Provably Faster Distributed Nonconvex Optimization", 2021,
arXiv:2110.03300, experiments section. x is the flat pair of a decoder D (p, r) and an encoder E (r, p), and

    f_i(D, E) = (n/N) sum over client i's rows a of ||D E a - a||^2 + (lam / 2) ||D E - I||_F^2.

||.||^2 is the sum over the p coordinates, not their mean, and the weight n/N makes f the mean over all N rows. There is
no L-smoothness on all of R^d, as f is a polynomial of degree 4: the constants are estimates at x^0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import bsr_array, csr_array
from torch import Tensor

from shoal import data, mnist, splits
from shoal.core import Problem
from shoal.errors import ConfigError, DataError
from shoal.kernels import autoencoder as kernels
from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.messages import Round, Rows, Vector
from shoal.problems import hosting
from shoal.problems.curvature import estimated, gaussian
from shoal.rng import checked_seed
from shoal.theory import Constant, Smoothness

Ids = NDArray[np.int64]


class Autoencoder(Problem):
    """A linear autoencoder of width r on rows A (N, p); client i has the rows parts[i], which may be others' as well.

    x^0 is Xavier's: standard normal numbers times sqrt(2 / (p + r)). Clients with the same rows in the same order are
    computed once. Raises ConfigError for a width below 1, a negative lam or parts that name no row, and DataError for
    values that are not finite.

    References: arXiv:2110.03300; docs/derivations/autoencoder.md and, for the constants, curvature.md.
    """

    def __init__(
        self,
        A: csr_array | NDArray,
        parts: Sequence[Ids],
        width: int = 16,
        lam: float = 0.0,
        seed: int = 0,
        name: str = "autoencoder",
    ) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(f"Autoencoder(width={width!r}): the encoder's width is an integer of at least 1.")
        if not (math.isfinite(lam) and lam >= 0):
            raise ConfigError(
                f"Autoencoder(lam={lam!r}): the weight of the regularizer is a number that is not negative."
            )
        A = csr_array(A, dtype=np.float32, copy=True)
        A.sum_duplicates()  # and sorts: the order of summation is part of the result
        if not np.isfinite(A.data).all():
            raise DataError("the data hold a NaN, an infinity or more than float32 can: every value must be finite.")
        _check_parts(parts, A.shape[0])
        self.name, self.width, self.lam, self.seed = name, width, float(lam), checked_seed(seed)
        self.n, self.p, self.d = len(parts), A.shape[1], 2 * A.shape[1] * width
        self.total_rows = sum(map(len, parts))
        known: dict[bytes, int] = {}
        which = [known.setdefault(np.asarray(part, np.int64).tobytes(), len(known)) for part in parts]
        distinct = [np.frombuffer(key, np.int64) for key in known]
        self._hold(np.arange(self.n), np.array(which), [A[part] for part in distinct])
        self._smoothness: Smoothness | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        n: int = 100,
        similarity: float = 0.0,
        rows: int | None = None,
        width: int = 16,
        lam: float = 0.0,
        seed: int = 0,
    ) -> Autoencoder:
        """MNIST from a folder, or by the name "mnist" (`shoal.mnist.located`), or a bundled data set by its name; split
        by `splits.similar`.

        The first `rows` images, pixels in [0, 1], or the first rows of the data set, labels left out.
        """
        if str(folder) in data.BUNDLED:
            A, what = data.load(str(folder)).A, f"{folder} has {{}} rows"
        else:
            images = mnist.images(mnist.located(folder), "train")
            A, what = csr_array(images.reshape(-1, 784).astype(np.float32) / np.float32(255)), "MNIST has {} images"
        if rows is not None and not 1 <= rows <= A.shape[0]:
            raise ConfigError(f"rows={rows!r}: {what.format(A.shape[0])}; take 1 to {A.shape[0]} of them.")
        A = A[:rows]
        return cls(A, splits.similar(A.shape[0], n, similarity, seed), width, lam, seed)

    def __repr__(self) -> str:
        facts = f"n={self.n}, d={self.d}, width={self.width}, rows={self.total_rows}, lam={self.lam:g}"
        return f"Autoencoder({self.name!r}, {facts}, seed={self.seed})"

    def start(self) -> Vector:
        """Xavier's normal numbers, a function of the seed."""
        normal = gaussian(Round.full(0, self.seed, 1).uniform(self.d, "Autoencoder.start")[0])
        return (normal * math.sqrt(2.0 / (self.p + self.width))).float()

    def evaluate(self, x: Vector, clients: Tensor) -> tuple[Tensor, Rows]:
        """f_i(x) and grad f_i(x) over all of each client's rows; float64 sums, gradients rounded to float32 once."""
        slots = hosting.slots(self._table, clients)
        hosting.point(x, self.d)
        blocks, where = np.unique(self._which[slots], return_inverse=True)
        values, rows = np.empty(len(blocks)), ready((len(blocks), self.d), np.float32)
        held = (self._squares, blocks, x.detach().numpy(), self._weight, self.lam, values, rows, self._unit)
        spread(kernels.gradients, (*self._data, *held), len(blocks), least=LEAST // self.d, pieces=1)
        if not np.array_equal(where, np.arange(len(blocks))):
            values, rows = values[where], rows[where]
        return torch.from_numpy(values), torch.from_numpy(rows)

    def products(self, x: Vector, v: Tensor, clients: Tensor) -> Tensor:
        """(m, d) float64: the Hessians of these f_i at x, times v (m, d) or v (d,), in closed form."""
        slots = hosting.slots(self._table, clients)
        hosting.point(x, self.d)
        blocks, where = self._which[slots], np.arange(len(slots))
        if v.ndim == 1:
            blocks, where = np.unique(blocks, return_inverse=True)
        rows = np.empty((len(blocks), self.d))
        V = v.reshape(-1, self.d).contiguous().numpy()
        args = (*self._data, blocks, x.detach().numpy(), V, self._weight, self.lam, rows, self._unit)
        spread(kernels.products, args, len(blocks), least=LEAST // self.d, pieces=1)
        return torch.from_numpy(rows if np.array_equal(where, np.arange(len(blocks))) else rows[where])

    def smoothness(self) -> Smoothness:
        """Estimates at x^0 (`shoal.problems.curvature.estimated`), computed once; f_inf = 0 is a bound.

        Raises ConfigError on what `only` returned, unless it was computed before.
        """
        if self._smoothness is None:
            if len(self.clients) < self.n:
                raise ConfigError(
                    f"smoothness of {len(self.clients)} of n={self.n} clients: it needs every client's rows; "
                    "call smoothness() on the whole problem before only(...)."
                )
            known = estimated(self, [self.start()])
            self._smoothness = Smoothness(**{**vars(known), "f_inf": Constant(0.0, "bound")})
        return self._smoothness

    def only(self, clients: Tensor) -> Autoencoder:
        """The same f_i under the same ids, holding just these clients' rows (and the constants, if already known)."""
        slots = np.unique(hosting.slots(self._table, clients))
        kept, which = np.unique(self._which[slots], return_inverse=True)
        other = copy(self)
        other._hold(self.clients[slots], which, [self._blocks[b] for b in kept])
        return other

    @property
    def _weight(self) -> float:
        return self.n / self.total_rows

    @property
    def _unit(self) -> tuple[int, ...]:
        return (0,) * self.width

    def _hold(self, clients: Ids, which: Ids, blocks: list[csr_array]) -> None:
        """Client clients[s] has the rows blocks[which[s]]."""
        self.clients, self._which, self._blocks = clients, which, blocks
        self._table = hosting.slot_table(self.n, clients)
        columns = [_paired(block) for block in blocks]
        self._data = (_joined(blocks), _joined(columns), np.cumsum([0, *(block.shape[0] for block in blocks)]))
        self._squares = np.array([np.square(block.data, dtype=np.float64).sum() for block in blocks])


def _paired(block: csr_array) -> bsr_array:
    """The block's columns in pairs, of which those rows are held in which either is not zero."""
    rows, p = block.shape
    turned = csr_array(block.T)
    turned.resize(p + p % 2, rows)
    pairs = turned.tobsr((2, 1))
    pairs.sort_indices()  # the order of summation is part of the result
    return pairs


def _joined(blocks: Sequence[csr_array | bsr_array]) -> tuple[NDArray, NDArray, Ids]:
    """(data, index, indptr) of the compressed blocks one after the other; an index counts within its block."""
    data = np.concatenate([np.empty(0, np.float32), *(block.data.ravel() for block in blocks)])
    index = np.concatenate([np.empty(0, np.int32), *(block.indices for block in blocks)]).astype(np.int32)
    lengths = [np.diff(block.indptr) for block in blocks]
    return data, index, np.cumsum(np.concatenate([[0], *lengths])).astype(np.int64)


def _check_parts(parts: Sequence[Ids], rows: int) -> None:
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if not len(parts) or empty:
        raise ConfigError(f"clients without rows: {empty[:5] or 'all'}; every client needs at least one row.")
    named = np.concatenate(parts)
    stray = named[(named < 0) | (named >= rows)]
    if len(stray):
        raise ConfigError(f"rows {stray[:5].tolist()} in the parts: the data have the rows 0..{rows - 1}.")
