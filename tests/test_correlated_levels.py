"""Correlated rounding onto k points, and in blocks: kernels, exact errors, constants against a search.

The exact error with blocks is summed over every group of clients and every block of coordinates; one statistical test
compares it with the code, within six standard errors (2e-9 a comparison, 10 comparisons).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from composition import dealt, grid_variance, parts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compressors import SIX, ab_bound, hardest, stated
from zoo import FAMILIES, inputs, round_of

from shoal import kernels
from shoal.compressors import Correlated
from shoal.compressors.correlated import exact_error, grid_omega
from shoal.errors import ConfigError, NonFiniteError, PayloadError
from shoal.kernels import Draw, cpu, reference
from shoal.messages import Messages, Round


# ------------------------------------------------------------------------------------------------ kernels
@pytest.mark.parametrize("strata", [1, 2, 5, 1000])
def test_two_points_are_one_bit(strata):
    """encode_levels with two points returns encode_bits' bytes, ends of the range included."""
    u = inputs("cauchy", 4, 300)
    u[:, :2] = torch.tensor([1.0, -1.0]) * u.abs().max()
    r, slots = reference.maxes(u), torch.arange(4)
    private, tie, place = Draw(slots, 3, 1, 9), Draw(slots, 3, 2, 9), slots % strata
    shifts = (torch.arange(300, dtype=torch.int32) * 7 % strata)[None]
    for ops in (reference, cpu):
        bits = ops.encode_bits(u, r, private, tie, strata, place, shifts)
        assert torch.equal(ops.encode_levels(u, r, private, tie, 2, strata, place, shifts), bits)


