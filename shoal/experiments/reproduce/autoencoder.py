"""MARINA with PermK and RandK, and EF21 with TopK, on the linear autoencoder, from clients that differ to equal ones.

Szlendak, Tyurin, Richtarik, "Permutation Compressors for Provably Faster Distributed Nonconvex Optimization", 2021,
arXiv:2110.03300, experiments section: MNIST, width 16, n = 1000, K = d/n, p = K/d, no regularizer, homogeneity
p-hat in {0, .5, .75, .9, 1}. The paper's code tries steps 2^-5..2^3; here they are powers of two times theory's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shoal.experiments.grid import Grid
from shoal.experiments.reproduce.cq_quadratics import better, seeds
from shoal.experiments.reproduce.permk import PAPER, cells, methods, tuned
from shoal.experiments.reproduce.study import (
    Finding,
    Listing,
    Outcome,
    Reproduction,
    Rows,
    above,
    folder,
    grid,
    ratio,
    where,
)

SIMILARITIES = (0.0, 0.5, 0.75, 0.9, 1.0)
WIDTH = 16
# n = 1000, powers of two times theory's step: MARINA's own, and from 1/4 of 1/L_- on up to where runs diverge. Where
# p = k/d = 1/n, theory's steps are about 1/(1 + sqrt(n)) (RandK) and 1/(2 n) (TopK) of that, PermK's by L_± 1/7 to 1.
MANY = {"PermK": range(5), "RandK": (0, *range(3, 7)), "TopK": range(9, 14)}


def _grids(n: int, images: int | None, quick: bool, data: Sequence[Path]) -> list[Grid]:
    """Quick: rows of the bundled mushrooms. A share of the rows that does not divide by n + 1 is left out."""
    found, many = [], n > 10
    n, d, images = (50 if many else 20, 2 * 112 * WIDTH, 840) if quick else (n, 2 * 784 * WIDTH, images)
    problem: dict[str, Any] = {"name": "autoencoder", "data": "mushrooms" if quick else folder(data), "clients": n}
    problem |= {"rows": images} if images else {}
    tried: dict[str, Sequence[int]] = dict.fromkeys(methods(n, d), range(0, 14, 3) if many else range(8))
    tried = MANY if many and not quick else tried
    for similarity in (0.0, 1.0) if quick else SIMILARITIES:
        seeded = {"seed": [0] if many else seeds(quick, 3)}
        relative, rounds = (1e-3, 600) if quick else (1e-2, 2000) if many else (1e-3, 4000)
        whole = grid(problem | {"similarity": similarity}, seeded, relative, rounds=rounds)
        for name, method in methods(n, d).items():
            found.append(whole.changed({}, {"method": [method], "multiple": [2.0**k for k in tried[name]]}))
    return found


def _judge(rows: Rows, quick: bool) -> Outcome:
    n, levels = rows[0]["problem.clients"], sorted({row["problem.similarity"] for row in rows})
    d = 2 * WIDTH * (112 if quick else 784)
    names, listing = methods(n, d), []
    here = {s: where(rows, problem__similarity=s) for s in levels}
    best = {(name, s): tuned(here[s], method) for name, method in names.items() for s in levels}
    theory = {(name, s): where(here[s], method=m, multiple=1.0) for name, m in names.items() for s in levels}
    for s in levels:
        listing.append((f"{s:g}", *(cell for name in names for cell in cells(theory[name, s], best[name, s]))))
    headline = {s: ratio(theory["RandK", s], theory["PermK", s]) for s in levels}
    over = {name: {s: ratio(best[name, s], best["PermK", s]) for s in levels} for name in ("RandK", "TopK")}
    last, first = levels[-1], levels[0]
    said = {name: "; ".join(f"p̂ = {s:g}: {one}" for s, one in over[name].items()) for name in over}
    findings = (
        Finding(
            "For clients that agree PermK needs fewer bits than RandK, with MARINA and theory's steps", "abstract",
            "RandK / PermK: " + "; ".join(f"p̂ = {s:g}: {one}" for s, one in headline.items()),
            better([headline[last].beats()]), "steps from constants estimated at x⁰, which no theorem covers",
        ),
        Finding(
            "With tuned steps PermK is the best of the three for p̂ near 1", "remembered",
            f"RandK / PermK: {said['RandK']}; TopK / PermK: {said['TopK']}",
            better([over[name][last].beats() for name in over]),
            "powers of two times each method's own theory step; EF21's messages carry their indices",
        ),
        Finding(
            "PermK's lead over RandK shrinks as clients differ", "remembered",
            f"tuned, RandK / PermK: {over['RandK'][last]} at p̂ = {last:g}, {over['RandK'][first]} at p̂ = {first:g}",
            better([above(over["RandK"][last], over["RandK"][first])]), "PermK's error grows with L±, RandK's with L₊",
        ),
    )  # fmt: skip
    header = ("p̂", *(f"{name}, {step}" for name in names for step in ("theory", "tuned")))
    title = f"Thousand bits a client to the target, n = {n}, d = {d}"
    return Outcome(findings, (Listing(title, header, tuple(listing)),))


def _autoencoder(name: str, n: int, images: int | None, ends: str) -> Reproduction:
    shown = f"{images} images" if images else "all images"
    return Reproduction(
        name, f"PermK, RandK and TopK on the linear autoencoder, n = {n}", PAPER,
        f"MNIST ({shown}), width 16, d = 25088, n = {n}, K = {25088 // n}, p = K/d; {ends} p̂ is the share of rows "
        "that all clients have in common. Quick: 840 rows of the bundled mushrooms, n = 20 or 50, to 10⁻³ of the first "
        "squared gradient norm in at most 600 rounds.", _judge, partial(_grids, n, images), needs="MNIST",
    )  # fmt: skip


_FEW = (
    "steps 2⁰ to 2⁷ times theory, three seeds; the target is 10⁻³ of the first squared gradient norm, in at most 4000 "
    "rounds."
)
_MANY = (
    "steps 2⁰ to 2⁴ times theory for PermK, 1 and 2³ to 2⁶ for RandK, 2⁹ to 2¹³ for TopK: MARINA's own, and from about "
    "1/4 of 1/L₋ on, as smaller ones do not arrive; one seed, so no intervals; the target is 10⁻² of the first squared "
    "gradient norm, in at most 2000 rounds."
)
AUTOENCODERS = (
    _autoencoder("permk-autoencoder", 10, 1100, _FEW),
    _autoencoder("permk-autoencoder-1000", 1000, None, _MANY),
)
