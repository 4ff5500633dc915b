"""MARINA: compressed gradient differences, and now and then, on a shared coin, everyone's full gradient.

Gorbunov, Burlachenko, Li, Richtarik, "MARINA: Faster Non-Convex Distributed Learning with Compression", 2021,
arXiv:2102.07845; with the AB inequality: Szlendak, Tyurin, Richtarik, 2021, arXiv:2110.03300; with correlated
quantization: Panferov et al., 2024, arXiv:2401.05518. Proof of the step sizes: docs/derivations/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from shoal.core import DENSE, Compressor, Gradient, Method, ab_for_inputs, check_share, require
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.theory import AB, Setting, StepSize, best_p, step_size, step_size_pl


class Server(NamedTuple):
    g: Vector


class Worker(NamedTuple):
    grad: Rows  # grad f_i at the point of the round before


@dataclass(frozen=True)
class Marina(Method):
    """Compressed gradient differences, now and then a full gradient.

    With probability p (and in round 0): g = mean grad f_i(x); else g += (1/n) sum C_i(grad f_i(x) - grad f_i(x-)).

    p=None is resolved before the run to the p with the fewest predicted bits. Up 32 d bits on heads, |C| on tails.

    References: arXiv:2102.07845, arXiv:2110.03300, arXiv:2401.05518.
    """

    compressor: Compressor
    p: float | None = None

    def __post_init__(self) -> None:
        mend = "Use EF21 for a biased compressor, or RandK, PermK, Correlated here."
        require(self.compressor, "ab", type(self).__name__, mend)
        check_share(type(self).__name__, "p", self.p, "the probability of a full round")

    def check(self, n: int, d: int) -> None:
        self.compressor.check(n, d)

    def _constants(self, setting: Setting) -> tuple[AB, float]:
        ab = ab_for_inputs(self.compressor, setting, equal=float(setting.smoothness.pm) == 0.0).best(setting.smoothness)
        return ab, ab.gamma(setting.smoothness)

    def resolved(self, setting: Setting) -> Marina:
        if self.p is not None:
            return self
        n, d = setting.n, setting.d
        code = self.compressor.predicted_bits(n, d)
        mu = setting.smoothness.mu if setting.pl else None
        return replace(self, p=best_p(32.0 * d, code, setting.smoothness.minus, self._constants(setting)[1], mu))

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1 / (L_- + sqrt((1-p)/p Gamma)), Gamma = (a-b) L_+^2 + b L_±^2 + c L_max^2;
        PL: min{1 / (L_- + sqrt(2 (1-p)/p Gamma)), p/(2 mu)}."""
        (ab, Gamma), s, p = self._constants(setting), setting.smoothness, self.resolved(setting).p or 1.0
        used = {"a": ab.a, "b": ab.b, "c": ab.c, "evidence": ab.evidence, "source": ab.source, "Gamma": Gamma, "p": p}
        used |= {"L_minus": s.minus, "L_plus": s.plus, "L_pm": s.pm, "L_max": s.max}
        known = {"proved": "", "numerical": "; constants numerical, not proved", "homogeneous": "; for equal inputs"}
        where = f"docs/derivations/methods.md{known[ab.evidence]}"
        evidence: Literal["proved", "numerical"] = "numerical" if ab.evidence == "numerical" else "proved"
        if setting.pl and s.mu is not None:
            gamma = step_size_pl(s.minus, Gamma, p, s.mu)
            return StepSize(gamma, f"MARINA under PL, AB inequality ({where})", used | {"mu": s.mu}, evidence)
        return StepSize(step_size(s.minus, Gamma, p), f"MARINA, AB inequality ({where})", used, evidence)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:
        return Server(torch.zeros_like(x0)), Worker(x0.new_zeros(len(rnd.clients), len(x0)))

    def _full(self, rnd: Round) -> bool:
        if self.p is None:
            raise ConfigError("Marina(p=None) is not resolved: simulate does it, or method.resolved(setting).")
        return rnd.index == 0 or rnd.coin(self.p, "Marina.coin")

    def code(self, rnd: Round) -> Compressor:
        return DENSE if self._full(rnd) else self.compressor

    def up(self, worker: Worker, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Worker]:
        new = grad(self.model(down, rnd), rnd)
        return (new if self._full(rnd) else new - worker.grad), Worker(new)

    def estimate(self, server: Server, mean: Vector, rnd: Round) -> tuple[Vector, Server]:
        g = mean if self._full(rnd) else server.g + mean
        return g, Server(g)
