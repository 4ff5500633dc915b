"""MARINA with PermK and RandK, and EF21 with TopK, on quadratics from equal to very different, tuned by powers of two.

Szlendak, Tyurin, Richtarik, "Permutation Compressors for Provably Faster Distributed Nonconvex Optimization", 2021,
arXiv:2110.03300, experiments section: d = 1000, n in {10, 1000, 10000}, s in {0, .05, .1, .2, .8}, lambda = 1e-6,
K = max(d/n, 1), p = K/d, multiples 2^0..2^19 of the theory's step. The paper's public code runs 20000 iterations; here
a run ends at a target, so that the bits to one accuracy can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shoal.experiments.grid import Grid
from shoal.experiments.reproduce.cq_quadratics import better, seeds
from shoal.experiments.reproduce.study import (
    Finding,
    Listing,
    Outcome,
    Reproduction,
    Rows,
    above,
    arrived,
    bits,
    grid,
    ratio,
    where,
)

PAPER = "Szlendak, Tyurin, Richtarik, 2021, arXiv:2110.03300"
NOISES = (0.0, 0.05, 0.1, 0.2, 0.8)


def methods(n: int, d: int) -> dict[str, str]:
    """The three that the paper compares."""
    k = max(1, d // n)
    return {
        "PermK": f"Marina(PermK(), p={k / d})", "RandK": f"Marina(RandK({k}), p={k / d})", "TopK": f"EF21(TopK({k}))",
    }  # fmt: skip


def _grids(n: int, quick: bool, data: Sequence[Path]) -> list[Grid]:
    """With many clients one seed, a nearer target and fewer rounds: else the grid takes days."""
    many, found, d = n > 10, [], 100 if quick else 1000
    n = min(n, 200) if quick else n
    for noise in (0.0, 0.8) if quick else NOISES:
        problem = {"name": "quadratics", "clients": n, "dim": d, "noise": noise, "lam": 1e-6}
        multiples: list[float] = [2.0**k for k in ((0, 2, 4) if quick else range(20))]
        over: dict[str, list[Any]] = {"method": list(methods(n, d).values()), "multiple": multiples}
        over["seed"] = [0] if many else seeds(quick, 5)
        relative, rounds = (1e-4, 5000) if many else (1e-7, 20_000)
        relative, rounds = (1e-4, 2000) if quick else (relative, rounds)
        found.append(grid(problem, over, relative, rounds=rounds))
    return found


def tuned(rows: Rows, method: str) -> Rows:
    """The runs with the multiple that needs the fewest bits on all seeds together; none where none arrives."""
    mine = where(rows, method=method)
    tried = [where(mine, multiple=m) for m in sorted({row["multiple"] for row in mine})]
    return min(filter(arrived, tried), key=lambda runs: sum(row["up_bits"] for row in runs), default=[])


def cells(theory: Rows, best: Rows) -> tuple[str, str]:
    """Bits with theory's step, and with the best, which is named."""
    return bits(theory), f"{bits(best)} at {best[0]['multiple']:g} ×" if best else "none arrives"


def _judge(rows: Rows, quick: bool) -> Outcome:
    noises, n, d = sorted({row["problem.noise"] for row in rows}), rows[0]["problem.clients"], rows[0]["problem.dim"]
    names, listing = methods(n, d), []
    best = {(k, s): tuned(where(rows, problem__noise=s), m) for k, m in names.items() for s in noises}
    theory = {(k, s): where(rows, method=m, problem__noise=s, multiple=1.0) for k, m in names.items() for s in noises}
    for s in noises:
        listing.append((f"{s:g}", *(cell for name in names for cell in cells(theory[name, s], best[name, s]))))
    small, most = [s for s in noises if s <= 0.05], math.sqrt(n) if d >= n else 1.0 + d / math.sqrt(n)
    headline = {s: ratio(theory["RandK", s], theory["PermK", s]) for s in noises}
    over = {name: {s: ratio(best[name, s], best["PermK", s]) for s in noises} for name in ("RandK", "TopK")}
    tops = [over["TopK"][s] for s in noises]
    findings = (
        Finding(
            "For small L± PermK needs up to √n (d >= n) or 1 + d/√n (d < n) times fewer bits than RandK, with MARINA",
            "abstract", f"theory steps, RandK / PermK ({most:.3g} at most): " + _said(headline),
            better([headline[s].beats() for s in small]), "A - B = 0 for PermK: only L± shortens its step",
        ),
        Finding(
            "With tuned steps PermK is the best of the three where L± is small", "remembered",
            f"RandK / PermK: {_said(over['RandK'])}; TopK / PermK: {_said(over['TopK'])}",
            better([over[name][s].beats() for name in over for s in small]),
            "powers of two times each method's own theory step; EF21's messages carry their indices. x⁰ has one "
            "nonzero coordinate, and a tridiagonal matrix spreads it slowly, which suits TopK; at s = 0 "
            "PermK's theory step is 1/L- already, and twice that does not converge",
        ),
        Finding(
            "EF21 with TopK catches up as L± grows", "remembered",
            f"tuned, TopK / PermK: {tops[0]} at s = {noises[0]:g}, {tops[-1]} at s = {noises[-1]:g}",
            better([above(tops[0], tops[-1])]), "PermK's error grows with L±, TopK's contraction does not depend on it",
        ),
    )  # fmt: skip
    header = ("noise s", *(f"{name}, {step}" for name in names for step in ("theory", "tuned")))
    listings = (Listing(f"Thousand bits a client to the target, n = {n}, d = {d}", header, tuple(listing)),)
    return Outcome(findings, listings)


def _said(ratios: dict) -> str:
    return "; ".join(f"s = {s:g}: {one}" for s, one in ratios.items())


def _quadratics(n: int, name: str, ends: str) -> Reproduction:
    return Reproduction(
        name, f"PermK, RandK and TopK on quadratics, n = {n}", PAPER,
        f"d = 1000, n = {n}, K = {max(1, 1000 // n)}, p = K/d, steps 2⁰ to 2¹⁹ times theory. {ends}",
        _judge, partial(_grids, n),
    )  # fmt: skip


FEW = "Five seeds; the target is 10⁻⁷ of the first squared gradient norm, within 20000 rounds."
MANY = "One seed, so no intervals; the target is 10⁻⁴ of the first squared gradient norm, within 5000 rounds."
QUADRATICS = (
    _quadratics(10, "permk-quadratics", FEW),
    _quadratics(1000, "permk-quadratics-1000", MANY),
    _quadratics(10_000, "permk-quadratics-10000", MANY),
)
