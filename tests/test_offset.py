"""Correlated quantization with an offset: exact errors, constants against a search, and what the mend is worth.

Two statistical tests compare bytes with exact errors, within six standard errors (2e-9 a comparison, 5 comparisons).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from offset_laws import exact_error, strata
from test_compressors import ab_bound, hardest, spread, stated
from zoo import inputs, round_of

from shoal import compressors
from shoal.compressors import Correlated, CorrelatedOffset
from shoal.compressors.correlated import exact_error as plain_error
from shoal.errors import ConfigError, PayloadError
from shoal.kernels import Draw, cpu, reference
from shoal.messages import Messages, Round

CODES = [CorrelatedOffset(o, s, k) for o in ("random", "even") for s in ("shared", "own") for k in (2, 3)]


def scales_of(code: CorrelatedOffset, u: np.ndarray) -> np.ndarray:
    return np.linalg.norm(u, axis=1) if code.scale == "own" else np.full(len(u), np.abs(u).max())


@pytest.mark.parametrize("code", [CorrelatedOffset(), CorrelatedOffset("even"), CorrelatedOffset("random", "own", 3)])
def test_the_exact_error_is_the_codes(code):
    """800 rounds of the bytes of 5 clients that differ."""
    u = inputs("gaussian", 5, 12)
    rows, start, errors = u.double().numpy(), round_of(code, u), np.empty(800)
    for k in range(len(errors)):
        rnd = replace(start, index=k)
        errors[k] = ((code.aggregate(code.encode(u, rnd), rnd).double().numpy() - rows.mean(0)) ** 2).sum()
    exact = exact_error(code, rows, scales_of(code, rows))
    assert abs(errors.mean() - exact) <= 6 * errors.std() / math.sqrt(len(errors)) + 1e-5 * exact


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 30), (5, 3), (8, 2)])
def test_constants_survive_a_search(code, n, d):
    """Every stated inequality against the exact error, climbing from the worst of the adversaries."""
    for ab in stated(code, n, d):
        assert ab.evidence == "proved"

        def ratio(u: np.ndarray, ab=ab) -> float:
            return (exact_error(code, u, scales_of(code, u), points=32) + 1e-12) / (ab_bound(ab, u) + 1e-12)

        assert hardest(ratio, n, d, steps=12) <= 1 + 1 / 2048, ab


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize(("n", "d"), [(2, 3), (3, 30), (6, 12)])
def test_equal_inputs(code, n, d):
    """With a random offset the error is the same for all vectors; without, it is at most the supremum."""
    a, T, rng = code.homogeneous(n, d).a, strata(code, n), np.random.default_rng(n)
    for row in (rng.normal(size=d), np.eye(d)[0], np.ones(d), rng.standard_cauchy(d), np.full(d, d**-0.5)):
        u = np.tile(row, (n, 1))
        r = scales_of(code, u)
        error = exact_error(code, u, r)
        assert error <= a * spread(u)[0] * (1 + 1e-5) + 1e-12
        if code.offset == "random":
            assert error == pytest.approx(2 * d * r[0] ** 2 / (3 * T**2), rel=1e-5)
    if code.offset == "random":
        one = np.tile(np.eye(d)[0], (n, 1))
        assert exact_error(code, one, np.ones(n)) == pytest.approx(a, rel=1e-5)


def test_what_an_offset_is_worth():
    """The constants of the page: where a random offset wins, and what odd n gains by the mend."""
    for n in range(2, 40):
        assert (CorrelatedOffset().ab(n, 100).c < Correlated().ab(n, 100).c) == (n >= 6)
    d = 10_000
    for scale, before, after in (("own", 44.44, 13.29), ("shared", 44.44, 6.66)):
        assert Correlated(scale).homogeneous(15, d).a == pytest.approx(before, abs=0.01)
        assert CorrelatedOffset("even", scale).homogeneous(15, d).a == pytest.approx(after, abs=0.01)
        assert Correlated(scale).homogeneous(14, d).a == pytest.approx(after, abs=0.01)
    assert CorrelatedOffset("even").ab(15, 100).c == pytest.approx(100 / 14**2)  # worse than 100/15^2: d < n^2
    other = CorrelatedOffset("even").ab(15, d).other
    assert (other.a, other.b, other.c) == (pytest.approx(100 / 14), 1.0, pytest.approx(100 / 14))


@pytest.mark.parametrize("n", [2, 4, 7])
def test_an_even_number_of_strata_is_left_as_it_is(n):
    code = CorrelatedOffset("even", levels=3)
    assert code.ab(n, 50).all()[0].c == Correlated(levels=3).ab(n, 50).c
    u = np.random.default_rng(n).normal(size=(n, 6))
    r = np.full(n, np.abs(u).max())
    assert exact_error(code, u, r) == pytest.approx(plain_error(u, r, 3))
    kernel = {"levels": 3, "strata": n, "place": torch.arange(n), "shifts": torch.zeros(1, 6, dtype=torch.int32)}
    slots = torch.arange(n)
    args = (torch.from_numpy(u).float(), torch.from_numpy(r).float(), Draw(slots, 3, 1, 9), Draw(slots, 3, 2, 9))
    for ops in (reference, cpu):
        moved = ops.encode_strata(*args, **kernel, steps=2 * n, offset=torch.zeros(6, dtype=torch.int32))
        assert torch.equal(moved, ops.encode_levels(*args, **kernel))


def test_zero_is_cheap_for_odd_n():
    """At 0, (n-1)/2 of n clients take the upper point, in every coordinate: no error; the plain code has r^2/n^2."""
    n, d = 5, 300
    code, rnd = CorrelatedOffset("even"), replace(Round.full(2, 0, n), agreed=1.0)
    rows = code.decode(code.encode(torch.zeros(n, d), rnd), rnd)
    assert set(rows.unique().tolist()) == {-1.0, 1.5}
    assert set((rows > 0).sum(0).tolist()) == {2}
    assert not code.aggregate(code.encode(torch.zeros(n, d), rnd), rnd).any()


def test_ties_on_an_offset_grid_are_settled_alike():
    """Vectors whose fraction of a stratum lies on each coordinate's own random half: the second word decides."""
    n, d = 3, 2000
    place, slots = torch.tensor([1, 0, 2]), torch.arange(3)
    private, tie, rng = Draw(slots, 5, 1, 7), Draw(slots, 5, 2, 7), np.random.default_rng(0)
    offset = torch.from_numpy(rng.integers(0, 65536, d).astype(np.int32))
    h = reference.halves(private, d).numpy().astype(np.int64)
    steps = 2 * n - 1
    y = (rng.integers(0, 2, h.shape) * n + place.numpy()[:, None]) * 65536 + h
    z = y - steps * 32768 - offset.numpy()
    u = torch.from_numpy(((z + rng.choice([0.0, 0.5], z.shape)) / (steps * 32768.0)).astype(np.float32))
    shifts = torch.zeros(1, d, dtype=torch.int32)
    args = (u, torch.ones(3), private, tie, 3, n, place, shifts, steps, offset)
    assert torch.equal(reference.encode_strata(*args), cpu.encode_strata(*args))
    cell, fraction = reference.bits.cells(u, torch.ones(3), steps)
    tied = (cell == z) & (fraction > 0) & (fraction < 1)
    assert (cell == z).mean() > 0.3
    assert tied.sum() > 100
    code = reference.unpack(reference.encode_strata(*args), d, 2).numpy()
    second = (reference.words(tie, d).numpy() >> 8) * 2.0**-24
    up = code - y // (n * 65536)
    assert np.array_equal(up[tied], (second < fraction)[tied])


def test_refusals():
    for bad in ({"offset": "none"}, {"scale": "max"}, {"levels": 1}, {"levels": 257}, {"levels": True}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            CorrelatedOffset(**bad)
    with pytest.raises(ConfigError, match="no room for an offset"):
        CorrelatedOffset().check(1, 5)
    CorrelatedOffset(levels=3).check(1, 5)
    code, u = CorrelatedOffset("random", "own", 3), inputs("gaussian", 4, 8)
    rnd = Round.full(0, 0, 4)
    msgs = code.encode(u, rnd)
    payload = msgs.payload.clone()
    payload[2, 4] |= 0b11
    with pytest.raises(PayloadError, match=r"outside 0\.\.2"):
        code.decode(Messages(payload, msgs.nbytes, msgs.slots, 8), rnd)
    with pytest.raises(PayloadError, match="room for the grid"):
        CorrelatedOffset().encode(torch.zeros(2, 3), replace(Round.full(0, 0, 2), agreed=2e38))
    with pytest.raises(ConfigError, match="smaller than an entry"):
        CorrelatedOffset().encode(torch.ones(2, 3), replace(Round.full(0, 0, 2), agreed=0.5))
    assert compressors.CorrelatedOffset is CorrelatedOffset
