"""Reproductions: the figures they judge by, and the quick version of each.

What is asserted of a quick version is the direction of a claim, or a law (a step of theory's is stable), never a size.
Seeds are fixed, so nothing here can fail by chance.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from test_cli import shoal  # noqa: F401  (a fixture)

from shoal.core import Method
from shoal.errors import ConfigError
from shoal.experiments.expressions import known_names, parse
from shoal.experiments.grid import Grid
from shoal.experiments.reproduce import REPRODUCTIONS, Outcome, load_findings, reproduce
from shoal.experiments.reproduce.cq_checks import gain, limit, stable, trajectory_errors
from shoal.experiments.reproduce.cq_quadratics import CQ, IQ, SHARED, better
from shoal.experiments.reproduce.study import Ratio, above, bits, curvature, interval, ratio, where
from shoal.experiments.sweep import table
from shoal.problems import Quadratics
from shoal.theory import Constant, Setting, Smoothness


def runs(*spent: float, stopped: str = "target", **fields: object) -> list[dict]:
    return [{"seed": k, "up_bits": one, "stopped": stopped, **fields} for k, one in enumerate(spent)]


def test_ratios_over_seeds():
    """Seed by seed; an interval over one seed is a point; who did not arrive makes a bound, or no figure."""
    found = ratio(runs(20, 40, 80), runs(10, 20, 40))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert found.beats(1.9) is True
    assert str(found) == "2"
    spread = interval([math.log(2), math.log(8)])
    assert spread.value == pytest.approx(4)
    assert spread.low == pytest.approx(4 * math.exp(-12.7062 * math.log(2)), rel=1e-4)  # t(0.975, 1) = 12.7062
    single = interval([math.log(3)])
    assert (single.low, single.high) == pytest.approx((3, 3))
    bound = ratio(runs(20, stopped="rounds"), runs(10))
    assert str(bound) == "> 2"
    assert (bound.beats(), bound.beats(3)) == (True, None)
    nowhere = ratio(runs(20), runs(10, stopped="rounds"))
    assert (str(nowhere), nowhere.beats()) == ("-", None)
    assert bits(runs(1000, stopped="bits")) == "not in 1"
    assert above(Ratio(3, 2.5, 4), Ratio(2, 1, 2.4)) is True
    assert above(Ratio(3, 2.5, 4), Ratio(5, 4.5, 6)) is False
    assert above(Ratio(3, 2.5, 4), Ratio(2, 1, 2.6)) is None


def test_verdicts():
    assert [better(v) for v in ([True, True], [True, None], [None, None], [None, False], [True, False])] == [
        "agrees", "in part", "undecided", "disagrees", "in part",
    ]  # fmt: skip


def test_the_largest_stable_multiple():
    """Up to the first multiple that fails on any seed, whatever larger ones do."""
    problem = {"problem.clients": 2, "problem.dim": 4, "problem.noise": 0.0, "problem.lam": 0.1}
    calm, wild = problem | {"value": -1.0, "grad_norm_sq": 0.0}, problem | {"value": 1e9, "grad_norm_sq": 0.0}
    rows = [*runs(1, 1, multiple=1.0, **calm), *runs(1, multiple=2.0, **calm), *runs(1, multiple=2.0, **wild)]
    assert stable([*rows, *runs(1, multiple=4.0, **calm)]) == 1.0
    assert stable([*runs(1, multiple=1.0, stopped="diverged", **calm)]) == 0.0


def test_the_ratio_that_is_claimed():
    """7.29 with the constant d/(4n), which is not omega/n; with the right one 12.86."""
    assert limit(0.25) == pytest.approx(7.287, abs=0.001)
    assert limit(1.0) == pytest.approx(12.86, abs=0.01)
    assert limit(1.0) / 1.2 < gain(1.0, 1e-9) < limit(1.0), "runs keep p above a floor"
    assert gain(1.0, 1.0) == pytest.approx(1.0)


def test_errors_along_a_trajectory():
    """IQ's is (d-1)/n for every input; where clients agree CQ's is at most d/n^2."""
    independent, own, shared = trajectory_errors(Quadratics(n=4, d=16, noise=0.0, lam=0.1), 5)
    assert independent == pytest.approx(15 / 4, rel=1e-6)
    assert 0.0 < own <= 1.0
    assert 0.0 < shared <= 1.0
    assert trajectory_errors(Quadratics(n=4, d=16, noise=0.5, lam=0.1), 5)[0] == pytest.approx(15 / 4, rel=1e-6)


def test_the_command(shoal, tmp_path):  # noqa: F811
    listed = shoal("reproduce", "--list")
    assert listed.status == 0
    assert all(name in listed.out for name in REPRODUCTIONS)
    assert "none of them" in shoal("reproduce", "cq-ration").error
    assert "which one" in shoal("reproduce").error
    assert "no such file" in shoal("reproduce", "cq-logistic", "--quick", "--data", "w8a").error
    done = shoal("reproduce", "cq-heterogeneity", "--quick", "--out", "here")
    assert done.status == 0
    report = (tmp_path / "here" / "cq-heterogeneity-quick" / "report.md").read_text()
    facts = json.loads((tmp_path / "here" / "cq-heterogeneity-quick" / "findings.json").read_text())
    assert facts["findings"][1]["verdict"] == "agrees"
    assert facts["findings"][1]["figure"] in report
    assert facts["command"] == "shoal reproduce cq-heterogeneity --quick"
    assert done.out.count("known from") == 1
    assert "cq-heterogeneity" in done.out


def test_files_that_do_not_come_along(tmp_path):
    """By the beginning of their names; the report's command names them without their folder."""
    for name in ("w8a.txt", "a9a"):
        (tmp_path / name).write_text("".join(f"{1 - 2 * (i % 2)} {1 + i % 4}:1\n" for i in range(40)))
    paths = [tmp_path / "w8a.txt", tmp_path / "a9a"]
    names = [g.run["problem.name"] for g in REPRODUCTIONS["cq-logistic"].grids(True, paths)]
    assert names == ["phishing", "mushrooms", str(paths[0])]
    names = [g.run["problem.name"] for g in REPRODUCTIONS["marina-classification"].grids(False, paths)]
    assert names == ["mushrooms", "phishing", *map(str, paths)]
    names = [g.run["problem.name"] for g in REPRODUCTIONS["marina-classification"].grids(True, paths[1:])]
    assert names == ["mushrooms", str(paths[1])]


