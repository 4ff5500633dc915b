"""Strata: absent clients, cohorts, and what is left where all clients agree (docs/derivations/strata.md).

Exact errors are summed over every way to deal the strata. The statistical tests allow six standard errors, 2e-9 a
comparison for a normal variable; there are some 60 comparisons, about 1e-7 in all, with fixed seeds.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from composition import grid_variance
from test_compressors import ab_bound, adversaries, hardest, spread, stated
from zoo import COMPRESSORS, EQUAL, MIXED, fits, inputs, round_of, setting

from shoal.compressors import QSGD, Correlated, Independent, PermK, RandK
from shoal.compressors.correlated import exact_error, grid_omega
from shoal.compressors.strata import supremum_max, supremum_norm
from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.messages import Messages, Round
from shoal.methods import Marina
from shoal.theory import AB

SLACK = 1 + 1e-9


def scales_of(code: Correlated, u: np.ndarray, top: float | None = None) -> np.ndarray:
    """(m,): the r_i; `top` where a shared scale is agreed on by more clients than these."""
    if code.scale == "own":
        return np.linalg.norm(u, axis=1)
    tops = np.abs(u).max(1)
    return np.full(len(u), tops.max() if top is None else top) if code.agrees else tops


def some_of(msgs: Messages, rows: list[int]) -> Messages:
    return Messages(msgs.payload[rows], msgs.nbytes[rows], msgs.slots[rows], msgs.d)


# ------------------------------------------------------------------------------------------------ absent clients
def enumerated(u: np.ndarray, r: np.ndarray, levels: int, n: int) -> float:
    """Of the mean over m clients of n, summed over every way to deal the n strata to the m."""
    m, step = len(u), 2 * r / (levels - 1)
    z = (u + r[:, None]) / np.where(step > 0, step, 1)[:, None]
    y, total, deals = z - np.floor(z), 0.0, 0
    for places in itertools.permutations(range(n), m):
        heads = np.clip(n * y - np.array(places)[:, None], 0, 1)
        value = -r[:, None] + step[:, None] * (np.floor(z) + heads)
        total += ((value.mean(0) - u.mean(0)) ** 2).sum()
        total += (step[:, None] ** 2 * heads * (1 - heads)).sum() / m**2
        deals += 1
    return total / deals


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_error_of_those_present(n, levels):
    """`exact_error` with fewer clients than strata, with unequal scales, against the sum over all deals."""
    rng = np.random.default_rng(n)
    for m in range(1, n + 1):
        u = rng.normal(size=(m, 3)) * 10 ** rng.uniform(-1, 1, size=(m, 1))
        r = np.abs(u).max(1) * rng.uniform(1, 3, size=m)
        assert exact_error(u, r, levels, strata=n) == pytest.approx(enumerated(u, r, levels, n))
    assert exact_error(u, r, levels) == exact_error(u, r, levels, strata=n)


@pytest.mark.parametrize("code", [Correlated(), Correlated("own", levels=3)], ids=repr)
def test_the_error_of_those_present_is_the_codes(code):
    """Clients 0, 2 and 5 of 6 in 600 rounds: unbiased, coordinate by coordinate, with the exact error."""
    here, u = [0, 2, 5], inputs("gaussian", 6, 8)
    rows, start = u.double().numpy(), round_of(code, u)
    errors = np.empty((600, 8))
    for k in range(len(errors)):
        rnd = replace(start, index=k)
        mean = code.aggregate(some_of(code.encode(u, rnd), here), rnd).double().numpy() * (6 / 3)
        errors[k] = mean - rows[here].mean(0)
    exact = exact_error(rows[here], scales_of(code, rows[here], float(np.abs(rows).max())), code.levels, strata=6)
    square = (errors**2).sum(1)
    assert abs(square.mean() - exact) <= 6 * square.std() / math.sqrt(len(errors))
    assert (np.abs(errors.mean(0)) <= 6 * errors.std(0) / math.sqrt(len(errors)) + 1e-6).all()


@pytest.mark.parametrize("scale", ["shared", "own", "max"])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize(("n", "m", "d"), [(2, 1, 3), (4, 2, 5), (5, 3, 4), (8, 7, 2), (16, 3, 2)])
def test_constants_of_those_present(scale, levels, n, m, d):
    """Every inequality against the exact error, climbing from the worst inputs; and never worse than independent."""
    code = Correlated(scale, levels=levels)
    first = code.present(n, d, m)
    for ab in first.all():
        assert ab.evidence == "proved"

        def ratio(u: np.ndarray, ab: AB = ab) -> float:
            return (exact_error(u, scales_of(code, u), levels, n) + 1e-12) / (ab_bound(ab, u) + 1e-12)

        assert hardest(ratio, m, d, steps=15) <= SLACK, ab
    for u in adversaries(m, d, np.random.default_rng(n)):
        r = scales_of(code, u)
        assert exact_error(u, r, levels, n) <= grid_variance(u, r[:, None], levels).sum() / m**2 * SLACK + 1e-12


def test_constants_of_those_present_at_their_ends():
    """All present: those of `ab`; one present: one client's own rounding. Permutations lose what the absent own."""
    for scale in ("shared", "own", "max"):
        whole, one = Correlated(scale).present(6, 10, 6), Correlated(scale).present(6, 10, 1)
        ab = Correlated(scale).ab(6, 10)
        assert [(x.a, x.b, x.c) for x in whole.all()] == [pytest.approx((x.a, x.b, x.c)) for x in ab.all()]
        assert (one.c if scale == "shared" else one.a) == (10.0 if scale == "shared" else 9.0)
    assert (PermK().present(4, 9, 3).a, PermK().present(4, 9, 3).b) == (pytest.approx(4 / 3), 1.0)
    assert RandK(2).present(9, 10, 4) == AB(1.0, 0.0, source="independent, omega = 4")
    for code in (Correlated(), PermK()):
        for m in (0, 5):
            with pytest.raises(ConfigError, match=r"m is in 1\.\.4"):
                code.present(4, 9, m)
    with pytest.raises(ConfigError, match="blocks=1"):
        Correlated(blocks=2).present(4, 9, 3)


