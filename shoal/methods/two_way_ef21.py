"""EF21 both ways: error feedback on the gradients that go up, and on the model that goes down, one message for all.

Up: EF21, Richtarik, Sokolov, Fatkhullin, 2021, arXiv:2106.05203. Down: EF21-P, Gruntkowska, Tyurin, Richtarik, "EF21-P
and Friends: Improved Theoretical Communication Complexity for Distributed Optimization with Bidirectional Compression",
2022, arXiv:2209.15218. The step sizes of the two together are derived in docs/derivations/downlink.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from shoal.core import DENSE, Compressor, Gradient, require
from shoal.messages import Messages, Round, Rows, Vector
from shoal.methods.ef21 import EF21
from shoal.theory import Setting, StepSize, ef21_two_way_step, page


class Server(NamedTuple):
    g: Vector  # the mean of the clients' estimates
    w: Vector  # the model as the clients know it


class Worker(NamedTuple):
    g: Rows  # the clients' estimates, g_i^0 = 0
    w: Vector  # the model as they know it


@dataclass(frozen=True)
class TwoWayEF21(EF21):
    """Error feedback both ways, for biased compressors.

    w += Q(x - w), one message that all clients hear; g_i += C(grad f_i(w) - g_i); g = (1/n) sum g_i; C is `compressor`
    and Q `downlink`. clients=r as for EF21: the others hear, and send nothing.

    Round 0 sends x itself. Up |C| bits a round, down |Q|.

    References: arXiv:2106.05203, arXiv:2209.15218; proof: docs/derivations/downlink.md.
    """

    downlink: Compressor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.downlink, "alpha", "TwoWayEF21", "Use MarinaP or TwoWayMarina for an unbiased compressor.")

    def check(self, n: int, d: int) -> None:
        super().check(n, d)
        self.downlink.check(n, d)

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1 / ((1 + sqrt r) (L_- + (1 + sqrt(1-down)) L_+ sqrt(beta/theta))), r = beta/theta of the downlink's
        alpha, `down`; for PL see `shoal.theory.ef21_two_way_step`."""
        s, known = setting.smoothness, super().step_size(setting).constants
        down = float(self.downlink.alpha(setting.d))  # type: ignore[attr-defined]
        mu = float(s.mu) if setting.pl and s.mu is not None else 0.0
        gamma, weight = ef21_two_way_step(s.minus, s.plus, known["alpha"], down, mu)
        name = "EF21 both ways, under PL" if mu else "EF21 both ways, nonconvex"
        numerical = "numerical" in (self.compressor.evidence, self.downlink.evidence)
        evidence: Literal["proved", "numerical"] = "numerical" if numerical else "proved"
        used, start = known | {"down": down}, weight * (1.0 - known["alpha"])
        return StepSize(gamma, f"{name} ({page('downlink.md', evidence)})", used, evidence, start)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:  # type: ignore[override]
        return Server(torch.zeros_like(x0), x0), Worker(x0.new_zeros(len(rnd.clients), len(x0)), x0)

    def down(self, server: Server, x: Vector, rnd: Round) -> tuple[Messages, Server]:
        if rnd.index == 0:
            return DENSE.encode(x[None], rnd.server()), server._replace(w=x)
        sent = self.downlink.encode((x - server.w)[None], rnd.server().fork("down"))
        return sent, server._replace(w=self.followed(server.w, sent, rnd))

    def followed(self, w: Vector, down: Messages, rnd: Round) -> Vector:
        """The model as all know it, after what they heard."""
        if rnd.index == 0:
            return self.model(down, rnd)
        return w + self.downlink.decode(down, rnd.server().fork("down"))[0]

    def up(  # type: ignore[override]
        self, worker: Worker, down: Messages, grad: Gradient, rnd: Round
    ) -> tuple[Rows, Worker]:
        w = self.followed(worker.w, down, rnd)
        return grad(w, rnd) - worker.g, Worker(worker.g, w)

    def commit(self, worker: Worker, sent: Messages, rnd: Round) -> Worker:  # type: ignore[override]
        return worker._replace(g=worker.g + self.compressor.decode(sent, rnd))

    def estimate(  # type: ignore[override]
        self, server: Server, mean: Vector, rnd: Round
    ) -> tuple[Vector, Server]:
        g = server.g + rnd.cohort / rnd.n * mean
        return g, server._replace(g=g)
