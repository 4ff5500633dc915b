"""Compressors made of compressors: constants in closed form, layouts byte by byte, and runs at theory steps.

Their laws, special inputs and hostile bytes are in the battery of compressors; what is here is exact.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import composition
import numpy as np
import pytest
import torch
from test_compressors import ab_bound, correlated_inputs, stated, variance
from zoo import CONVEX, FAMILIES, MIXED, inputs, rows_of

import shoal
from shoal.compressors import (
    QSGD,
    Composed,
    Correlated,
    Dense,
    Independent,
    PerLayer,
    PermK,
    RandK,
    Scaled,
    TopK,
)
from shoal.compressors.wrap import joined
from shoal.core import Compressor
from shoal.errors import ConfigError, LengthError, NonFiniteError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.messages import Round
from shoal.methods import EF21, Diana, Marina
from shoal.problems import Quadratics
from shoal.theory import AB

SHAPES = [(5, 7), (4, 8), (7, 3), (6, 3), (5, 5), (1, 4)]


# ------------------------------------------------------------------------------------------------ composed
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("inner", [RandK(1), Independent(), QSGD(1), QSGD(3)], ids=repr)
def test_constants_around_permk(inner, n, d, family):
    """The exact error: PermK's, and (1/n^2) sum_i E s^2 Var Q_i, the quantizers being independent of each other. The
    stated bound is never exceeded, and reached where omega is an equality for every vector: by every input if n
    divides d or exceeds it, else by those that have but the coordinates of the last block."""
    c, u = Composed(PermK(), inner), inputs(family, n, d).double().numpy()
    if d > n and d % n:
        u[:, : d - d % n] *= family in ("gaussian", "cauchy")
    rounding = (variance(c, u) - variance(PermK(), u)).sum() / n**2
    exact = ab_bound(PermK().ab(n, d), u) + rounding
    bound = ab_bound(c.ab(n, d), u)
    assert exact <= bound + 1e-9 * (u**2).sum()
    if isinstance(inner, RandK | Independent) and (d < n or d % n == 0 or family not in ("gaussian", "cauchy")):
        assert exact == pytest.approx(bound, abs=1e-9 * (u**2).sum() + 1e-300)


@pytest.mark.parametrize("inner", [RandK(1), RandK(2), Independent(), QSGD(2)], ids=repr)
def test_omega_around_randk(inner):
    """(1 + omega_1) (1 + omega_2) - 1, with equality where the inner omega is one."""
    c = Composed(RandK(3), inner)
    for family in FAMILIES[:-1]:
        u = inputs(family, 4, 6).double().numpy()
        error, bound = variance(c, u).sum(1), c.omega(6) * (u**2).sum(1)
        assert (error <= bound * (1 + 1e-12)).all()
        if not isinstance(inner, QSGD):
            assert np.allclose(error, bound, rtol=1e-12)
    assert c.ab(4, 6).a == pytest.approx(c.omega(6) / 4)


def test_around_permk_nothing_but_rounding_is_lost_where_clients_agree():
    """At d >= n and equal inputs each coordinate's error is that of one rounding: E||err||^2 = omega(ceil(d/n)) M."""
    u = correlated_inputs("homogeneous", 5, 12)
    c = Composed(PermK(), Independent())
    assert ab_bound(c.ab(5, 12), u) == pytest.approx(2 * (u[0] ** 2).sum())


def test_composed_bytes_are_the_inner_ones_of_what_is_kept():
    """QSGD's message of client i's coordinates, ascending, under a fork of the round."""
    u, rnd = inputs("gaussian", 3, 7), Round.full(5, 0, 3)
    c = Composed(PermK(), QSGD(3))
    kept = PermK().decode(PermK().encode(torch.ones(3, 7), rnd), rnd)
    assert kept.sum(0).tolist() == [3.0] * 7
    for i, row in enumerate(rows_of(c.encode(u, rnd))):
        block = u[i, kept[i] > 0][None]
        one = rnd.rows(torch.tensor([i])).fork("Composed")
        assert [row] == rows_of(QSGD(3).encode(block, one))


def test_composed_has_the_constants_that_hold():
    assert hasattr(Composed(RandK(2), QSGD(1)), "omega")
    assert not hasattr(Composed(PermK(), QSGD(1)), "omega")
    with pytest.raises(ConfigError, match="omega"):
        Diana(Composed(PermK(), QSGD(1)))
    for outer, inner, match in ((TopK(2), QSGD(1), "outer"), (PermK(), PermK(), "inner"), (PermK(), Dense(), "inner")):
        with pytest.raises(ConfigError, match=match):
            Composed(outer, inner)
    with pytest.raises(ConfigError, match=r"k must be in 1\.\.2"):
        Composed(PermK(), RandK(3)).check(5, 12)


