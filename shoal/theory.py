"""Constants of compressors and problems, the algebra between them, and the step sizes they allow.

Plain floats: this file imports neither torch nor the rest of the package, so that it can be read on its own.
One lemma stands behind every MARINA step size (proof in docs/derivations/methods.md):

    if  E||g+ - grad f(x+)||^2 <= (1-p) (||g - grad f(x)||^2 + Gamma ||x+ - x||^2)  and  x+ = x - gamma g,
    then  gamma <= 1 / (L_- + sqrt((1-p)/p Gamma))  gives  E||grad f(x^)||^2 <= 2 Delta_0 / (gamma K).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from scipy.optimize import minimize_scalar

Status = Literal["exact", "bound", "estimate"]
Evidence = Literal["proved", "numerical", "homogeneous"]


class Constant(float):
    """A number that says how well it is known: `exact`, a valid `bound`, or a measured `estimate`."""

    status: Status

    def __new__(cls, value: float, status: Status) -> Constant:
        self = super().__new__(cls, value)
        self.status = status
        return self

    def __getnewargs__(self) -> tuple[float, Status]:  # type: ignore[override]
        return float(self), self.status

    def __repr__(self) -> str:
        return f"{float(self):.6g} ({self.status})"


ONE, ZERO = Constant(1.0, "exact"), Constant(0.0, "exact")


@dataclass(frozen=True)
class Smoothness:
    """What is known of f = (1/n) sum f_i. A field is None where nothing is known; a plain number is an estimate.

    minus  L_-:  ||grad f(x) - grad f(y)|| <= L_- ||x - y||
    plus   L_+:  (1/n) sum ||grad f_i(x) - grad f_i(y)||^2 <= L_+^2 ||x - y||^2
    pm     L_±:  (1/n) sum ||grad f_i(x) - grad f_i(y)||^2 - ||grad f(x) - grad f(y)||^2 <= L_±^2 ||x - y||^2
    tilde  sqrt(mean L_i^2);  max  max L_i, with L_i the Lipschitz constant of grad f_i
    mu     PL constant: ||grad f(x)||^2 >= 2 mu (f(x) - f_*)
    f_inf  (1/n) sum inf f_i, or a lower bound of it; None where some f_i has no lower bound

    Where f_i = (1/N_i) sum_j f_ij is a mean of samples (by default of one, f_i itself):
    samples  (1/n) sum N_i;  most  max N_i
    sample   L_s:  (1/n) sum_i (1/N_i) sum_j ||D_ij - D_i||^2 <= L_s^2 ||x - y||^2, D = grad f(x) - grad f(y)
    noise    sigma^2:  (1/n) sum_i (1/N_i) sum_j ||grad f_ij(x) - grad f_i(x)||^2 <= sigma^2 for all x

    Where each client counts with its own weight (docs/derivations/weighted.md):
    each  the L_i, as well known as `max`; () where they are not stated
    plus_w, pm_w  L_{+,w} and L_{±,w} of `WeightedAB`, for the weights w = `by_smoothness(each)`

    Where clients have points of their own, x + u_i, and V = (1/n) sum ||u_i - ubar||^2 (docs/derivations/downlink.md):
    apart, together  ||(1/n) sum (grad f_i(x + u_i) - grad f_i(x))|| <= apart sqrt(V) + together ||ubar||
    """

    minus: Constant
    plus: Constant
    pm: Constant
    tilde: Constant
    max: Constant
    mu: Constant | None = None
    f_inf: Constant | None = None
    samples: Constant = ONE
    most: Constant = ONE
    sample: Constant = ZERO
    noise: Constant = ZERO
    each: tuple[float, ...] = field(default=(), repr=False)
    plus_w: Constant | None = None
    pm_w: Constant | None = None
    apart: Constant | None = None
    together: Constant | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "each" and value is not None and not isinstance(value, Constant):
                object.__setattr__(self, name, Constant(value, "estimate"))

    def facts(self) -> dict[str, tuple[float, Status]]:
        """The known single constants as name -> (value, status): what a report prints."""
        return {k: (float(v), v.status) for k, v in vars(self).items() if isinstance(v, Constant)}

    def packed(self) -> bytes:
        """JSON that says every number exactly: what one process tells others."""
        known = {k: [float(v), v.status] for k, v in vars(self).items() if isinstance(v, Constant)}
        return json.dumps({**known, "each": [float(L) for L in self.each]}).encode()

    @classmethod
    def unpacked(cls, data: bytes) -> Smoothness:
        """What was packed. The bytes are trusted: they come from a process of the same run."""
        told = json.loads(data)
        each = tuple(told.pop("each"))
        return cls(**{k: Constant(*v) for k, v in told.items()}, each=each)

    def weighted(self, weights: Sequence[float]) -> Smoothness:
        """L_{+,w}, L_{±,w} and max L_i / (n w_i) in the places of L_+, L_± and L_max, for any positive weights.

        From weights v whose constants are known, with rho = max v_i / w_i: L_{+,w}^2 <= rho L_{+,v}^2 and
        L_{±,w}^2 <= L_{±,v}^2 + (rho - 1) L_{+,v}^2. v is 1/n and `by_smoothness(each)`. And
        L_{+,w}^2 <= (1/n) sum L_i^2 / (n w_i). The least bound counts.
        """
        n = len(weights)
        known = [((1.0 / n,) * n, self.plus, self.pm)]
        if self.each and self.plus_w is not None and self.pm_w is not None:
            known.append((by_smoothness(self.each), self.plus_w, self.pm_w))
        pluses, spreads = [], []
        for base, plus, pm in known:
            rho = max(1.0, max(v / w for v, w in zip(base, weights, strict=True)))
            pluses.append(rho * plus**2)
            spreads.append(pm**2 + (rho - 1.0) * plus**2)
        if self.each:
            pluses.append(math.fsum(L**2 / (n * n * w) for L, w in zip(self.each, weights, strict=True)))
        top = max(L / (n * w) for L, w in zip(self.each or (self.max,) * n, weights, strict=True))
        status: Status = "estimate" if "estimate" in (self.plus.status, self.pm.status, self.max.status) else "bound"
        plus, pm = (Constant(math.sqrt(min(squares)), status) for squares in (pluses, pluses + spreads))
        return replace(self, plus=plus, pm=pm, max=Constant(top, status))


def by_smoothness(each: Sequence[float]) -> tuple[float, ...]:
    """Weights in proportion to the L_i, none below a thousandth of an even share, so that every client can be drawn.

    Even where all L_i are 0.
    """
    if not any(each):
        return (1.0 / len(each),) * len(each)
    floor = 1e-3 * math.fsum(each) / len(each)
    raised = [max(float(L), floor) for L in each]
    total = math.fsum(raised)
    return tuple(L / total for L in raised)


@dataclass(frozen=True)
class AB:
    """E||(1/n) sum C_i(a_i) - abar||^2 <= a (1/n) sum ||a_i||^2 - b ||abar||^2 + c max_i ||a_i||^2.

    The AB inequality of Szlendak et al. (arXiv:2110.03300), with one more term, c, for compressors whose scale is
    shared by all clients. `evidence` is `proved`, `numerical` (survived a search) or `homogeneous` (holds only when
    all a_i are equal). `source` names the theorem or derivation.
    """

    a: float
    b: float
    c: float = 0.0
    evidence: Evidence = "proved"
    source: str = ""
    other: AB | None = None  # a second inequality that holds as well

    def gamma(self, L: Smoothness) -> float:
        """Gamma = (a - b) L_+^2 + b L_±^2 + c L_max^2: the constant of the lemma for MARINA."""
        return max(0.0, self.a - self.b) * L.plus**2 + self.b * L.pm**2 + self.c * L.max**2

    def all(self) -> tuple[AB, ...]:
        """This inequality and the others that hold as well."""
        return (self,) if self.other is None else (self, *self.other.all())

    def drawn(self, n: int, r: int) -> AB:
        """Of a uniform cohort of r among n clients, against the mean of all n; self is stated for the cohort's r.

        a and b grow by (1-b) theta, theta = (n-r) / (r (n-1)); c stays (docs/derivations/strata.md).
        """
        if not 1 <= r <= n:
            raise ValueError(f"a cohort of r={r} among n={n} clients: r is in 1..{n}.")
        more = (1.0 - self.b) * (n - r) / (r * (n - 1)) if n > 1 else 0.0
        other = None if self.other is None else self.other.drawn(n, r)
        return replace(self, a=self.a + more, b=self.b + more, other=other)

    def best(self, L: Smoothness) -> AB:
        """Of the inequalities that hold, the one with the smallest Gamma."""
        return min(self.all(), key=lambda ab: ab.gamma(L))


@dataclass(frozen=True)
class WeightedAB:
    """E||(1/n) sum C_i(a_i) - abar||^2 <= a (1/n) sum ||a_i||^2 / (n w_i) - b ||abar||^2, weights w_i > 0 of sum 1.

    The weighted AB inequality of Tyurin et al. (arXiv:2206.02275); w_i = 1/n is `AB` with c = 0. Derivations:
    docs/derivations/weighted.md.
    """

    a: float
    b: float
    weights: tuple[float, ...]
    evidence: Evidence = "proved"
    source: str = ""

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) <= 0.0 or abs(math.fsum(self.weights) - 1.0) > 1e-9:
            raise ValueError(f"weights={self.weights}: one for each client, positive, with the sum 1.")

    def gamma(self, plus: float, pm: float) -> float:
        """Gamma = (a - b) L_{+,w}^2 + b L_{±,w}^2, for weighted constants of the same weights.

        (1/n) sum ||grad f_i(x) - grad f_i(y)||^2 / (n w_i) <= L_{+,w}^2 ||x - y||^2, and the same less
        ||grad f(x) - grad f(y)||^2 for L_{±,w}.
        """
        return max(0.0, self.a - self.b) * plus**2 + self.b * pm**2


@dataclass(frozen=True)
class Setting:
    """All that a step size may depend on, known before anything runs.

    n clients, d coordinates, the smoothness constants, the budget in rounds (horizon) or in uplink bits a client, and
    whether the caller wants the step size of the PL theorem (needs `smoothness.mu`).
    """

    n: int
    d: int
    smoothness: Smoothness
    horizon: int | None = None
    bits: float | None = None
    pl: bool = False


@dataclass(frozen=True)
class StepSize:
    """A step size with the theorem it comes from and the constants that went in.

    `evidence` is `proved`; `numerical` where a constant survived a search but is not proved; `none` where no theorem
    applies and gamma is only a unit to tune in. `start`: what the theorem promises is stated with
    Phi_0 = Delta_0 + start (1/n) sum ||grad f_i(x^0)||^2 in place of Delta_0, the price of memories that start at zero.
    """

    gamma: float
    theorem: str
    constants: dict[str, Any] = field(default_factory=dict)
    evidence: Literal["proved", "numerical", "none"] = "proved"
    start: float = 0.0


def page(name: str, evidence: str) -> str:
    """Where a theorem's proof stands, and a warning where a constant in it has none."""
    return f"docs/derivations/{name}" + ("" if evidence == "proved" else "; constants numerical, not proved")


