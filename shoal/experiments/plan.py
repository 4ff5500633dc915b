"""A plan: methods, compressors and their parameters ranked by the bits that theory predicts, before anything is run.

A theorem promises mean E||grad f||^2 <= 2 Phi_0 / (gamma K), so K = 2 Phi_0 / (gamma target) rounds reach the target.
Under PL, E f(x^K) - f_* <= (1 - gamma mu)^K Phi_0 and ||grad f||^2 <= 2 L_- (f - f_*) give K. Times the expected bits
of a round that is the prediction. It is an upper bound, and bounds of different methods are loose by different factors:
only runs decide, see `shoal.experiments.trial`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shoal.core import Method, Problem
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact
from shoal.experiments.folder import versions, write_json
from shoal.methods import DCGD, EF21, GD, Dasha, Marina, PPMarina, VRDiana
from shoal.runtimes import chunks
from shoal.theory import Constant, Setting, Smoothness, StepSize

DEEP = 1e-4  # the default target, against ||grad f(x^0)||^2 or what it can be at most


@dataclass(frozen=True)
class Start:
    """What is known of x^0, and where to go: ||grad f||^2 <= target.

    gap    Delta_0 = f(x^0) - f_*, or an upper bound
    below  f(x^0) - (1/n) sum inf f_i, None where some f_i has no lower bound (DCGD needs it)
    spread (1/n) sum ||grad f_i(x^0)||^2, None where unknown (DIANA's, VR-DIANA's and EF21's memories start from zero)
    """

    gap: float
    target: float
    below: float | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name}={value!r}: a positive finite number.")


@dataclass(frozen=True)
class Prediction:
    """What one candidate needs, if its theorem is taken at its word. `first` and `each`: bits a client in round 0, and
    expected in later ones."""

    method: str
    bits: float
    rounds: int
    gamma: float
    p: float | None
    first: float
    each: float
    theorem: str
    evidence: str


@dataclass(frozen=True)
class Plan:
    """The candidates, the fewest predicted bits first, and why others are not among them (reason -> how many)."""

    setting: Setting
    start: Start
    ranked: tuple[Prediction, ...]
    left_out: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        s = self.setting
        known = {"n": s.n, "d": s.d, "pl": s.pl, "smoothness": {k: list(v) for k, v in s.smoothness.facts().items()}}
        asked = {"format": 1, "kind": "plan", **known, "start": asdict(self.start), "versions": versions()}
        return {**asked, "ranked": [asdict(p) for p in self.ranked], "left_out": self.left_out}

    def save(self, path: Path, more: dict[str, Any] | None = None) -> None:
        """The facts, and `more` of them, as JSON."""
        write_json(path, {**self.facts(), **(more or {})})


# ------------------------------------------------------------------------------------------------ what is known
def known_smoothness(
    minus: float, plus: float | None, pm: float | None, n: int, most: float | None = None, mu: float | None = None
) -> Smoothness:
    """The constants from L_- and at least one of L_+, L_±, with what follows from them for the others.

    L_+^2 <= L_-^2 + L_±^2, L_± <= L_+ and L_max <= sqrt(n) L_+. Raises ConfigError where the given ones contradict it.
    """
    if plus is None and pm is None:
        raise ConfigError("a plan needs L_+ or L_±, beside L_-: give --L-plus, --L-pm or both.")
    for name, value, least in (("L-minus", minus, 0.0), ("L-plus", plus, 0.0), ("L-max", most, 0.0), ("mu", mu, 0.0)):
        if value is not None and not (math.isfinite(value) and value > least):
            raise ConfigError(f"--{name} {value:g}: a positive finite number.")
    if pm is not None and not (math.isfinite(pm) and pm >= 0.0):
        raise ConfigError(f"--L-pm {pm:g}: a finite number that is not negative.")
    follows = math.inf if pm is None else math.hypot(minus, pm)
    plus = follows if plus is None else min(plus, follows)
    pm = plus if pm is None else min(pm, plus)
    most = math.sqrt(n) * plus if most is None else most
    for name, small, what, large in (("L_-", minus, "L_+", plus), ("L_-", minus, "L_max", most)):
        if small > large * (1 + 1e-12):
            raise ConfigError(f"{name} = {small:g} > {what} = {large:g}: {name} <= {what} holds for all functions.")
    if mu is not None and mu > minus:
        raise ConfigError(f"mu = {mu:g} > L_- = {minus:g}: mu <= L_- holds for all functions.")
    known = {"minus": minus, "plus": plus, "pm": pm, "tilde": most, "max": most} | ({} if mu is None else {"mu": mu})
    return Smoothness(**{name: Constant(value, "bound") for name, value in known.items()}, each=())


def measured_start(problem: Problem, smoothness: Smoothness, gap: float | None, target: float | None) -> Start:
    """x^0 of a problem: f and all gradients there, exactly; f_* where the problem knows it, else its lower bound.

    `gap` replaces f(x^0) - f_*; target=None: 1e-4 ||grad f(x^0)||^2. Raises ConfigError where there is no gap.
    """
    x, values, total, squares = problem.start(), [], torch.zeros(problem.d, dtype=torch.float64), 0.0
    for part in chunks(problem.n, problem.d, None):
        value, rows = problem.evaluate(x, torch.arange(problem.n)[part])
        values += value.tolist()
        total += rows.double().sum(0)
        squares += float(rows.double().square().sum())
    f, norm = math.fsum(values) / problem.n, float((total / problem.n).square().sum())
    below = None if smoothness.f_inf is None else f - float(smoothness.f_inf)
    star = getattr(problem, "f_star", None)
    if gap is None:
        gap = below if star is None else f - float(star)
    if gap is None:
        raise ConfigError(f"{problem.name} has no known lower bound: give f(x^0) - f_* as --delta0.")
    if target is not None and target >= norm:
        raise ConfigError(f"target={target:g}: ||grad f(x^0)||^2 is {norm:.3g} already; choose a smaller one.")
    return Start(gap, DEEP * norm if target is None else target, below, squares / problem.n)


# ------------------------------------------------------------------------------------------------ predictions
def spent(method: Method, n: int, d: int) -> tuple[float, float]:
    """Expected bits a client: of round 0, and of a later round."""
    full, code = 32.0 * d, getattr(method, "compressor", None)
    if isinstance(method, GD) or code is None:
        return full, full
    if isinstance(method, Marina):  # VR-MARINA and PP-MARINA are Marinas too
        r = method.clients if isinstance(method, PPMarina) else n
        p = method.p or 1.0
        return full, p * full + (1.0 - p) * code.predicted_bits(r, d) * r / n
    asked = (method.clients or n) if isinstance(method, EF21) else n
    each = code.predicted_bits(asked, d) * asked / n
    return (full if isinstance(method, Dasha) else each), each


def promised(step: StepSize, setting: Setting, start: Start) -> float:
    """The rounds in which the theorem reaches the target. Raises ConfigError where it needs what is not known."""
    if step.start > 0.0 and start.spread is None:
        raise ConfigError("needs the mean of ||grad f_i(x^0)||^2: give --spread0, or a problem")
    potential = start.gap + (step.start * start.spread if start.spread is not None else 0.0)
    s = setting.smoothness
    if setting.pl and s.mu is not None:
        return math.log(max(1.0, 2.0 * s.minus * potential / start.target)) / -math.log1p(-step.gamma * s.mu)
    return 2.0 * potential / (step.gamma * start.target)


def _horizon(method: DCGD, setting: Setting, start: Start) -> int:
    """The least K with 6 delta_0 / (gamma K) <= target at gamma = min{1/sqrt(L A K), 1/L}."""
    if start.below is None:
        raise ConfigError("DCGD needs lower bounds of all f_i")
    used = method.step_size(replace(setting, horizon=1)).constants
    if "A" not in used:
        raise ConfigError("DCGD needs lower bounds of all f_i")
    L, ratio = float(setting.smoothness.minus), 6.0 * start.below / start.target
    return max(1, math.ceil(max(ratio * L, ratio**2 * L * used["A"])))


def rounded(method: Method, setting: Setting) -> Method:
    """The method with numbers in place of open parameters that a run would choose; p to three digits, to be read."""
    ready = method.resolved(setting)
    p = getattr(ready, "p", None)
    if p is None or getattr(method, "p", None) is not None:
        return method if p is None else ready
    # VR-DIANA's p and DASHA-PAGE's do not depend on the budget: left open, they are the same in the run.
    return replace(method, p=min(1.0, float(f"{p:.3g}"))) if isinstance(method, Marina) else method


def predict(method: Method, setting: Setting, start: Start) -> Prediction:
    """What the theorem says of this candidate. Raises ConfigError, with the reason, where it says nothing."""
    method.check(setting.n, setting.d)
    if isinstance(method, VRDiana) and setting.pl and start.spread is None:
        raise ConfigError("needs the mean of ||grad f_i(x^0)||^2: give --spread0, or a problem")
    if isinstance(method, DCGD):
        if setting.pl:
            raise ConfigError("DCGD has no theorem under PL")
        rounds = _horizon(method, setting, start)
        step = method.step_size(replace(setting, horizon=rounds))
    else:
        method = rounded(method, setting)
        step = method.step_size(setting)
        rounds = max(1, math.ceil(promised(step, setting, start)))
    if step.evidence == "none":
        raise ConfigError("no theorem applies")
    first, each = spent(method.resolved(setting), setting.n, setting.d)
    bits, p = first + (rounds - 1) * each, getattr(method.resolved(setting), "p", None)
    return Prediction(compact(method), bits, rounds, step.gamma, p, first, each, step.theorem, step.evidence)


def plan(methods: Iterable[Method], setting: Setting, start: Start, numerical: bool = False) -> Plan:
    """All that a theorem speaks of, ranked by predicted bits; ties go to fewer rounds.

    numerical: also where constants survived a search and are not proved.
    """
    ranked, left_out = [], dict[str, int]()
    for method in methods:
        try:
            found = predict(method, setting, start)
        except ConfigError as error:
            left_out[str(error)] = left_out.get(str(error), 0) + 1
            continue
        if found.evidence != "proved" and not numerical:
            reason = "constants are numerical, not proved: --numerical lets them in"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        ranked.append(found)
    if not ranked:
        raise ConfigError(f"nothing to rank: {'; '.join(left_out) or 'no candidate fits'}.")
    ranked.sort(key=lambda p: (p.bits, p.rounds, p.method))
    return Plan(setting, start, tuple(ranked), left_out)
