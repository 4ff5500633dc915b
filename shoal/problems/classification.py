"""Binary linear classification on real data, split over clients; two losses, both nonconvex as a whole.

    "logistic":   log(1 + exp(-y a'x)) + lam sum x_j^2 / (1 + x_j^2), a convex loss with a nonconvex regularizer
    "nonconvex":  (1 - s(y a'x))^2 + (lam / 2) ||x||^2, s the sigmoid: the loss of the experiments of Gorbunov,
                  Burlachenko, Li, Richtarik, "MARINA", 2021, arXiv:2102.07845

Client i has N_i of the N rows, and f_i = (n/N) sum over its rows of the loss + regularizer: the weights N_i n / N sit
inside f_i, so that f = (1/n) sum f_i is the mean over all data, however uneven the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, sparray, spmatrix
from torch import Tensor

from shoal import data, rng, splits
from shoal.core import Problem
from shoal.errors import ConfigError, DataError
from shoal.kernels import losses
from shoal.messages import Round, Rows, Vector
from shoal.problems import hosting
from shoal.problems.smoothness import linear_model
from shoal.theory import Constant, Smoothness

Floats = NDArray[np.float64]


class Loss(NamedTuple):
    """A loss phi of the margin with lo <= phi'' <= hi, |phi'| <= slope, and a regularizer lam R with |R''| <= bend."""

    kernel: Callable[..., None]
    lo: float
    hi: float
    slope: float
    regularizer: Callable[[Floats], tuple[float, Floats]]  # R and its gradient
    bend: float


def bounded_ratio(x: Floats) -> tuple[float, Floats]:
    """sum x_j^2 / (1 + x_j^2) and its gradient; the second derivative 2(1 - 3x^2) / (1 + x^2)^3 is in [-1/2, 2]."""
    square = np.square(x)
    with np.errstate(invalid="ignore"):  # inf / inf at an x that overflowed: the NaN is what a diverged run reports
        return float((square / (1.0 + square)).sum()), 2.0 * x / np.square(1.0 + square)


def half_square(x: Floats) -> tuple[float, Floats]:
    """||x||^2 / 2 and its gradient; the second derivative is 1."""
    return 0.5 * float(np.square(x).sum()), x


def sigmoid_curvature(s: float) -> float:
    """The second derivative of (1 - s)^2 at a margin with sigmoid s: 2 s (1 - s)^2 (3 s - 1)."""
    return 2.0 * s * (1.0 - s) ** 2 * (3.0 * s - 1.0)


# Its derivative in s is 2 (1 - s)(-12 s^2 + 9 s - 1): extremes -0.120241 and 0.154059.
LOWEST, HIGHEST = (sigmoid_curvature((9.0 + sign * math.sqrt(33.0)) / 24.0) for sign in (-1.0, 1.0))

LOSSES = {
    "logistic": Loss(losses.logistic, 0.0, 0.25, 1.0, bounded_ratio, 2.0),
    "nonconvex": Loss(losses.nonconvex, LOWEST, HIGHEST, 8.0 / 27.0, half_square, 1.0),
}


