"""The steps of the proofs in docs/derivations, by exact enumeration, on grids, or by searching for a counterexample.

Nothing here is statistical but `test_exact_error_is_the_codes_error`, which states its false-alarm rate.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
import zoo

from shoal import kernels
from shoal.compressors import QSGD, Correlated, Independent, PermK, RandK, TopK, permk
from shoal.compressors.blocks import dealt_bound
from shoal.compressors.correlated import exact_error
from shoal.kernels import reference
from shoal.messages import Round
from shoal.methods import DCGD, EF21, Diana, Marina
from shoal.problems import Quadratics
from shoal.theory import Constant, Setting, Smoothness, best_p, ef21_constants, predicted_bits

SLACK = 1 + 1e-9  # both sides of every inequality are float64 sums of fewer than 10^6 terms


def square(rows):
    """||row||^2 of each row."""
    return np.square(rows).sum(axis=-1)


def spread(u):
    """(M, V): the mean of ||u_i||^2, and what it exceeds ||ubar||^2 by."""
    return square(u).mean(), square(u - u.mean(axis=0)).mean()


# ------------------------------------------------------------------------------------------------ the one lemma
def lemma(L, a, B, rho, mu=None):
    """The step size of docs/derivations/methods.md for error <= a s and s+ <= (1 - rho) s + B ||dx||^2."""
    if mu is None:
        return 1 / (L + math.sqrt(a * B / rho))
    return min(1 / (L + math.sqrt(2 * a * B / rho)), rho / (2 * mu))


def test_root_lemma():
    """gamma <= 1/(a + sqrt b) implies gamma^2 b + gamma a <= 1, with equality at b = 0 and at a = 0."""
    a, b = np.meshgrid(np.r_[0, np.logspace(-6, 6, 61)], np.r_[0, np.logspace(-12, 12, 61)])
    a, b = a[(a + b) > 0], b[(a + b) > 0]
    gamma = 1 / (a + np.sqrt(b))
    assert np.all(gamma**2 * b + gamma * a <= 1 + 1e-12)
    assert np.allclose((gamma**2 * b + gamma * a)[(a == 0) | (b == 0)], 1)


@pytest.mark.parametrize("pl", [False, True])
def test_step_sizes_are_the_lemmas(pl):
    """What the methods return is the lemma with each method's (a, B, rho)."""
    L = Smoothness(*(Constant(v, "exact") for v in (0.7, 1.1, 0.8, 1.2, 2.5)), mu=Constant(0.3, "exact"))
    n, d, mu = 8, 96, 0.3 if pl else None
    setting = Setting(n, d, L, pl=pl)
    for code in (RandK(5), PermK(), Correlated(), Correlated("own"), Independent()):
        ab, p = code.ab(n, d), 0.2
        both = [ab] if ab.other is None else [ab, ab.other]
        Gamma = min((e.a - e.b) * L.plus**2 + e.b * L.pm**2 + e.c * L.max**2 for e in both)
        step = Marina(code, p=p).step_size(setting)
        assert step.gamma == pytest.approx(lemma(L.minus, 1, (1 - p) * Gamma, p, mu))
    for shift in (0.01, 5 / 96):
        # The code divides the square root of (omega/n) (2/shift) / (shift/2) out of the root.
        step = Diana(RandK(5), shift=shift).step_size(setting)
        assert step.gamma == pytest.approx(lemma(L.minus, (96 / 5 - 1) / n, 2 / shift * L.plus**2, shift / 2, mu))
    theta, beta = ef21_constants(5 / 96)
    step = EF21(TopK(5)).step_size(setting)
    assert step.gamma == pytest.approx(lemma(L.minus, 1, beta * L.plus**2, theta, mu))


# ------------------------------------------------------------------------------------------------ recursions
@dataclass
class Members:
    """n quadratics with random symmetric (indefinite) Hessians, and their constants by eigenvalues."""

    A: np.ndarray  # (n, d, d)
    b: np.ndarray  # (n, d)

    def grads(self, x):
        return self.A @ x - self.b

    def constants(self):
        """(L_+^2, L_±^2)."""
        mean, second = self.A.mean(axis=0), (self.A @ self.A).mean(axis=0)
        return np.linalg.eigvalsh(second)[-1], np.linalg.eigvalsh(second - mean @ mean)[-1]


def members(rng, n=2, d=3):
    A = rng.normal(size=(n, d, d))
    return Members(A + A.transpose(0, 2, 1), rng.normal(size=(n, d)))


