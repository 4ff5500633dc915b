"""DIANA: clients compress the difference between their gradient and a shift that learns it.

Mishchenko, Gorbunov, Takac, Richtarik, "Distributed Learning with Compressed Gradient Differences", 2019,
arXiv:1901.09269. The nonconvex step sizes are derived in docs/derivations/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from shoal.core import Compressor, Gradient, Method, check_share, require
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.theory import Setting, StepSize, page


class Server(NamedTuple):
    h: Vector  # the mean of the shifts


class Worker(NamedTuple):
    h: Rows  # the shifts, h_i^0 = 0


@dataclass(frozen=True)
class Diana(Method):
    """Compressed differences to shifts that learn the gradients.

    m_i = Q_i(grad f_i(x) - h_i); g = h + mean m_i; h_i += shift m_i; h += shift mean m_i. Up |Q| bits a round.

    `shift` in (0, 1/(1+omega)] is the paper's alpha (default: 1/(1+omega)).

    References: arXiv:1901.09269.
    """

    spares = True  # a missing m_i is 0: the server goes on with h_i, which stays as it is at the client too
    compressor: Compressor
    shift: float | None = None

    def __post_init__(self) -> None:
        name, mend = type(self).__name__, "Use EF21 for a biased one, Marina for PermK and others with ab."
        require(self.compressor, "omega", name, mend)
        check_share(name, "shift", self.shift, "the shift's step", "1/(1+omega)")

    def check(self, n: int, d: int) -> None:
        self.compressor.check(n, d)
        most = 1.0 / (1.0 + self.compressor.omega(d))  # type: ignore[attr-defined]
        if self.shift is not None and self.shift > most * (1 + 1e-12):
            raise ConfigError(f"Diana(shift={self.shift}): at d={d} it must be at most 1/(1+omega) = {most:.6g}.")

    def _shift(self, d: int) -> float:
        return 1.0 / (1.0 + self.compressor.omega(d)) if self.shift is None else self.shift  # type: ignore[attr-defined]

    def resolved(self, setting: Setting) -> Diana:
        return replace(self, shift=self._shift(setting.d))

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1 / (L_- + (2/shift) sqrt(omega/n) L_+): mean E||grad f||^2 <= 2 Phi_0 / (gamma K).

        PL: min{1 / (L_- + (1/shift) sqrt(8 omega/n) L_+), shift/(4 mu)}: E Phi_K <= (1 - gamma mu)^K Phi_0.
        """
        s, n = setting.smoothness, setting.n
        omega, shift = self.compressor.omega(setting.d), self._shift(setting.d)  # type: ignore[attr-defined]
        used = {"omega": omega, "shift": shift, "n": n, "L_minus": s.minus, "L_plus": s.plus}
        evidence = self.compressor.evidence
        where = page("methods.md", evidence)
        if setting.pl and s.mu is not None:
            gamma = min(1.0 / (s.minus + math.sqrt(8.0 * omega / n) * s.plus / shift), shift / (4.0 * s.mu))
            start = 2.0 * gamma * omega / (n * shift)
            return StepSize(gamma, f"DIANA under PL ({where})", used | {"mu": s.mu}, evidence, start)
        gamma = 1.0 / (s.minus + 2.0 * math.sqrt(omega / n) * s.plus / shift)
        start = gamma * omega / (n * shift)
        return StepSize(gamma, f"DIANA, nonconvex ({where})", used, evidence, start)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:
        return Server(torch.zeros_like(x0)), Worker(x0.new_zeros(len(rnd.clients), len(x0)))

    def code(self, rnd: Round) -> Compressor:
        return self.compressor

    def up(self, worker: Worker, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Worker]:
        return grad(self.model(down, rnd), rnd) - worker.h, worker

    def commit(self, worker: Worker, sent: Messages, rnd: Round) -> Worker:
        return Worker(worker.h + self._shift(sent.d) * self.compressor.decode(sent, rnd))

    def estimate(self, server: Server, mean: Vector, rnd: Round) -> tuple[Vector, Server]:
        if rnd.cohort < rnd.n:  # some were left out
            mean = rnd.cohort / rnd.n * mean
        return server.h + mean, Server(server.h + self._shift(len(mean)) * mean)