class Classification(Problem):
    """A linear classifier on rows A (N, d) with labels in {-1, +1}; client i has the rows parts[i].

    Raises ConfigError where the parts are not a partition of the rows into nonempty parts, for a loss that is not in
    LOSSES or a negative lam, and DataError for labels other than -1 and +1 or values that are not finite.

    References: arXiv:2102.07845 for the loss "nonconvex"; bounds in docs/derivations/smoothness.md.
    """

    def __init__(
        self,
        A: csr_array | spmatrix | sparray | Floats,
        labels: NDArray,
        parts: Sequence[NDArray[np.int64]],
        loss: str = "logistic",
        lam: float = 1e-3,
        name: str = "classification",
    ) -> None:
        if loss not in LOSSES:
            raise ConfigError(f"loss={loss!r}: a loss is one of {', '.join(LOSSES)}.")
        if not (math.isfinite(lam) and lam >= 0):
            raise ConfigError(f"lam={lam!r}: the weight of the regularizer must be a number that is not negative.")
        A, y = csr_array(A, dtype=np.float64, copy=True), np.asarray(labels, np.float64)
        A.sum_duplicates()  # and sorts: the order of summation is part of the result
        _check_data(A, y)
        _check_partition(parts, A.shape[0])
        self.name, self.loss, self.lam = name, loss, float(lam)
        self.n, self.d, self.total_rows = len(parts), A.shape[1], A.shape[0]
        order = np.concatenate([np.sort(part) for part in parts]).astype(np.int64)
        self._hold(np.arange(self.n), _signed(A[order], y[order]), np.cumsum([0, *map(len, parts)]))
        self._smoothness: Smoothness | None = None

    @classmethod
    def load(
        cls,
        source: str | Path = "phishing",
        n: int = 20,
        split: str = "iid",
        alpha: float | None = None,
        seed: int = 0,
        loss: str = "logistic",
        lam: float = 1e-3,
    ) -> Classification:
        """A bundled data set or a LIBSVM file (`shoal.data.load`), shared out by `shoal.splits.split`."""
        read = data.load(source)
        return cls(read.A, read.y, splits.split(split, read.y, n, seed, alpha), loss, lam, read.name)

    def __repr__(self) -> str:
        facts = f"n={self.n}, d={self.d}, rows={self.total_rows}, loss={self.loss!r}, lam={self.lam:g}"
        return f"Classification({self.name!r}, {facts})"

    def start(self) -> Vector:
        """x^0 = 0."""
        return torch.zeros(self.d)

    def evaluate(self, x: Vector, clients: Tensor) -> tuple[Tensor, Rows]:
        """f_i(x) and grad f_i(x) over all of each client's rows; float64 sums, gradients rounded to float32 once."""
        slots = hosting.slots(self._table, clients)
        return self._over(self._A, self._starts[slots], self._starts[slots + 1], np.ones(len(slots)), x)

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        """grad f_i over all of client i's N_i rows, or over `batch` of them: f_ij = n N_i/N phi(y a'x) + lam R."""
        if batch is None:
            return super().grad(x, rnd)
        rows, counts, sizes = self._drawn(rnd, batch)
        A, ends = _narrow(self._A[rows], self._A), np.cumsum(counts)
        return self._over(A, ends - counts, ends, sizes / counts, x)[1]

    def _drawn(self, rnd: Round, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The rows of A that the round's clients draw, client after client; how many each; of how many."""
        slots = hosting.slots(self._table, rnd.clients)
        starts = self._starts[slots]
        sizes = self._starts[slots + 1] - starts
        counts = np.minimum(sizes, batch)
        rows, first = np.empty(counts.sum(), np.int64), np.cumsum(counts) - counts
        for size in np.unique(sizes):  # evenly split data have two sizes at most
            at = np.flatnonzero(sizes == size)
            if size <= batch:
                chosen = np.broadcast_to(np.arange(size), (len(at), size))
            else:
                draw = rnd.draw("Classification.batch", rnd.clients[torch.from_numpy(at)])
                chosen = rng.support(draw, int(size), batch).numpy()
            rows[first[at][:, None] + np.arange(chosen.shape[1])] = starts[at][:, None] + chosen
        return rows, counts, sizes

    def _over(
        self, A: csr_array, first: NDArray[np.int64], last: NDArray[np.int64], weights: Floats, x: Vector
    ) -> tuple[Tensor, Rows]:
        """Values and gradients of (n/N) weights[i] times the losses of A's rows first[i]..last[i]-1, regularized."""
        z, parts = hosting.point(x, self.d), LOSSES[self.loss]
        value, gradient = parts.regularizer(z)
        values, rows = np.empty(len(first)), np.empty((len(first), self.d), np.float32)
        scales, shared = self.n / self.total_rows * weights, (self.lam * value, self.lam * gradient)
        parts.kernel(A.data, A.indices, A.indptr, first, last, z, scales, *shared, values, rows)
        return torch.from_numpy(values), torch.from_numpy(rows)

    def smoothness(self) -> Smoothness:
        """Valid bounds (`shoal.problems.smoothness.linear_model`), computed once; f_inf = 0 since both losses are >= 0.

        Needs all clients' rows: raises ConfigError on what `only` returned, unless it was computed before.
        """
        if self._smoothness is None:
            if len(self.clients) < self.n:
                raise ConfigError(
                    f"smoothness of {len(self.clients)} of n={self.n} clients: it needs every client's rows; "
                    "call smoothness() on the whole problem before only(...)."
                )
            parts = LOSSES[self.loss]
            blocks = [self._A[a:b] for a, b in zip(self._starts[:-1], self._starts[1:], strict=True)]
            bounds = linear_model(blocks, parts.lo, parts.hi, self.lam * parts.bend, parts.slope)
            self._smoothness = replace(bounds, f_inf=Constant(0.0, "bound"))
        return self._smoothness

    def only(self, clients: Tensor) -> Classification:
        """The same f_i under the same ids, holding just these clients' rows (and the constants, if already known)."""
        slots = np.unique(hosting.slots(self._table, clients))
        spans = [np.arange(self._starts[s], self._starts[s + 1]) for s in slots]
        rows = np.concatenate([np.empty(0, np.int64), *spans])
        other = copy(self)
        other._hold(self.clients[slots], self._A[rows], np.cumsum([0, *map(len, spans)]))
        return other

    def _hold(self, clients: NDArray[np.int64], A: csr_array, starts: NDArray[np.int64]) -> None:
        """Rows starts[s]..starts[s+1]-1 of A are those of clients[s]."""
        # One index type, so that the kernels are compiled once whatever the caller's matrix was made of.
        width = np.int32 if max(A.nnz, A.shape[1]) < 2**31 else np.int64
        A.indices, A.indptr = A.indices.astype(width), A.indptr.astype(width)
        self.clients, self._A, self._starts = clients, A, starts.astype(np.int64)
        self._table = hosting.slot_table(self.n, clients)


def _signed(A: csr_array, y: Floats) -> csr_array:
    """Rows y a in place of a: the label enters through the margin only, and a change of sign is exact."""
    return csr_array((A.data * np.repeat(y, np.diff(A.indptr)), A.indices, A.indptr), shape=A.shape)


def _narrow(A: csr_array, like: csr_array) -> csr_array:
    """A with the index type of another matrix, for which the kernels are compiled already."""
    A.indices, A.indptr = A.indices.astype(like.indices.dtype), A.indptr.astype(like.indptr.dtype)
    return A


def _check_data(A: csr_array, y: Floats) -> None:
    if A.shape[0] == 0 or A.shape[1] == 0:
        raise DataError(f"the data have shape {A.shape}: at least one row and one column are needed.")
    if len(y) != A.shape[0] or not np.isin(y, (-1.0, 1.0)).all():
        found = np.unique(y)[:5].tolist()
        raise DataError(f"{len(y)} labels such as {found} for {A.shape[0]} rows: each row needs one label, -1 or +1.")
    if not np.isfinite(A.data).all():
        raise DataError("the data hold a NaN or an infinity: every value must be finite; drop or fill in those rows.")


def _check_partition(parts: Sequence[NDArray[np.int64]], rows: int) -> None:
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if not len(parts) or empty:
        raise ConfigError(f"clients without rows: {empty[:5] or 'all'}; every client needs at least one row.")
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows)):
        raise ConfigError(
            f"the parts do not hold each of the {rows} rows exactly once; shoal.splits.split makes such parts."
        )
