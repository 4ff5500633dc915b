"""Compressed downlinks: what points of their own cost, MARINA-P and its two-way form, messages that one client hears.

Statistical tests fix their seeds and allow six standard errors: 2e-9 for a normal mean of 400 draws or more.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_methods import SIX, descended, estimates_on, gradient, iterates, mean_and_error, two_points
from zoo import EQUAL, MIXED, PROBLEMS, TappedLocal, inputs, resolved, round_of, setting, trace

from shoal import rng
from shoal.compressors import (
    QSGD,
    Coded,
    Composed,
    Correlated,
    Dense,
    PerLayer,
    PermK,
    RandK,
    Rotated,
    Scaled,
    Sign,
    TopK,
)
from shoal.core import gradients_at
from shoal.descents import Step
from shoal.errors import ConfigError, NonFiniteError
from shoal.messages import Messages, Round
from shoal.methods import EF21, MarinaP, TwoWayEF21, TwoWayMarina
from shoal.problems import Quadratics
from shoal.runtimes import Local, rounds
from shoal.theory import best_p, ef21_constants, ef21_two_way_step, gamma_points, step_size, step_size_pl
from shoal.wire import HEADER

IDS = torch.arange(5)
NEVER = 2.0**-20  # a p whose coin shows tails in all the rounds of a test


# ------------------------------------------------------------------------------------------------ constants
def clouds(problem, n: int = 5) -> list[np.ndarray]:
    """Displacements (n, d): random, all equal, centered, of one client, along the Hessians' eigenvectors."""
    draw, d = np.random.default_rng(4), problem.d
    random = [draw.normal(size=(n, d)) * scale for scale in (0.1, 1.0, 10.0) for _ in range(8)]
    out = random + [np.tile(u[:1], (n, 1)) for u in random] + [u - u.mean(0) for u in random]
    j = np.arange(1, d + 1)
    for k in j:
        z = np.sin(j * k * math.pi / (d + 1))
        out += [np.outer(np.eye(n)[i], z) for i in range(n)] + [np.tile(z, (n, 1))]
        if isinstance(problem, Quadratics):
            quarter = problem._coefficients[0]
            out.append(np.outer(quarter - quarter.mean(), z))
    return out


@pytest.mark.parametrize("problem", PROBLEMS[:5], ids=repr)
def test_points_of_their_own(problem):
    """||mean (grad f_i(x + u_i) - grad f_i(x))|| <= apart sqrt V + together ||ubar||, and <= L~ sqrt(mean ||u_i||^2);
    quadratics reach `apart` where ubar = 0 and `together` where V = 0."""
    L, reached, rnd = problem.smoothness(), [0.0, 0.0], Round.full(0, 0, 5)
    for shift in (0.0, 1.0):
        x = problem.start() + shift
        before = gradient(problem, x).numpy()
        for u in clouds(problem):
            points = x + torch.from_numpy(u).float()
            off = gradients_at(points, problem.grad, rnd).double().numpy().mean(0) - before
            u = (points.double() - x.double()).numpy()
            V, mean = np.square(u - u.mean(0)).sum(1).mean(), np.linalg.norm(u.mean(0))
            error = np.linalg.norm(off) - 1e-5 * (1 + np.linalg.norm(before))  # float32 gradients
            assert error <= L.apart * math.sqrt(V) + L.together * mean
            assert error <= L.tilde * math.sqrt(V + mean**2)
            equal = bool(mean**2 > V)
            if min(V, mean**2) < 1e-8 * max(V, mean**2):
                reached[equal] = max(reached[equal], np.linalg.norm(off) / max(mean, math.sqrt(V)))
    if isinstance(problem, Quadratics):
        assert reached == pytest.approx([L.apart, L.together], rel=1e-3, abs=1e-4)


