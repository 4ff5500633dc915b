"""DASHA: compressed momentum that needs no synchronized full gradients; with minibatches, DASHA-PAGE.

Tyurin, Richtarik, "DASHA: Distributed Nonconvex Optimization with Communication Compression, Optimal Oracle Complexity,
and No Client Synchronization", 2022, arXiv:2202.01268. Step sizes for any momentum, batches without replacement and one
coin for all clients: docs/derivations/sampling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from shoal.core import DENSE, Compressor, Gradient, Method, check_share, require
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.methods.vr_marina import check_batch
from shoal.theory import Setting, StepSize, dasha_step, drawn, page


class Server(NamedTuple):
    g: Vector  # the mean of the clients' g_i


class Worker(NamedTuple):
    g: Rows  # what the server knows of the clients' gradients
    h: Rows  # what they know themselves: grad f_i at the point of the round before, or PAGE's estimate of it
    x: Vector  # that point


@dataclass(frozen=True)
class Dasha(Method):
    """Compressed differences with momentum; no dense message after the first.

    m_i = Q_i(h_i+ - h_i - momentum (g_i - h_i)); g_i += m_i; g = (1/n) sum g_i; h_i = grad f_i(x). Round 0 is dense.
    With a batch (DASHA-PAGE): h_i+ = grad f_i(x) with probability p, on a shared coin, else
    h_i + mean over `batch` samples j of grad f_ij(x) - grad f_ij(x-).

    momentum=None: 1/(1+2 omega), the paper's a. p=None with a batch: batch/(N + batch), N the mean number of samples
    a client. Up |Q| bits a round.

    References: arXiv:2202.01268.
    """

    compressor: Compressor
    momentum: float | None = None
    batch: int | None = None
    p: float | None = None

    def __post_init__(self) -> None:
        require(self.compressor, "omega", "Dasha", "Use EF21 for a biased one, Marina for PermK and others with ab.")
        check_batch("Dasha", "batch", self.batch)
        check_share("Dasha", "momentum", self.momentum, "the momentum", "1/(1+2 omega)")
        check_share("Dasha", "p", self.p, "the probability of a full round")
        if self.p is not None and self.batch is None:
            raise ConfigError(
                f"Dasha(batch=None, p={self.p!r}): a probability goes with a batch; give both, or leave both out."
            )

    def check(self, n: int, d: int) -> None:
        self.compressor.check(n, d)
        most = 1.0 / (1.0 + 2.0 * self.compressor.omega(d))  # type: ignore[attr-defined]
        if self.momentum is not None and self.momentum > most * (1 + 1e-12):
            raise ConfigError(f"Dasha(momentum={self.momentum}): at d={d} at most 1/(1+2 omega) = {most:.6g}.")

    def _momentum(self, d: int) -> float:
        omega: float = self.compressor.omega(d)  # type: ignore[attr-defined]
        return 1.0 / (1.0 + 2.0 * omega) if self.momentum is None else self.momentum

    def resolved(self, setting: Setting) -> Dasha:
        p = self.p
        if self.batch is not None and p is None:
            p = self.batch / (setting.smoothness.samples + self.batch)
        return replace(self, momentum=self._momentum(setting.d), p=p)

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1 / (L_- + sqrt X + sqrt Y), X = 2 omega/(n a) (L_+^2 + 2 L_+ sqrt(p (1-p) V) + 2 (1-p) V) and
        Y = (1-p) V/(p n), a the momentum, V = (N - batch) / (batch (N - 1)) L_s^2, or 0 without a batch; under PL see
        `shoal.theory.dasha_step`. Then mean E||grad f||^2 <= 2 Delta_0 / (gamma K)."""
        s, n, ready = setting.smoothness, setting.n, self.resolved(setting)
        omega, a = self.compressor.omega(setting.d), self._momentum(setting.d)  # type: ignore[attr-defined]
        p = 1.0 if ready.p is None else ready.p
        V = 0.0 if self.batch is None else drawn(self.batch, s.most) * s.sample**2
        mu = float(s.mu) if setting.pl and s.mu is not None else 0.0
        gamma = dasha_step(s.minus, s.plus, omega, n, V, a, p, mu)
        used: dict[str, Any] = {"omega": omega, "momentum": a, "n": n, "L_minus": s.minus, "L_plus": s.plus}
        if self.batch is not None:
            used |= {"p": p, "batch": self.batch, "L_sample": s.sample, "most": s.most}
        name = ("DASHA" if self.batch is None else "DASHA-PAGE") + (" under PL" if mu else ", nonconvex")
        evidence = self.compressor.evidence
        where, used = page("sampling.md", evidence), used | ({"mu": s.mu} if mu else {})
        return StepSize(gamma, f"{name} ({where})", used, evidence)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:
        rows = x0.new_zeros(len(rnd.clients), len(x0))
        return Server(torch.zeros_like(x0)), Worker(rows, rows, x0)

    def code(self, rnd: Round) -> Compressor:
        return DENSE if rnd.index == 0 else self.compressor

    def up(self, worker: Worker, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Worker]:
        x = self.model(down, rnd)
        if self.batch is None or rnd.index == 0 or self._heads(rnd):
            h = grad(x, rnd)
        else:
            h = worker.h + (grad(x, rnd, self.batch) - grad(worker.x, rnd, self.batch))
        u = h - worker.h - self._momentum(len(x)) * (worker.g - worker.h)
        return u, Worker(worker.g, h, x)

    def _heads(self, rnd: Round) -> bool:
        if self.p is None:
            raise ConfigError("Dasha with a batch is not resolved: simulate does it, or method.resolved(setting).")
        return rnd.coin(self.p, "Dasha.coin")

    def commit(self, worker: Worker, sent: Messages, rnd: Round) -> Worker:
        return worker._replace(g=worker.g + self.code(rnd).decode(sent, rnd))

    def estimate(self, server: Server, mean: Vector, rnd: Round) -> tuple[Vector, Server]:
        g = server.g + mean
        return g, Server(g)
