"""PP-MARINA: MARINA in which, between full rounds, a few clients stand for all.

Gorbunov, Burlachenko, Li, Richtarik, "MARINA: Faster Non-Convex Distributed Learning with Compression", 2021,
arXiv:2102.07845. The paper draws clients with replacement and has (1+omega) L~^2 / r where
docs/derivations/sampling.md proves (omega L_+^2 + L_±^2) / r, and less without replacement.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from shoal import rng
from shoal.core import Gradient, Messages, Round, Rows, Vector, ab_for_inputs
from shoal.errors import ConfigError
from shoal.methods.marina import Marina, Server
from shoal.methods.vr_marina import Worker
from shoal.theory import AB, Setting, StepSize, best_p, drawn, gamma_clients


@dataclass(frozen=True)
class PPMarina(Marina):
    """Compressed gradient differences of a few clients, now and then everyone's full gradient.

    With probability p (and in round 0): g = mean grad f_i(x), from all n; else
    g += (1/r) sum over r = `clients` of them of C_i(grad f_i(x) - grad f_i(x-)), drawn uniformly.

    All clients hear x, and only the r compute and send. replacement=True is the paper's: a client drawn twice sends
    twice. p=None: the p with the fewest predicted bits a client. Up 32 d bits on heads, |C| r/n on tails.

    References: arXiv:2102.07845; proof: docs/derivations/sampling.md.
    """

    clients: int = field(kw_only=True)
    replacement: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.clients, bool) or not isinstance(self.clients, int) or self.clients < 1:
            raise ConfigError(f"PPMarina(clients={self.clients!r}): a number of clients is an integer, at least one.")
        if not isinstance(self.replacement, bool):
            raise ConfigError(f"PPMarina(replacement={self.replacement!r}): True or False.")

    def check(self, n: int, d: int) -> None:
        if self.clients > n and not self.replacement:
            raise ConfigError(f"PPMarina(clients={self.clients}): there are n={n}; take fewer, or replacement=True.")
        self.compressor.check(self.clients, d)

    def cohort(self, rnd: Round) -> Tensor | None:
        if self._full(rnd):
            return None
        draw = rnd.shared("PPMarina.clients")
        if self.replacement:
            return rng.below(draw, self.clients, rnd.n)[0].long().sort().values
        return rng.support(draw, rnd.n, self.clients)[0]

    def _constants(self, setting: Setting) -> tuple[AB, float]:
        s, r = setting.smoothness, self.clients
        share = 1.0 / r if self.replacement else drawn(r, setting.n)
        every = ab_for_inputs(self.compressor, replace(setting, n=r), equal=float(s.pm) == 0.0).all()
        return min(((ab, gamma_clients(ab, s, share)) for ab in every), key=lambda pair: pair[1])

    def resolved(self, setting: Setting) -> PPMarina:
        if self.p is not None:
            return self
        d, s = setting.d, setting.smoothness
        code = self.compressor.predicted_bits(self.clients, d) * self.clients / setting.n
        mu = s.mu if setting.pl else None
        return replace(self, p=best_p(32.0 * d, code, s.minus, self._constants(setting)[1], mu))

    def step_size(self, setting: Setting) -> StepSize:
        """MARINA's, with Gamma = (a-b) L_+^2 + (b + (1-b) share) L_±^2 + c L_max^2, (a, b, c) those of r clients and
        share = 1/r with replacement, (n-r)/(r (n-1)) without."""
        step = super().step_size(setting)
        theorem = step.theorem.replace("MARINA", "PP-MARINA").replace("methods.md", "sampling.md")
        return replace(step, theorem=theorem, constants=step.constants | {"clients": self.clients})

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:  # type: ignore[override]
        return super().init(x0, rnd)[0], Worker(x0)

    def up(  # type: ignore[override]
        self, worker: Worker, down: Messages, grad: Gradient, rnd: Round
    ) -> tuple[Rows, Worker]:
        x = self.model(down, rnd)
        if self._full(rnd):
            return grad(x, rnd), Worker(x)
        # Who was not asked in the round before has no gradient there: both are computed.
        return grad(x, rnd) - grad(worker.x, rnd), Worker(x)