def test_gamma_of_points():
    """The least over the split s = (1+t) A^2 V + (1+1/t) B^2 ||ubar||^2 of the worst (omega', theta') below both."""
    L = MIXED.smoothness()
    for A, B in ((1.0, 2.0), (2.0, 1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        t = np.r_[np.logspace(-6, 6, 20001), (B / A) ** 2 if A * B > 0 else 1.0]  # the corner of the worst, too
        for omega, theta in ((3.0, 0.0), (3.0, 0.6), (3.0, 2.0), (3.0, 3.0), (0.0, 0.0)):
            big = type(L.tilde)(1e3, "bound")
            known = replace(L, apart=type(L.tilde)(A, "bound"), together=type(L.tilde)(B, "bound"), tilde=big)
            corners = [(omega, 0.0), (omega, theta), (theta, theta)]
            worst = np.max([(1 + t) * A**2 * (w - h) + (1 + 1 / t) * B**2 * h for w, h in corners], axis=0)
            assert gamma_points(known, omega, theta) == pytest.approx(worst.min(), rel=1e-5, abs=2e-5)
            assert gamma_points(known, omega, theta) <= (A**2 + B**2) * omega + 1e-12
    assert gamma_points(replace(L, apart=None), 3.0, 1.0) == 3.0 * L.tilde**2
    assert gamma_points(replace(L, tilde=type(L.tilde)(0.1, "bound")), 3.0, 1.0) == pytest.approx(0.03)


SLOW = [Composed(PermK(), QSGD(3)), Composed(RandK(3), QSGD(3)), Rotated(PermK())]


@pytest.mark.parametrize("family", ["gaussian", "one-hot", "cauchy"])
@pytest.mark.parametrize("code", [PermK(), *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)], ids=repr)
@pytest.mark.parametrize("d", [3, 13])
def test_omega_of_one_client_alone(code, family, d):
    """E||C_i(u) - u||^2 <= alone ||u||^2 and E C_i(u) = u for each client, an equality for PermK."""
    n, u = 5, inputs(family, 5, d)
    errors, total = np.empty((400, n)), np.zeros((2, n, d))
    for k in range(400):
        rnd = round_of(code, u, k, seed=2)
        off = (code.decode(code.encode(u, rnd), rnd) - u).double().numpy()
        errors[k], total[0], total[1] = np.square(off).sum(1), total[0] + off, total[1] + off**2
    bound = code.alone(n, d) * u.double().square().sum(1).numpy()
    spread = SIX * errors.std(0) / 20 + 1e-6 * bound + 1e-9
    assert np.all(errors.mean(0) <= bound + spread)
    if code == PermK():
        assert code.alone(n, d) == min(n, d) - 1
        assert np.all(errors.mean(0) >= bound - spread)
    assert np.all(np.abs(total[0] / 400) <= SIX * np.sqrt(total[1]) / 400)


# ------------------------------------------------------------------------------------------------ recursions
@pytest.mark.parametrize("code", [RandK(3), PermK(), pytest.param(QSGD(1), marks=pytest.mark.slow)], ids=repr)
def test_recursion_of_marina_p(code):
    """E V+ <= (1-p) (V + (omega - theta') ||dx||^2) and E||ubar+||^2 = (1-p) (||ubar||^2 + theta' ||dx||^2), theta' at
    most theta: equalities for RandK and PermK. g is the mean of the gradients at the clients' points."""
    x, ahead, *_ = two_points()
    method, kinds = MarinaP(code, p=0.25), inspect.getmodule(MarinaP)
    u = 0.3 * inputs("gaussian", 5, MIXED.d) + 0.1
    g, after = estimates_on(MIXED, method, kinds.Server(x), kinds.Worker(x + u), ahead, 400)
    moved, dx = torch.stack([a.w for a in after]).double() - ahead.double(), float((ahead - x).double().square().sum())
    center, u = moved.mean(1), u.double()
    omega, theta, *_ = method.constants(setting(MIXED))
    found = [(moved - center[:, None]).square().sum(2).mean(1).numpy(), center.square().sum(1).numpy()]
    start = [float((u - u.mean(0)).square().sum(1).mean()), float(u.mean(0).square().sum())]
    for values, before, factor in zip(found, start, (omega - theta, theta), strict=True):
        mean, error = mean_and_error(values)
        assert mean <= 0.75 * (before + factor * dx) + error
        if code != QSGD(1):
            assert mean >= 0.75 * (before + factor * dx) - error
    heads = sum(torch.equal(a.w, ahead.expand(5, -1)) for a in after)
    assert abs(heads - 100) <= SIX * math.sqrt(400 * 0.1875)
    for k in (0, 1, 2):
        rows = gradients_at(after[k].w, MIXED.grad, Round.full(k + 1, 5, 5))
        assert np.allclose(g[k], rows.double().mean(0).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("down", [pytest.param(RandK(3), marks=pytest.mark.slow), PermK()], ids=repr)
def test_recursion_of_two_ways(down):
    """E||g+ - mean grad f_i(w_i+)||^2 = (1-p) (||g - mean grad f_i(w_i)||^2 + omega_up/n mean E||D_i||^2), and
    mean E||D_i||^2 <= (1 + omega_down) L~^2 ||dx||^2, whatever the points."""
    x, ahead, *_ = two_points()
    method, kinds = TwoWayMarina(RandK(3), downlink=down, p=0.25), inspect.getmodule(TwoWayMarina)
    w = x + 0.3 * inputs("gaussian", 5, MIXED.d)
    before = gradients_at(w, MIXED.grad, Round.full(0, 0, 5))
    server = kinds.Server(x, before.mean(0) + torch.linspace(-0.02, 0.03, MIXED.d))
    g, after = estimates_on(MIXED, method, server, kinds.Worker(w, before), ahead, 400)
    rows = torch.stack([a.grad for a in after]).double()
    mean, error = mean_and_error(np.square(g - rows.mean(1).numpy()).sum(1))
    tails = np.array([not torch.equal(a.w, ahead.expand(5, -1)) for a in after])
    squares = (rows - before.double()).square().sum(2).mean(1).numpy()[tails]
    moved, other = mean_and_error(squares)
    start, dx = float((server.g - before.mean(0)).double().square().sum()), float((ahead - x).double().square().sum())
    omega = method._link.alone(5, MIXED.d)
    assert moved <= (1 + omega) * MIXED.smoothness().tilde ** 2 * dx + other
    assert abs(mean - 0.75 * (start + 3 / 5 * moved)) <= error + 0.75 * 0.6 * other


# ------------------------------------------------------------------------------------------------ step sizes
@pytest.mark.parametrize("pl", [False, True])
def test_step_sizes(pl):
    """The lemma with Gamma; PermK is free where the clients' functions are equal quadratics."""
    for problem in (MIXED, EQUAL):
        s, known = problem.smoothness(), setting(problem, pl=pl)
        mu = (s.mu,) if pl else ()
        lemma = step_size_pl if pl else step_size
        Gamma = 4 * s.pm**2
        found = MarinaP(PermK(), p=0.2).step_size(known)
        assert found.gamma == pytest.approx(lemma(s.minus, min(Gamma, 4 * s.tilde**2), 0.2, *mu))
        assert (found.gamma == pytest.approx(1 / s.minus)) == (problem is EQUAL)
        both = (math.sqrt(3 / 5 * 5) * s.tilde + math.sqrt(min(Gamma, 4 * s.tilde**2))) ** 2
        assert TwoWayMarina(RandK(3), downlink=PermK(), p=0.2).step_size(known).gamma == pytest.approx(
            lemma(s.minus, both, 0.2, *mu)
        )
        same = TwoWayMarina(Dense(), downlink=PermK(), p=0.2).step_size(known)
        assert same.gamma == pytest.approx(found.gamma), "an uplink without losses costs nothing"
        shared = TwoWayMarina(Correlated(), downlink=RandK(3), p=0.2)._constants(known)
        assert shared[0].c > 0, "the scale's c max ||D_i||^2 counts n times"
        assert shared[1] >= shared[0].c * 5 * 4 * s.tilde**2


def test_resolved_p_of_downlinks():
    big = Quadratics(n=20, d=400, noise=0.2, lam=1e-2)
    for pl in (False, True):
        known = setting(big, pl=pl)
        s, mu = big.smoothness(), big.smoothness().mu if pl else None
        method = MarinaP(PermK()).resolved(known)
        assert method.p == best_p(32.0 * 400, 32.0 * 20, s.minus, method.constants(known)[3], mu) < 0.5
        both = TwoWayMarina(RandK(20), downlink=PermK()).resolved(known)
        assert both.p == best_p(64.0 * 400, 2 * 32.0 * 20, s.minus, both._constants(known)[1], mu)
        assert (method.resolved(known), both.resolved(known)) == (method, both)
    numerical = TwoWayMarina(Correlated("own", numerical=True), downlink=RandK(3), p=0.2).step_size(setting(MIXED))
    assert numerical.evidence == "numerical"
    assert "not proved" in numerical.theorem


# ------------------------------------------------------------------------------------------------ EF21 both ways
@pytest.mark.parametrize("code", [TopK(3), Scaled(RandK(3)), Sign(), Rotated(TopK(3))], ids=repr)
def test_recursions_of_ef21_both_ways(code):
    """E||x+ - w+||^2 <= (1-down) ||x+ - w||^2, E||w+ - w||^2 <= (1 + sqrt(1-down))^2 ||x+ - w||^2, and what EF21 leaves
    of the gradients at w+; the server and the clients know the same w."""
    x, ahead, before, _ = two_points()
    method, kinds = TwoWayEF21(TopK(3), downlink=code), inspect.getmodule(TwoWayEF21)
    w, g_i = x + 0.05, 0.5 * before + 0.1
    left, moved, u = [], [], ahead - w
    for k in range(1, 201):
        rnd = Round.full(k, 5, 5)
        down, server = method.down(kinds.Server(g_i.mean(0), w), ahead, rnd)
        assert down.shared
        rows, worker = method.up(kinds.Worker(g_i, w), down, MIXED.grad, rnd)
        assert torch.equal(worker.w, server.w)
        left.append(float((ahead - worker.w).double().square().sum()))
        moved.append(float((worker.w - w).double().square().sum()))
        after = method.commit(worker, method.code(rnd).encode(rows, rnd), rnd)
        target = MIXED.evaluate(worker.w, IDS)[1]
        lost = float((target - after.g).double().square().sum(1).mean())
        assert lost <= 0.75 * float((target - g_i).double().square().sum(1).mean()) * (1 + 1e-6)
    far, down = float(u.double().square().sum()), code.alpha(12)
    for values, factor in ((left, 1 - down), (moved, (1 + math.sqrt(1 - down)) ** 2)):
        mean, error = mean_and_error(np.array(values))
        assert mean <= factor * far * (1 + 1e-6) + error


@pytest.mark.parametrize("mu", [0.0, 0.02])
def test_step_size_of_ef21_both_ways(mu):
    """The weights of the proof exist at the step that is returned; an uncompressed downlink leaves EF21's."""
    L, plus, twice = 1.0, 1.7, 2.0 if mu else 1.0
    for alpha in (0.02, 0.3, 1.0):
        for down in (0.05, 0.5, 1.0):
            gamma, weight = ef21_two_way_step(L, plus, alpha, down, mu)
            (theta, beta), (below, fall) = ef21_constants(alpha), ef21_constants(down)
            kappa, r = (1 + math.sqrt(1 - down)) ** 2, twice * fall / below
            X, Y = twice * beta / theta * plus**2 * kappa * (1 + math.sqrt(r)) ** 2, L**2 * r
            eta, tau = math.sqrt(Y / X) if X * Y > 0 else 1e-9 if X > 0 else 1e9, 1 / math.sqrt(r) if r > 0 else 1e9
            wG = twice * gamma * (1 + eta) / (2 * theta)
            wW = twice * (gamma * (1 + 1 / eta) * L**2 / 2 + wG * beta * plus**2 * kappa * (1 + tau)) / below
            keep = (1 - gamma * mu) * (1 + 1e-9)
            assert gamma * (1 + eta) / 2 + wG * (1 - theta) <= wG * keep
            spread = wG * beta * plus**2 * kappa
            assert gamma * (1 + 1 / eta) * L**2 / 2 + spread * (1 + tau) + wW * (1 - below) <= wW * keep
            if X > 0:
                assert weight == pytest.approx(wG, rel=1e-6)
            assert 1 / (2 * gamma) - L / 2 - spread * (1 + 1 / tau) - wW * fall >= -1e-6 / gamma
    known = setting(MIXED, pl=mu > 0)
    same = TwoWayEF21(TopK(3), downlink=Dense()).step_size(known).gamma
    assert same == pytest.approx(EF21(TopK(3)).step_size(known).gamma)
    assert TwoWayEF21(TopK(3), downlink=TopK(3)).step_size(known).gamma < same


# ------------------------------------------------------------------------------------------------ messages
def test_bytes_of_the_downlink():
    """By hand: 5 x 48 bytes in round 0, then 5 messages of 12; everything else as in any method."""
    for method, up in ((MarinaP(RandK(3), p=NEVER), 48), (TwoWayMarina(RandK(2), downlink=RandK(3), p=NEVER), 8)):
        channel = Local(5)
        for event in rounds(method, Step(0.1), MIXED, channel, seed=0):
            if event.state.index == 4:
                break
        assert channel.meter.down == 5 * 48 + 3 * 5 * 12
        assert channel.meter.up == 5 * 48 + 3 * 5 * up
        assert channel.meter.down_framed == channel.meter.down + 4 * 5 * HEADER


def test_one_message_for_all_of_ef21():
    """By hand: round 0 sends x, 48 bytes, to all five; then TopK's 3 values and 3 indices of 4 bits, 14 bytes."""
    channel = Local(5)
    for event in rounds(TwoWayEF21(TopK(2), downlink=TopK(3), clients=2), Step(0.1), MIXED, channel, seed=0):
        if event.state.index == 4:
            break
    assert channel.meter.down == 5 * 48 + 3 * 5 * 14
    assert channel.meter.up == 4 * 2 * 9


def test_a_client_hears_its_own_message():
    """A row of the server's is for all; other rows are for their slots, whoever hosts them."""
    method, x = MarinaP(PermK(), p=NEVER), MIXED.start()
    server, rnd = method.init(x, Round.full(0, 0, 5))[0], Round.full(3, 0, 5)
    down, after = method.down(server, x + 1.0, rnd)
    assert torch.equal(after.x, x + 1.0)
    assert not down.shared
    assert down.slots.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(method.down(server, x + 1.0, Round.full(3, 0, 5, torch.tensor([2])))[0].payload, down.payload)
    dense, _ = method.down(server, x, Round.full(0, 0, 5))
    assert dense.shared
    assert dense.rows(torch.tensor([3])) is dense
    own = Messages(down.payload[2:3], down.nbytes[2:3], down.slots[2:3], 12)
    alone = method.followed(x[None], own, Round.full(3, 0, 5, torch.tensor([2])))
    assert torch.equal(alone[0], method.followed(x.repeat(5, 1), down, rnd)[2])
    some = Round.full(3, 0, 5, torch.tensor([1, 4])).among(torch.tensor([0, 1, 1, 4]))
    assert some.everyone().clients.tolist() == [0, 1, 1, 4]
    assert some.everyone().slots.tolist() == [0, 1, 2, 3]

    class Part(Local):
        """A channel that hosts clients 1 and 4."""

    part = Part(5)
    heard = part.scatter(down, Round.full(3, 0, 5, torch.tensor([1, 4])))
    assert torch.equal(heard.payload, down.payload[[1, 4]])
    assert part.meter.down == int(down.nbytes.sum()), "all that is sent is counted, whoever hosts the clients"


def test_down_and_up_draw_different_numbers():
    """The same compressor both ways: the downlink's draws have streams of their own."""
    rnd = Round.full(3, 0, 5)
    streams = [rnd.everyone().fork("down").draw("RandK.support").stream, rnd.draw("RandK.support").stream]
    assert streams[0] != streams[1]
    assert rng.stream_id("down/RandK.support") == streams[0]


# ------------------------------------------------------------------------------------------------ limits
@pytest.mark.parametrize("problem", [MIXED, PROBLEMS[3]], ids=repr)
def test_full_rounds_are_gradient_descent_to_the_bit(problem):
    for method in (MarinaP(PermK(), p=1.0), TwoWayMarina(RandK(3), downlink=PermK(), p=1.0)):
        assert torch.equal(iterates(method, problem, 0.25, 40), descended(problem, 0.25, 40))
    plain = descended(problem, 0.25, 40)
    for method in (
        MarinaP(Dense(), p=0.3),
        TwoWayMarina(Dense(), downlink=Dense(), p=0.3),
    ):  # sums of differences, to 2^-24
        assert (iterates(method, problem, 0.25, 40) - plain).abs().max() <= 1e-5 * max(1.0, float(plain.abs().max()))


@pytest.mark.parametrize(
    "method", [MarinaP(Coded(QSGD(1)), p=0.3), TwoWayMarina(Correlated(), downlink=PermK(), p=0.3)], ids=repr
)
@pytest.mark.parametrize("problem", PROBLEMS[3:5], ids=["logistic", "nonconvex"])
def test_chunks_of_a_downlink(method, problem):
    """On data, and from the second iterate on, with messages of any length."""
    assert trace(problem, method, chunk=1) == trace(problem, method, chunk=3) == trace(problem, method)
    silent = trace(problem, method, lambda: TappedLocal(5), measure=False)
    assert silent["payloads"] == trace(problem, method)["payloads"]


def test_what_is_not_finite_on_its_way_down():
    """The server is named, not the client whose message it would have been."""
    method, x = MarinaP(RandK(3), p=NEVER), torch.zeros(12)
    with pytest.raises(NonFiniteError, match="the server, round 3"):
        method.down(inspect.getmodule(MarinaP).Server(x), x + float("inf"), Round.full(3, 0, 5))


def test_refused_downlinks():
    for make, said in (
        (lambda: MarinaP(TopK(3)), "unbiased compressor"),
        (lambda: MarinaP(Correlated()), "scale='own'"),
        (lambda: MarinaP(PerLayer((2, None), (RandK(1), PermK()))), "one client alone"),
        (lambda: MarinaP(RandK(3), p=0.0), "p=0.0"),
        (lambda: MarinaP(RandK(13)).check(5, 12), "1..12"),
        (lambda: TwoWayMarina(TopK(3), downlink=PermK()), "unbiased compressor"),
        (lambda: TwoWayMarina(RandK(3), downlink=TopK(3)), "unbiased compressor"),
        (lambda: TwoWayMarina(RandK(3), downlink=PermK(), p=2.0), "p=2.0"),
        (lambda: TwoWayMarina(RandK(13), downlink=PermK()).check(5, 12), "1..12"),
        (lambda: TwoWayMarina(RandK(3), downlink=RandK(13)).check(5, 12), "1..12"),
        (lambda: TwoWayEF21(TopK(3), downlink=RandK(3)), "TwoWayMarina"),
        (lambda: TwoWayEF21(RandK(3), downlink=TopK(3)), "EF21 needs"),
        (lambda: TwoWayEF21(TopK(3), downlink=TopK(13)).check(5, 12), "1..12"),
        (lambda: trace(MIXED, MarinaP(RandK(3))), "not resolved"),
        (lambda: trace(MIXED, TwoWayMarina(RandK(3), downlink=PermK())), "not resolved"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()
    assert resolved(MarinaP(PermK()), EQUAL).p < 1.0
