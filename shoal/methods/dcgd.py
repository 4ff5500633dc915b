"""DCGD (QGD): clients compress their gradients and remember nothing.

Step size by the ABC theory of Khaled, Richtarik, "Better Theory for SGD in the Nonconvex World", 2020,
arXiv:2002.03329, derived for compressed gradients in docs/derivations/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from shoal.core import Compressor, Gradient, Method, ab_for_inputs, require
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.theory import Setting, StepSize


@dataclass(frozen=True)
class DCGD(Method):
    """Compressed gradients, no memory; settles in a neighborhood.

    g = (1/n) sum C_i(grad f_i(x)). Up |C| bits a round.

    With an unbiased C it reaches a neighborhood whose size shrinks with the step. A biased C (TopK) is admitted as a
    baseline that may diverge.

    References: arXiv:2002.03329.
    """

    spares = True  # nothing is remembered: g is the mean of those who are there
    compressor: Compressor

    def __post_init__(self) -> None:
        if not hasattr(self.compressor, "alpha"):
            require(self.compressor, "ab", "DCGD", "Take RandK, QSGD, PermK or Independent.")

    def check(self, n: int, d: int) -> None:
        self.compressor.check(n, d)

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = min{1/sqrt(L A K), 1/L}, A = (a + n c) L_max, over a horizon of K rounds.

        Then min_k E||grad f(x^k)||^2 <= 6 (f(x^0) - f_inf) / (gamma K). Needs lower bounds of the f_i and the horizon:
        the given rounds, or what the given bits pay for. There is no PL theorem: raises ConfigError if one is wanted.
        """
        if setting.pl:
            raise ConfigError(f"{self!r}: no step size is known here under PL; leave pl out.")
        s, L, A, horizon = setting.smoothness, float(setting.smoothness.minus), 0.0, setting.horizon
        if horizon is None and setting.bits is not None:
            horizon = math.ceil(setting.bits / self.compressor.predicted_bits(setting.n, setting.d))
        missing = (
            "some f_i has no lower bound" if s.f_inf is None else "the theorem needs a horizon; give rounds or bits"
        )
        if not hasattr(self.compressor, "ab"):
            missing = f"{self.compressor!r} is biased and DCGD may diverge"
        elif s.f_inf is not None and horizon is not None:
            missing = ""
        if missing or horizon is None:
            return StepSize(1.0 / L, f"none: {missing}", {"L_minus": L}, "none")
        ab = min(ab_for_inputs(self.compressor, setting, equal=False).all(), key=lambda ab: ab.a + setting.n * ab.c)
        A = (ab.a + setting.n * ab.c) * s.max
        gamma = min(1.0 / L, 1.0 / math.sqrt(L * A * horizon) if A > 0 else math.inf)
        used: dict[str, Any] = {"L_minus": L, "L_max": s.max, "a": ab.a, "c": ab.c, "evidence": ab.evidence, "A": A}
        where = "docs/derivations/methods.md" + ("" if ab.evidence == "proved" else "; constants numerical, not proved")
        evidence: Literal["proved", "numerical"] = "numerical" if ab.evidence == "numerical" else "proved"
        return StepSize(gamma, f"DCGD: min{{1/sqrt(L A K), 1/L}} ({where})", used | {"K": horizon}, evidence)

    def init(self, x0: Vector, rnd: Round) -> tuple[Any, Any]:
        return (), ()

    def code(self, rnd: Round) -> Compressor:
        return self.compressor

    def up(self, worker: Any, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Any]:
        return grad(self.model(down, rnd), rnd), worker

    def estimate(self, server: Any, mean: Vector, rnd: Round) -> tuple[Vector, Any]:
        return mean, server
