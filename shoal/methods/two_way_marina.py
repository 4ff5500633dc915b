"""Both ways: MARINA's compressed uplink on the points of MARINA-P's compressed downlink, on one coin.

MARINA: Gorbunov, Burlachenko, Li, Richtarik, 2021, arXiv:2102.07845. MARINA-P, and M3, which joins the two by a
momentum that this method does not have: Gruntkowska, Tyurin, Richtarik, 2024, arXiv:2402.06412. That one coin for both
directions has a recursion of one line, and the step sizes, are ours: docs/derivations/downlink.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from shoal.core import DENSE, Compressor, Gradient, Method, ab_for_inputs, gradients_at, require
from shoal.messages import Messages, Round, Rows, Vector
from shoal.methods.marina_p import MarinaP, check_downlink, lemma_step
from shoal.theory import AB, Setting, StepSize, best_p


class Server(NamedTuple):
    x: Vector  # the iterate of the round before
    g: Vector


class Worker(NamedTuple):
    w: Rows  # the clients' points
    grad: Rows  # grad f_i(w_i)


@dataclass(frozen=True)
class TwoWayMarina(Method):
    """Compressed both ways: differences of iterates go down, differences of gradients up.

    With probability p (and in round 0), on one coin: w_i = x and g = mean grad f_i(x), both uncompressed; else
    w_i += Q_i(x - x-) and g += (1/n) sum C_i(grad f_i(w_i) - grad f_i(w_i-)), C_i from `compressor` and Q_i from
    `downlink`.

    p=None: the p with the fewest predicted bits, up and down. 32 d bits each way on heads; |C| up, |Q| down on tails.

    References: arXiv:2102.07845, arXiv:2402.06412; proof: docs/derivations/downlink.md.
    """

    compressor: Compressor
    p: float | None = None
    downlink: Compressor = field(kw_only=True)

    def __post_init__(self) -> None:
        require(self.compressor, "ab", "TwoWayMarina", "Take RandK, PermK or another unbiased compressor.")
        check_downlink("TwoWayMarina", self.downlink, self.p)

    @property
    def _link(self) -> MarinaP:
        return MarinaP(self.downlink, self.p)

    def check(self, n: int, d: int) -> None:
        self.compressor.check(n, d)
        self._link.check(n, d)

    def _constants(self, setting: Setting) -> tuple[AB, float, dict[str, Any]]:
        omega, theta, below, points = self._link.constants(setting)
        # Clients at points of their own differ even where their functions do not.
        every = ab_for_inputs(self.compressor, setting, equal=False).all()
        ab = min(every, key=lambda ab: ab.a + setting.n * ab.c)
        lost = (ab.a + setting.n * ab.c) * (1.0 + omega) * setting.smoothness.tilde**2
        used = {"a": ab.a, "c": ab.c, "omega": omega, "theta": theta, "source": f"{ab.source}; down: {below.source}"}
        numerical = "numerical" in (ab.evidence, below.evidence)
        Gamma = (math.sqrt(lost) + math.sqrt(points)) ** 2
        return replace(ab, evidence="numerical" if numerical else "proved"), Gamma, used | {"Gamma": Gamma}

    def resolved(self, setting: Setting) -> TwoWayMarina:
        if self.p is not None:
            return self
        n, d, s = setting.n, setting.d, setting.smoothness
        code = self.compressor.predicted_bits(n, d) + self.downlink.predicted_bits(n, d)
        mu = s.mu if setting.pl else None
        return replace(self, p=best_p(64.0 * d, code, s.minus, self._constants(setting)[1], mu))

    def step_size(self, setting: Setting) -> StepSize:
        """MARINA-P's, with sqrt Gamma = sqrt((a + n c) (1 + omega)) L~ + sqrt(Gamma of MARINA-P), (a, c) those of the
        uplink and omega that of one client's downlink."""
        ab, Gamma, used = self._constants(setting)
        s, p = setting.smoothness, self.resolved(setting).p or 1.0
        used |= {"p": p, "L_minus": s.minus, "L_tilde": s.tilde, "L_apart": s.apart, "L_together": s.together}
        return lemma_step("MARINA both ways", setting, Gamma, p, used, ab.evidence, self.downlink.evidence)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:
        rows = x0.repeat(len(rnd.clients), 1)
        return Server(x0, torch.zeros_like(x0)), Worker(rows, torch.zeros_like(rows))

    def down(self, server: Server, x: Vector, rnd: Round) -> tuple[Messages, Server]:
        return self._link.sent(server.x, x, rnd), server._replace(x=x)

    def code(self, rnd: Round) -> Compressor:
        return DENSE if self._link.full(rnd) else self.compressor

    def up(self, worker: Worker, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Worker]:
        w = self._link.followed(worker.w, down, rnd)
        if self._link.full(rnd):
            new = grad(self.model(down, rnd), rnd)
            return new, Worker(w, new)
        new = gradients_at(w, grad, rnd)
        return new - worker.grad, Worker(w, new)

    def estimate(self, server: Server, mean: Vector, rnd: Round) -> tuple[Vector, Server]:
        g = mean if self._link.full(rnd) else server.g + mean
        return g, server._replace(g=g)
