"""DCGD (QGD): clients compress their gradients and remember nothing.

Step size from the ABC theory of Khaled, Richtarik, "Better Theory for SGD in the Nonconvex World", 2020,
arXiv:2002.03329, derived for compressed gradients in docs/derivations/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shoal.core import Compressor, Gradient, Messages, Method, Round, Rows, Vector, ab_for_inputs, require
from shoal.theory import Setting, StepSize


@dataclass(frozen=True)
class DCGD(Method):
    """Compressed gradients, no memory; settles in a neighborhood.

    g = (1/n) sum C_i(grad f_i(x)). Up |C| bits a round.

    With an unbiased C it reaches a neighborhood whose size shrinks with the step. A biased C (TopK) is admitted as a
    baseline that may diverge.

    References: arXiv:2002.03329.
    """

    compressor: Compressor

    def __post_init__(self) -> None:
        if not hasattr(self.compressor, "alpha"):
            require(self.compressor, "ab", "DCGD", "Take RandK, QSGD, PermK or Independent.")

    def check(self, n: int, d: int) -> None:
        self.compressor.check(n, d)

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = min{1/sqrt(L A K), 1/L, target/(2 L C)}, A = (a + n c) L_max, C = 2 A (f(x^0) - f_inf).

        Then min_k E||grad f||^2 <= target after K >= 12 Delta_0 / (gamma target) rounds. Needs the horizon K and lower
        bounds of the f_i; without a target the last term is dropped and the method settles in a neighborhood.
        """
        L, s = float(setting.smoothness.minus), setting.smoothness
        if not hasattr(self.compressor, "ab"):
            return StepSize(
                1.0 / L, f"none: {self.compressor!r} is biased and DCGD may diverge", {"L_minus": L}, proved=False
            )
        if s.f_inf is None:
            return StepSize(1.0 / L, "none: some f_i has no lower bound", {"L_minus": L}, proved=False)
        horizon = setting.horizon
        if horizon is None and setting.bits is not None:
            horizon = math.ceil(setting.bits / self.compressor.predicted_bits(setting.n, setting.d))
        if horizon is None or setting.f0 is None:
            return StepSize(
                1.0 / L, "none: the theorem needs a horizon; give rounds or bits", {"L_minus": L}, proved=False
            )
        ab = ab_for_inputs(self.compressor, setting, equal=False)
        A = (ab.a + setting.n * ab.c) * s.max
        gap = max(0.0, setting.f0 - s.f_inf)
        terms = [1.0 / L]
        if A > 0:
            terms.append(1.0 / math.sqrt(L * A * horizon))
            if setting.target is not None and gap > 0:
                terms.append(setting.target / (4.0 * L * A * gap))
        used: dict[str, Any] = {
            "L_minus": L,
            "L_max": s.max,
            "a": ab.a,
            "c": ab.c,
            "evidence": ab.evidence,
            "A": A,
            "K": horizon,
        }
        used |= {"gap": gap, "target": setting.target}
        return StepSize(min(terms), "DCGD: min{1/sqrt(L A K), 1/L, target/(2 L C)} (arXiv:2002.03329)", used)

    def init(self, x0: Vector, rnd: Round) -> tuple[Any, Any]:
        return (), ()

    def code(self, rnd: Round) -> Compressor:
        return self.compressor

    def up(self, worker: Any, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Any]:
        return grad(self.model(down, rnd), rnd), worker

    def estimate(self, server: Any, up: Messages, rnd: Round) -> tuple[Vector, Any]:
        return self.compressor.aggregate(up, rnd), server
