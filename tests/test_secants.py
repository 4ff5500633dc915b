"""Smoothness constants seen along a run: against numpy, below the exact ones, and the same however a run is cut."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import zoo

from shoal import Quadratics, report, simulate
from shoal.problems.secants import EVERY, FIRST, Secant, Seen, Trail
from shoal.runtimes import Local
from shoal.runtimes.rounds import Watch

METHODS = ["GD()", "Marina(PermK())", "EF21(TopK(2))", "VRMarina(RandK(2), batch=1)"]


def plain(before: np.ndarray, after: np.ndarray, length: float) -> list[float]:
    """The definition, in float64 at once."""
    D = after.astype(np.float64) - before
    squares = [np.square(D.mean(0)).sum(), np.square(D).sum(1).mean(), np.square(D - D.mean(0)).sum(1).mean()]
    return [math.sqrt(square) / length for square in squares]


@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 7), (40, 1300), (3, 5000)])
def test_a_secant_is_the_definition_whatever_the_chunks_and_threads(n, d):
    draw = np.random.default_rng(n).standard_normal((2, n, d)).astype(np.float32)
    x, y = torch.zeros(d), torch.full((d,), 0.25)
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for chunk in (1, 3, n):
            secant = Secant(x, y)
            for lo in range(0, n, chunk):
                secant.add(*torch.from_numpy(draw[:, lo : lo + chunk].copy()))
            found.add(secant.seen())
    torch.set_num_threads(1)
    (seen,) = found
    # What may be rounding is taken off: at most 2^-23 of gradients that are about as long as their differences.
    assert seen == pytest.approx(plain(*draw, 0.25 * math.sqrt(d)), rel=1e-5, abs=1e-5)
    if n == 1:
        assert seen.pm == 0.0


def test_points_that_say_nothing_are_left_out():
    rows, x = torch.ones(2, 3), torch.zeros(3)
    for y in (x, torch.full((3,), math.nan), torch.full((3,), math.inf)):
        secant = Secant(x, y)
        secant.add(rows, 2 * rows)
        assert secant.seen() is None
    near, huge = Secant(x, x + 1), Secant(x, x + 1)
    near.add(rows, rows * (1 + 2.0**-14))  # the last bits of the gradients are a thousandth of what they moved
    huge.add(rows, rows * math.inf)
    assert near.seen() is None
    assert huge.seen() is None
    assert Secant(x, x + 1).seen() is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", [zoo.MIXED, Quadratics(n=4, d=9, lam=0.1), *zoo.PROBLEMS[3:5]], ids=repr)
def test_what_a_run_sees_is_below_what_is_proved(problem, method):
    run = simulate(problem, method, rounds=60, step=0.5 / float(problem.smoothness().minus))
    stated = problem.smoothness()
    for name, seen in run.seen.facts().items():
        assert seen <= getattr(stated, name) * (1 + 1e-6), name
        assert seen.status == "estimate"
    assert run.seen.minus > 0.0
    if stated.pm == 0.0:
        assert run.seen.pm == 0.0


def test_gradient_descent_sees_the_top_of_the_spectrum():
    """Started along T's last eigenvector, which all A_i share, every secant has the exact constants."""
    problem = Quadratics(n=6, d=12, noise=0.3, lam=0.1, seed=3)
    top = torch.from_numpy(np.sin(np.arange(1, 13) * 12 * np.pi / 13)).float()
    trail = Trail()
    watch = Watch(problem, Local(6), None, trail)
    for point in (problem.start(), problem.start() + top):
        watch.evaluate(point)
    L = problem.smoothness()
    assert trail.seen == pytest.approx((L.minus, L.plus, L.pm), rel=1e-5)


def test_the_same_is_seen_however_the_run_is_cut(tmp_path, monkeypatch):
    """In chunks, with nothing remembered between points, at every third round, and resumed in the middle."""
    options = {"rounds": 70, "seed": 4, "every": 3}
    whole = simulate(zoo.MIXED, "Marina(RandK(2), p=0.3)", **options)
    assert simulate(zoo.MIXED, "Marina(RandK(2), p=0.3)", chunk=2, **options).seen == whole.seen
    monkeypatch.setattr(sys.modules["shoal.runtimes.rounds"], "REMEMBERED", 0)
    forgetful = simulate(zoo.MIXED, "Marina(RandK(2), p=0.3)", chunk=2, **options)
    assert (forgetful.seen, forgetful.sha256) == (whole.seen, whole.sha256)
    monkeypatch.undo()

    def cut(row):
        if row.round == 45:
            raise KeyboardInterrupt

    monkeypatch.setattr("shoal.experiments.checkpoint.EVERY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        simulate(zoo.MIXED, "Marina(RandK(2), p=0.3)", out=tmp_path / "run", record=cut, **options)
    again = simulate(zoo.MIXED, "Marina(RandK(2), p=0.3)", out=tmp_path / "run", resume=True, **options)
    assert (again.seen, again.sha256) == (whole.seen, whole.sha256)
    (record,) = report.load(tmp_path / "run").runs
    assert record.seen == whole.seen._asdict()


def test_which_pairs_are_looked_at():
    trail = Trail()
    assert [k for k in range(50) if trail.due(k)] == [*range(1, FIRST + 1), *range(EVERY, 50, EVERY)]
    assert simulate(zoo.MIXED, "GD()", rounds=1, step=1e-30).seen == Seen()