@pytest.mark.parametrize(("n", "d", "here"), [(4, 9, [0, 2, 3]), (5, 5, [1, 4]), (7, 3, [0, 1, 2, 6]), (6, 3, [5])])
def test_permutations_with_absent_clients(n, d, here):
    """PermK's equality, and no bias, in 1000 rounds."""
    u = inputs("gaussian", n, d)
    rows, errors = u.double().numpy()[here], np.empty((1000, d))
    for k in range(len(errors)):
        rnd = Round.full(k, 0, n)
        errors[k] = PermK().aggregate(some_of(PermK().encode(u, rnd), here), rnd).double().numpy() * n / len(here)
    errors -= rows.mean(0)
    square, bound = (errors**2).sum(1), ab_bound(PermK().present(n, d, len(here)), rows)
    assert abs(square.mean() - bound) <= 6 * square.std() / math.sqrt(len(errors)) + 1e-6
    assert (np.abs(errors.mean(0)) <= 6 * errors.std(0) / math.sqrt(len(errors)) + 1e-6).all()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_a_missing_message_counts_as_zero(compressor: Compressor):
    """aggregate of some messages is their sum over the cohort's size, for every compressor."""
    for n, d in ((5, 12), (7, 3)):
        if fits(compressor, n, d):
            u = inputs("gaussian", n, d)
            rnd = round_of(compressor, u)
            msgs = some_of(compressor.encode(u, rnd), [0, 2, 3])
            rows = compressor.decode(msgs, rnd)
            expected, got = rows.double().sum(0) / n, compressor.aggregate(msgs, rnd).double()
            assert (got - expected).abs().max() <= 2.0**-21 * rows.norm(dim=1).max() + 1e-30


# ------------------------------------------------------------------------------------------------ cohorts
COHORTS = [Correlated(), Correlated("own", levels=3), PermK(), RandK(2)]


def cohort_error(u: np.ndarray, code: Compressor, r: int) -> float:
    """E||mean over a uniform cohort of r - mean of all||^2, summed over every cohort."""
    total, count, mean = 0.0, 0, u.mean(0)
    for rows in map(list, itertools.combinations(range(len(u)), r)):
        part = u[rows]
        if isinstance(code, Correlated):
            error = exact_error(part, scales_of(code, part), code.levels)
        else:  # their AB inequalities are equalities
            error = ab_bound(code.ab(r, u.shape[1]), part)
        total, count = total + error + ((part.mean(0) - mean) ** 2).sum(), count + 1
    return total / count


@pytest.mark.parametrize("code", COHORTS, ids=repr)
@pytest.mark.parametrize(("n", "r", "d"), [(3, 1, 2), (5, 3, 4), (4, 4, 3), (6, 2, 3)])
def test_constants_of_a_cohort(code, n, r, d):
    """Strata over r slots: n becomes r, and drawing adds (1-b) theta to a and to b."""
    for ab in code.ab(r, d).drawn(n, r).all():

        def ratio(u: np.ndarray, ab: AB = ab) -> float:
            return (cohort_error(u, code, r) + 1e-12) / (ab_bound(ab, u) + 1e-12)

        if isinstance(code, PermK | RandK):
            for u in adversaries(n, d, np.random.default_rng(r)):
                assert ratio(u) == pytest.approx(1.0, abs=1e-6)
        else:
            assert hardest(ratio, n, d, steps=10) <= SLACK


