"""Pointwise compressors and k-level rounding: layouts, exact probabilities, and constants that are suprema.

The battery of test_compressors.py has the general laws. Only `test_the_coin_is_fair_enough` is statistical and states
its false-alarm rate; the other probabilities are counted by handing the kernels the random words that decide.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_laws import cells, octaves, variance
from zoo import FAMILIES, inputs, round_of, rows_of

from shoal import kernels
from shoal.compressors import QSGD, Bernoulli, Independent, Natural, NaturalDithering, Sign, Ternary
from shoal.errors import ConfigError, NonFiniteError, PayloadError
from shoal.kernels import reference
from shoal.messages import Messages, Round

ONE = Round.full(0, 0, 1)
SLACK = 1 + 1e-9  # both sides of every inequality are float64 sums of fewer than 10^5 terms


def ratio(c, u) -> float:
    """E||C(u) - u||^2 / ||u||^2 of one vector, exactly."""
    u = np.asarray(u, np.float64)
    return float(variance(c, u[None]).sum() / (u**2).sum())


def sent(body: bytes, d: int) -> Messages:
    return Messages(torch.tensor([list(body)], dtype=torch.uint8), torch.tensor([len(body)]), ONE.slots, d)


# ------------------------------------------------------------------------------------------------ Bernoulli
def test_bernoulli_sends_all_or_nothing():
    u = inputs("gaussian", 200, 3)
    rnd = Round.full(4, 0, 200)
    c = Bernoulli(0.25)
    msgs = c.encode(u, rnd)
    heads = msgs.nbytes > 0
    assert set(msgs.nbytes.tolist()) == {0, 12}
    rows = c.decode(msgs, rnd)
    assert torch.equal(rows[heads], 4 * u[heads])
    assert not rows[~heads].any()
    assert rows_of(msgs)[int(heads.nonzero()[0])] == u[heads][0].numpy().tobytes(), "the values travel as they are"
    assert Bernoulli(1).decode(Bernoulli(1).encode(u, rnd), rnd).numpy().tobytes() == u.numpy().tobytes()
    assert c.predicted_bits(200, 3) == 24.0
    assert c.capacity(200, 3) == 12


@pytest.mark.parametrize("p", [1.0, 0.6, 0.5, 2.0**-32, 1e-3, 1 - 2.0**-53])
def test_the_coin_compares_64_bits(p, monkeypatch):
    """Heads are exactly the words below ceil(2^64 p): both sides of the border, and both ends."""
    border = math.ceil(Fraction(p) * 2**64)
    values = [v for v in (0, border - 1, border, 2**64 - 1) if v < 2**64]
    monkeypatch.setattr("shoal.rng.coins", lambda draw, odds: torch.tensor([v < odds for v in values]))
    assert Bernoulli(p).sends(torch.arange(len(values)), ONE).tolist() == [v < border for v in values]


def test_the_coin_is_fair_enough():
    """100 000 private coins: six standard errors, false-alarm rate 2e-9 when the seed was chosen."""
    for p in (0.01, 0.6):
        rnd = Round.full(2, 5, 100_000)
        heads = Bernoulli(p).sends(rnd.slots, rnd).double()
        assert abs(float(heads.mean()) - p) <= 6 * math.sqrt(p * (1 - p) / 100_000)


@pytest.mark.parametrize("p", [0, -0.1, 1.1, True, "1", None, float("nan"), 2.0**-33])
def test_impossible_p(p):
    with pytest.raises(ConfigError, match="probability of sending"):
        Bernoulli(p)


def test_what_overflows_once_divided_by_p_is_refused_on_both_sides():
    with pytest.raises(NonFiniteError, match=r"client 0, round 0.*overflows"):
        Bernoulli(0.5).encode(torch.full((1, 2), 3e38), ONE)
    index = next(k for k in range(50) if Bernoulli(0.5).sends(ONE.slots, Round.full(k, 0, 1))[0])
    with pytest.raises(PayloadError, match="scaled"):
        Bernoulli(0.5).decode(sent(np.float32([3e38, 0]).tobytes(), 2), Round.full(index, 0, 1))


# ------------------------------------------------------------------------------------------------ Sign
def test_sign_layout_and_zeros():
    u = torch.tensor([[1.0, -2.0, 0.0, -0.0, 5.0, -1.0, -1.0, 2.0, -6.0]])
    msgs = Sign().encode(u, ONE)
    assert rows_of(msgs) == [np.float32(2.0).tobytes() + bytes([0b10011101, 0])]  # both zeros count as +
    assert Sign().decode(msgs, ONE).tolist() == [[2.0, -2.0, 2.0, 2.0, 2.0, -2.0, -2.0, 2.0, -2.0]]
    zeros = Sign().encode(torch.zeros(1, 9), ONE)
    assert not Sign().decode(zeros, ONE).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("d", [1, 2, 7, 130])
def test_error_of_sign(family, d):
    """||C(u) - u||^2 = ||u||^2 - ||u||_1^2 / d for every u: alpha = 1/d, reached by one-hot rows. The scale is rounded
    to float32, which costs at most 2^-48 of ||u||^2 in exact arithmetic; 1e-6 covers the sums here."""
    u = inputs(family, 5, d)
    rnd = round_of(Sign(), u)
    lost = (Sign().decode(Sign().encode(u, rnd), rnd).double() - u.double()).square().sum(1)
    size, taxi = u.double().square().sum(1), u.double().abs().sum(1)
    assert torch.allclose(lost, size - taxi**2 / d, rtol=1e-6, atol=1e-6)
    assert (lost <= (1 - Sign().alpha(d)) * size + 1e-12).all()
    if family == "one-hot":
        assert torch.allclose(lost, (1 - Sign().alpha(d)) * size, rtol=1e-6, atol=1e-12)


def test_sign_never_enlarges_denormals():
    """Where the mean magnitude underflows, alpha is lost (the error is at most ||u||^2), not finiteness."""
    u = torch.zeros(1, 12)
    for entry in (1.4e-45, 7e-45, 1e-44, 1e-39):
        u[0, 3] = entry
        out = Sign().decode(Sign().encode(u, ONE), ONE).double()
        assert float((out - u).square().sum()) <= float(u.double().square().sum())


# ------------------------------------------------------------------------------------------------ Ternary
def test_ternary_layout():
    """Entries of magnitude r or 0 are certain: digits 1 + sign, five a byte, the first the least significant."""
    u = torch.tensor([[3.0, 0.0, -3.0, 0.0, 3.0, -3.0, 3.0]])
    msgs = Ternary().encode(u, ONE)
    assert rows_of(msgs) == [np.float32(3.0).tobytes() + bytes([2 + 3 * 1 + 0 + 27 * 1 + 81 * 2, 0 + 3 * 2])]
    assert torch.equal(Ternary().decode(msgs, ONE), u)
    assert Ternary().capacity(1, 1000) == 204  # 1.6 bits a coordinate, and the scale


@pytest.mark.parametrize("tail", [bytes([243, 0]), bytes([255, 0]), bytes([0, 9])])
def test_ternary_bytes_that_are_no_digits(tail):
    """d = 7: 243 is no five digits, 9 has a digit beyond d."""
    with pytest.raises(PayloadError, match="base 3"):
        Ternary().decode(sent(np.float32(1).tobytes() + tail, 7), ONE)
    Ternary().decode(sent(np.float32(1).tobytes() + bytes([242, 8]), 7), ONE)


@given(st.data())
def test_trits_round_trip(data):
    count = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=count, max_size=count), min_size=1, max_size=3))
    code = torch.tensor(rows)
    packed = reference.pack_trits(code)
    assert packed.shape[1] == -(-count // 5)
    assert torch.equal(reference.unpack_trits(packed, count), code)
    for ops in (reference, kernels.cpu):
        assert torch.equal(ops.decode_trits(packed, torch.ones(len(code)), count)[0], code.float() - 1)


@pytest.mark.parametrize("d", [1, 2, 3, 10, 100])
def test_omega_of_ternary_is_the_supremum(d):
    """Reached at (1, t, ..., t), t = 1/(1 + sqrt d); random vectors of every scale stay below."""
    omega, t = Ternary().omega(d), 1 / (1 + math.sqrt(d))
    assert ratio(Ternary(), [1.0] + [t] * (d - 1)) == pytest.approx(omega, rel=1e-12, abs=1e-15)
    rng = np.random.default_rng(d)
    u = rng.uniform(size=(3000, d)) ** rng.uniform(0, 8, size=(3000, 1))
    assert (variance(Ternary(), u).sum(1) <= omega * (u**2).sum(1) * SLACK + 1e-15).all()


# ------------------------------------------------------------------------------------------------ Natural
def test_natural_layout():
    """Powers of two are certain: 8 bits of exponent, then the sign, 9 bits each."""
    u = torch.tensor([[1.0, -2.0, 0.0]])
    stream = 127 | (256 + 128) << 9 | 0 << 18
    msgs = Natural().encode(u, ONE)
    assert rows_of(msgs) == [stream.to_bytes(4, "little")]
    assert torch.equal(Natural().decode(msgs, ONE), u)


@pytest.mark.parametrize("ops", ["reference", "cpu"])
def test_natural_probabilities_are_exact(ops, monkeypatch):
    """With noise w >> 9, the upper neighbor is taken iff w >> 9 >= 2^23 - f: f of the 2^23 values. Checked on both
    sides of that border, for mantissas f of normal numbers in all binades but the top, and of denormals.

    The compiled kernel gets its words from a draw; the vectors are made to fit its words in place of the reverse.
    """
    d = 2540
    draw = kernels.Draw(torch.tensor([3]), 5, 77, 9)
    noise = reference.words(draw, d).numpy()[0].astype(np.int64) >> 9
    exponent = np.arange(d) % 254
    for carry, f in ((1, 2**23 - noise), (0, 2**23 - 1 - noise)):
        inside = f < 2**23  # noise 0 never carries
        bits = (exponent << 23) | np.where(inside, f, 0)
        u = torch.from_numpy(bits.astype(np.uint32).view(np.float32))[None]
        module = reference if ops == "reference" else kernels.cpu
        code = reference.unpack(module.encode_natural(u, draw), d, 9).numpy()[0]
        assert np.array_equal(code[inside], (exponent + carry)[inside])
        assert np.array_equal(code[~inside], exponent[~inside])


def test_natural_at_the_ends_of_float32():
    below = float(np.nextafter(np.float32(2.0**127), np.float32(0)))
    for entry in (1.4e-45, 1e-39, -(2.0**-126), below, -below):
        u = torch.full((1, 500), entry)
        out = Natural().decode(Natural().encode(u, ONE), ONE)
        allowed = {0.0, math.copysign(2.0**-126, entry)} if abs(entry) <= 2.0**-126 else {
            math.copysign(2.0**126, entry), math.copysign(2.0**127, entry)}  # fmt: skip
        assert set(out[0].tolist()) <= allowed
    for entry in (2.0**127, 3e38, -3.4028234663852886e38):
        with pytest.raises(NonFiniteError, match=r"client 0, round 0.*overflows"):
            Natural().encode(torch.tensor([[1.0, entry]]), ONE)
    with pytest.raises(PayloadError, match="255"):
        Natural().decode(sent(bytes([255, 0]), 1), ONE)


def test_omega_of_natural_is_the_supremum():
    """1/8 at 4/3 2^e, never more between neighboring powers of two."""
    x = np.linspace(1, 2, 100_001)
    assert (octaves(x, 2.0**-126) <= x**2 / 8 * SLACK).all()
    for e in (-126, 0, 126):
        assert ratio(Natural(), [4 / 3 * 2.0**e] * 3) == pytest.approx(Natural().omega(3), rel=1e-12)


# ------------------------------------------------------------------------------------------------ NaturalDithering
def test_natural_dithering_layout():
    """A one-hot row is certain: -1 times the norm is code 0, zero is code s. Decoded, all codes 0..2 s."""
    u = torch.tensor([[0.0, -2.0, 0.0]])
    c = NaturalDithering(3)
    msgs = c.encode(u, ONE)
    assert rows_of(msgs) == [np.float32(2).tobytes() + (3 | 0 << 3 | 3 << 6).to_bytes(2, "little")]
    assert torch.equal(c.decode(msgs, ONE), u)
    every = sum(code << (3 * j) for j, code in enumerate(range(7))).to_bytes(3, "little")
    values = c.decode(sent(np.float32(8).tobytes() + every, 7), ONE)
    assert values.tolist() == [[-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0]]
    with pytest.raises(PayloadError, match=r"outside 0\.\.6"):
        c.decode(sent(np.float32(8).tobytes() + bytes([7]), 1), ONE)
    for levels in (0, 128, 2.0, True):
        with pytest.raises(ConfigError, match="levels"):
            NaturalDithering(levels)


@pytest.mark.parametrize("levels", [1, 2, 5, 127])
def test_natural_dithering_probabilities(levels):
    """The upper neighbor is taken iff (w + 1/2) 2^-32 < frac. The decision turns between a frac that is one float32
    step of |u| below and one above its own word's border, in every cell, for words whose border fits."""
    d, rng = 3000, np.random.default_rng(levels)
    draw, r = kernels.Draw(torch.tensor([3]), 5, 77, 9), torch.ones(1)
    border = (reference.words(draw, d).numpy()[0].astype(np.float64) + 0.5) * 2.0**-32
    cell = rng.integers(0, levels, d)
    t = np.where(cell == 0, border, 2.0 ** (cell - 1.0) * (1 + border))  # in units of the lowest level
    for factor, up in ((1 - 1e-6, 0), (1 + 1e-6, 1)):
        size = (t * factor * 2.0 ** (1 - levels)).astype(np.float32)
        sign = rng.choice([-1, 1], d)
        fits = (size <= 1) & (border > 1e-3) & (border < 1 - 1e-3)
        u = torch.from_numpy((size * sign).astype(np.float32))[None]
        for ops in (reference, kernels.cpu):
            code = reference.unpack(ops.encode_natural_levels(u, r, draw, levels)[:, 4:], d, (2 * levels).bit_length())
            expected = levels + sign * (cell + up)
            assert np.array_equal(code.numpy()[0][fits], expected[fits])