def randk_outcomes(n, d):
    """All equally likely outcomes of n independent RandK(1): masks (n, d), to be scaled by d."""
    for picks in itertools.product(range(d), repeat=n):
        yield np.eye(d)[list(picks)]


def permk_outcomes(n, d):
    """All equally likely outcomes of PermK for d >= n: masks (n, d), to be scaled by n."""
    blocks = np.array_split(np.arange(d), n)
    for order in itertools.permutations(range(d)):
        for owner in itertools.permutations(range(n)):
            masks = np.zeros((n, d))
            for i in range(n):
                masks[i, [order[j] for j in blocks[owner[i]]]] = 1
            yield masks


def states(seed, count=40):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield members(rng), rng.normal(size=3), 10 ** rng.uniform(-2, 1) * rng.normal(size=(2, 3)), rng


@pytest.mark.parametrize(("outcomes", "scale", "ab"), [
    (list(randk_outcomes(2, 3)), 3, RandK(1).ab(2, 3)), (list(permk_outcomes(2, 3)), 2, PermK().ab(2, 3)),
], ids=["RandK", "PermK"])  # fmt: skip
def test_marina_recursion(outcomes, scale, ab):
    """E||g+ - grad f(x+)||^2 = (1-p) (||g - grad f(x)||^2 + E||err||^2) <= (1-p) (... + Gamma ||dx||^2)."""
    p = 0.3
    for f, x, rows, rng in states(0):
        g, new = rows[0], x + rng.normal(size=3)
        moved = f.grads(new) - f.grads(x)
        target = f.grads(new).mean(axis=0)
        tails = [square(g + scale * (mask * moved).mean(axis=0) - target) for mask in outcomes]
        after = (1 - p) * np.mean(tails)  # heads give the exact gradient
        plus, pm = f.constants()
        Gamma = (ab.a - ab.b) * plus + ab.b * pm
        before = square(g - f.grads(x).mean(axis=0))
        error = ab.a * square(moved).mean() - ab.b * square(moved.mean(axis=0))
        assert after == pytest.approx((1 - p) * (before + error))  # RandK and PermK reach their constants
        assert after <= (1 - p) * (before + Gamma * square(new - x)) * SLACK


@pytest.mark.parametrize("shift", [1 / 3, 0.2, 0.01])
def test_diana_recursion(shift):
    """E||g - grad f||^2 <= (omega/n) s and E s+ <= (1 - shift/2) s + (2/shift) L_+^2 E||dx||^2, shift <= 1/(1+omega).

    x+ and h+ are made of the same messages; omega = 2 here, so that 1/3 is the largest shift.
    """
    for f, x, h, rng in states(1):
        gamma = 10 ** rng.uniform(-3, 1)
        y = f.grads(x) - h
        s, errors, after, moves = square(y).mean(), [], [], []
        for mask in randk_outcomes(2, 3):
            m = 3 * mask * y
            g = h.mean(axis=0) + m.mean(axis=0)
            errors.append(square(g - f.grads(x).mean(axis=0)))
            after.append(square(f.grads(x - gamma * g) - h - shift * m).mean())
            moves.append(square(gamma * g))
        assert np.mean(errors) == pytest.approx(2 / 2 * s)
        plus, _ = f.constants()
        assert np.mean(after) <= ((1 - shift / 2) * s + (2 / shift - 1) * plus * np.mean(moves)) * SLACK
        root = math.sqrt(1 - shift)
        assert np.mean(after) <= (root * s + plus * np.mean(moves) / (1 - root)) * SLACK


def test_ef21_recursion():
    """E s+ <= (1 - theta) s + beta L_+^2 ||dx||^2, for Top1 and for u_S with |S| = 1 (alpha = 1/3)."""
    theta, beta = ef21_constants(1 / 3)
    for f, x, g, rng in states(2):
        new = x - 10 ** rng.uniform(-3, 1) * g.mean(axis=0)
        v = f.grads(new) - g
        s, (plus, _) = square(f.grads(x) - g).mean(), f.constants()
        bound = ((1 - theta) * s + beta * plus * square(new - x)) * SLACK
        assert np.mean([square(mask * v - v).mean() for mask in randk_outcomes(2, 3)]) <= bound
        top = np.eye(3)[np.abs(v).argmax(axis=1)]
        assert square(top * v - v).mean() <= bound


