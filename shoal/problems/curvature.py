"""Smoothness constants of losses without closed forms: what products with Hessians find at given points.

Where f_i has Hessian H_i(x), and H is their mean, the constants near x are

    L_- = ||H||,   L_+^2 = ||(1/n) sum H_i^2||,   L_±^2 = ||(1/n) sum H_i^2 - H^2||,   L_i = ||H_i||.

and where f_i is the mean of f_ij with Hessians H_ij, L_s^2 = ||(1/n) sum_i (1/N_i) sum_j (H_ij - H_i)^2||.

Lanczos's method finds these, power iteration the L_i. Both stay below the norm that they approach, and a norm
at some points is at most the constant for all of R^d: the numbers are lower bounds, typed "estimate", and no theorem
covers a step size made from them. Losses such as the autoencoder's have no finite constants on R^d at all. Derivation:
docs/derivations/curvature.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from scipy.special import ndtri
from torch import Tensor

from shoal.errors import ConfigError
from shoal.messages import Round, Vector
from shoal.theory import Constant, Smoothness

COORDINATES = 2**22  # of a chunk of clients
ROUNDS = 12  # products with H, and with the other two matrices


class Look(NamedTuple):
    """How much of a problem is looked at: so many products in a row, at so many clients and samples, evenly spaced.

    None: all of them. A norm of a mean over some clients is not a bound of any kind, and is still typed as an estimate.
    `precise`: products in float64, of Hessians that know nothing of kinks (ReLU); else differences of two gradients in
    float32, which take less time and see what a small step would.
    """

    rounds: int = ROUNDS
    clients: int | None = None
    samples: int | None = 4
    precise: bool = True

    def at(self, many: int, some: int | None) -> Tensor:
        """The places of `some` of `many`."""
        few = many if some is None else min(some, many)
        return torch.arange(few) * many // few


class Curved(Protocol):
    """A problem that multiplies by its clients' Hessians."""

    n: int
    d: int

    def products(self, x: Vector, v: Tensor, clients: Tensor) -> Tensor:
        """(m, d) float64: H_i(x) v_i, with v (m, d) float64, or (d,) for all of them."""
        ...


class Sampled(Curved, Protocol):
    """One whose f_i are means of f_ij, their Hessians at hand as well."""

    def sample_products(self, x: Vector, v: Tensor, client: int, samples: Tensor) -> Tensor:
        """(k, d) float64: H_ij(x) v_j, with v (k, d) float64, or (d,) for all of them."""
        ...

    def sample_gradients(self, x: Vector, client: int, samples: Tensor) -> Tensor:
        """(k, d) float64: grad f_ij(x)."""
        ...


def gaussian(u: Tensor) -> Tensor:
    """Standard normal numbers, float64, of uniform ones on the multiples of 2^-24 in [0, 1)."""
    # In the middle of its 2^-24: 0 would be minus infinity.
    return torch.from_numpy(ndtri((u.double() + 2.0**-25).numpy()))


def estimated(
    problem: Curved, points: Sequence[Vector], rounds: int = ROUNDS, clients: Tensor | None = None
) -> Smoothness:
    """The largest constants seen at the points, for instance x^0, or iterates of a run; all of them estimates.

    Deterministic, rounded to six digits. Costs about 6.5 `rounds` products with every client's Hessian a point, or with
    those of the `clients` alone. Raises ConfigError for no point or rounds < 1, or where a Hessian is not finite.
    """
    ids = torch.arange(problem.n) if clients is None else clients
    if not len(points) or rounds < 1:
        raise ConfigError(
            f"{len(points)} points, rounds={rounds}: at least one of each, for instance [problem.start()]."
        )
    found = [_at(problem, x, rounds, ids) for x in points]
    top = (max(float(f"{value:.6g}") for value in values) for values in zip(*found, strict=True))
    minus, plus, pm, tilde, most = (Constant(value, "estimate") for value in top)
    return Smoothness(minus, plus, pm, tilde, most)