@pytest.mark.parametrize("power", [-110, -60, 40, 100])
@pytest.mark.parametrize("c", [Ternary(), NaturalDithering(3), Sign()], ids=repr)
def test_codes_do_not_see_the_scale(c, power):
    u = inputs("cauchy", 5, 130)
    plain, scaled = (c.encode(u * 2.0**p, round_of(c, u)).payload[:, 4:] for p in (0, power))
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize("s", [2, 3, 5, 9])
def test_natural_dithering_tangent(s):
    """The step of the proof: a line in y^2 that touches y (low - y) at y_0 <= 4 low / 9 lies above the variance."""
    low = 2.0 ** (1 - s)
    y = np.concatenate([np.linspace(0, 1, 40_001), low * np.linspace(0, 4, 20_001)])
    y = y[y <= 1]
    for y0 in (4 * low / 9, low / 3, low / 10):
        slope, offset = low / (2 * y0) - 1, low * y0 / 2
        assert (octaves(y, low) <= (offset + slope * y**2) * SLACK).all()


@pytest.mark.parametrize("s", [1, 2, 3, 5])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 30, 100, 700])
def test_omega_of_natural_dithering(s, d):
    """Never exceeded by random vectors, by flat ones on k coordinates, or by mixtures of the two worst places; equal to
    the flat vector's where it says exact; below the paper's 1/8 + low sqrt(d) min(1, low sqrt(d))."""
    c, low = NaturalDithering(s), 2.0 ** (1 - s)
    omega, rng = c.omega(d), np.random.default_rng([s, d])
    found = [ratio(c, np.ones(k)) for k in range(1, d + 1)]
    for _ in range(2000):
        u = np.abs(rng.normal(size=d)) ** rng.uniform(0.1, 3) * np.where(rng.random(d) < 0.5, rng.uniform(0, low), 1)
        found.append(ratio(c, u + 1e-9))
    for big in range(min(d, 3)):
        for k in range(1, s):
            top = 4 / 3 * 2.0**-k
            rest = 1 - big * top**2
            if rest > 0 and d > big:
                found.append(ratio(c, [top] * big + [math.sqrt(rest / (d - big))] * (d - big)))
    assert max(found) <= omega * SLACK
    if (s > 1 and low * math.sqrt(d) >= 2.25) or (s == 1 and d >= 4):
        assert found[d - 1] == pytest.approx(omega, rel=1e-12)
    assert omega <= 0.125 + low * math.sqrt(d) * min(1, low * math.sqrt(d))
    if s == 1:
        assert omega == QSGD(1).omega(d)


