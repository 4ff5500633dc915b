"""Gradient descent: every client sends its whole gradient every round. The yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.core import DENSE, Compressor, Gradient, Method
from shoal.messages import Messages, Round, Rows, Vector
from shoal.theory import Setting, StepSize


@dataclass(frozen=True)
class GD(Method):
    """Gradient descent: the yardstick.

    g = (1/n) sum grad f_i(x). Up 32 d bits, down 32 d bits a round.

    References: textbook; docs/derivations/methods.md.
    """

    spares = True  # nothing is remembered: g is the mean of those who are there

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1/L_-: min ||grad f||^2 <= 2 L_- Delta_0 / K, and (1 - mu/L_-)^K under PL. Textbook."""
        L = setting.smoothness.minus
        return StepSize(1.0 / L, "gradient descent: 1/L_-", {"L_minus": L})

    def init(self, x0: Vector, rnd: Round) -> tuple[Any, Any]:
        return (), ()

    def code(self, rnd: Round) -> Compressor:
        return DENSE

    def up(self, worker: Any, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Any]:
        return grad(self.model(down, rnd), rnd), worker

    def estimate(self, server: Any, mean: Vector, rnd: Round) -> tuple[Vector, Any]:
        return mean, server
