"""A search for vectors that beat the constants without a proof: `python scripts/search_constants.py [STEPS]`.

DRIVE and EDEN: the largest E||C(u) - u||^2 / ||u||^2 found, over what a uniform rotation would give, for one, two and
three rounds; the stated constants are `drive.EXCESS` times that. Correlated(numerical=True): the largest exact error
over the right side of its AB inequality. From few-hot, two-valued, power-law, Cauchy and Gaussian vectors, the three
worst climb by random moves of any length, for STEPS steps; the end of each climb is measured again with fresh numbers,
because the largest of many noisy values is too large. The tables are in docs/derivations/rotation.md and correlated.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import torch

from shoal.compressors import Correlated, Drive, Eden
from shoal.compressors.correlated import exact_error
from shoal.compressors.drive import DISTORTION, EXCESS, Turned
from shoal.messages import Round

Ratio = Callable[[np.ndarray], float]


def starts(shape: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Vectors (d,), or n of them (n, d), of the kinds on which rotations and grids are at their worst."""
    d, out = shape[-1], []
    for hot in sorted({1, 2, 3, 4, 8, d // 4, d // 2, d - 1, d} & set(range(1, d + 1))):
        flat = np.where(np.arange(d) < hot, 1.0, 0.0)
        out += [flat, rng.permutation(flat), flat * rng.choice([-1.0, 1.0], d), flat * rng.uniform(0.1, 1.0, d)]
    out += [(1.0 + np.arange(d)) ** -power for power in (0.5, 1.0, 2.0, 4.0)]
    out += [np.where(rng.random(d) < share, 1.0, low) for share in (0.1, 0.5) for low in (-0.5, 0.01, 0.1, 0.5)]
    out += [rng.standard_cauchy(d), rng.normal(size=d), rng.choice([-1.0, 1.0], d)]
    if len(shape) == 1:
        return out
    n = shape[0]
    apart = [rng.choice([-1.0, 0.0, 1.0], shape), rng.normal(size=shape), rng.standard_cauchy(shape), np.eye(n, d)]
    lone = [np.where(np.arange(n)[:, None] == 0, v, 0.0) for v in out]
    half = [np.where(np.arange(n)[:, None] < n // 2, v, -v) for v in out]
    near = [v + 0.02 * rng.normal(size=shape) for v in out]
    return apart + lone + half + near + [np.tile(v, (n, 1)) for v in out]


def climb(ratio: Ratio, shape: tuple[int, ...], steps: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The ends of three climbs."""
    found = sorted(((ratio(u), i, u) for i, u in enumerate(starts(shape, rng))), reverse=True)[:3]
    ends = []
    for value, _, u in found:
        for _ in range(steps):
            size = np.abs(u).max() * 10.0 ** rng.uniform(-3, 0)
            moved = u + size * rng.normal(size=shape) * (rng.random(shape) < rng.choice([0.03, 0.3, 1.0]))
            new = ratio(moved)
            if new > value:
                value, u = new, moved
        ends.append(u)
    return ends


def omega(code: Turned, u: np.ndarray, samples: int, index: int) -> tuple[float, float]:
    """(the mean of ||C(u) - u||^2 / ||u||^2, its standard error): a client is a sample."""
    row = torch.from_numpy((u / np.abs(u).max()).astype(np.float32))
    rnd = Round.full(index, 1, samples)
    lost = (code.decode(code.encode(row.expand(samples, -1), rnd), rnd).double() - row.double()).square().sum(1)
    size = float(row.double().square().sum())
    return float(lost.mean()) / size, float(lost.std()) / size / math.sqrt(samples)


def uniform_omega(code: Turned, D: int) -> float:
    """1 / (1 - distortion) - 1."""
    return D / sum(count * (1.0 - DISTORTION[bits]) for count, bits in code._parts(D)) - 1.0


def worst(code: Turned, D: int, steps: int) -> tuple[float, float]:
    """(ratio, standard error) of the worst vector found."""
    ideal, rng = uniform_omega(code, D), np.random.default_rng([D, code.rounds])
    ends = climb(lambda u: omega(code, u, 1000, 0)[0] if u.any() else 0.0, (D,), steps, rng)
    value, error = max(omega(code, u, 20_000, 1) for u in ends)
    return value / ideal, error / ideal


def turned(steps: int) -> None:
    """One line a number of bits: the worst of three dimensions for one, two and three rounds."""
    print("\nDRIVE and EDEN: worst ratio to 1/(1 - D_b) - 1 (standard error), at D = 64, 128, 256\n")
    print("| code | stated | one round | two rounds | three rounds |\n|---|---|---|---|---|")
    for bits in (0.25, 0.5, 0.9, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8):
        cells = []
        for rounds in (1, 2, 3):
            code = Drive(rounds=rounds) if bits == 1 else Eden(bits, rounds)
            ratio, error = max(worst(code, D, steps) for D in (64, 128, 256))
            cells.append(f"{ratio:.3f} ({error:.3f})")
        stated = EXCESS[code._parts(64)[0][1]]
        print(f"| {'`Drive()`' if bits == 1 else f'`Eden({bits})`'} | {stated} | {' | '.join(cells)} |", flush=True)


def correlated(steps: int) -> None:
    """One line a shape: the worst ratio to the numerical AB inequality, errors exact."""
    print("\nCorrelated(numerical=True): worst ratio of the exact error to its bound\n")
    print('| n, d | `"own"` | `"max"` |\n|---|---|---|')
    for n, d in (
        (2, 2),
        (2, 8),
        (2, 64),
        (3, 4),
        (3, 40),
        (4, 16),
        (5, 3),
        (8, 2),
        (8, 32),
        (16, 4),
        (16, 64),
        (33, 5),
    ):
        cells = []
        for scale in ("own", "max"):
            ab, rng = Correlated(scale, numerical=True).ab(n, d), np.random.default_rng([n, d])

            def ratio(u: np.ndarray, scale: str = scale, ab: object = ab, n: int = n) -> float:
                u = u.reshape(n, -1)
                squares = (u**2).sum(1)
                r = np.sqrt(squares) if scale == "own" else np.abs(u).max(1)
                bound = ab.a * squares.mean() - ab.b * (u.mean(0) ** 2).sum() + ab.c * squares.max()  # type: ignore[attr-defined]
                return (exact_error(u, r) + 1e-12) / (bound + 1e-12)

            cells.append(f"{max(map(ratio, climb(ratio, (n, d), 10 * steps, rng))):.4f}")
        print(f"| {n}, {d} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    turned(count)
    correlated(count)