def test_abc_inequality():
    """E||g||^2 <= 2 A (f - f_inf) + ||grad f||^2 for DCGD, and ||grad f_i||^2 <= 2 L_i (f_i - inf f_i)."""
    problem = Quadratics(n=4, d=6, noise=0.05, lam=0.3)
    L, rng = problem.smoothness(), np.random.default_rng(3)
    setting = zoo.setting(problem, horizon=50)
    for code in (RandK(2), PermK(), Correlated(), Independent()):
        step = DCGD(code).step_size(setting)
        ab, A = code.ab(4, 6), step.constants["A"]
        for _ in range(50):
            x = torch.from_numpy(rng.normal(size=6) * 10 ** rng.uniform(-2, 2)).float()
            values, rows = problem.evaluate(x, torch.arange(4))
            rows, gap = rows.double().numpy(), float(values.mean()) - L.f_inf
            assert square(rows).mean() <= 2 * L.max * gap * (1 + 1e-5)  # rows are float32
            full = square(rows.mean(axis=0))
            second = full + ab.a * square(rows).mean() - ab.b * full + ab.c * square(rows).max()
            assert second <= (2 * A * gap + full) * (1 + 1e-5)
        assert step.evidence == "proved"
        assert step.gamma == pytest.approx(min(1 / L.minus, 1 / math.sqrt(L.minus * A * 50)))
    assert 2 * math.e < 6  # the constant of the theorem


def test_best_p():
    """No p on a fine grid below it, down to a thousandth of the floor, needs less than 1/1.1 of the bits at best_p."""
    for cost, Gamma in itertools.product(np.logspace(-4, -0.01, 12), [0.0, *np.logspace(-6, 4, 11)]):
        p = best_p(1.0, cost, 1.0, Gamma)
        grid = np.exp(np.linspace(math.log(cost / 1e4), 0, 2001))
        bits = np.array([predicted_bits(q, 1.0, cost, 1.0, Gamma) for q in grid])
        ours = predicted_bits(p, 1.0, cost, 1.0, Gamma)
        assert ours <= bits[grid >= cost / 10].min() * (1 + 1e-4)
        assert ours <= 1.1 * bits.min()


