"""A plan against runs: candidates at their theorems' steps until the target, in bits that were really encoded.

First a screening, one seed each: the first candidates of the plan, the best single compressors, other p around the best
that was found. A run is stopped at `SLACK` times the fewest bits so far of its sort. Then the finalists (the plan's
choice, the best of the screening, the best compositions and the best single compressors) run on every seed: being the
best of many on the seed of the screening is partly luck, and the other seeds show how much.

Entropy-coded messages are judged apart (`coded`): how long they are depends on the vectors, and a plan that knows no
vectors has a bound for all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import kendalltau

from shoal.compressors import QSGD, Coded, Composed, Correlated, Independent, PermK, RandK
from shoal.core import Compressor, Method, Problem
from shoal.errors import ConfigError
from shoal.experiments.expressions import known_names, parse
from shoal.experiments.plan import Plan, Prediction, predict
from shoal.experiments.run import simulate
from shoal.methods import Marina

SLACK = 1.25
SHIFTS = (0.25, 0.5, 2.0, 4.0)  # times p
FINALISTS = 3  # of each class
SINGLES = 3  # of each kind
Tell = Callable[[str, int, int], None]  # (expression, how many are done, how many there are)


@dataclass(frozen=True)
class Trial:
    """One candidate in runs: bits a client to the target, one number a seed, inf where it was not reached.

    spent: bits a client when the run ended, for whatever reason. rank: its place in the plan; None for another p than
    the plan's. stopped: why the last run ended.
    """

    prediction: Prediction
    rank: int | None
    bits: tuple[float, ...]
    spent: tuple[float, ...]
    rounds: tuple[int, ...]
    stopped: str

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.bits)

    @property
    def half(self) -> float:
        """Twice the standard error of the mean; 0 for one seed, and where a run did not arrive."""
        if len(self.bits) < 2 or math.isinf(self.mean):
            return 0.0
        return 2.0 * statistics.stdev(self.bits) / math.sqrt(len(self.bits))

    def facts(self) -> dict[str, Any]:
        """As JSON has it: null where the target was not reached."""
        finite = [None if math.isinf(b) else b for b in self.bits]
        return asdict(self) | {"bits": finite, "mean": None if math.isinf(self.mean) else self.mean}


@dataclass(frozen=True)
class Verdict:
    """What the runs say.

    ratio: bits of the plan's choice over those of the best finalist, >= 1. plain: the same among those without an
    entropy code, None without any. tau: Kendall's, between predicted and screened bits of these (a stopped run counts
    with what it had spent), None for fewer than two. composition: bits of the best composition over those of the best
    single compressor, None without both.
    """

    screened: tuple[Trial, ...]
    finalists: tuple[Trial, ...]
    ratio: float
    plain: float | None
    tau: float | None
    composition: float | None

    @property
    def best(self) -> Trial:
        """The finalist with the fewest bits."""
        return min(self.finalists, key=lambda t: t.mean)

    def facts(self) -> dict[str, Any]:
        """As JSON has it."""
        numbers = {name: getattr(self, name) for name in ("ratio", "plain", "tau", "composition")}
        known = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        return {
            **known,
            "screened": [t.facts() for t in self.screened],
            "finalists": [t.facts() for t in self.finalists],
        }


def compressor_of(prediction: Prediction) -> Compressor | None:
    """The candidate's compressor."""
    method = parse(prediction.method, known_names(), Method)
    return getattr(method, "compressor", None)


def composes(prediction: Prediction) -> bool:
    """Whether MARINA has a quantizer inside a sparsifier here: `Composed`, or correlated quantization in blocks."""
    code = compressor_of(prediction)
    blocks = isinstance(code, Correlated) and code.blocks > 1
    return prediction.method.startswith("Marina(") and (blocks or isinstance(code, Composed))


def coded(prediction: Prediction) -> bool:
    """Whether its messages travel in an entropy code, so that their length depends on the vectors."""
    return isinstance(compressor_of(prediction), Coded)


def single(prediction: Prediction) -> str:
    """Which single compressor of MARINA's three papers this is, "" for any other candidate.

    RandK and QSGD (arXiv:2102.07845), PermK (arXiv:2110.03300), Correlated and Independent (arXiv:2401.05518).
    """
    code = compressor_of(prediction)
    kinds = (RandK, QSGD, PermK, Correlated, Independent)
    other = not prediction.method.startswith("Marina(") or composes(prediction)
    return "" if other or not isinstance(code, kinds) else type(code).__name__


def sort_of(prediction: Prediction) -> str:
    """Whom it is compared with while runs are stopped early."""
    if coded(prediction):
        return "coded"
    return "composed" if composes(prediction) else "single" if single(prediction) else "other"


def chosen(plan: Plan, count: int) -> list[Prediction]:
    """The first `count` of the plan, and of each kind of single compressor the first three."""
    found, seen = list(plan.ranked[:count]), dict[str, int]()
    for prediction in plan.ranked:
        kind = single(prediction)
        seen[kind] = seen.get(kind, 0) + 1
        if kind and seen[kind] <= SINGLES and prediction not in found:
            found.append(prediction)
    return found