def test_composed_names_the_client_whose_rounding_overflows():
    """No entry overflows when scaled, but the norm of the block does."""
    u = torch.zeros(2, 8)
    u[1] = 1.2e38
    with pytest.raises(NonFiniteError, match=r"client 1, round 0.*overflows"):
        Composed(PermK(), Independent()).encode(u, Round.full(0, 0, 2))


def test_composed_reads_its_own_message_where_entries_are_large(monkeypatch):
    """Only there can rounding overflow: no compressor makes 2^64 times as much of an entry."""
    read, decode = [], QSGD.decode
    monkeypatch.setattr(QSGD, "decode", lambda self, msgs, rnd: (read.append(msgs), decode(self, msgs, rnd))[1])
    for size, times in ((1.0, 0), (2.0**60, 0), (2.0**64, 1), (1e30, 1)):
        read.clear()
        Composed(PermK(), QSGD(3)).encode(torch.full((2, 8), size), Round.full(0, 0, 2))
        assert len(read) == times


# ------------------------------------------------------------------------------------------------ scaled
@pytest.mark.parametrize("inner", [RandK(2), Independent(), QSGD(2), Composed(RandK(3), Independent())], ids=repr)
def test_alpha_of_scaled(inner):
    """E||Q/(1+omega) - u||^2 = Var Q/(1+omega)^2 + (omega/(1+omega))^2 ||u||^2 <= (1 - alpha) ||u||^2."""
    alpha = Scaled(inner).alpha(6)
    assert alpha == pytest.approx(1 / (1 + inner.omega(6)))
    for family in FAMILIES[:-1]:
        u = inputs(family, 4, 6).double().numpy()
        size = (u**2).sum(1)
        error = alpha**2 * variance(inner, u).sum(1) + (1 - alpha) ** 2 * size
        assert (error <= (1 - alpha) * size * (1 + 1e-12)).all()
        if not isinstance(inner, QSGD):
            assert np.allclose(error, (1 - alpha) * size)


def test_scaled_sends_the_inner_bytes():
    u, rnd = inputs("gaussian", 4, 9), Round.full(2, 0, 4)
    msgs = Scaled(RandK(3)).encode(u, rnd)
    assert torch.equal(msgs.payload, RandK(3).encode(u, rnd).payload)
    assert torch.allclose(Scaled(RandK(3)).decode(msgs, rnd), RandK(3).decode(msgs, rnd) / 3)
    for inner in (TopK(2), Correlated(), PermK()):
        with pytest.raises(ConfigError, match="unbiased"):
            Scaled(inner)
    with pytest.raises(ConfigError, match="no omega"):
        Scaled(Correlated("own", blocks=2)).check(4, 9)


# ------------------------------------------------------------------------------------------------ layers
def test_layout_of_layers():
    """A uint32 for PermK, whose blocks differ; none for RandK; then the messages one behind the other."""
    u, rnd = inputs("gaussian", 3, 9), Round.full(1, 0, 3)
    c = PerLayer((4, None), (PermK(), RandK(2)))
    first = rows_of(PermK().encode(u[:, :4].contiguous(), rnd.fork("PerLayer.0")))
    second = rows_of(RandK(2).encode(u[:, 4:].contiguous(), rnd.fork("PerLayer.1")))
    expected = [struct.pack("<I", len(a)) + a + b for a, b in zip(first, second, strict=True)]
    assert rows_of(c.encode(u, rnd)) == expected
    assert c.capacity(3, 9) == 4 + 8 + 8
    assert PerLayer([4, 5], [RandK(1), QSGD(1)]).capacity(3, 9) == 4 + (4 + 2), "no length travels"


def test_layers_that_do_not_add_up_are_refused():
    u, rnd = inputs("gaussian", 3, 9), Round.full(1, 0, 3)
    c = PerLayer((4, None), (PermK(), RandK(2)))
    msgs = c.encode(u, rnd)
    for wrong in (0, 5, 12, 2**31, 2**32 - 4):
        payload = msgs.payload.clone()
        payload[1, :4] = torch.tensor(list(struct.pack("<I", wrong)), dtype=torch.uint8)
        with pytest.raises(LengthError):
            c.decode(replace(msgs, payload=payload), rnd)


LAYERS = [
    [AB(1.0, 1.0), AB(0.4, 0.0)],
    [AB(3.0, 0.5, 0.2), AB(0.4, 0.3, 0.1), AB(2.0, 2.0)],
    [AB(2.0, 0.0, other=AB(4.0, 3.5)), AB(1.0, 1.0)],
    [Correlated("own").ab(5, 4), PermK().ab(5, 8), RandK(2).ab(5, 3)],
]


