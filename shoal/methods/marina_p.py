"""MARINA-P: the downlink is compressed; each client has a point of its own, which a message of its own moves.

Gruntkowska, Tyurin, Richtarik, 2024, arXiv:2402.06412. The step sizes, and the constants of problems that they need,
are derived in docs/derivations/downlink.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from shoal.core import DENSE, Compressor, Gradient, Method, ab_for_inputs, check_share, gradients_at, require
from shoal.errors import ConfigError
from shoal.messages import Messages, Round, Rows, Vector, checked_rows
from shoal.theory import AB, Evidence, Setting, StepSize, best_p, gamma_points, page, step_size, step_size_pl


class Server(NamedTuple):
    x: Vector  # the iterate of the round before


class Worker(NamedTuple):
    w: Rows  # the clients' points


@dataclass(frozen=True)
class MarinaP(Method):
    """Compressed differences of iterates go down, one message a client; now and then the iterate itself, to all.

    With probability p (and in round 0): w_i = x; else w_i += Q_i(x - x-), Q_i from `downlink`.
    g = (1/n) sum grad f_i(w_i), uncompressed.

    p=None: the p with the fewest predicted bits down. Down 32 d bits on heads, |Q| on tails; up 32 d.

    References: arXiv:2402.06412; proof: docs/derivations/downlink.md.
    """

    downlink: Compressor
    p: float | None = None

    def __post_init__(self) -> None:
        check_downlink("MarinaP", self.downlink, self.p)

    def check(self, n: int, d: int) -> None:
        self.downlink.check(n, d)
        self.alone(n, d)

    def alone(self, n: int, d: int) -> float:
        """omega of one client's Q_i by itself."""
        code: Any = self.downlink
        return float(code.alone(n, d) if hasattr(code, "alone") else code.omega(d))

    def constants(self, setting: Setting) -> tuple[float, float, AB, float]:
        """(omega, theta, the AB inequality that theta is from, Gamma); theta = a - b + c, as all inputs are equal."""
        n, d = setting.n, setting.d
        ab = min(ab_for_inputs(self.downlink, setting, equal=True).all(), key=lambda ab: ab.a - ab.b + ab.c)
        omega, theta = self.alone(n, d), max(0.0, ab.a - ab.b + ab.c)
        return omega, theta, ab, gamma_points(setting.smoothness, omega, theta)

    def resolved(self, setting: Setting) -> MarinaP:
        if self.p is not None:
            return self
        n, d, s = setting.n, setting.d, setting.smoothness
        code, mu = self.downlink.predicted_bits(n, d), s.mu if setting.pl else None
        return replace(self, p=best_p(32.0 * d, code, s.minus, self.constants(setting)[3], mu))

    def step_size(self, setting: Setting) -> StepSize:
        """gamma = 1 / (L_- + sqrt((1-p)/p Gamma)), Gamma = `shoal.theory.gamma_points`;
        PL: min{1 / (L_- + sqrt(2 (1-p)/p Gamma)), p/(2 mu)}."""
        omega, theta, ab, Gamma = self.constants(setting)
        s, p = setting.smoothness, self.resolved(setting).p or 1.0
        used: dict[str, Any] = {"omega": omega, "theta": theta, "source": ab.source, "Gamma": Gamma, "p": p}
        used |= {"L_minus": s.minus, "L_tilde": s.tilde, "L_apart": s.apart, "L_together": s.together}
        return lemma_step("MARINA-P", setting, Gamma, p, used, ab.evidence, self.downlink.evidence)

    def init(self, x0: Vector, rnd: Round) -> tuple[Server, Worker]:
        return Server(x0), Worker(x0.repeat(len(rnd.clients), 1))

    def full(self, rnd: Round) -> bool:
        """Whether all clients are sent the iterate itself."""
        if self.p is None:
            raise ConfigError("MarinaP(p=None) is not resolved: simulate does it, or method.resolved(setting).")
        return rnd.index == 0 or rnd.coin(self.p, "MarinaP.coin")

    def down(self, server: Server, x: Vector, rnd: Round) -> tuple[Messages, Server]:
        return self.sent(server.x, x, rnd), Server(x)

    def sent(self, before: Vector, x: Vector, rnd: Round) -> Messages:
        """x in one row for all, or Q_i(x - before) in a row for each."""
        if self.full(rnd):
            return DENSE.encode(x[None], rnd.server())
        moved = checked_rows((x - before)[None], rnd.server())
        return self.downlink.encode(moved.expand(rnd.cohort, -1), rnd.everyone().fork("down"))

    def followed(self, w: Rows, down: Messages, rnd: Round) -> Rows:
        """The clients' points after what they heard."""
        if self.full(rnd):
            return self.model(down, rnd).repeat(len(w), 1)
        return w + self.downlink.decode(down, rnd.fork("down"))

    def code(self, rnd: Round) -> Compressor:
        return DENSE

    def up(self, worker: Worker, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Worker]:
        w = self.followed(worker.w, down, rnd)
        return (grad(self.model(down, rnd), rnd) if self.full(rnd) else gradients_at(w, grad, rnd)), Worker(w)

    def estimate(self, server: Server, mean: Vector, rnd: Round) -> tuple[Vector, Server]:
        return mean, server


def check_downlink(method: str, downlink: Compressor, p: float | None) -> None:
    """Raise ConfigError, in this method's name, unless messages of the compressor can go down."""
    if not isinstance(downlink, Compressor):
        raise ConfigError(f"{method}(downlink={downlink!r}): a compressor, such as RandK(10).")
    require(downlink, "ab", method, "Take RandK, PermK or another unbiased compressor for the downlink.")
    if downlink.agrees:
        raise ConfigError(
            f"{method}(downlink={downlink!r}): clients that agree on a scale send it up; nobody does so for the "
            "downlink: take scale='own'."
        )
    if not hasattr(downlink, "alone") and not hasattr(downlink, "omega"):
        raise ConfigError(f"{method}(downlink={downlink!r}): it has no omega of one client alone; take RandK or PermK.")
    check_share(method, "p", p, "the probability of a full round")


def lemma_step(name: str, setting: Setting, Gamma: float, p: float, used: dict[str, Any], *known: Evidence) -> StepSize:
    """The step size of the lemma, general or PL, for a recursion with this Gamma."""
    evidence: Literal["proved", "numerical"] = "numerical" if "numerical" in known else "proved"
    s, where = setting.smoothness, page("downlink.md", evidence)
    if setting.pl and s.mu is not None:
        gamma = step_size_pl(s.minus, Gamma, p, s.mu)
        return StepSize(gamma, f"{name} under PL ({where})", used | {"mu": s.mu}, evidence)
    return StepSize(step_size(s.minus, Gamma, p), f"{name}, nonconvex ({where})", used, evidence)