def test_the_autoencoder_needs_its_folder_but_not_quick(shoal, tmp_path):  # noqa: F811
    refused = shoal("reproduce", "permk-autoencoder")
    assert "permk-autoencoder needs MNIST: --data FOLDER, or --quick" in refused.error
    with pytest.raises(ConfigError, match="needs MNIST"):
        reproduce(REPRODUCTIONS["permk-autoencoder-1000"], tmp_path / "out", data=())
    assert "holds no train-images" in shoal("reproduce", "permk-autoencoder", "--data", ".").error
    grids = REPRODUCTIONS["permk-autoencoder"].grids(True, [])
    assert {grid.run["problem.data"] for grid in grids} == {"mushrooms"}
    assert [grid.run["problem.similarity"] for grid in grids] == [0.0] * 3 + [1.0] * 3


def test_the_autoencoders_steps_at_1000_clients_leave_out_what_cannot_arrive(tmp_path, monkeypatch):
    """They begin at a quarter of 1/L_-, theory's own apart, and end where gradient descent would diverge."""
    monkeypatch.setattr("shoal.experiments.reproduce.study.target", lambda problem, relative: 1.0)
    whole = [point for grid in REPRODUCTIONS["permk-autoencoder"].grids(False, [tmp_path]) for point in grid.points()]
    assert len(whole) == 5 * 3 * 8 * 3
    grids = REPRODUCTIONS["permk-autoencoder-1000"].grids(False, [tmp_path])
    points = [point for grid in grids for point in grid.points()]
    assert len(points) == 5 * (5 + 5 + 5)
    for far in (0.0, 0.17):  # L_± / L_-, as measured for p-hat = 1 and 0
        one = Constant(1.0, "estimate")
        constants = Smoothness(minus=one, plus=one, pm=Constant(far, "estimate"), tilde=one, max=one)
        for name in ("PermK", "RandK", "TopK"):
            mine = [point for point in points if name in point.method and point.problem.similarity == 0.0]
            gamma = parse(mine[0].method, known_names(), Method).step_size(Setting(1000, 25088, constants)).gamma
            tried = sorted(gamma * point.multiple for point in mine)
            assert 1.9 < tried[-1] < 17
            assert (tried[0] if name == "PermK" and far == 0.0 else tried[1]) < (1.1 if name == "PermK" else 0.6)
            assert name == "TopK" or tried[0] == gamma