def shifted(plan: Plan, prediction: Prediction) -> list[Prediction]:
    """The same MARINA at other p, each at the step that the theorem has for it; nothing for other methods."""
    method = parse(prediction.method, known_names(), Method)
    if type(method) is not Marina or not method.p:
        return []
    others = {min(1.0, float(f"{method.p * shift:.3g}")) for shift in SHIFTS} - {method.p}
    return [predict(Marina(method.compressor, p=p), plan.setting, plan.start) for p in sorted(others)]


def run(
    problem: Problem, plan: Plan, prediction: Prediction, seeds: Iterable[int], limit: int, most: float = math.inf
) -> Trial:
    """The candidate at its step, until the target, `limit` rounds or `most` bits a client."""
    bits, spent, rounds, stopped = [], [], [], ""
    for seed in seeds:
        done = simulate(
            problem, prediction.method, rounds=limit, bits=None if math.isinf(most) else most,
            target=plan.start.target, seed=seed, step=prediction.gamma,
        )  # fmt: skip
        bits.append(done.rows[-1].up_bits if done.stopped == "target" else math.inf)
        spent.append(done.rows[-1].up_bits)
        rounds.append(done.rows[-1].round)
        stopped = done.stopped
    rank = next((k for k, p in enumerate(plan.ranked, 1) if p.method == prediction.method), None)
    return Trial(prediction, rank, tuple(bits), tuple(spent), tuple(rounds), stopped)


def screen(problem: Problem, plan: Plan, count: int, seed: int, limit: int, tell: Tell) -> list[Trial]:
    """One run each, the fewest predicted bits first, then other p around the best of each sort."""
    waiting, found, least = chosen(plan, count), list[Trial](), dict[str, float]()

    def one(prediction: Prediction, done: int) -> None:
        tell(prediction.method, done, len(waiting))
        sort = sort_of(prediction)
        best = least.get(sort, math.inf)
        found.append(run(problem, plan, prediction, [seed], limit, SLACK * best))
        least[sort] = min(best, found[-1].mean)

    for k, prediction in enumerate(waiting):
        one(prediction, k)
    best = {t.prediction.method: t.prediction for t in _best(found, 1)}
    for prediction in best.values():
        for other in shifted(plan, prediction):
            one(other, len(waiting))
    return found


def _best(screened: Sequence[Trial], count: int) -> list[Trial]:
    """The best with and without an entropy code, of compositions and of single compressors, as far as any arrived."""
    order = sorted((t for t in screened if math.isfinite(t.mean)), key=lambda t: t.mean)
    sorts = [
        [t for t in order if coded(t.prediction)],
        [t for t in order if not coded(t.prediction)],
        [t for t in order if composes(t.prediction)],
        [t for t in order if single(t.prediction)],
    ]
    return [t for sort in sorts for t in sort[:count]]


def _finalists(screened: Sequence[Trial]) -> list[Trial]:
    """The plan's choice, its choice without an entropy code, and the best of each sort."""
    plain = [t for t in screened if not coded(t.prediction)]
    wanted = [screened[0], *plain[:1], *_best(screened, FINALISTS)]
    return list({t.prediction.method: t for t in wanted}.values())


def check(
    problem: Problem,
    plan: Plan,
    count: int,
    seeds: Sequence[int] = (0, 1, 2),
    limit: int = 20_000,
    tell: Tell = lambda label, done, total: None,
) -> Verdict:
    """Run the plan's first `count` candidates, and what stands at the top of this file.

    limit: rounds of a run at most. Raises ConfigError for a count, limit or number of seeds below one.
    """
    if min(count, limit, len(seeds)) < 1:
        raise ConfigError(f"check={count}, limit={limit}, seeds={len(seeds)}: all count from one.")
    screened = screen(problem, plan, count, seeds[0], limit, tell)
    last = _finalists(screened)
    finalists = []
    for k, trial in enumerate(last):
        tell(f"all seeds: {trial.prediction.method}", k, len(last))
        finalists.append(run(problem, plan, trial.prediction, seeds, limit))
    plain = [t for t in finalists if not coded(t.prediction)]
    ratio, alone = _over(finalists), _over(plain) if plain else None
    return Verdict(tuple(screened), tuple(finalists), ratio, alone, agreement(screened), _composition(finalists))


def _over(trials: Sequence[Trial]) -> float:
    """Bits of the first, which is the plan's choice, over the fewest."""
    least = min(t.mean for t in trials)
    return trials[0].mean / least if math.isfinite(least) else math.inf


def agreement(trials: Sequence[Trial]) -> float | None:
    """Kendall's tau-b between predicted and measured bits, of those in the plan without an entropy code; None for fewer
    than two, or all ties."""
    plain = [t for t in trials if t.rank is not None and not coded(t.prediction)]
    said, seen = [t.prediction.bits for t in plain], [statistics.fmean(t.spent) for t in plain]
    return float(kendalltau(said, seen).statistic) if min(len(set(said)), len(set(seen))) > 1 else None


def _composition(finalists: Sequence[Trial]) -> float | None:
    composed = [t.mean for t in finalists if composes(t.prediction)]
    alone = [t.mean for t in finalists if single(t.prediction)]
    return min(composed) / min(alone) if composed and alone and math.isfinite(min(alone)) else None