def test_a_shared_scale_costs_no_more_in_a_cohort():
    """a = b = 1: drawing and rounding share V between them; blocks of one group have the cohort's constants."""
    ab = Correlated(levels=3).ab(4, 10).drawn(12, 4)
    assert (ab.a, ab.b, ab.c) == (1.0, 1.0, pytest.approx(10 / 64))
    blocks = Correlated("own", blocks=3).ab(12, 3 * 7)
    drawn = Correlated("own").ab(4, 7).drawn(12, 4)
    assert (blocks.a, blocks.b) == (pytest.approx(drawn.a), pytest.approx(drawn.b))
    assert blocks.other.b == pytest.approx(drawn.other.b)
    assert blocks.other.a - blocks.other.b == pytest.approx(drawn.other.a - drawn.other.b)
    with pytest.raises(ValueError, match=r"r is in 1\.\.4"):
        Correlated().ab(5, 3).drawn(4, 5)


def test_a_cohort_in_the_code():
    """Slots 0..2 held by any 3 of 5 clients, 1000 rounds: the error is that of `cohort_error`."""
    u, code, rng = inputs("gaussian", 5, 6), Correlated("own"), np.random.default_rng(0)
    rows, square = u.double().numpy(), np.empty(1000)
    for k in range(len(square)):
        ids = torch.from_numpy(rng.permutation(5)[:3])
        rnd = Round(k, 0, 5, ids, torch.arange(3), 3)
        square[k] = ((code.aggregate(code.encode(u[ids], rnd), rnd).double().numpy() - rows.mean(0)) ** 2).sum()
    assert abs(square.mean() - cohort_error(rows, code, 3)) <= 6 * square.std() / math.sqrt(len(square))


# ------------------------------------------------------------------------------------------------ equal inputs
def grid_error(u: np.ndarray, r: float, N: int) -> float:
    """Of rounding u to N + 1 points over [-r, r]."""
    return float(grid_variance(u[None], np.array([[r]]), N + 1).sum())


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_clients_that_agree_are_one_client_on_a_finer_grid(n, levels):
    rng = np.random.default_rng(n)
    u = rng.normal(size=7)
    r = np.abs(u).max() * 1.3
    assert exact_error(np.tile(u, (n, 1)), np.full(n, r), levels) == pytest.approx(grid_error(u, r, n * (levels - 1)))


def worst_for_the_norm(d: int, N: int) -> np.ndarray:
    """A unit vector that points to a center of a cell whose norm is nearest to N: found by trying every such sum."""
    parity = 1 - N % 2
    found: dict[int, list[int]] = {0: []}
    for _ in range(d):
        new = {}
        for W, p in found.items():
            for a in range(parity, N + 4, 2):
                if W + a * a <= max((N + 3) ** 2, 4 * d * d):
                    new.setdefault(W + a * a, [*p, a])
        found = new
    W = min((W for W in found if W), key=lambda W: abs(math.sqrt(W) - N))
    return np.array(found[W]) / math.sqrt(W)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("N", [1, 2, 3, 4, 6, 7])
def test_the_supremum_for_the_norm_is_exact(d, N):
    """Reached by a center's direction, and not exceeded by 300 vectors (N = 1: every vector has it)."""
    top = supremum_norm(d, N)
    if N > 1:
        assert grid_error(worst_for_the_norm(d, N), 1.0, N) == pytest.approx(top, abs=1e-9)
    rng = np.random.default_rng([d, N])
    for k in range(300):
        u = rng.normal(size=d) * (rng.random(d) < 0.5) if k % 2 else rng.integers(-N, N + 1, d) + 0.3 * rng.random(d)
        u = u / (np.linalg.norm(u) or 1.0)
        assert grid_error(u, 1.0, N) <= top * (u @ u) + 1e-9 or not u.any()


def test_the_supremum_for_the_norm_is_what_is_known():
    for d, n in ((64, 2), (64, 4), (10**4, 16)):
        assert supremum_norm(d, n) == pytest.approx(2 * math.sqrt(d) / n - 1)
    for d in (4, 7, 100):
        assert supremum_norm(d, 1) == d - 1
        assert supremum_norm(d, 5) == pytest.approx(Independent(6).omega(d))
    assert supremum_norm(25, 5) == pytest.approx((25 - (5 - math.sqrt(24)) ** 2) / 25)
    assert supremum_norm(12, 6) == pytest.approx(12 / 36)  # 36 = 9 + 9 + 9 + 1 + ... + 1, twelve odd squares
    assert supremum_norm(10**6, 255_000) <= 10**6 / 255_000**2
    for d, s in ((5, 2), (30, 3), (7, 8)):
        assert supremum_norm(d, 2 * s) <= QSGD(s).omega(d)


