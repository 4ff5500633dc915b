"""Slices of messages: added up apart and put together, they say what `aggregate` says of whole ones, bit for bit.

Every compressor of the zoo either cuts or says that it cannot; the sums of codes that travel back are as short as they
should be, are digits of a few bytes as docs/wire.md has them, and say the mean exactly.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import COMPRESSORS, FAMILIES, SHAPES, fits, inputs, round_of

from shoal.compressors import QSGD, Correlated, CorrelatedOffset, Dense, Grid, Independent, Natural, Rotated, Ternary
from shoal.core import Compressor
from shoal.errors import LengthError, PayloadError, WireError
from shoal.kernels import cpu, reference
from shoal.kernels.reference.sums_of_codes import DIGITS, group, packed_bytes
from shoal.messages import Messages, Round, Vector
from shoal.slices import MOST, Slices, Tally

WHOLE = {"Bernoulli", "Coded", "Composed", "Drive", "Eden", "LowRank", "PerLayer", "PermK", "RandK", "Scaled", "TopK"}


def sharded(slices: Slices, msgs: Messages, parts: int) -> Vector:
    """The mean, by way of `parts` processes that see nothing but their slices."""
    bodies = []
    for lo, hi in slices.bounds(parts):
        part = slices.cut(msgs, lo, hi)
        assert part.payload.shape[1] == slices.length(lo, hi)
        body = slices.fold(part, lo) if hi > lo else torch.zeros(0, dtype=torch.uint8)
        most = slices.folded(lo, hi)
        assert len(body) <= most if slices.tally else len(body) == most
        bodies.append(body)
    return slices.finish(slices.unfold(bodies, slices.bounds(parts)))


@pytest.mark.parametrize("code", [*COMPRESSORS, Correlated(levels=3), Correlated(levels=257 - 1)], ids=repr)
def test_slices_say_what_aggregate_says(code):
    """Shapes with fewer grains than processes among them, one client, and the rows of a shorter last grain."""
    cuts = 0
    for n, d in SHAPES:
        if not fits(code, n, d):
            continue
        for family in FAMILIES:
            u = inputs(family, n, d)
            rnd = round_of(code, u, index=3)
            msgs, slices = code.encode(u, rnd), code.slices(d, rnd)
            if slices is None:
                continue
            cuts += 1
            whole = code.aggregate(msgs, rnd)
            assert slices.length(0, slices.d) == code.capacity(n, d) == int(msgs.nbytes.max())
            for parts in (1, 2, 3, 4, 7):
                found = sharded(slices, msgs, parts)
                assert found.numpy().tobytes() == whole.numpy().tobytes(), (n, d, family, parts)
    inner = code.inner if isinstance(code, Rotated) else code
    blocks = getattr(inner, "blocks", 1) > 1
    assert (cuts > 0) is (type(inner).__name__ not in WHOLE and not blocks)


def test_a_cohort_is_cut_as_everyone_is():
    u = inputs("gaussian", 3, 130)
    for code in (Correlated(), QSGD(3), CorrelatedOffset(), Dense()):
        rnd = Round.full(0, 5, 9).among(torch.tensor([1, 4, 8]))
        rnd = replace(rnd, clients=torch.tensor([1, 4, 8]), slots=torch.arange(3))
        if code.agrees:
            rnd = replace(rnd, agreed=float(u.abs().max()))
        msgs, slices = code.encode(u, rnd), code.slices(130, rnd)
        assert torch.equal(sharded(slices, msgs, 4), code.aggregate(msgs, rnd))


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-39, 1.0, 3.4e38])
def test_sums_of_codes_say_the_mean_at_every_scale(scale):
    """Denormal scales, the edge of float32, and zero, whose mean is +0 and never -0; odd cohorts and one client."""
    for n, levels in ((1, 2), (2, 2), (7, 2), (300, 2), (3, 3), (5, 5), (4, 17)):
        u = inputs("gaussian", n, 130)
        u = (u / u.abs().max() * scale).float()
        code = Correlated(levels=levels)
        rnd = round_of(code, u)
        slices, msgs = code.slices(130, rnd), code.encode(u, rnd)
        assert slices.folded(0, 130) < 4 * 130
        assert sharded(slices, msgs, 2).numpy().tobytes() == code.aggregate(msgs, rnd).numpy().tobytes()


def test_a_sum_of_codes_is_taken_only_where_it_is_exact_and_short():
    """Points a power of two apart; others come back as float32, and so do sums that would take half as much."""
    assert [k for k in range(2, 258) if Tally(1.0, k).sums(2)] == [2, 3, 5, 9, 17, 33, 65, 129, 257]
    assert Tally(1.0, 2).sums(MOST - 1) == MOST
    assert Tally(1.0, 2).sums(MOST) == 0
    u = inputs("gaussian", 4, 130)
    three = round_of(Correlated(levels=4), u)
    assert Correlated(levels=4).slices(130, three).folded(0, 130) == 4 * 130
    means = Tally(0.3, 5).means(3).double()
    assert torch.allclose(means, np.float32(0.3) * (2 * torch.arange(13).double() / 12 - 1), atol=1e-7)


def test_digits_take_almost_the_fewest_bits():
    """What docs/ranks.md says of n + 1 sums of bits; never more than 5% above log2, and a whole number of bytes."""
    assert [group(base) for base in (2, 3, 4, 5, 9, 17, 33, 257)] == [
        (8, 1), (5, 1), (4, 1), (24, 7), (5, 2), (15, 8), (11, 7), (7, 8),
    ]  # fmt: skip
    for base in range(2, 300):
        digits, size = group(base)
        assert base**digits <= 256**size
        assert 8 * size / digits <= 1.15 * math.log2(base)
    assert packed_bytes(0, 9) == 0
    assert packed_bytes(6, 9) == 3


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([2, 3, 4, 5, 16, 200, 256]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_digits_are_read_back(m, d, levels, seed):
    """The layout of docs/wire.md, of sums of which at most a few are alike."""
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (m, d)))
    body, beyond = reference.fold_codes(reference.pack(codes, (levels - 1).bit_length()), levels, d)
    base = m * (levels - 1) + 1
    values = torch.arange(base).float()
    read, good = reference.unfold_codes([body], values, [d])
    assert not beyond
    assert good.all()
    assert torch.equal(read, codes.sum(0).float())
    digits, size = group(base)
    first = codes.sum(0).tolist()[:digits]
    number = int.from_bytes(body[1 : 1 + size].numpy().tobytes(), "little")
    assert body[0] == DIGITS
    assert len(body) == 1 + packed_bytes(d, base)
    assert number == sum(digit * base**place for place, digit in enumerate(first))


@pytest.mark.parametrize(("m", "d", "levels"), [(300, 6001, 2), (3, 270_001, 3)])
def test_sums_do_not_depend_on_threads(m, d, levels):
    """Tiles of coordinates and groups of digits shared by two threads; more rows than eight bits count."""
    bits, draw, before = (levels - 1).bit_length(), np.random.default_rng(m), torch.get_num_threads()
    codes = reference.pack(torch.from_numpy(draw.integers(0, levels, (m, d))), bits)
    values = torch.from_numpy(draw.normal(size=m * (levels - 1) + 1).astype(np.float32))
    expected = reference.fold_codes(codes, levels, d)[0]
    mean = reference.unfold_codes([expected], values, [d])[0]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.fold_codes(codes, levels, d)[0], expected)
            assert torch.equal(cpu.unfold_codes([expected], values, [d])[0], mean)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ hostile bytes
CUT: list[Compressor] = [Dense(), QSGD(3), Correlated(), Correlated(levels=3), Correlated("own"), Grid(5), Ternary()]
CUT += [Natural(), Independent(3), CorrelatedOffset(), Rotated(Correlated())]


@pytest.mark.parametrize("code", CUT, ids=repr)
def test_hostile_slices_raise_wire_errors_and_nothing_else(code):
    """Random bytes of the right and of wrong lengths, in front of the addition and behind it."""
    n, d = 4, 45
    u, noise = inputs("gaussian", n, d), np.random.default_rng(1)
    rnd = round_of(code, u)
    slices = code.slices(d, rnd)
    (lo, hi), refused = slices.bounds(3)[1], 0
    part, size = slices.cut(code.encode(u, rnd), lo, hi), slices.length(lo, hi)
    for trial in range(60):
        wide = size + (0 if trial < 40 else int(noise.integers(-size, 3)))
        payload = torch.from_numpy(noise.integers(0, 256, (n, max(wide, 0)), np.uint8))
        bad = Messages(payload, torch.full((n,), payload.shape[1]), part.slots, hi - lo)
        body = torch.from_numpy(noise.integers(0, 256, max(slices.folded(lo, hi) + (wide - size), 0), np.uint8))
        for attempt in (lambda bad=bad: slices.fold(bad, lo), lambda body=body: slices.unfold([body], [(lo, hi)])):
            try:
                attempt()
            except WireError:
                refused += 1
    assert refused > 0


def test_what_is_refused_is_said():
    code, u = Correlated(levels=3), inputs("gaussian", 3, 16)
    rnd = round_of(code, u)
    slices = code.slices(16, rnd)
    part = slices.cut(code.encode(u, rnd), 0, 8)
    with pytest.raises(PayloadError, match=r"a code lies outside 0\.\.2"):
        slices.fold(replace(part, payload=torch.full_like(part.payload, 255)), 0)
    with pytest.raises(LengthError, match="2 slices from coordinate 0 on, of a cohort of 3"):
        slices.fold(part.rows(slice(0, 2)), 0)
    with pytest.raises(PayloadError, match=r"coordinates 0\.\.7: these bytes are no sums of 3 codes"):
        slices.unfold([torch.full((slices.folded(0, 8),), 255, dtype=torch.uint8)], [(0, 8)])
    with pytest.raises(LengthError, match="5 bytes of a mean of 8 coordinates, at most 4"):
        slices.unfold([torch.zeros(5, dtype=torch.uint8)], [(0, 8)])
    with pytest.raises(PayloadError, match="not finite"):
        Dense().slices(2, Round.full(0, 0, 1)).unfold([torch.full((8,), 255, dtype=torch.uint8)], [(0, 2)])


def test_the_zoo_has_all_that_cuts():
    assert {type(code) for code in zoo.COMPRESSORS} >= {type(code) for code in CUT}
