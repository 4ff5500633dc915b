"""MARINA with correlated quantization on logistic regression with a nonconvex regularizer.

Panferov et al., "Correlated Quantization for Faster Nonconvex Distributed Optimization", 2024, arXiv:2401.05518.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.experiments.grid import Grid
from shoal.experiments.reproduce.cq_quadratics import CQ, DRIVE, IQ, PAPER, PERMK, QSGD, SHARED, better, seeds
from shoal.experiments.reproduce.study import (
    Finding,
    Listing,
    Outcome,
    Reproduction,
    Rows,
    bits,
    chosen,
    grid,
    ratio,
    where,
)

RANDK = "Marina(RandK(0.05))"
METHODS = {
    "CQ, own l2 scale": CQ, "CQ, shared scale": SHARED, "IQ": IQ, "PermK": PERMK, "RandK": RANDK, "DRIVE": DRIVE,
    "QSGD": QSGD,
}  # fmt: skip


def _grids(quick: bool, data: Sequence[Path]) -> list[Grid]:
    found = []
    for name in ["phishing", "mushrooms", *chosen(data, ("w8a", "phishing", "mushrooms"))]:
        problem = {"name": name, "clients": 20, "loss": "logistic", "lam": 1e-3}
        methods = (SHARED, IQ) if quick else tuple(METHODS.values())
        over = {"method": methods, "seed": seeds(quick, 3)}
        found.append(grid(problem, over, 0.1 if quick else 1e-2, rounds=4000))
    return found


def _judge(rows: Rows, quick: bool) -> Outcome:
    names = list(dict.fromkeys(row["problem.name"] for row in rows))
    gains, other, listing = {}, {}, []
    for name in names:
        mine = {label: where(rows, problem__name=name, method=method) for label, method in METHODS.items()}
        spent = {label: runs for label, runs in mine.items() if runs}
        gains[name] = ratio(mine["IQ"], mine["CQ, shared scale"])
        short = Path(name).name
        other[short] = ", ".join(
            f"{label} {ratio(runs, mine['CQ, shared scale'])}" for label, runs in spent.items() if label[:2] != "CQ"
        )
        listing.append((short, *(bits(runs) for runs in mine.values()), str(gains[name])))
    findings = (
        Finding(
            "On logistic regression with a nonconvex regularizer CQ needs fewer bits than IQ", "remembered",
            "IQ / CQ with a shared scale: " + "; ".join(f"{Path(k).name} {g}" for k, g in gains.items()),
            better([g.beats() for g in gains.values()]),
            "n = 20, iid split, λ = 10⁻³ and the target, 10⁻² of the first squared norm, are ours; theory steps from "
            "proved bounds, in which L± is bounded from the data",
        ),
        Finding(
            "What do DRIVE, PermK, RandK and QSGD need, against CQ with a shared scale?", "open question",
            "; ".join(f"{name}: {said}" for name, said in other.items()), "answered",
            "bits over those of CQ; theory steps (DRIVE's constants are numerical, not proved)",
        ),
    )  # fmt: skip
    listings = (Listing("Thousand bits a client to the target", ("data", *METHODS, "IQ / CQ shared"), tuple(listing)),)
    return Outcome(findings[: 1 if quick else 2], listings)


LOGISTIC = Reproduction(
    "cq-logistic", "CQ on logistic regression", PAPER,
    "MARINA on log-loss with the regularizer λ Σ x²/(1+x²), mushrooms and phishing over 20 clients, and w8a where its "
    "file is given: --data w8a.", _judge, _grids, ("w8a", "phishing", "mushrooms"),
)  # fmt: skip