@pytest.mark.parametrize("levels", [3, 5, 9])
@pytest.mark.parametrize("strata", [2, 7])
def test_ties_in_strata_are_settled_alike(levels, strata):
    """Vectors whose fraction of a stratum lies on each coordinate's own random half: the second word decides."""
    rng, slots, place = np.random.default_rng(levels), torch.arange(3), torch.tensor([1, 0, 1])
    private, tie = Draw(slots, 5, 1, 7), Draw(slots, 5, 2, 7)
    h, steps = reference.halves(private, 2500).numpy().astype(np.int64), (levels - 1) * strata
    below = rng.integers(0, levels - 1, h.shape)
    z = (below * strata + place.numpy()[:, None]) * 65536 + h - steps * 32768 + rng.choice([0.0, 0.5], h.shape)
    u, r = torch.from_numpy((z / (steps * 32768.0)).astype(np.float32)), torch.ones(3)
    cell, fraction = reference.bits.cells(u, r, steps)
    y = cell + steps * 32768
    tied = y - y // (strata * 65536) * (strata * 65536) - place.numpy()[:, None] * 65536 == h
    assert tied.mean() > 0.5
    coded = [ops.encode_levels(u, r, private, tie, levels, strata, place, None) for ops in (reference, cpu)]
    assert torch.equal(*coded)
    code = reference.unpack(coded[0], 2500, (levels - 1).bit_length()).numpy()
    second = (reference.words(tie, 2500).numpy() >> 8) * 2.0**-24
    assert np.array_equal((code - y // (strata * 65536))[tied], (second < fraction)[tied])


def test_equal_inputs_are_rounded_up_by_all_or_all_but_some():
    """Of n clients at one value, floor(n y) or ceil(n y) take the upper of its two neighbors, in every coordinate."""
    n, d, k = 7, 400, 5
    for value in (-1.0, -0.62, -0.5, 0.0, 0.3, 0.97, 1.0):
        rnd = replace(Round.full(3, 0, n), agreed=1.0)
        code = Correlated(levels=k)
        rows = code.decode(code.encode(torch.full((n, d), value), rnd), rnd)
        z = (value + 1) * (k - 1) / 2
        y, floor = z - math.floor(z), 2 * math.floor(z) / (k - 1) - 1
        ups = (rows > floor + 1e-6).sum(0)
        assert set(ups.tolist()) <= {math.floor(n * y + 1e-9), math.ceil(n * y - 1e-9)}
        assert ((rows - floor).abs() < 1e-6).logical_or((rows - floor - 2 / (k - 1)).abs() < 1e-6).all()


# ------------------------------------------------------------------------------------------------ constants of the grid
@settings(max_examples=200)
@given(st.integers(1, 30), st.integers(2, 17), st.integers(0, 2**32 - 1))
def test_omega_of_the_grid_is_never_exceeded(d, levels, seed):
    """Random vectors, sparse ones, and those that lie between two points in every coordinate."""
    rng = np.random.default_rng(seed)
    between = (2 * rng.integers(0, levels - 1, d) + 1) / (levels - 1) - 1
    for u in (rng.normal(size=d), rng.standard_cauchy(d), between, rng.normal(size=d) * (rng.random(d) < 0.3)):
        size = float(u @ u)
        for r in (math.sqrt(size), np.abs(u).max()):
            error = grid_variance(u[None], np.array([[r]]), levels).sum()
            assert error <= grid_omega(d, levels) * size * (1 + 1e-9)


def test_omega_of_the_grid_is_close_to_tight():
    assert grid_omega(9, 2) == 8.0
    assert grid_omega(16, 3) == 3.0
    assert grid_omega(50, 4) == pytest.approx(50 / 9)
    u = np.zeros((1, 50))
    u[0, :2] = 1.0  # 48 coordinates halfway between two points, and two at 0.707, between 1/3 and 1
    error = grid_variance(u, np.array([[math.sqrt(2)]]), 4).sum() / 2
    assert 0.95 * grid_omega(50, 4) < error <= grid_omega(50, 4)


# ------------------------------------------------------------------------------------------------ blocks
def rounding_error(u: np.ndarray, r: np.ndarray, levels: int) -> float:
    """Of the mean of one group: `exact_error`, and for one client the variance (its one stratum is everything)."""
    return exact_error(u, r, levels) if len(u) > 1 else float(grid_variance(u, r[:, None], levels).sum())


def exact_blocks(u: np.ndarray, c: Correlated) -> float:
    """E||(1/n) sum C_i(u_i) - ubar||^2, summed over every group of clients and every set of coordinates it may have."""
    n, d = u.shape
    total, mean, R = 0.0, u.mean(0), np.abs(u).max()
    for m in parts(n, c.blocks):
        groups = list(itertools.combinations(range(n), m))
        # With one scale for all, coordinates do not interact: all of them at once, counted 1/sigma times.
        blocks = [list(range(d))] if c.scale == "shared" else dealt(d, c.blocks)
        weight = (1 / c.blocks if c.scale == "shared" else 1.0) / (len(groups) * len(blocks))
        for group, block in itertools.product(map(list, groups), blocks):
            part = u[np.ix_(group, block)]
            normed = u[group] if c.scale == "full" else part
            own = np.abs(part).max(1) if c.scale == "max" else np.linalg.norm(normed, axis=1)
            r = np.full(m, R) if c.scale == "shared" else own
            error = rounding_error(part, r, c.levels)
            total += weight * (((part.mean(0) - mean[block]) ** 2).sum() + error)
    return total


@pytest.mark.parametrize("code", [
    Correlated(levels=3), Correlated("own", levels=4), Correlated(blocks=2), Correlated("own", blocks=2),
    Correlated("max", levels=3, blocks=3), Correlated("full", levels=4, blocks=2),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("family", ["gaussian", "identical"])
def test_exact_blocks_are_the_codes(code, family):
    """5 clients and 7 coordinates: groups and blocks of two sizes."""
    rows = inputs(family, 5, 7)
    u, start = rows.double().numpy(), round_of(code, rows)
    errors = np.empty(500)
    for k in range(len(errors)):
        rnd = replace(start, index=k)
        errors[k] = ((code.aggregate(code.encode(rows, rnd), rnd).double().numpy() - u.mean(0)) ** 2).sum()
    exact = exact_blocks(u, code)
    assert abs(errors.mean() - exact) <= SIX * errors.std() / math.sqrt(len(errors)) + 1e-6 * exact


SIZES = [(2, 2, 2), (3, 4, 2), (4, 4, 2), (5, 3, 2), (5, 3, 3), (4, 5, 1)]


@pytest.mark.parametrize("scale", ["shared", "own", "max", "full"])
@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize(("n", "d", "blocks"), SIZES)
def test_constants_survive_a_search(scale, levels, n, d, blocks):
    """Every stated inequality against the exact error, climbing from the worst of the adversaries."""
    if scale == "full" and blocks == 1:
        return  # its name is "own"
    code = Correlated(scale, levels=levels, blocks=blocks)
    for ab in stated(code, n, d):
        assert ab.evidence == "proved"

        def ratio(u: np.ndarray, ab=ab) -> float:
            return (exact_blocks(u, code) + 1e-12) / (ab_bound(ab, u) + 1e-12)

        assert hardest(ratio, n, d, steps=6) <= 1 + 1e-9, ab


def test_constants_of_equal_groups():
    """n = 12, d = 24, sigma = 4: c = d sigma^2 / (n (k-1))^2; own scales d - sigma over n, and (sigma-1)/(n-1)."""
    n, d, s = 12, 24, 4
    shared = Correlated(levels=3, blocks=s).ab(n, d)
    assert (shared.a, shared.b, shared.c) == (1.0, 1.0, pytest.approx(d * s**2 / (2 * n) ** 2))
    own = Correlated("own", blocks=s).ab(n, d)
    drawn = (s - 1) / (n - 1)
    assert (own.a, own.b) == (pytest.approx((d - s) / n + drawn), pytest.approx(drawn))
    assert own.other.a - own.other.b == pytest.approx(s * d / n**2)
    assert own.other.b == pytest.approx(1 + (d / s - 1) / (n / s) * n / (n - 1))


def test_full_norms_cost_a_factor_of_sigma():
    """n = 12, d = 24, sigma = 4, one bit, against own norms; one active client has this error, whatever the groups."""
    n, d, s = 12, 24, 4
    own, full = (Correlated(scale, blocks=s).ab(n, d) for scale in ("own", "full"))
    assert full.b == own.b
    assert full.a - full.b == pytest.approx(s * (d - 1) / n)
    assert (full.a - full.b) / (own.a - own.b) == pytest.approx(s * (d - 1) / (d - s))
    assert full.other.a - full.other.b == pytest.approx(s * (own.other.a - own.other.b))
    assert (full.other.b - 1) / (own.other.b - 1) == pytest.approx(s * (d - 1) / (d - s))
    for n, d, s in ((4, 6, 2), (5, 5, 2), (3, 3, 3)):
        u, code = np.zeros((n, d)), Correlated("full", blocks=s)
        u[1] = np.arange(1, d + 1)
        assert exact_blocks(u, code) == pytest.approx(ab_bound(code.ab(n, d), u))


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_norms_on_the_zoos_vectors(family, levels):
    """Both inequalities against the sum over all groups and sets of coordinates, for sizes that differ and do not."""
    for n, d, s in ((4, 6, 2), (5, 7, 2), (5, 5, 3)):
        u, code = inputs(family, n, d).double().numpy(), Correlated("full", levels=levels, blocks=s)
        for ab in stated(code, n, d):
            assert exact_blocks(u, code) <= ab_bound(ab, u) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("scale", ["shared", "own", "max", "full"])
@pytest.mark.parametrize(
    ("n", "d", "blocks", "levels"), [(4, 6, 2, 2), (3, 3, 2, 2), (2, 3, 2, 6), (4, 3, 2, 2), (5, 5, 3, 3)]
)
def test_equal_inputs_in_blocks_exactly(scale, n, d, blocks, levels):
    """`homogeneous` is not exceeded; reached where the scale is that of the whole vector and groups are equal."""
    code, rng = Correlated(scale, levels=levels, blocks=blocks), np.random.default_rng(d)
    bound = code.homogeneous(n, d).a
    for k in range(40):
        u = [rng.normal(size=d), np.eye(d)[-1], np.ones(d), np.arange(d) // 2 + 1.0][k % 4]
        u = u * 10 ** rng.uniform(-k / 20, 0, d)
        assert exact_blocks(np.tile(u, (n, 1)), code) <= bound * (u @ u) * (1 + 1e-9) + 1e-12
    if scale == "full" and n % blocks == 0 and levels == 2:
        assert exact_blocks(np.ones((n, d)), code) == pytest.approx(bound * d)


def test_blocks_of_one_client_each_are_permk_with_rounding():
    """sigma = n: (sigma-1)/(n-1) = 1, PermK's A = B = 1, and the rounding of each client's own block."""
    own = Correlated("own", levels=3, blocks=5).ab(5, 10)
    assert (own.b, own.a) == (pytest.approx(1.0), pytest.approx(1.0 + grid_omega(2, 3)))


def test_every_coordinate_comes_from_one_group():
    for n, d, blocks in ((5, 7, 2), (7, 9, 3), (4, 4, 4), (6, 6, 1)):
        code = Correlated("max", blocks=blocks)
        u = torch.ones(n, d)  # at the end of its range a coordinate is rounded to itself
        for k in range(10):
            rnd = Round.full(k, 0, n)
            msgs = code.encode(u, rnd)
            rows = code.decode(msgs, rnd)
            sizes = (rows != 0).sum(0)
            assert set(sizes.tolist()) <= set(parts(n, blocks))
            assert torch.allclose(rows[rows != 0], (n / sizes.float()).expand(n, d)[rows != 0])
            assert torch.allclose(code.aggregate(msgs, rnd), torch.ones(d), atol=1e-6)


# ------------------------------------------------------------------------------------------------ refusals
def test_impossible_levels_and_blocks():
    for bad in (1, 0, 257, 2.0, True):
        with pytest.raises(ConfigError, match="levels"):
            Correlated(levels=bad)
    for bad in (0, 1.5, True):
        with pytest.raises(ConfigError, match="blocks"):
            Correlated(blocks=bad)
    with pytest.raises(ConfigError, match="levels=2, blocks=1"):
        Correlated("own", numerical=True, levels=3)
    with pytest.raises(ConfigError, match=r"blocks is in 1\.\.3"):
        Correlated(blocks=4).check(9, 3)
    for scale in ("own", "full"):
        with pytest.raises(ConfigError, match="no omega"):
            Correlated(scale, blocks=2).omega(10)
    with pytest.raises(ConfigError, match="is scale='own': take that"):
        Correlated("full")


@pytest.mark.parametrize("code", [Correlated(), Correlated(levels=4), Correlated(blocks=2)], ids=str)
def test_a_scale_that_is_none_is_refused(code):
    """Just below an entry, or not agreed on; and a row that is no number is named before that is said."""
    u, rnd = torch.tensor([[1.0, -3.0, 2.0], [0.5, 1.0, 0.0]]), Round.full(0, 0, 2)
    code.encode(u, replace(rnd, agreed=3.0))
    with pytest.raises(ConfigError, match="smaller than an entry"):
        code.encode(u, replace(rnd, agreed=float(np.nextafter(np.float32(3), np.float32(0)))))
    for agreed, error in ((None, ConfigError), (float("nan"), PayloadError), (-1.0, PayloadError)):
        with pytest.raises(error, match="agreed"):
            code.encode(u, replace(rnd, agreed=agreed))
        u[1, 2] = float("nan")
        with pytest.raises(NonFiniteError) as caught:
            code.encode(u, replace(rnd, agreed=agreed))
        assert caught.value.clients == (1,)
        u[1, 2] = 0.0


def test_the_usual_repr_is_what_it_was():
    """Stored runs name their compressor: what is not used does not show."""
    assert repr(Correlated()) == "Correlated(scale='shared', numerical=False)"
    assert repr(Correlated(levels=3, blocks=2)) == "Correlated(scale='shared', numerical=False, levels=3, blocks=2)"


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_code_beyond_the_grid_is_refused(blocks):
    """Three points take two bits, and 3 is none of them."""
    code, u = Correlated("own", levels=3, blocks=blocks), inputs("gaussian", 4, 8)
    rnd = Round.full(0, 0, 4)
    msgs = code.encode(u, rnd)
    payload = msgs.payload.clone()
    payload[2, 4] |= 0b11
    with pytest.raises(PayloadError, match=r"outside 0\.\.2"):
        code.decode(Messages(payload, msgs.nbytes, msgs.slots, 8), rnd)


def test_what_overflows_once_it_is_scaled_is_named():
    """n/m is 3 for the smallest groups: 2e38 is a float32, and three times it is none."""
    u = torch.zeros(3, 6)
    u[1, 2] = 2e38
    rnd = Round.full(4, 0, 3)
    for code in (Correlated(blocks=3), Correlated("own", blocks=3)):
        with pytest.raises(NonFiniteError, match=r"client 1, round 4.*overflows"):
            (code.prepare if code.agrees else code.encode)(u, rnd)
    u[1] = 6e37  # three times an entry is a float32, three times the norm is none
    with pytest.raises(NonFiniteError, match=r"client 1, round 4.*the norm overflows"):
        Correlated("full", blocks=3).encode(u, rnd)
    Correlated("own", blocks=3).encode(u, rnd)
    with pytest.raises(PayloadError, match="agreed"):
        Correlated(blocks=3).encode(torch.zeros(3, 6), replace(rnd, agreed=2e38))
    assert kernels.of(u) is cpu