@pytest.mark.parametrize("d", [1, 2, 3, 9, 200])
@pytest.mark.parametrize("N", [1, 2, 3, 4, 7, 16])
def test_the_supremum_for_the_largest_entry_is_exact(d, N):
    top = supremum_max(d, N)
    worst = np.zeros(d) if N % 2 else np.full(d, 1 / (N * (1 + top)))
    worst[0] = 1.0
    assert grid_error(worst, 1.0, N) == pytest.approx(top * (worst @ worst), abs=1e-9)
    rng = np.random.default_rng([d, N])
    for _ in range(300):
        u = rng.uniform(-1, 1, d) * 10 ** rng.uniform(-3, 0) * (rng.random(d) < rng.random())
        u[0] = 1.0
        assert grid_error(u, 1.0, N) <= top * (u @ u) * SLACK + 1e-12


@pytest.mark.parametrize("scale", ["shared", "own", "max"])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (4, 40), (5, 12), (1, 9)])
def test_equal_inputs(scale, levels, n, d):
    """`homogeneous` against the exact error of equal rows; below every other inequality that is stated."""
    code = Correlated(scale, levels=levels)
    ab = code.homogeneous(n, d)
    assert (ab.b, ab.c, ab.evidence) == (0.0, 0.0, "homogeneous")
    for k in range(60):
        rng = np.random.default_rng(k)
        u = np.tile([rng.normal(size=d), np.eye(d)[0], np.ones(d), rng.standard_cauchy(d)][k % 4], (n, 1))
        assert exact_error(u, scales_of(code, u), levels) <= ab.a * spread(u)[0] * SLACK + 1e-12
    for other in stated(code, n, d):
        assert ab.a <= (other.a - other.b + other.c) * SLACK


BLOCKS = [Correlated(blocks=2), Correlated("own", levels=3, blocks=3), Correlated("max", blocks=2)]


@pytest.mark.parametrize("code", BLOCKS, ids=repr)
def test_equal_inputs_in_blocks(code):
    """Against the bytes: 5 clients, groups and blocks of two sizes, 150 rounds a vector."""
    n, d = 5, 7
    for family in ("identical", "ones", "one-hot"):
        row = {"identical": inputs("identical", 1, d), "ones": torch.ones(1, d), "one-hot": torch.eye(d)[:1]}[family]
        u = row.repeat(n, 1)
        start, square = round_of(code, u), np.empty(150)
        for k in range(len(square)):
            rnd = replace(start, index=k)
            square[k] = float((code.aggregate(code.encode(u, rnd), rnd) - row[0]).double().square().sum())
        bound = code.homogeneous(n, d).a * float(row.double().square().sum())
        assert square.mean() <= bound + 6 * square.std() / math.sqrt(len(square)) + 1e-9


def test_marina_uses_it_for_equal_inputs_alone():
    """A larger step where L_± = 0; nothing of it where the clients differ."""
    for code in (Correlated(), Correlated("own"), Correlated("max")):
        equal, mixed = (Marina(code, p=0.3).step_size(setting(p)) for p in (EQUAL, MIXED))
        assert (equal.constants["evidence"], equal.evidence) == ("homogeneous", "proved")
        assert "equal inputs" in equal.theorem
        assert equal.constants["a"] == code.homogeneous(5, 12).a
        assert mixed.constants["evidence"] == "proved"
        assert mixed.constants["source"] == code.ab(5, 12).best(MIXED.smoothness()).source


def test_correlated_qsgd_is_an_odd_number_of_levels():
    """QSGD's omega, its law for every client, and 2 n s strata where clients agree."""
    for s in (1, 2, 5):
        code = Correlated("own", levels=2 * s + 1)
        assert code.omega(50) == QSGD(s).omega(50) == grid_omega(50, 2 * s + 1)
        assert code.ab(4, 50).a == QSGD(s).ab(4, 50).a
        assert code.homogeneous(4, 50).a == supremum_norm(50, 8 * s)


def test_magnitudes_would_be_the_wrong_thing_to_round():
    """Two clients at 1/2 and -1/2: one rounds up and one down, and the mean is 0. With magnitudes rounded by the same
    thresholds exactly one of them becomes 0: the mean is 1/2 or -1/2, twice the 1/8 of independent rounding."""
    u = np.array([[0.5], [-0.5]])
    assert exact_error(u, np.ones(2), 3) == pytest.approx(0.0)
    assert grid_variance(u, np.ones((2, 1)), 3).sum() / 4 == pytest.approx(0.125)
    magnitudes = [((U < 0.5) - 1.0 * (U >= 0.5)) / 2 for U in (0.1, 0.3, 0.6, 0.9)]  # the other's threshold lies apart
    assert np.mean(np.square(magnitudes)) == pytest.approx(0.25)