def of_samples(problem: Sampled, x: Vector, sizes: Sequence[int], look: Look) -> tuple[Constant, Constant]:
    """(L_s, sigma^2) at x, estimates: how far Hessians and gradients of single samples are from their client's.

    `sizes` are the N_i. Costs `rounds` products with each chosen sample's Hessian and the clients', twice.
    """
    chosen = [(int(i), look.at(sizes[i], look.samples)) for i in look.at(problem.n, look.clients).tolist()]

    def spread(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for i, places in chosen:
            one = torch.tensor([i])
            apart = problem.sample_products(x, v, i, places) - problem.products(x, v, one)
            back = problem.products(x, apart.mean(0), one)[0]
            total += problem.sample_products(x, apart, i, places).mean(0) - back
        return total / len(chosen)

    square, _ = _lanczos(spread, _outset(problem), look.rounds)
    noise = 0.0
    for i, places in chosen:
        whole = sum(part.sum(0) for part in _gradients(problem, x, i, torch.arange(sizes[i]))) / sizes[i]
        noise += sum(float((part - whole).square().sum()) for part in _gradients(problem, x, i, places)) / len(places)
    found = (math.sqrt(square), noise / len(chosen))
    length, variance = (Constant(float(f"{value:.6g}"), "estimate") for value in found)
    return length, variance


def _gradients(problem: Sampled, x: Vector, client: int, samples: Tensor) -> Iterator[Tensor]:
    """A few at a time: never more numbers than a chunk of clients has."""
    return (problem.sample_gradients(x, client, part) for part in samples.split(max(1, COORDINATES // problem.d)))


def _outset(problem: Curved) -> Tensor:
    start = gaussian(Round.full(0, 0, 1).uniform(problem.d, "curvature.start")[0])
    return start / start.norm()


def _at(problem: Curved, x: Vector, rounds: int, ids: Tensor) -> tuple[float, float, float, float, float]:
    start = _outset(problem)
    minus, v = _lanczos(lambda v: _mean(problem, x, v, ids), start, rounds)
    plus, _ = _lanczos(lambda v: _square(problem, x, v, ids), start, rounds)
    pm, _ = _lanczos(lambda v: _variance(problem, x, v, ids), start, rounds)
    # The L_i set out from the direction in which the mean curves most, and are half way there.
    lengths = [_lengths(problem, x, v, max(1, rounds // 2), part) for part in _chunks(problem, ids)]
    each = torch.cat(lengths)
    tilde, most = math.sqrt(float(each.square().mean())), float(each.max())
    # L_+ <= sqrt(mean L_i^2) <= max L_i and L_- <= L_+: what is found of a smaller one holds for the larger.
    plus = max(minus, math.sqrt(plus), math.sqrt(pm))
    return minus, plus, math.sqrt(pm), max(plus, tilde), max(plus, tilde, most)


def _chunks(problem: Curved, ids: Tensor) -> Iterator[Tensor]:
    return iter(ids.split(max(1, COORDINATES // problem.d)))


def _lanczos(apply: Callable[[Tensor], Tensor], v: Tensor, rounds: int) -> tuple[float, Tensor]:
    """(|q'M q|, q): the extreme Ritz pair of a symmetric M in the span of v, M v, ..., M^(rounds - 1) v, ||v|| = 1."""
    basis, images = [v], [apply(v)]
    while True:
        if not bool(images[-1].isfinite().all()):
            raise ConfigError("a product with a Hessian is not finite: the loss overflows at this point; take another.")
        Q, w = torch.stack(basis), images[-1]
        for _ in range(2):  # twice is enough: what is left of the basis is rounding
            w = w - Q.T @ (Q @ w)
        # A rest of the size of rounding errors is no direction: the span holds all that v can reach.
        if len(basis) == min(rounds, len(v)) or float(w.norm()) <= 1e-12 * float(images[-1].norm()):
            break
        basis.append(w / w.norm())
        images.append(apply(basis[-1]))
    T = Q @ torch.stack(images).T
    values, vectors = torch.linalg.eigh((T + T.T) / 2)
    top = int(values.abs().argmax())
    return float(values[top].abs()), Q.T @ vectors[:, top]


def _mean(problem: Curved, x: Vector, v: Tensor, ids: Tensor) -> Tensor:
    """H v."""
    total = torch.zeros(problem.d, dtype=torch.float64)
    for part in _chunks(problem, ids):
        total += problem.products(x, v, part).sum(0)
    return total / len(ids)


def _square(problem: Curved, x: Vector, v: Tensor, ids: Tensor) -> Tensor:
    """(1/n) sum H_i^2 v."""
    total = torch.zeros(problem.d, dtype=torch.float64)
    for part in _chunks(problem, ids):
        total += problem.products(x, problem.products(x, v, part), part).sum(0)
    return total / len(ids)


def _variance(problem: Curved, x: Vector, v: Tensor, ids: Tensor) -> Tensor:
    """((1/n) sum H_i^2 - H^2) v = (1/n) sum H_i (H_i - H) v: exactly 0 where all clients agree."""
    first = problem.products(x, v, ids[:1])[0]
    moved, total = torch.zeros_like(v), torch.zeros_like(v)
    for part in _chunks(problem, ids):
        moved += (problem.products(x, v, part) - first).sum(0)
    moved /= len(ids)
    for part in _chunks(problem, ids):
        apart = problem.products(x, v, part) - first - moved
        total += problem.products(x, apart, part).sum(0)
    return total / len(ids)


def _lengths(problem: Curved, x: Vector, v: Tensor, rounds: int, ids: Tensor) -> Tensor:
    """(m,): ||H_i v_i||, each v_i from its own power iteration."""
    own = v
    norms = torch.zeros(len(ids), dtype=torch.float64)
    for _ in range(rounds):
        w = problem.products(x, own, ids)
        norms = w.norm(dim=1)
        own = w / norms.clamp(min=1e-300)[:, None]
    return norms
