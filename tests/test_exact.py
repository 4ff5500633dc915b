"""The error of correlated quantization without measuring: in O((m + n) d) against the sums as they are defined.

Nothing here is statistical. `test_mean.test_errors_that_are_known_exactly` compares with rounds of the real code.
"""

from __future__ import annotations

import itertools

import numpy as np
import offset_laws
import pytest
import torch
import zoo
from test_strata import scales_of

from shoal.compressors import Correlated, CorrelatedOffset, PermK
from shoal.compressors.correlated import exact_error
from shoal.compressors.strata import strata_error
from shoal.experiments import exact as module
from shoal.experiments.exact import exact


def by_definition(z: np.ndarray, step: np.ndarray, n: int) -> float:
    """The three sums of `strata_errors`, with every stratum of every client, in O(m n d)."""
    m, y = len(z), z - np.floor(z)
    f = n * y - np.floor(n * y)
    total = (step[:, None] ** 2 * f * (1.0 - f)).sum() / (m * m * n)
    if n == 1:
        return float(total)
    x = np.clip(n * y[:, :, None] - np.arange(n), 0.0, 1.0) * step[:, None, None]
    apart = (x - x.mean(0)).var(axis=2).sum() / (m * (n - 1))
    return float(total + apart + x.var(axis=2).sum() * (n - m) / (m * m * (n - 1)))


def hard_inputs(n: int, d: int):
    """The zoo's, clients that agree up to their last bits, all but one that agree, grid points, ends of the range."""
    rng = np.random.default_rng(n)
    common = rng.normal(size=d)
    yield from (zoo.inputs(family, n, d).double().numpy() for family in zoo.FAMILIES)
    yield from (common + spread * rng.normal(size=(n, d)) for spread in (1e-2, 1e-5, 1e-8))
    yield np.vstack([np.full((1, d), 5.0), np.tile(common, (n - 1, 1))])
    yield np.round(rng.normal(size=(n, d)) * 4) / 4
    yield np.where(np.arange(n)[:, None] % 2, common, -common)
    yield 1e30 * rng.normal(size=(n, d))


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_fast_sums_are_those_of_the_definition(n):
    """Within 1e-9 of it, and 1e-15 step^2 a coordinate: what the rounding of z leaves known of an error near 0."""
    for u in hard_inputs(n, 12):
        tops = np.abs(u).max(1)
        for r in (np.full(n, tops.max()), np.linalg.norm(u, axis=1), tops, np.full(n, tops.max() * 1.1)):
            for levels, m in itertools.product((2, 3, 6), {1, (n + 1) // 2, n}):
                step = 2 * r[:m] / (levels - 1)
                z = (u[:m] + r[:m, None]) / np.where(step > 0, step, 1)[:, None]
                expected = by_definition(z, step, n)
                slack = 1e-9 * expected + 1e-15 * u.shape[1] * float((step**2).max())
                assert abs(strata_error(z, step, n) - expected) <= slack


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f != "zeros"])
@pytest.mark.parametrize("code", [Correlated(blocks=2), Correlated("full", levels=4, blocks=3)], ids=repr)
def test_blocks_are_cohorts(code, family):
    """Groups of the shared permutation: the mean over all cohorts of each group's size (docs/derivations/strata.md)."""
    for n, d in ((3, 5), (6, 4)):
        u = zoo.inputs(family, n, d)
        rows, total = u.double().numpy(), 0.0
        r = np.full(n, np.abs(rows).max()) if code.agrees else np.linalg.norm(rows, axis=1)
        sizes = [len(part) for part in np.array_split(np.arange(n), code.blocks)]
        for size in sizes:
            cohorts = [list(c) for c in itertools.combinations(range(n), size)]
            for cohort in cohorts:
                here = rows[cohort]
                error = exact_error(here, r[cohort], code.levels) + ((here.mean(0) - rows.mean(0)) ** 2).sum()
                total += error / len(cohorts) / len(sizes)
        assert exact(code, u) == pytest.approx(total, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("code", [CorrelatedOffset(), CorrelatedOffset("random", "own", 3), CorrelatedOffset("even")])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_offsets_are_integrated(code, family):
    """Against 512 midpoints, which lose a factor of 2e-6 or so, 1e-5 where an error jumps between them."""
    for n, d in ((3, 5), (6, 4)):
        u = zoo.inputs(family, n, d)
        rows = u.double().numpy()
        r = np.linalg.norm(rows, axis=1) if code.scale == "own" else np.full(n, np.abs(rows).max())
        assert exact(code, u) == pytest.approx(offset_laws.exact_error(code, rows, r), rel=2e-5, abs=1e-14)


def test_what_is_known_and_what_is_not(monkeypatch):
    u = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32))
    assert exact(PermK(), u) is None
    assert exact(Correlated("own", blocks=2), u) is None
    codes = [Correlated(), Correlated("own"), Correlated("max", levels=5), Correlated(blocks=2), CorrelatedOffset()]
    whole = [exact(code, u) for code in codes]
    monkeypatch.setattr(module, "PIECE", 300)  # in pieces of the coordinates: the same
    assert [exact(code, u) for code in codes] == pytest.approx(whole, rel=1e-12)
    assert whole[:2] == pytest.approx(
        [exact_error(u.double().numpy(), scales_of(c, u.double().numpy())) for c in codes[:2]]
    )
    monkeypatch.setattr(module, "WORK", 4000)
    assert exact(Correlated(), u) == whole[0]
    assert exact(CorrelatedOffset(), u) is None