def test_a_report_says_what_was_seen_of_the_constants(tmp_path):
    """Beside what the problem states, largest first over the runs that did not diverge."""
    what = replace(REPRODUCTIONS["cq-stability"], grids=three, judge=lambda rows, quick: Outcome(()))
    reproduce(what, tmp_path, workers=0)
    rows = table(tmp_path)
    (listing,) = curvature(rows)
    (line,) = listing.rows
    exact, seen = rows[0]["L_minus"], max(row["L_minus_seen"] for row in rows)
    assert line[:3] == ("quadratics", f"{exact:.4g} (exact)", f"{seen:.4g}")
    assert "| L₋, seen |" in (tmp_path / "report.md").read_text()
    far = [row | {"L_minus_seen": 1e9, "stopped": "diverged"} for row in rows]
    assert curvature(rows + far)[0].rows == listing.rows


def test_a_failed_point_gives_no_verdict(tmp_path, monkeypatch):
    def no(*args: object, **more: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("shoal.experiments.sweep.simulate", no)
    few = replace(REPRODUCTIONS["cq-stability"], grids=three)
    with pytest.raises(ConfigError, match="3 of 3 points have no result"):
        reproduce(few, tmp_path, workers=0)
    assert load_findings(tmp_path) is None


def three(quick, data):
    """A grid of three points."""
    return [Grid.of(run={"method": "GD()", "problem.name": "quadratics", "rounds": 3}, over={"seed": (0, 1, 2)})]


ANY = {"agrees", "in part", "undecided", "disagrees"}
HOLDS = {  # the verdicts that a quick version must reach, finding by finding
    "cq-quadratics-zero": ({"agrees", "in part"}, {"answered"}),
    "cq-quadratics-positive": ({"answered"},),
    "cq-permk": ({"answered"},),
    "cq-ratio": ({"in part"}, {"agrees"}),
    "cq-heterogeneity": ({"answered"}, {"agrees"}),
    "cq-parity": ({"answered"},),
    "cq-stability": ({"answered"},),
    "cq-logistic": ({"agrees"},),
    "permk-quadratics": ({"agrees"}, ANY, {"agrees"}),
    "permk-quadratics-1000": ({"agrees"}, ANY, ANY),
    "permk-quadratics-10000": ({"agrees"}, ANY, ANY),
    "permk-autoencoder": ({"agrees"}, {"in part"}, {"agrees"}),
    "permk-autoencoder-1000": ({"agrees"}, ANY, ANY),
    "marina-classification": ({"agrees"}, {"agrees", "undecided"}, {"agrees"}, {"agrees", "undecided"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_the_quick_version(name, tmp_path):
    """Every run arrives, or is in a table; the verdicts are those above; done twice, nothing is run again."""
    outcome = reproduce(REPRODUCTIONS[name], tmp_path / name, quick=True, workers=0)
    assert len(outcome.findings) == len(HOLDS[name])
    for finding, verdicts in zip(outcome.findings, HOLDS[name], strict=True):
        assert finding.verdict in verdicts, finding
    assert load_findings(tmp_path / name) is not None
    if name == "cq-heterogeneity":
        return
    rows = table(tmp_path / name)
    assert reproduce(REPRODUCTIONS[name], tmp_path / name, quick=True, workers=0) == outcome
    if name == "cq-quadratics-positive":
        assert (
            ratio(where(rows, method=IQ, problem__noise=0.05), where(rows, method=SHARED, problem__noise=0.05)).low > 1
        )
    if name == "cq-parity":
        sevens, eights = (where(rows, method=CQ, problem__clients=n) for n in (7, 8))
        assert ratio(sevens, eights).value > 1
    if name == "cq-stability":
        assert all(stable(where(rows, method=row["method"])) >= 1.0 for row in rows), "theory's step is stable"
