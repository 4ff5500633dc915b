"""EF21: error feedback for contractive compressors; the clients' gradient estimates are moved by what they send.

Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback",
2021, arXiv:2106.05203; with partial participation: Fatkhullin, Sokolov, Gorbunov, Li, Richtarik, "EF21 with Bells &
Whistles", 2021, arXiv:2110.03294. Step sizes with L_+ in place of the paper's larger L~: docs/derivations/methods.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal import rng
from shoal.core import Compressor, Gradient, Method, require
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.theory import Setting, StepSize, ef21_constants, page


class Server(NamedTuple):
    g: Vector  # the mean of the clients' estimates


class Worker(NamedTuple):
    g: Rows  # the clients' estimates, g_i^0 = 0


@dataclass(frozen=True)
class EF21(Method):
    """Error feedback for biased compressors.

    g_i += C(grad f_i(x) - g_i); g = (1/n) sum g_i. Up |C| bits a round, never a dense message.

    clients=r: only r of the n clients, drawn uniformly without replacement, send and move their g_i (EF21-PP); up
    |C| r/n bits a client. A client then loses no more than a compressor with alpha r/n does.

    References: arXiv:2106.05203; EF21-PP: arXiv:2110.03294.
    """

    spares = True  # a missing message is 0: g_i stays as it is, at the server and at the client
    compressor: Compressor
    clients: int | None = None

    def __post_init__(self) -> None:
        require(self.compressor, "alpha", type(self).__name__, "Use Marina or Diana for an unbiased compressor.")
        r = self.clients
        if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
            raise ConfigError(f"EF21(clients={r!r}): a number of clients is an integer, at least one, or None for all.")

    def check(self, n: int, d: int) -> None:
        if self.clients is not None and self.clients > n:
            raise ConfigError(f"EF21(clients={self.clients}): there are n={n}; take fewer, or leave it out.")
        self.compressor.check(n if self.clients is None else self.clients, d)

    def cohort(self, rnd: Round) -> Tensor | None:
        if self.clients is None:
            return None
        return rng.support(rnd.shared("EF21.clients"), rnd.n, self.clients)[0]

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1 / (L_- + L_+ sqrt(beta/theta)); PL: min{1 / (L_- + L_+ sqrt(2 beta/theta)), theta/(2 mu)}. Where r
        of n clients take part, alpha r/n stands for alpha."""
        s, asked = setting.smoothness, 1.0 if self.clients is None else self.clients / setting.n
        alpha = asked * self.compressor.alpha(setting.d)  # type: ignore[attr-defined]
        theta, beta = ef21_constants(alpha)
        used = {"alpha": alpha, "theta": theta, "beta": beta, "L_minus": s.minus, "L_plus": s.plus}
        evidence = self.compressor.evidence
        where = page("methods.md", evidence)
        if setting.pl and s.mu is not None:
            gamma = min(1.0 / (s.minus + s.plus * math.sqrt(2.0 * beta / theta)), theta / (2.0 * s.mu))
            start = gamma / theta * (1.0 - alpha)
            return StepSize(gamma, f"EF21 under PL ({where})", used | {"mu": s.mu}, evidence, start)
        gamma = 1.0 / (s.minus + s.plus * math.sqrt(beta / theta))
        start = gamma / (2.0 * theta) * (1.0 - alpha)
        return StepSize(gamma, f"EF21, Theorem 1 with L_+ ({where})", used, evidence, start)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:
        return Server(torch.zeros_like(x0)), Worker(x0.new_zeros(len(rnd.clients), len(x0)))

    def code(self, rnd: Round) -> Compressor:
        return self.compressor

    def up(self, worker: Worker, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Worker]:
        return grad(self.model(down, rnd), rnd) - worker.g, worker

    def commit(self, worker: Worker, sent: Messages, rnd: Round) -> Worker:
        return Worker(worker.g + self.compressor.decode(sent, rnd))

    def estimate(self, server: Server, mean: Vector, rnd: Round) -> tuple[Vector, Server]:
        g = server.g + rnd.cohort / rnd.n * mean
        return g, Server(g)
