"""VR-MARINA: MARINA whose clients, between full gradients, look at a few of their samples only.

Gorbunov, Burlachenko, Li, Richtarik, "MARINA: Faster Non-Convex Distributed Learning with Compression", 2021,
arXiv:2102.07845, Algorithms 2 (finite sums) and 3 (online). The paper draws samples with replacement; here they are
drawn without, so that a batch of all samples is MARINA to the bit. Proof: docs/derivations/sampling.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shoal.core import Gradient, ab_for_inputs
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.methods.marina import Marina, Server
from shoal.theory import AB, Setting, StepSize, drawn, gamma_samples


class Worker(NamedTuple):
    x: Vector  # the point of the round before: gradients of new samples are needed there too


def check_batch(method: str, name: str, batch: int | None) -> None:
    """Raise ConfigError unless the number of samples is None or an integer, at least one."""
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ConfigError(f"{method}({name}={batch!r}): a number of samples a client is an integer, at least one.")


def percent(setting: Setting) -> int:
    """A hundredth of a client's samples, the batch of the paper's experiments; at least one."""
    return max(1, math.ceil(setting.smoothness.samples / 100.0))


@dataclass(frozen=True)
class VRMarina(Marina):
    """Compressed differences of minibatch gradients, now and then a full gradient.

    With probability p (and in round 0): g = mean grad f_i(x); else g += (1/n) sum C_i(d_i) with d_i the mean of
    grad f_ij(x) - grad f_ij(x-) over `batch` samples j of client i.

    batch=None: 1% of a client's samples. p=None: min{|C|/(32 d), batch/(N + batch)}, N the mean number of samples a
    client. large: the online form, in which heads take so many samples too, and the noise that they leave stays:
    mean E||grad f||^2 <= 2 Phi_0 / (gamma K) + floor.

    References: arXiv:2102.07845, Algorithms 2 and 3.
    """

    batch: int | None = None
    large: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batch("VRMarina", "batch", self.batch)
        check_batch("VRMarina", "large", self.large)
        if self.large is not None and self.large < (self.batch or 1):
            raise ConfigError(f"VRMarina(batch={self.batch}, large={self.large}): large is at least batch.")

    def resolved(self, setting: Setting) -> VRMarina:
        batch = percent(setting) if self.batch is None else self.batch
        many = setting.smoothness.samples if self.large is None else min(self.large, setting.smoothness.samples)
        bits = self.compressor.predicted_bits(setting.n, setting.d) / (32.0 * setting.d)
        p = min(1.0, bits, batch / (many + batch)) if self.p is None else self.p
        return replace(self, p=p, batch=batch)

    def _constants(self, setting: Setting) -> tuple[AB, float]:
        s, share = setting.smoothness, drawn(self.batch or percent(setting), setting.smoothness.most)
        equal = share * s.sample == 0.0 and s.pm == 0.0  # else what is compressed differs from client to client
        every = ab_for_inputs(self.compressor, setting, equal).all()
        return min(((ab, gamma_samples(ab, s, setting.n, share)) for ab in every), key=lambda pair: pair[1])

    def step_size(self, setting: Setting) -> StepSize:
        """MARINA's, with Gamma = (a-b) L_+^2 + b L_±^2 + (a + (1-b)/n) V + c (L_max + sqrt(n V))^2 and
        V = (N - batch) / (batch (N - 1)) L_s^2. Online: floor = (N - large) / (large (N - 1)) sigma^2 / n, and under
        PL floor/mu."""
        step, s, ready = super().step_size(setting), setting.smoothness, self.resolved(setting)
        used: dict[str, Any] = {"batch": ready.batch, "most": s.most, "L_sample": s.sample}
        if self.large is not None:
            used |= {"large": self.large, "noise": s.noise, "floor": drawn(self.large, s.most) * s.noise / setting.n}
        theorem = step.theorem.replace("MARINA", "VR-MARINA").replace("methods.md", "sampling.md")
        return replace(step, theorem=theorem, constants=step.constants | used)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:  # type: ignore[override]
        return super().init(x0, rnd)[0], Worker(x0)

    def up(  # type: ignore[override]
        self, worker: Worker, down: Messages, grad: Gradient, rnd: Round
    ) -> tuple[Rows, Worker]:
        if self.batch is None:
            raise ConfigError("VRMarina(batch=None) is not resolved: simulate does it, or method.resolved(setting).")
        x = self.model(down, rnd)
        if self._full(rnd):
            return grad(x, rnd, self.large), Worker(x)
        return grad(x, rnd, self.batch) - grad(worker.x, rnd, self.batch), Worker(x)