@pytest.mark.parametrize(("s", "k", "big"), [(6, 1, 2), (8, 1, 2), (8, 2, 8), (9, 1, 1)])
def test_the_second_bound_of_natural_dithering_is_nearly_reached(s, k, big):
    """A few coordinates at 4/3 2^-k, the others near 4/9 of the lowest level: each of the few loses 2/9 of its square.

    The others share what is left of the norm, a hair off 4/9 because their number is whole: a percent of the bound.
    """
    low = 2.0 ** (1 - s)
    small, top = 4 * low / 9, 4 / 3 * 2.0**-k
    rest = 1 - big * top**2
    count = round(rest / small**2)
    u = np.array([top] * big + [math.sqrt(rest / count)] * count)
    omega = NaturalDithering(s).omega(big + count)
    assert low * math.sqrt(big + count) < 2.25
    assert 0.99 * (omega - big * 2 * low**2 / 9) <= ratio(NaturalDithering(s), u) <= omega * SLACK


# ------------------------------------------------------------------------------------------------ k levels
def closest(q: int, d: int) -> float:
    """min over integer points m of d coordinates of (q - 2 |m|)^2, by going through the sums of d squares."""
    sums, limit = {0}, (q // 2 + 2) ** 2
    for _ in range(d):
        sums = {a + m * m for a in sums for m in range(q // 2 + 2) if a + m * m <= limit}
    return min((q - 2 * math.sqrt(a)) ** 2 for a in sums)


@pytest.mark.parametrize("levels", [2, 4, 6, 8, 16, 30])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
def test_omega_of_even_levels_is_the_supremum(levels, d):
    """(d - dist^2)/q^2 with the nearest lattice point, in closed form for d >= 4 and for two levels."""
    q, omega = levels - 1, Independent(levels).omega(d)
    exact = (d - closest(q, d)) / q**2
    assert exact <= omega * SLACK + 1e-15
    if d >= 4 or levels == 2:
        assert omega == pytest.approx(exact, rel=1e-12, abs=1e-15)


@settings(max_examples=150)
@given(st.integers(1, 40), st.integers(2, 33), st.integers(0, 2**32 - 1))
def test_omega_of_levels_is_never_exceeded(d, levels, seed):
    """Random vectors, and those whose coordinates lie in the middle of cells."""
    c, rng = Independent(levels), np.random.default_rng(seed)
    steps = levels - 1
    middle = (rng.integers(0, max(1, steps // 2), d) + (0.5 if levels % 2 else 0.0)) + 1e-12
    for u in (rng.normal(size=d), rng.standard_cauchy(d), middle, np.eye(d)[0]):
        assert ratio(c, u) <= c.omega(d) * SLACK + 1e-12
    for top in ([3, 1, 1, 1], [1, 1]) if levels == 8 else ():
        assert ratio(c, top) <= c.omega(len(top)) * SLACK


def test_four_levels_reach_their_supremum():
    """q = 3: the point (1, 1, 0, 0), put on the sphere of radius 3/2. From d = 62 on, three levels do better."""
    assert [Independent(3).omega(d) < Independent(4).omega(d) for d in (61, 62)] == [False, True]
    assert ratio(Independent(4), [1.0, 1.0, 0.0, 0.0]) == pytest.approx(Independent(4).omega(4), rel=1e-12)
    assert Independent(4).omega(4) == pytest.approx((4 - (3 - math.sqrt(8)) ** 2) / 9, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_levels_are_one_bit(family):
    """The general kernel at two levels gives the bytes of the one-bit kernel: one definition, two speeds."""
    u = inputs(family, 5, 130)
    rnd = round_of(Independent(), u, index=6)
    r = reference.norms(u)
    code = reference.encode_levels(u, r, rnd.draw("Independent.bits"), rnd.draw("Independent.ties"), 2)
    msgs = Independent().encode(u, rnd)
    assert torch.equal(msgs.payload[:, 4:], code) or family == "zeros"  # r = 0: fair bits there, one point here
    assert torch.equal(Independent().decode(msgs, rnd), reference.decode_levels(msgs.payload[:, 4:], r, 2, 130)[0])


def test_levels_on_the_wire():
    """ceil(log2 k) bits for a point's number, -r being 0; an odd k keeps zeros, and rounds as QSGD does."""
    u = torch.tensor([[0.0, -2.0, 0.0, 0.0, 0.0]])
    assert [Independent(k).capacity(9, 100) - 4 for k in (2, 3, 4, 5, 8, 9, 17)] == [13, 25, 25, 38, 38, 50, 63]
    body = rows_of(Independent(5).encode(u, ONE))[0]
    assert body == np.float32(2).tobytes() + (2 | 0 << 3 | 2 << 6 | 2 << 9 | 2 << 12).to_bytes(2, "little")
    for s in (1, 2, 7):
        assert Independent(2 * s + 1).omega(50) == QSGD(s).omega(50)
        v = inputs("cauchy", 3, 50).double().numpy()
        z = s * np.abs(v) / np.linalg.norm(v, axis=1, keepdims=True)
        r = np.linalg.norm(v, axis=1, keepdims=True)
        assert np.allclose(variance(Independent(2 * s + 1), v), (r / s) ** 2 * cells(z), atol=1e-9 * (r / s).max() ** 2)
    with pytest.raises(PayloadError, match=r"outside 0\.\.4"):
        Independent(5).decode(sent(np.float32(1).tobytes() + bytes([7]), 1), ONE)
    for levels in (1, 0, 2.0, True, 32768):
        with pytest.raises(ConfigError, match="points"):
            Independent(levels)
