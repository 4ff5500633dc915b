"""PP-MARINA: MARINA in which, between full rounds, a few clients stand for all.

Gorbunov, Burlachenko, Li, Richtarik, "MARINA: Faster Non-Convex Distributed Learning with Compression", 2021,
arXiv:2102.07845. The paper draws clients with replacement and has (1+omega) L~^2 / r where
docs/derivations/sampling.md proves (omega L_+^2 + L_±^2) / r, and less without replacement. Unequal odds: Tyurin et
al., 2022, arXiv:2206.02275, and docs/derivations/weighted.md, for compressors that may depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from shoal import rng
from shoal.core import Gradient, ab_for_inputs
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.methods.marina import Marina, Server
from shoal.methods.vr_marina import Worker
from shoal.theory import AB, Setting, Smoothness, StepSize, best_p, by_smoothness, drawn, gamma_clients

Odds = tuple[float, ...] | Literal["even", "smoothness"] | None
WORDS = 2**32


@lru_cache(maxsize=16)
def drawable(odds: tuple[float, ...]) -> tuple[Tensor, tuple[float, ...]]:
    """((n,) int64 upper ends, odds'): the 32-bit words from one end up to the next draw one client.

    odds' are multiples of 2^-32 next to the odds, and exactly the probabilities: with them nothing is biased.
    """
    ends = [*(round(share * WORDS) for share in accumulate(odds[:-1])), WORDS]
    return torch.tensor(ends), tuple((hi - lo) / WORDS for lo, hi in pairwise([0, *ends]))


@dataclass(frozen=True)
class PPMarina(Marina):
    """Compressed gradient differences of a few clients, now and then everyone's full gradient.

    With probability p (and in round 0): g = mean grad f_i(x), from all n; else
    g += (1/r) sum over r = `clients` of them of C_i(grad f_i(x) - grad f_i(x-)), drawn uniformly.

    All clients hear x, and only the r compute and send. odds="even" draws with replacement, as the paper: a client
    drawn twice sends twice. odds="smoothness" draws client i, with replacement, with probability q_i = L_i / sum L (or
    q_i = odds[i]), and differences are then divided by n q_i. p=None: the p with the fewest predicted bits a client.
    Up 32 d bits on heads, |C| r/n on tails.

    References: arXiv:2102.07845, arXiv:2206.02275; proofs: docs/derivations/sampling.md.
    """

    clients: int = field(kw_only=True)
    odds: Odds = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.clients, bool) or not isinstance(self.clients, int) or self.clients < 1:
            raise ConfigError(f"PPMarina(clients={self.clients!r}): a number of clients is an integer, at least one.")
        if self.odds is None or isinstance(self.odds, str):
            fits = self.odds in (None, "even", "smoothness")
        else:
            numbers = isinstance(self.odds, tuple) and all(isinstance(q, int | float) and q > 0.0 for q in self.odds)
            fits = numbers and abs(sum(self.odds) - 1.0) <= 1e-9 and min(drawable(self.odds)[1]) > 0.0
        if not fits:
            rule = "one number for each client, at least 2^-32, with the sum 1"
            raise ConfigError(f"PPMarina(odds={self.odds!r}): None, 'even', 'smoothness', or a tuple of {rule}.")

    def check(self, n: int, d: int) -> None:
        if self.clients > n and self.odds is None:
            raise ConfigError(f"PPMarina(clients={self.clients}): there are n={n}; take fewer, or odds='even'.")
        if isinstance(self.odds, tuple) and len(self.odds) != n:
            raise ConfigError(f"PPMarina(odds=...) has {len(self.odds)} odds: there are n={n} clients; give one each.")
        self.compressor.check(self.clients, d)

    def cohort(self, rnd: Round) -> Tensor | None:
        if self._full(rnd):
            return None
        draw = rnd.shared("PPMarina.clients")
        if self.odds is None:
            return rng.support(draw, rnd.n, self.clients)[0]
        if self.odds == "even":
            return rng.below(draw, self.clients, rnd.n)[0].long().sort().values
        ends, _ = drawable(self._known_odds())
        return torch.searchsorted(ends, rng.words(draw, self.clients)[0].to(torch.int64), right=True).sort().values

    def _known_odds(self) -> tuple[float, ...]:
        if not isinstance(self.odds, tuple):
            raise ConfigError("PPMarina(odds='smoothness') is not resolved: simulate does it, or method.resolved(...).")
        return self.odds

    def _odds(self, setting: Setting) -> Odds:
        """The odds as they are drawn."""
        if not isinstance(self.odds, tuple) and self.odds != "smoothness":
            return self.odds
        if isinstance(self.odds, tuple):
            return drawable(self.odds)[1]
        if not setting.smoothness.each:
            mend = "take odds='even', or give them"
            raise ConfigError(f"PPMarina(odds='smoothness'): the problem does not state its L_i; {mend}.")
        return drawable(by_smoothness(setting.smoothness.each))[1]

    def _smoothness(self, setting: Setting) -> Smoothness:
        odds = self._odds(setting)
        return setting.smoothness.weighted(odds) if isinstance(odds, tuple) else setting.smoothness

    def _constants(self, setting: Setting) -> tuple[AB, float]:
        s, r = self._smoothness(setting), self.clients
        share = drawn(r, setting.n) if self.odds is None else 1.0 / r
        # Divided by odds, inputs differ even where the clients do not.
        equal = float(s.pm) == 0.0 and (self.odds is None or self.odds == "even")
        every = ab_for_inputs(self.compressor, replace(setting, n=r), equal=equal).all()
        return min(((ab, gamma_clients(ab, s, share)) for ab in every), key=lambda pair: pair[1])

    def resolved(self, setting: Setting) -> PPMarina:
        ready = replace(self, odds=self._odds(setting))
        if ready.p is not None:
            return ready
        d, s = setting.d, setting.smoothness
        code = self.compressor.predicted_bits(self.clients, d) * self.clients / setting.n
        mu = s.mu if setting.pl else None
        return replace(ready, p=best_p(32.0 * d, code, s.minus, self._constants(setting)[1], mu))

    def step_size(self, setting: Setting) -> StepSize:
        """MARINA's, with Gamma = (a-b) L_+^2 + (b + (1-b) share) L_±^2 + c L_max^2, (a, b, c) those of r clients and
        share = 1/r with replacement, (n-r)/(r (n-1)) without; with odds q, L_{+,q}, L_{±,q} and max L_i/(n q_i)."""
        step, s = super().step_size(setting), self._smoothness(setting)
        theorem = step.theorem.replace("MARINA", "PP-MARINA").replace("methods.md", "sampling.md")
        used: dict[str, Any] = {"clients": self.clients, "L_plus": s.plus, "L_pm": s.pm, "L_max": s.max}
        return replace(step, theorem=theorem, constants=step.constants | used)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:  # type: ignore[override]
        return super().init(x0, rnd)[0], Worker(x0)

    def up(  # type: ignore[override]
        self, worker: Worker, down: Messages, grad: Gradient, rnd: Round
    ) -> tuple[Rows, Worker]:
        x = self.model(down, rnd)
        if self._full(rnd):
            return grad(x, rnd), Worker(x)
        # Who was not asked in the round before has no gradient there: both are computed.
        moved = grad(x, rnd) - grad(worker.x, rnd)
        if self.odds is None or self.odds == "even":
            return moved, Worker(x)
        q = torch.tensor(drawable(self._known_odds())[1], dtype=torch.float64)[rnd.clients]
        return moved * (1.0 / (rnd.n * q)).float()[:, None], Worker(x)