# ------------------------------------------------------------------------------------------------ PermK
def permk_rounds(n, d, monkeypatch):
    """One round for everything that PermK may draw: the shifts of all blocks, or two permutations for d < n."""
    ids = torch.arange(n)
    if d >= n:
        for shifts in itertools.product(range(n), repeat=-(-d // n)):
            words = np.array([[(2 * s + 1) * 2**31 // n for s in shifts]], np.uint32)  # the middle of what gives s
            monkeypatch.setattr(reference.dealt, "word_array", lambda draw, count, words=words: words[:, :count])
            yield Round(0, 0, n, ids, ids, n)
    else:
        for order, owner in itertools.product(itertools.permutations(range(d)), itertools.permutations(range(n))):
            monkeypatch.setattr(Round, "permutation", lambda self, d, name, order=order: torch.tensor(order))
            monkeypatch.setattr(permk.rng, "places", lambda draw, n, slots, owner=owner: torch.tensor(owner)[slots])
            yield Round(0, 0, n, ids, ids, n)


@pytest.mark.parametrize(("n", "d"), [(2, 2), (2, 3), (3, 4), (3, 5), (2, 1), (4, 2), (3, 2), (5, 2), (4, 3), (5, 3)])
def test_permk_constants(n, d, monkeypatch):
    """Unbiased, and E||error||^2 = A M - B ||ubar||^2 exactly: d >= n, n = q d, and n = q d + r."""
    monkeypatch.setattr(kernels, "of", lambda tensor: reference)
    u = torch.from_numpy(np.random.default_rng(n * 10 + d).normal(size=(n, d))).float()
    rows = []
    for rnd in permk_rounds(n, d, monkeypatch):
        rows.append(PermK().decode(PermK().encode(u, rnd), rnd).double().numpy())
    assert len(rows) == (n ** -(-d // n) if d >= n else math.factorial(n) * math.factorial(d))
    u, second = u.double().numpy(), square(np.mean(rows, axis=1)).mean()
    assert np.allclose(np.mean(rows, axis=0), u, rtol=0, atol=1e-6)  # every client alone
    ab, bar = PermK().ab(n, d), square(u.mean(axis=0))
    assert second - bar == pytest.approx(ab.a * square(u).mean() - ab.b * bar, rel=1e-5, abs=1e-6)
    r = 0 if d >= n else n % d
    assert ab.a - ab.b == pytest.approx(r * (d - r) / n**2, abs=1e-12)


@pytest.mark.parametrize(("parts", "d"), [(2, 2), (2, 3), (3, 5), (3, 8), (4, 10)])
def test_dealt_lengths_and_their_bound(parts, d, monkeypatch):
    """Over all shifts: every coordinate goes to every part as often, the last ones always in a longer part; and
    sum_j E f(length of j's part) a_j^2 reaches `dealt_bound` for its worst a."""
    counts, f = {}, {d // parts: 1.7, d // parts + 1: 0.6}
    for constant in (f.__getitem__, lambda b: -f[b], lambda b: b - 1.0):
        mean = np.zeros(d)
        for shifts in itertools.product(range(parts), repeat=-(-d // parts)):
            words = np.array([[(2 * s + 1) * 2**31 // parts for s in shifts]], np.uint32)
            monkeypatch.setattr(reference.dealt, "word_array", lambda draw, count, words=words: words[:, :count])
            owner = reference.dealt._owners(None, parts, d)
            size = np.bincount(owner, minlength=parts)
            counts[shifts] = owner
            mean += [constant(b) for b in size[owner].tolist()]
        assert (mean / len(counts)).max() == pytest.approx(dealt_bound(constant, d, parts))
    owners = np.array(list(counts.values()))
    assert all(np.bincount(column).tolist() == [len(owners) // parts] * parts for column in owners.T)


# ------------------------------------------------------------------------------------------------ grids
def cells(y):
    """frac (1 - frac): the variance of rounding y to a neighboring integer."""
    return (y - np.floor(y)) * (1 - y + np.floor(y))


@pytest.mark.parametrize("s", [1, 2, 5])
def test_qsgd_tangent(s):
    """cells(s y) <= y^2 (sqrt(d) s/2 - s^2) + s/(2 sqrt d) for d >= 4 s^2; the flat vector reaches sqrt(d)/s - 1."""
    y = np.linspace(0, 1, 20001)
    for d in (4 * s * s, 4 * s * s + 1, 9 * s * s, 10**6):
        root = math.sqrt(d)
        assert np.all(cells(s * y) <= y**2 * (root * s / 2 - s**2) + s / (2 * root) + 1e-12)
        omega = QSGD(s).omega(d)
        assert d * cells(np.array(s / root)) / s**2 == pytest.approx(omega)
    rng = np.random.default_rng(s)
    for d in (1, 2, 3, 4, 7, 16, 50, 101):
        e = rng.normal(size=(4000, d)) * 10 ** rng.uniform(-3, 0, size=(4000, d))
        e /= np.linalg.norm(e, axis=1, keepdims=True)
        assert (cells(s * np.abs(e)).sum(axis=1) / s**2).max() <= QSGD(s).omega(d) * SLACK


def strata(y, n):
    """c_s = clip(n y - s, 0, 1), s = 0..n-1."""
    return np.clip(n * y[..., None] - np.arange(n), 0, 1)


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_strata_variance(n):
    """Var_s(c(z) - c(z')) <= min(delta, n delta^2) - delta^2 in one cell, and <= (n-1) delta^2 for all z, z'."""
    z = np.linspace(0, 3, 361)
    c = strata(z - np.floor(z), n)
    variance = (c[:, None] - c[None]).var(axis=2)
    delta = np.abs(z[:, None] - z[None])
    assert np.all(variance <= (n - 1) * delta**2 + 1e-12)
    one = np.floor(z)[:, None] == np.floor(z)[None]
    assert np.all(variance[one] <= (np.minimum(delta, n * delta**2) - delta**2)[one] + 1e-12)


# ------------------------------------------------------------------------------------------------ correlated rounding
def enumerated_error(u, r, levels, shifted):
    """E||error||^2 by summing over every way to deal the strata: one permutation a coordinate, or (shifted) one for all
    coordinates and every shift. Given the strata, the bits are independent."""
    n, _ = u.shape
    step = 2 * r / (levels - 1)
    z = (u + r[:, None]) / np.where(step > 0, step, 1)[:, None]
    c = strata(z - np.floor(z), n)
    total, deals = 0.0, 0
    for places in itertools.permutations(range(n)):
        for shift in range(n if shifted else 1):
            at = (np.array(places) + shift) % n
            heads = c[np.arange(n), :, at]  # (n, d): P(bit = 1)
            value = -r[:, None] + step[:, None] * (np.floor(z) + heads)
            total += square(value.mean(axis=0) - u.mean(axis=0))
            total += (step[:, None] ** 2 * heads * (1 - heads)).sum() / n**2
            deals += 1
    return total / deals


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_exact_error_formula(n, levels):
    """The closed form against the sum over all permutations, with unequal scales; the O(1) scheme agrees."""
    rng = np.random.default_rng(n)
    u = rng.normal(size=(n, 3)) * 10 ** rng.uniform(-1, 1, size=(n, 1))
    r = np.abs(u).max(axis=1) * rng.uniform(1, 3, size=n)
    exact = exact_error(u, r, levels)
    assert exact == pytest.approx(enumerated_error(u, r, levels, shifted=False))
    assert exact == pytest.approx(enumerated_error(u, r, levels, shifted=True))


@pytest.mark.parametrize("code", [Correlated(), Correlated("own"), Correlated("max")], ids=repr)
def test_exact_error_is_the_codes_error(code):
    """4000 rounds of the real code. |z| > 5 has probability 6e-7 for a mean of so many; the seed is fixed."""
    rng = np.random.default_rng(5)
    u = torch.from_numpy(rng.normal(size=6) + 0.2 * rng.normal(size=(5, 6))).float()
    errors = []
    for index in range(4000):
        rnd = zoo.round_of(code, u, index)
        errors.append(square((code.aggregate(code.encode(u, rnd), rnd).double() - u.double().mean(0)).numpy()))
    rows = u.double().numpy()
    tops = np.abs(rows).max(axis=1)
    scale = {"shared": np.full(5, tops.max()), "own": np.linalg.norm(rows, axis=1), "max": tops}[code.scale]
    z = (np.mean(errors) - exact_error(rows, scale)) / (np.std(errors) / math.sqrt(len(errors)))
    assert abs(z) < 5


def candidates(n, d, seed, count=150):
    """(n, d) inputs from equal to unrelated clients: near copies, scaled copies, few active clients, heavy tails."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        base = rng.normal(size=d)
        small = 10 ** rng.uniform(-5, 1)
        active = (np.arange(n) < rng.integers(1, n + 1))[:, None]
        yield [
            base + small * rng.normal(size=(n, d)),
            base * rng.uniform(0.5, 2, size=(n, 1)) + small * rng.normal(size=(n, d)),
            base * np.where(rng.random((n, 1)) < 0.5, 1, 1 + small),
            active * rng.normal(size=(n, d)),
            np.sign(base) * (1 + small * rng.random((n, 1))),
            rng.standard_cauchy(size=(n, d)),
        ][k % 6]


SIZES = [(2, 2), (2, 9), (3, 5), (4, 16), (8, 4), (8, 8), (5, 40), (16, 6)]


def worst(n, d, excess, climbs=3, steps=80):
    """The largest excess(u) over the candidates, after random climbs from the best of them."""
    ranked = sorted(candidates(n, d, seed=17 * n + d), key=excess)[-climbs:]
    rng, best = np.random.default_rng(n + d), -math.inf
    for u in ranked:
        top, width = excess(u), 0.3
        for _ in range(steps):
            moved = u + width * np.abs(u).mean() * rng.normal(size=u.shape) * (rng.random(u.shape) < 0.3)
            value = excess(moved)
            u, top, width = (moved, value, width * 1.3) if value > top else (u, top, width * 0.93)
        best = max(best, top)
    return best


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_shared_scale_theorem(n, d):
    """E||error||^2 <= d Delta^2/(4 n^2) + V at any scale R >= max |u_ij|; for one bit and even n,
    <= (lambda - 1) M + V + d R^2/(lambda n^2) for every lambda >= 1 as well."""

    def excess(u, levels=2, wide=1.0):
        R = wide * np.abs(u).max()
        M, V = spread(u)
        lambdas = np.r_[1, np.logspace(0, 2, 41)] if levels == 2 and n % 2 == 0 else np.ones(1)
        head = d * (2 * R / (levels - 1)) ** 2 / (4 * n**2)
        return exact_error(u, np.full(n, R), levels) / (((lambdas - 1) * M + head / lambdas).min() + V)

    assert worst(n, d, excess) <= SLACK
    for levels, wide in ((3, 1.0), (5, 1.7), (2, 1.3)):
        assert max(excess(u, levels, wide) for u in candidates(n, d, seed=1)) <= SLACK


def needed_b(u, scale):
    """The least B with E||error||^2 <= (d/n^2) M + B V at these inputs, for own scales."""
    n, d = u.shape
    r = np.linalg.norm(u, axis=1) if scale == "own" else np.abs(u).max(axis=1)
    M, V = spread(u)
    return (exact_error(u, r) - d / n**2 * M) / V if V > 1e-9 * M else -math.inf


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_own_scale(n, d):
    """Proved: B = 1 + (d-1)/(n-1). Searched: max(d/n, 1/2). One active client shows that d/n - 1/(n-1) is needed."""
    found = worst(n, d, lambda u: needed_b(u, "own"))
    assert found <= (1 + (d - 1) / (n - 1)) * SLACK
    numerical = Correlated("own", numerical=True).ab(n, d)
    assert numerical.a - numerical.b == pytest.approx(d / n**2)
    assert found <= numerical.b * SLACK
    assert worst(n, d, lambda u: needed_b(u, "max")) <= numerical.b * SLACK
    one = np.zeros((n, d))
    one[0] = np.random.default_rng(0).normal(size=d)
    assert needed_b(one, "own") == pytest.approx(d / n - 1 / (n - 1))
    assert exact_error(one, np.linalg.norm(one, axis=1)) == pytest.approx((d - 1) / n * spread(one)[0])


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_never_worse_than_independent(n, d):
    """The covariances are <= 0: E||error||^2 <= (1/n^2) sum_i E||error_i||^2, whatever the scales."""
    rng = np.random.default_rng(9)
    for u in candidates(n, d, seed=2):
        r = np.abs(u).max(axis=1) * rng.uniform(1, 2, size=n)
        alone = (r[:, None] ** 2 - u**2).sum() / n**2
        assert exact_error(u, r) <= alone * SLACK


@pytest.mark.parametrize(("n", "d"), [(2, 4), (2, 64), (4, 16), (4, 100), (6, 36), (3, 9), (5, 40)])
def test_parity(n, d):
    """Equal inputs, own scale: 2 sqrt(d)/n - 1 for even n and d >= n^2, reached; odd n: at least (d-1)/n^2."""
    flat = np.full((n, d), d**-0.5)
    one = np.zeros((n, d))
    one[:, 0] = 1
    if n % 2:
        assert exact_error(one, np.ones(n)) == pytest.approx((d - 1) / n**2)
    else:
        assert exact_error(flat, np.ones(n)) == pytest.approx(2 * d**0.5 / n - 1, abs=1e-9)
        assert QSGD(n // 2).omega(d) == pytest.approx(2 * d**0.5 / n - 1)
    for u in candidates(1, d, seed=3):
        u = np.repeat(u / np.linalg.norm(u), n, axis=0)
        bound = d / n**2 if n % 2 else QSGD(n // 2).omega(d)
        assert exact_error(u, np.ones(n)) <= bound * SLACK + 1e-12


# ------------------------------------------------------------------------------------------------ finite words
AWKWARD = [(1e-3, 1.0), (-1e-3, 1.0), (0.3, 0.7), (-0.3, 0.7), (1e-9, 1.0), (-1e-9, 1.0), (0.7, 0.7), (-0.7, 0.7),
           (1e-30, 3e38), (1.1e-40, 1.7e-38), (-3e-44, 7e-44), (1.2345e-5, 1.0)]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_rounding_bias(steps):
    """|E C(u) - u| <= (2^-23 + 2^-48) |u| + 2^-40 (2 r / steps), all 2^16 halves and 2^24 ties counted exactly.

    steps is the number of strata of one bit; the same cells make QSGD's levels, where steps = 2 s.
    """
    halves, ties = np.arange(2**16), np.arange(2**24, dtype=np.uint32) << np.uint32(8)
    for value, scale in AWKWARD:
        u, r = np.float32(value), np.float32(scale)
        cell, frac = reference.bits.cells(torch.tensor([[u]]), torch.tensor([r]), steps)
        hits = Fraction(0)
        ties_below = int(np.count_nonzero(reference.bits.decided(0, 0, ties, frac[0])))
        for place in range(steps):
            t = int(cell[0, 0]) + steps * 32768 - place * 65536
            low = reference.bits.decided(halves, t, np.full(2**16, 2**32 - 1, np.uint32), np.float32(0))
            hits += Fraction(int(low.sum()), 2**16)
            if 0 <= t < 2**16:
                hits += Fraction(ties_below, 2**40)
        mean = 2 * Fraction(float(r)) * (hits / steps) - Fraction(float(r))
        bound = (Fraction(1, 2**23) + Fraction(1, 2**48)) * abs(Fraction(float(u)))
        assert abs(mean - Fraction(float(u))) <= bound + 2 * Fraction(float(r)) / steps / 2**40


def picked(m, bits=32):
    """P(floor(word m / 2^bits) = v) for v = 0..m-1 and words of so many bits, exactly."""
    edges = [-(-(v << bits) // m) for v in range(m + 1)]
    return [Fraction(b - a, 2**bits) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("n", range(1, 129))
def test_shift_marginals(n):
    """Each shift's probability is off by less than 2^-48: over all halves, those that decide alone, and the words that
    carry of those that do not. Of these there are n - gcd(n, 2^16)."""
    upper, left = np.divmod(np.arange(2**16) * n, 2**16)
    alone = left + n <= 2**16
    pairs = [int(count) * 2**32 for count in np.bincount(upper[alone], minlength=n)]
    for s, rest in zip(upper[~alone].tolist(), left[~alone].tolist(), strict=True):
        carry = 2**32 - -(-(2**16 - rest) * 2**32 // n)  # words with floor(w n / 2^32) >= 2^16 - rest
        pairs[s] += 2**32 - carry
        pairs[s + 1] += carry
    law = [Fraction(count, 2**48) for count in pairs]
    assert law == picked(n, 48)
    assert all(abs(p - Fraction(1, n)) < Fraction(1, 2**48) for p in law)
    assert int((~alone).sum()) == n - math.gcd(n, 2**16)


@pytest.mark.parametrize(("d", "k"), [(3, 1), (7, 3), (23, 5), (24, 23)])
def test_floyd_marginals(d, k):
    """|P(j in S) - k/d| <= k 2^-32 for every coordinate j, from the exact probabilities of the drawn words."""
    law = {t: picked(t + 1) for t in range(d - k, d)}
    assert all(abs(p - Fraction(1, len(ps))) < Fraction(1, 2**32) for ps in law.values() for p in ps)
    out = {}  # P(j not in S) for j that are there from the start; a t >= d-k enters with what hits S or t
    for j in range(d - k):
        out[j] = math.prod(1 - ps[j] for ps in law.values())
    sets = {frozenset(): Fraction(1)}
    if math.comb(d, k) <= 3000:
        for t, ps in law.items():
            nxt: dict[frozenset, Fraction] = {}
            for s, weight in sets.items():
                for j, p in enumerate(ps):
                    into = s | {t if j in s else j}
                    nxt[into] = nxt.get(into, Fraction(0)) + weight * p
            sets = nxt
        for j in range(d):
            inside = sum(w for s, w in sets.items() if j in s)
            assert abs(inside - Fraction(k, d)) <= Fraction(k, 2**32)
            assert j >= d - k or 1 - inside == out[j]
    for j in range(d - k):
        assert abs(1 - out[j] - Fraction(k, d)) <= Fraction(k, 2**32)


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_fisher_yates_marginals(n):
    """|n P(pi(i) = b) - 1| <= eta (1 + eta), eta = (n + 1 + ln n) 2^-32; for the place pi(i) + s mod n with an
    independent shift s of 48 bits, the two deviations multiply: <= n 2^-48 eta (1 + eta)."""
    law = {t: picked(t + 1) for t in range(n)}
    table = [[Fraction(0)] * n for _ in range(n)]
    for choice in itertools.product(*(range(t + 1) for t in range(n - 1, 0, -1))):
        out, weight = list(range(n)), Fraction(1)
        for t, j in zip(range(n - 1, 0, -1), choice, strict=True):
            out[t], out[j] = out[j], out[t]
            weight *= law[t][j]
        for i, b in enumerate(out):
            table[i][b] += weight
    eta = (n + 1 + math.log(n)) / 2**32
    shift = picked(n, 48)
    for row in table:
        assert all(abs(n * p - 1) <= eta * (1 + eta) for p in row)
        place = [sum(row[b] * shift[(c - b) % n] for b in range(n)) for c in range(n)]
        assert all(abs(n * p - 1) <= n * eta * (1 + eta) / 2**48 for p in place)