def independent(omega: float, n: int, source: str = "") -> AB:
    """Independent unbiased compressors with E||C(a) - a||^2 <= omega ||a||^2 have A = omega / n, B = 0."""
    return AB(omega / n, 0.0, source=source)


def weighted_independent(omegas: Sequence[float], weights: Sequence[float] | None = None) -> WeightedAB:
    """Independent unbiased compressors, one omega_i each: a = max omega_i w_i, b = 0.

    The default weights, in proportion to 1/omega_i, have the least a: 1 / sum(1/omega_i).
    """
    if weights is None:
        if not omegas or min(omegas) <= 0.0:
            raise ValueError(f"omegas={tuple(omegas)}: the best weights need omega_i > 0; give weights.")
        total = math.fsum(1.0 / omega for omega in omegas)
        weights = [1.0 / (omega * total) for omega in omegas]
    a = max(omega * w for omega, w in zip(omegas, weights, strict=True))
    return WeightedAB(a, 0.0, tuple(weights), source="independent (docs/derivations/weighted.md)")


def weighted_sampling(omega: float, weights: Sequence[float], draws: int) -> WeightedAB:
    """(1/draws) sum_t C(a_i(t)) / (n w_i(t)), i(t) drawn with probabilities w, and with replacement.

    a = (1 + omega) / draws, b = 1 / draws, where C has omega and is drawn anew each time.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: at least one client is drawn.")
    source = "sampled clients (docs/derivations/weighted.md)"
    return WeightedAB((1.0 + omega) / draws, 1.0 / draws, tuple(weights), source=source)


def step_size(L_minus: float, Gamma: float, p: float) -> float:
    """The lemma: 1 / (L_- + sqrt((1-p)/p Gamma)), for general nonconvex f."""
    return 1.0 / (L_minus + math.sqrt((1.0 - p) / p * Gamma))


def step_size_pl(L_minus: float, Gamma: float, p: float, mu: float) -> float:
    """min{1 / (L_- + sqrt(2(1-p)/p Gamma)), p / (2 mu)}: E f(x^K) - f_* <= (1 - gamma mu)^K Delta_0 under PL."""
    return min(1.0 / (L_minus + math.sqrt(2.0 * (1.0 - p) / p * Gamma)), p / (2.0 * mu))


def predicted_bits(
    p: float, full_bits: float, code_bits: float, L_minus: float, Gamma: float, mu: float | None = None
) -> float:
    """(p full_bits + (1-p) code_bits) / gamma(p): bits a client to any accuracy, up to a factor without p."""
    gamma = step_size(L_minus, Gamma, p) if mu is None else step_size_pl(L_minus, Gamma, p, mu)
    return (p * full_bits + (1.0 - p) * code_bits) / gamma


def best_p(full_bits: float, code_bits: float, L_minus: float, Gamma: float, mu: float | None = None) -> float:
    """The p in [code_bits / (10 full_bits), 1] with the fewest `predicted_bits`; `mu` where the PL step size is used.

    The floor keeps p away from 0 where Gamma = 0 and any p is as good: there full
    gradients cost at most a tenth of the compressed messages. One-dimensional, bounded, on log p.
    """
    floor = min(1.0, code_bits / (10.0 * full_bits))
    if code_bits >= full_bits:
        return 1.0

    def bits(log_p: float) -> float:
        return predicted_bits(math.exp(log_p), full_bits, code_bits, L_minus, Gamma, mu)

    # Under PL the objective has a corner, where the cap p / (2 mu) sets in: a grid finds the dip, a search its floor.
    low, points = math.log(floor), 256
    grid = [low * (1.0 - k / points) for k in range(points + 1)]
    k = min(range(points + 1), key=lambda k: bits(grid[k]))
    near = (grid[max(k - 1, 0)], grid[min(k + 1, points)])
    inner = minimize_scalar(bits, bounds=near, method="bounded", options={"xatol": 1e-9})
    return math.exp(min((grid[k], float(inner.x)), key=bits))


def drawn(batch: int, most: float) -> float:
    """(N - b) / (b (N - 1)), N = most: the variance of a mean of b of N samples, drawn without replacement, over that
    of one sample; 0 where b >= N. It grows with N, so that `most` bounds it for all clients."""
    return 0.0 if batch >= most else (most - batch) / (batch * (most - 1.0))


def gamma_samples(ab: AB, L: Smoothness, n: int, share: float) -> float:
    """Gamma where b samples are compared at both points, V = share L_s^2 with share = `drawn(b, most)`:

    (a-b) L_+^2 + b L_±^2 + (a + (1-b)/n) V + c (L_max + sqrt(n V))^2.
    """
    V = share * L.sample**2
    spread = max(0.0, ab.a + (1.0 - ab.b) / n) * V
    top = (L.max + math.sqrt(n * V)) ** 2
    return max(0.0, ab.a - ab.b) * L.plus**2 + ab.b * L.pm**2 + spread + ab.c * top


def gamma_clients(ab: AB, L: Smoothness, share: float) -> float:
    """Gamma where r clients stand for all: (a-b) L_+^2 + (b + (1-b) share) L_±^2 + c L_max^2.

    (a, b, c) are those of r clients; share is 1/r for clients drawn with replacement, `drawn(r, n)` without.
    """
    spread = max(0.0, ab.b + (1.0 - ab.b) * share)
    return max(0.0, ab.a - ab.b) * L.plus**2 + spread * L.pm**2 + ab.c * L.max**2


def gamma_points(L: Smoothness, omega: float, theta: float) -> float:
    """Gamma where clients are moved to points of their own by E||Q_i(u) - u||^2 <= omega ||u||^2 with
    E||(1/n) sum Q_i(u) - u||^2 <= theta ||u||^2 (docs/derivations/downlink.md):

    min{L~^2 omega, (A sqrt(omega - t) + B sqrt t)^2}, A = apart, B = together, t = min{theta, omega B^2/(A^2 + B^2)}.
    """
    plain = L.tilde**2 * omega
    if L.apart is None or L.together is None:
        return plain
    squares = L.apart**2 + L.together**2
    t = min(theta, omega * L.together**2 / squares) if squares > 0.0 else 0.0
    return min(plain, (L.apart * math.sqrt(omega - t) + L.together * math.sqrt(t)) ** 2)


def vr_diana_weights(
    gamma: float, L_minus: float, L_plus: float, omega: float, n: int, V: float, shift: float, p: float, mu: float
) -> tuple[float, float] | None:
    """The least weights of VR-DIANA's memories at this gamma (docs/derivations/sampling.md); None if there are none.

    Phi = f - f_* + w mean ||grad f_i - h_i||^2 + z ||x - w||^2 falls by gamma/2 ||grad f||^2 a round, or by the factor
    1 - gamma mu where mu > 0.
    """
    A, C, E = omega / n * gamma**2, (1.0 + omega) * V / n * gamma**2, (1.0 + 2.0 / shift) * L_plus**2
    P, S, R = shift / 2.0 - gamma * mu - E * A, p / 2.0 - gamma * mu - C, 1.5 * shift * V + E * C
    if P <= 0.0 or S <= 0.0 or P * S <= A * R:
        return None
    det = P * S - A * R
    w, z = L_minus / 2.0 * (A * S + A * C) / det, L_minus / 2.0 * (P * C + R * A) / det
    left = 0.5 - gamma * (L_minus / 2.0 + w * E + z * (1.0 + 2.0 / p))
    return (w, z) if left >= 0.0 else None


def vr_diana_step(
    L_minus: float, L_plus: float, omega: float, n: int, V: float, shift: float, p: float, mu: float = 0.0
) -> tuple[float, float]:
    """(gamma, w): the largest step size with weights, by bisection to 1e-12 from the safe side, and its weight w."""
    low, high = 0.0, 1.0 / L_minus
    best = vr_diana_weights(high, L_minus, L_plus, omega, n, V, shift, p, mu)
    if best is not None:
        return high, best[0]
    weight = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        found = vr_diana_weights(middle, L_minus, L_plus, omega, n, V, shift, p, mu)
        low, high = (low, middle) if found is None else (middle, high)
        weight = weight if found is None else found[0]
    return low, weight


def dasha_step(
    L_minus: float, L_plus: float, omega: float, n: int, V: float, momentum: float, p: float, mu: float = 0.0
) -> float:
    """DASHA's step size, or DASHA-PAGE's with V > 0 (docs/derivations/sampling.md):

    1 / (L_- + sqrt X + sqrt Y), X = 2 omega/(n a) (L_+^2 + 2 L_+ sqrt(p (1-p) V) + 2 (1-p) V), Y = (1-p) V/(p n);
    PL: X = 4 omega/(n a) (L_+^2 + 2 L_+ sqrt(2 p (1-p) V) + 3 (1-p) V), Y = 2 (1-p) V/(p n), at most min{a, p}/(2 mu).
    """
    twice, thrice = (2.0, 3.0) if mu > 0.0 else (1.0, 2.0)
    tails = (1.0 - p) * V
    X = 2.0 * twice * omega / (n * momentum)
    X *= L_plus**2 + 2.0 * L_plus * math.sqrt(twice * p * tails) + thrice * tails
    gamma = 1.0 / (L_minus + math.sqrt(X) + math.sqrt(twice * tails / (p * n)))
    cap = momentum if V == 0.0 else min(momentum, p)
    return min(gamma, cap / (2.0 * mu)) if mu > 0.0 else gamma


def ef21_two_way_step(L_minus: float, L_plus: float, alpha: float, down: float, mu: float = 0.0) -> tuple[float, float]:
    """(gamma, w) of EF21 on the points of EF21-P, alpha up and `down` down (docs/derivations/downlink.md):

    gamma = 1 / (L_- + X + Y), X = (1 + sqrt(1-down)) (1 + sqrt r) L_+ sqrt(beta/theta), Y = L_- sqrt r, r = beta/theta
    of `down`; under PL every beta/theta is doubled, and gamma <= min of both theta / (2 mu). w is the weight of the
    first mean ||g_i - grad f_i||^2 in Phi_0.
    """
    (theta, beta), (below, fall) = ef21_constants(alpha), ef21_constants(down)
    twice = 2.0 if mu > 0.0 else 1.0
    root = math.sqrt(twice * fall / below)
    X = (1.0 + math.sqrt(1.0 - down)) * (1.0 + root) * L_plus * math.sqrt(twice * beta / theta)
    Y = L_minus * root
    gamma = 1.0 / (L_minus + X + Y)
    gamma = min(gamma, min(theta, below) / (2.0 * mu)) if mu > 0.0 else gamma
    return gamma, twice * gamma / (2.0 * theta) * (1.0 + (Y / X if X > 0.0 else 0.0))


def ef21_constants(alpha: float) -> tuple[float, float]:
    """(theta, beta) of EF21: theta = 1 - sqrt(1-alpha), beta = (1-alpha) / (1 - sqrt(1-alpha))."""
    root = math.sqrt(1.0 - alpha)
    return 1.0 - root, (1.0 - alpha) / (1.0 - root)