@pytest.mark.parametrize("layers", LAYERS, ids=len)
def test_joined_constants_bound_the_sum(layers):
    """For random vectors, near-equal ones and one active client, each joined inequality exceeds the layers' sum."""
    rng, n = np.random.default_rng(5), 5
    chain = [joined(layers)]
    while chain[-1].other:
        chain.append(chain[-1].other)
    for _ in range(300):
        sizes = 10 ** rng.uniform(-3, 1, len(layers))
        kinds = rng.choice(["homogeneous", "near-homogeneous", "one active client", "gaussian"], len(layers))
        blocks = [s * rng.normal() * correlated_inputs(k, n, 3) for s, k in zip(sizes, kinds, strict=True)]
        best = sum(
            min(ab_bound(ab, u) for ab in ([e, e.other] if e.other else [e]))
            for e, u in zip(layers, blocks, strict=True)
        )
        u = np.concatenate(blocks, 1)
        for ab in chain:
            assert best <= ab_bound(ab, u) * (1 + 1e-9) + 1e-12


def test_constants_of_layers():
    both = PerLayer((4, None), (RandK(1), Independent()))
    assert both.omega(10) == max(4 - 1, 6 - 1)
    assert PerLayer((4, None), (TopK(1), TopK(3))).alpha(10) == min(1 / 4, 3 / 6)
    mixed = PerLayer((4, None), (RandK(1), TopK(3)))
    assert not any(hasattr(mixed, constant) for constant in ("omega", "alpha", "ab"))
    weak = PerLayer((4, None), (RandK(1), Correlated("own", numerical=True)))
    assert {ab.evidence for ab in stated(weak, 5, 10)} == {"numerical"}


@pytest.mark.parametrize(("sizes", "codes", "match"), [
    ((4,), (Dense(), Dense()), "one compressor"), ((), (), "one compressor"), ((None, None), (Dense(),) * 2, "None"),
    ((0, 3), (Dense(), Dense()), ">= 1"), ((True,), (Dense(),), ">= 1"), ((4, None), (Dense(), Correlated()), "own"),
])  # fmt: skip
def test_impossible_layers(sizes, codes, match):
    with pytest.raises(ConfigError, match=match):
        PerLayer(sizes, codes)


def test_layers_fit_or_say_so():
    for sizes, d in (((4, 5), 10), ((4, None), 4), ((4, 5), 3)):
        with pytest.raises(ConfigError, match=f"d={d}"):
            PerLayer(sizes, (Dense(), Dense())).check(3, d)


def test_expressions_hold_tuples_of_compressors():
    text = "Marina(PerLayer((4, None), (RandK(1), Composed(PermK(), QSGD(levels=3)))))"
    method = parse(text, known_names(), shoal.core.Method)
    assert method == Marina(PerLayer((4, None), (RandK(1), Composed(PermK(), QSGD(3)))))
    assert parse(compact(method), known_names(), shoal.core.Method) == method
    assert compact(PerLayer((None,), (RandK(1),))) == "PerLayer((None,), (RandK(1),))"


# ------------------------------------------------------------------------------------------------ runs
@pytest.mark.parametrize("method", [
    Marina(Composed(PermK(), QSGD(7)), p=0.3), Marina(Correlated(blocks=2, levels=4), p=0.3),
    Marina(PerLayer((4, None), (RandK(1), QSGD(3))), p=0.3), EF21(Scaled(RandK(5))),
    Diana(Composed(RandK(5), QSGD(3))),
], ids=repr)  # fmt: skip
def test_runs_converge_at_their_theory_steps(method):
    """To ||grad f||^2 <= 1e-6 from about 1, at the same bits for all clients at once and one at a time."""
    run = shoal.simulate(CONVEX, method, rounds=20000, target=1e-6)
    assert (run.stopped, run.step.evidence) == ("target", "proved")
    short = [shoal.simulate(MIXED, method, rounds=40, chunk=chunk).sha256 for chunk in (None, 1)]
    assert short[0] == short[1]


def test_a_quantizer_inside_permk_saves_bits():
    """At n = 16, d = 1024 and nearly equal clients, 5-bit blocks reach the target on fewer bits than PermK's floats
    and than one correlated bit a coordinate. Means of three seeds, with room below what
    was measured: 97, 233 and 545 kbit."""
    problem = Quadratics(n=16, d=1024, noise=0.02, lam=1e-2)

    def bits(compressor: Compressor) -> float:
        runs = [shoal.simulate(problem, Marina(compressor), rounds=4000, target=1e-2, seed=s) for s in range(3)]
        assert all(run.stopped == "target" for run in runs)
        return float(np.mean([run.rows[-1].up_bits for run in runs]))

    composed = bits(Composed(PermK(), QSGD(15)))
    assert 1.2 * composed < bits(PermK())
    assert 4.0 * composed < bits(Correlated())


def test_the_battery_knows_every_length():
    """`supports` covers all clients: the probabilities add up to one, and factor times share is one coordinate."""
    for c in (Composed(PermK(), QSGD(1)), Composed(RandK(3), QSGD(1)), Correlated(blocks=2)):
        for n, d in SHAPES[:5]:
            laws = composition.supports(c, n, d)
            assert sum(p for p, _, _ in laws) == pytest.approx(1.0)
            assert sum(p * size / d * factor for p, size, factor in laws) == pytest.approx(1.0), "unbiased"
