"""VR-DIANA: DIANA on minibatch gradients that a full gradient at a reference point corrects (loopless SVRG).

Horvath, Kovalev, Mishchenko, Stich, Richtarik, "Stochastic Distributed Learning with Gradient Quantization and Variance
Reduction", 2019, arXiv:1904.05115. Samples are drawn without replacement; the step sizes are derived in
docs/derivations/sampling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shoal.core import Gradient, check_share
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.methods.diana import Diana, Server
from shoal.methods.vr_marina import check_batch, percent
from shoal.theory import Setting, StepSize, drawn, page, vr_diana_step


class Worker(NamedTuple):
    h: Rows  # the shifts, h_i^0 = 0
    anchor: Rows  # grad f_i(w)
    w: Vector  # the reference point, w^0 = x^0


@dataclass(frozen=True)
class VRDiana(Diana):
    """DIANA on minibatches, corrected by a full gradient at a reference point.

    v_i = mean over `batch` samples j of grad f_ij(x) - grad f_ij(w), + grad f_i(w); m_i = Q_i(v_i - h_i);
    g = h + mean m_i; h_i += shift m_i; h += shift mean m_i; w = x with probability p, on a shared coin.

    shift=None: 1/(1+omega). batch=None: 1% of a client's samples. p=None: batch/N, N the mean number of samples a
    client, so that a reference point costs no more samples than the batches between.

    References: arXiv:1904.05115.
    """

    spares = False  # the reference point moves for all, and whoever was left out would keep the gradient at the old one
    batch: int | None = None
    p: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch("VRDiana", "batch", self.batch)
        check_share("VRDiana", "p", self.p, "the probability of a new reference point")

    def resolved(self, setting: Setting) -> VRDiana:
        batch = percent(setting) if self.batch is None else self.batch
        p = min(1.0, batch / setting.smoothness.samples) if self.p is None else self.p
        return replace(self, shift=self._shift(setting.d), batch=batch, p=p)

    def step_size(self, setting: Setting) -> StepSize:
        """The largest gamma for which weights of the two memories exist: E||grad f||^2 <= 2 Phi_0 / (gamma K) on
        average, Phi_0 = Delta_0 + weight mean ||grad f_i(x^0)||^2. PL: E Phi_K <= (1 - gamma mu)^K Phi_0."""
        s, n, ready = setting.smoothness, setting.n, self.resolved(setting)
        assert ready.batch is not None
        assert ready.p is not None
        omega, shift = self.compressor.omega(setting.d), self._shift(setting.d)  # type: ignore[attr-defined]
        V = drawn(ready.batch, s.most) * s.sample**2
        mu = float(s.mu) if setting.pl and s.mu is not None else 0.0
        gamma, weight = vr_diana_step(s.minus, s.plus, omega, n, V, shift, ready.p, mu)
        used: dict[str, Any] = {"omega": omega, "shift": shift, "n": n, "p": ready.p, "batch": ready.batch}
        used |= {"L_minus": s.minus, "L_plus": s.plus, "L_sample": s.sample, "most": s.most, "weight": weight}
        which = "VR-DIANA under PL" if mu else "VR-DIANA, nonconvex"
        evidence = self.compressor.evidence
        theorem, used = f"{which} ({page('sampling.md', evidence)})", used | ({"mu": s.mu} if mu else {})
        return StepSize(gamma, theorem, used, evidence, weight)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:  # type: ignore[override]
        server, worker = super().init(x0, rnd)
        return server, Worker(worker.h, worker.h, x0)

    def up(  # type: ignore[override]
        self, worker: Worker, down: Messages, grad: Gradient, rnd: Round
    ) -> tuple[Rows, Worker]:
        if self.batch is None or self.p is None:
            raise ConfigError("VRDiana is not resolved: simulate does it, or method.resolved(setting).")
        x, after = self.model(down, rnd), worker
        if rnd.index == 0 or rnd.coin(self.p, "VRDiana.coin"):
            after = Worker(worker.h, grad(x, rnd), x)
        if rnd.index == 0:  # the reference point is x^0 itself
            return after.anchor - worker.h, after
        v = grad(x, rnd, self.batch) - grad(worker.w, rnd, self.batch) + worker.anchor
        return v - worker.h, after

    def commit(self, worker: Worker, sent: Messages, rnd: Round) -> Worker:  # type: ignore[override]
        return worker._replace(h=worker.h + self._shift(sent.d) * self.compressor.decode(sent, rnd))
