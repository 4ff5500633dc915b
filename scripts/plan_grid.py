"""Hold `shoal plan` against runs on a grid of tridiagonal quadratics, and print a table for docs/plan.md.

    python scripts/plan_grid.py                                        (n = 10 and 100, d = 1000, five noises)
    python scripts/plan_grid.py --clients 16 --dim 1024 --noises 0.02 0.05 0.1 --seeds 10

A line a problem, as soon as it is done. What the columns mean is in docs/plan.md.
"""

from __future__ import annotations

import argparse
import math
from itertools import product

import torch

from shoal.experiments.candidates import candidates
from shoal.experiments.plan import measured_start, plan
from shoal.experiments.trial import Trial, Verdict, check, coded, composes, single
from shoal.problems import Quadratics
from shoal.theory import Setting

HEAD = ("n", "noise", "L±", "the plan's choice", "kbit", "best without a code", "kbit", "ratio", "best of all", "kbit",
        "tau", "best composition / best single")  # fmt: skip


def said(trial: Trial) -> list[str]:
    """Expression, its place in the plan, and thousands of bits."""
    place = "other p" if trial.rank is None else f"no. {trial.rank}"
    half = f" ± {trial.half / 1e3:.2g}" if trial.half else ""
    return [f"`{trial.prediction.method}`, {place}", f"{trial.mean / 1e3:.3g}{half}"]


def line(problem: Quadratics, verdict: Verdict) -> list[str]:
    """The cells of one problem."""
    plain = [t for t in verdict.finalists if not coded(t.prediction)]
    least = min(plain, key=lambda t: t.mean)
    composed = min((t for t in plain if composes(t.prediction)), key=lambda t: t.mean, default=None)
    alone = min((t for t in plain if single(t.prediction)), key=lambda t: t.mean, default=None)
    pair = "-"
    if composed is not None and alone is not None:
        pair = " / ".join(" ".join(said(t)) for t in (composed, alone)) + f" = {composed.mean / alone.mean:.2f}"
    tau = "-" if verdict.tau is None else f"{verdict.tau:.2f}"
    first = said(plain[0])
    first[1] += "" if plain[0].rank == 1 else " (first without a code)"
    return [str(problem.n), f"{problem.noise:g}", f"{problem.smoothness().pm:.3f}", *first, *said(least),
            f"{plain[0].mean / least.mean:.2f}", *said(verdict.best), tau, pair]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--dim", type=int, default=1000)
    parser.add_argument("--noises", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.8])
    parser.add_argument("--lam", type=float, default=1e-6)
    parser.add_argument("--depth", type=float, default=1e-4, help="the target over ||grad f(x^0)||^2")
    parser.add_argument("--check", type=int, default=40, help="candidates that run")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for n, noise in product(asked.clients, asked.noises):
        problem = Quadratics(n=n, d=asked.dim, noise=noise, lam=asked.lam)
        smoothness = problem.smoothness()
        start = measured_start(problem, smoothness, None, None)
        start = type(start)(start.gap, start.target * asked.depth / 1e-4, start.below, start.spread)
        made = plan(candidates(n, problem.d), Setting(n, problem.d, smoothness), start)
        verdict = check(problem, made, asked.check, range(asked.seeds))
        worst = max((t.prediction.bits / t.mean for t in verdict.finalists if math.isfinite(t.mean)), default=math.nan)
        least = min((t.prediction.bits / t.mean for t in verdict.finalists if math.isfinite(t.mean)), default=math.nan)
        cells = line(problem, verdict)
        print("| " + " | ".join(cells) + f" | <!-- loose by {least:.3g} to {worst:.3g} -->", flush=True)


if __name__ == "__main__":
    main()
