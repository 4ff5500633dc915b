"""Quadratics whose smoothness constants are known exactly, nonconvex members included.

The generator of Szlendak, Tyurin, Richtarik, "Permutation Compressors for Provably Faster Distributed Nonconvex
Optimization", 2021, arXiv:2110.03300, experiments section. With T = tridiag(-1, 2, -1) of size d x d and, for each
client, two standard normal numbers xi_i, zeta_i out of one generator:

    nu_i = 1 + noise xi_i,   f_i(x) = x'A_i x / 2 - b_i'x,
    A_i = (nu_i / 4) T + shift I,   b_i = (nu_i / 4)(-1 + noise zeta_i) e_1,

and the shift that makes the smallest eigenvalue of (1/n) sum A_i equal lam: f is lam-strongly convex, while an f_i with
small nu_i is not convex and has no lower bound. T is never built. Derivations: docs/derivations/quadratics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral

import numpy as np
import torch
from numpy.random import PCG64, Generator
from numpy.typing import NDArray
from scipy.linalg import solveh_banded
from torch import Tensor

from shoal.core import Problem
from shoal.errors import ConfigError
from shoal.kernels import losses
from shoal.messages import Rows, Vector
from shoal.problems import hosting
from shoal.theory import Constant, Smoothness, by_smoothness

CLEAR = 1e-12  # of nu_i / 4: an eigenvalue of A_i below that is mostly rounding

Floats = NDArray[np.float64]


def extreme_eigenvalues(d: int) -> tuple[float, float]:
    """The smallest and the largest of the eigenvalues 4 sin^2(k pi / (2(d+1))), k = 1..d, of T."""
    angle = math.pi / (2 * (d + 1))
    return 4.0 * math.sin(angle) ** 2, 4.0 * math.cos(angle) ** 2


def stencil(x: Floats) -> Floats:
    """T x: entry j is 2 x_j - x_(j-1) - x_(j+1), with zeros beyond both ends."""
    out = 2.0 * x
    out[1:] -= x[:-1]
    out[:-1] -= x[1:]
    return out


@dataclass(frozen=True)
class Quadratics(Problem):
    """n tridiagonal quadratics in d coordinates; `noise` spreads them apart, L_± = std(nu) cos^2(pi / (2(d+1))).

    noise = 0 makes all f_i equal (L_± = 0). The same (n, noise, seed) gives the same nu_i for every d. Raises
    ConfigError for n or d below 1, a negative noise or a lam that is not positive.

    References: arXiv:2110.03300; constants in docs/derivations/quadratics.md.
    """

    n: int = 10
    d: int = 100
    noise: float = 0.0
    lam: float = 1e-6
    seed: int = 0
    hosted: tuple[int, ...] | None = field(default=None, repr=False)
    name: str = field(default="quadratics", init=False, repr=False)

    def __post_init__(self) -> None:
        for what, least in (("n", 1), ("d", 1), ("seed", 0)):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ConfigError(f"Quadratics({what}={value!r}): {what} must be an integer of at least {least}.")
        for what, positive in (("noise", False), ("lam", True)):
            value = getattr(self, what)
            fits = isinstance(value, (int, float)) and math.isfinite(value) and (value > 0 if positive else value >= 0)
            if not fits:
                rule = "a positive number" if positive else "a number that is not negative"
                raise ConfigError(f"Quadratics({what}={value!r}): {what} must be {rule}.")

    @cached_property
    def _hosted_ids(self) -> hosting.Ids:
        return np.arange(self.n) if self.hosted is None else np.array(self.hosted, np.int64)

    @cached_property
    def _table(self) -> hosting.Ids:
        return hosting.slot_table(self.n, self._hosted_ids)

    @cached_property
    def _coefficients(self) -> tuple[Floats, Floats, float]:
        """(nu_i / 4) (n,), the first entries of b_i (n,), and the shift."""
        draws = Generator(PCG64(self.seed)).standard_normal((self.n, 2))
        quarter = (1.0 + self.noise * draws[:, 0]) / 4.0
        linear = quarter * (-1.0 + self.noise * draws[:, 1])
        # The mean of the nu_i can be negative (few clients, much noise); then T's largest eigenvalue decides.
        shift = self.lam - min(quarter.mean() * edge for edge in extreme_eigenvalues(self.d))
        return quarter, linear, float(shift)

    def start(self) -> Vector:
        """x^0 = (sqrt d, 0, ..., 0), as in the paper."""
        x = torch.zeros(self.d)
        x[0] = math.sqrt(self.d)
        return x

    def evaluate(self, x: Vector, clients: Tensor) -> tuple[Tensor, Rows]:
        """f_i(x) in closed form from x'Tx and x'x, and A_i x - b_i; float64 throughout, gradients rounded once."""
        ids, z = self._hosted_ids[hosting.slots(self._table, clients)], hosting.point(x, self.d)
        quarter, linear, shift = self._coefficients
        # x'Tx as a sum of squares: no cancellation, and never negative.
        energy = float(np.square(np.diff(z, prepend=0.0, append=0.0)).sum())
        square = float(np.square(z).sum())
        values = 0.5 * (quarter[ids] * energy + shift * square) - linear[ids] * z[0]
        rows = np.empty((len(ids), self.d), np.float32)
        losses.tridiagonal(z, stencil(z), quarter[ids], shift, linear[ids], rows)
        return torch.from_numpy(values), torch.from_numpy(rows)

    def smoothness(self) -> Smoothness:
        """Every constant in closed form, exact up to float64 rounding; f_inf is None where some f_i is unbounded, or
        so near to it that float64 cannot tell."""
        quarter, _, shift = self._coefficients
        edges = np.array(extreme_eigenvalues(self.d))
        # Every squared quantity below is a convex function of T's eigenvalue: its maximum is at one of the two ends.
        spectra = quarter[:, None] * edges + shift
        largest = np.abs(spectra).max(axis=1)
        exact = {
            "minus": np.abs(quarter.mean() * edges + shift).max(),
            "plus": math.sqrt(np.square(spectra).mean(axis=0).max()),
            "pm": quarter.std() * edges[1],
            "tilde": math.sqrt(np.square(largest).mean()),
            "max": largest.max(),
            "mu": self.lam,
        }
        weights = np.array(by_smoothness(largest.tolist()))
        second = (np.square(spectra) / weights[:, None]).sum(axis=0) / self.n**2
        exact["apart"], exact["together"] = exact["pm"], exact["minus"]
        exact["plus_w"] = math.sqrt(second.max())
        # A variance under the weights, added as squares: no cancellation.
        apart = np.square(spectra / (self.n * weights[:, None]) - spectra.mean(axis=0))
        exact["pm_w"] = math.sqrt((weights[:, None] * apart).sum(axis=0).max())
        bounded = bool((spectra > CLEAR * np.abs(quarter)[:, None]).all())
        floor = self._mean_of_minima() if bounded else None
        known = {what: Constant(float(value), "exact") for what, value in exact.items()}
        least = None if floor is None else Constant(floor, "exact")
        return Smoothness(**known, f_inf=least, each=tuple(largest.tolist()))

    def minimum(self) -> tuple[Floats, float]:
        """The minimizer of f (d,) float64 and f_* = f(minimizer), by one tridiagonal solve."""
        quarter, linear, _ = self._coefficients
        x = self._solve(float(quarter.mean()), float(linear.mean()))
        return x, -0.5 * float(linear.mean()) * float(x[0])

    @cached_property
    def f_star(self) -> float:
        """f_*, the minimum of f."""
        return self.minimum()[1]

    def only(self, clients: Tensor) -> Quadratics:
        """The same problem, answering for these clients only. Two numbers a client are all the data there is."""
        mine = self._hosted_ids[hosting.slots(self._table, clients)]
        return replace(self, hosted=tuple(np.unique(mine).tolist()))

    def _solve(self, quarter: float, linear: float) -> Floats:
        """x with (quarter T + shift I) x = linear e_1; the matrix must be positive definite."""
        bands = np.full((2, self.d), -quarter)
        bands[1] = 2.0 * quarter + self._coefficients[2]
        right = np.zeros(self.d)
        right[0] = linear
        # LAPACK's tridiagonal solver refuses a 1 x 1 matrix.
        return right / bands[1] if self.d == 1 else solveh_banded(bands, right)

    def _mean_of_minima(self) -> float:
        # inf f_i = -linear_i^2 (A_i^-1)_11 / 2, and (A_i^-1)_11 = 1 / s_d where s_1 = a, s_k = a - q^2 / s_{k-1} are
        # the pivots of A_i, a being its diagonal and q = |quarter_i|. Near the border of definiteness s comes close to
        # q: the recursion is one of t = s - q, in which nothing cancels.
        quarter, linear, shift = self._coefficients
        q = np.abs(quarter)
        rest = shift + np.where(quarter < 0, 4.0 * quarter, 0.0)  # a - 2 q
        t = q + rest
        for _ in range(self.d - 1):
            t = rest + q * (t / (q + t))
        return float((-0.5 * np.square(linear) / (q + t)).mean())
