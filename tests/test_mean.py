"""Mean estimation: what is measured agrees with exact errors, bounds and bytes; inputs, the page, both commands.

Statistical checks run on fixed seeds. Where a measured error is held against an exact one, three half-widths of its 95%
interval are allowed, which is six standard deviations: a false alarm of about 1e-8 for each, were the seed not fixed.
"""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from rich.console import Console
from test_report import Browser, browser  # noqa: F401
from typer.testing import CliRunner

import shoal
from shoal.cli import app, main
from shoal.compressors import Correlated, CorrelatedOffset, Eden, Grid, Independent, PermK, RandK, Rotated, TopK
from shoal.compressors.drive import DISTORTION
from shoal.errors import ConfigError, DataError
from shoal.experiments import bench, vectors
from shoal.experiments.mean import mean_estimation
from shoal.experiments.measurement import bias_z, interval
from shoal.report import choice, mean_text
from shoal.report import mean as page


def rows_of(data, compressors, rounds=200, **options):
    return {row.compressor: row for row in mean_estimation(data, compressors, rounds, **options).points[0].rows}


def near(row, value: float) -> bool:
    return abs(row.error - value) <= 3 * (row.high - row.error) + 1e-9


@dataclass(frozen=True)
class Shrunk(RandK):
    """RandK that returns nine tenths of what it should, and claims to be unbiased."""

    def aggregate(self, msgs, rnd):
        return 0.9 * super().aggregate(msgs, rnd)


# ------------------------------------------------------------------------------------------------ inputs
@pytest.mark.parametrize("family", ["gaussian", "lognormal", "onehot", "cauchy", "identical", "near-identical:0.1"])
def test_made_vectors(family):
    u = vectors.make(family, 6, 500)
    assert u.shape == (6, 500)
    assert u.dtype == torch.float32
    assert torch.equal(u, vectors.make(family, 6, 500))
    assert torch.equal(u, vectors.make(family, 6, 500, seed=1)) is False
    facts = u.double().square().sum(1).mean(), u.double().mean(0).square().sum()
    spread = float(1 - facts[1] / facts[0])
    # near-identical:S has V/M = S^2 (1 - 1/n) / (1 + S^2), here 0.00825; 3000 coordinates put it within a tenth
    expected = {"identical": (0, 1e-12), "near-identical:0.1": (0.0074, 0.0091)}.get(family, (0.3, 1.0))
    assert expected[0] - 1e-12 <= spread <= expected[1]


@pytest.mark.parametrize(
    "family",
    [
        "normal",
        "near-identical",
        "near-identical:",
        "near-identical:x",
        "near-identical:-1",
        "near-identical:inf",
        "near-identical:S",
        "gaussian:2",
    ],
)
def test_unknown_families(family):
    with pytest.raises(ConfigError, match="data"):
        vectors.made(family, 3, 4)


def test_npy_is_read_in_order(tmp_path):
    a, b = np.arange(6.0).reshape(2, 3), np.arange(3, dtype=np.int16)
    np.save(tmp_path / "a.npy", np.asfortranarray(a))
    np.save(tmp_path / "b.npy", b)
    read = vectors.read([tmp_path / "a.npy", tmp_path / "b.npy"])
    assert read.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert read.dtype == torch.float32


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    matrix = torch.arange(6.0).reshape(2, 3)
    save_file({"grads": matrix.to(torch.bfloat16)}, tmp_path / "one.safetensors")
    assert torch.equal(vectors.read([tmp_path / "one.safetensors"]), matrix)
    save_file({"b": torch.ones(2, 2), "a": torch.zeros(4)}, tmp_path / "many.safetensors")
    assert vectors.read([tmp_path / "many.safetensors"]).tolist() == [[0] * 4, [1] * 4]
    save_file({"b": torch.ones(2, 2), "a": torch.zeros(5)}, tmp_path / "uneven.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    for name in ("uneven", "torn"):
        with pytest.raises(DataError, match=name):
            vectors.read([tmp_path / f"{name}.safetensors"])


def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(DataError, match=r"pip install \"shoal\[data\]\"") as error:
        vectors.read([tmp_path / "x.safetensors"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "array", [np.array([[1, np.nan]]), np.array([[1e300]]), np.zeros((2, 2, 2)), np.zeros((0, 3)), np.array([{"a": 1}]),
              np.array(["x"]), np.array([[1j]])],
    ids=["nan", "overflow", "3d", "empty", "object", "text", "complex"],
)  # fmt: skip
def test_unreadable_arrays(tmp_path, array):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=r"x\.npy"):
        vectors.read([tmp_path / "x.npy"])


def test_unreadable_files(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "x.csv").touch()
    for name in ("x.npy", "x.csv", "absent.npy"):
        with pytest.raises(DataError, match=name):
            vectors.read([tmp_path / name])
    for width in (2, 3):
        np.save(tmp_path / f"{width}.npy", np.ones((1, width)))
    with pytest.raises(DataError, match="2 and 3 coordinates"):
        vectors.read([tmp_path / "2.npy", tmp_path / "3.npy"])


# ------------------------------------------------------------------------------------------------ measurements
@pytest.mark.parametrize("family", ["gaussian", "one-hot", "two-hot", "cauchy", "identical"])
def test_errors_that_are_known_exactly(family):
    """RandK, PermK and Independent have bounds with equality; correlated quantization has an exact formula."""
    tight = [RandK(3), PermK(), Independent()]
    correlated = [
        Correlated(),
        Correlated("own"),
        Correlated("max"),
        Correlated(blocks=2),
        Correlated("full", blocks=2),
    ]
    correlated += [CorrelatedOffset(), CorrelatedOffset("even", levels=3)]
    for n, d in ((5, 24), (4, 65)):
        rows = rows_of(zoo.inputs(family, n, d), [*tight, *correlated], 160)
        for compressor in tight:
            row = rows[shoal.experiments.expressions.compact(compressor)]
            assert near(row, row.bound), row
            assert row.exact is None
        for compressor in correlated:
            row = rows[shoal.experiments.expressions.compact(compressor)]
            assert near(row, row.exact), row
            assert row.exact <= row.bound * (1 + 1e-6)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f != "zeros"])
@pytest.mark.parametrize(("n", "d"), [(5, 12), (6, 3), (1, 9), (5, 2)])
def test_the_zoo_stays_below_its_bounds_and_without_bias(family, n, d):
    fitting = [c for c in zoo.COMPRESSORS if zoo.fits(c, n, d)]
    result = mean_estimation(zoo.inputs(family, n, d), fitting, rounds=60)
    assert page.warnings(json.loads(json.dumps(as_record(result)))) == []
    for row in result.points[0].rows:
        assert row.low <= row.error <= row.high
        assert row.bound is None or row.bound >= 0


def test_bits_are_the_bytes():
    n, d = 3, 100
    rows = rows_of(vectors.make("gaussian", n, d), [Correlated(), Correlated("own"), PermK(), RandK(7), TopK(5)], 5)
    # payload, and 32 bits for an agreement; frames of 64 bytes, two of them where a scale is agreed on
    assert rows["Correlated()"].bits * d == pytest.approx(8 * 13 + 32)
    assert rows["Correlated()"].framed_bits * d == pytest.approx(8 * 13 + 32 + 2 * 512)
    assert rows["Correlated(scale='own')"].bits * d == pytest.approx(8 * 13 + 32)
    assert rows["PermK()"].bits * n == pytest.approx(32)
    assert rows["RandK(7)"].framed_bits * d == pytest.approx(32 * 7 + 512)
    assert rows["TopK(5)"].bits * d == pytest.approx(32 * 5 + 8 * 5)
    assert all(min(row.encode_ns, row.decode_ns, row.aggregate_ns) > 0 for row in rows.values())


def test_a_bias_is_found():
    u = vectors.make("gaussian", 4, 50)
    rows = rows_of(u, [Shrunk(25), RandK(25), TopK(25)], 400)
    assert rows["Shrunk(25)"].bias == "found"
    assert rows["RandK(25)"].bias == "none seen"
    assert rows["TopK(25)"].bias == "stated"
    assert rows["TopK(25)"].bias_z > 6
    assert rows["TopK(25)"].bound == pytest.approx(0.5)


def test_events_too_rare_to_be_seen_are_no_bias():
    """QSGD sends a coordinate of 0.001 r once in 1000 messages: 100 messages without it all err to the same side."""
    row = rows_of(torch.tensor([[0.001, 1.0]] * 5), ["QSGD(1)"], 20)["QSGD()"]
    assert row.bias_z > 6
    assert row.bias == "none seen"


def test_a_bias_and_a_broken_bound_are_told():
    result = mean_estimation(vectors.make("gaussian", 4, 50), [Shrunk(25)], 400)
    assert "Shrunk(25)" in page.warnings(as_record(result))[0]
    (point,) = result.points
    wrong = replace(point.rows[0], bias="none seen", bound=point.rows[0].error / 2, evidence="proved")
    broken = replace(result, points=(replace(point, rows=(wrong,)),))
    assert "above the proved bound" in page.warnings(as_record(broken))[0]


@pytest.mark.parametrize("d", [1, 2, 60])
def test_the_bias_check_seldom_cries_wolf(d):
    """4000 draws of unbiased errors: at d = 1 P(z > 6) = P(chi^2_1 > 9.5) = 0.002 in the limit, less at larger d."""
    rng = np.random.default_rng(0)
    z = [bias_z(torch.from_numpy(rng.normal(size=(20, d)).astype(np.float32))) for _ in range(4000)]
    assert np.mean(np.array(z) > 6) < 0.005
    assert bias_z(torch.ones(20, d)) == pytest.approx(190**0.5)
    assert bias_z(torch.zeros(20, d)) == 0.0


def test_intervals_cover():
    """Exponential errors, 4000 intervals: coverage 0.95 within five standard deviations of the count, and skewness."""
    rng = np.random.default_rng(1)
    edges = np.linspace(0, 200, 21).astype(int)[1:]
    hits = [low <= 1 <= high for low, high in (interval(rng.exponential(size=200), edges) for _ in range(4000))]
    assert 0.92 < np.mean(hits) < 0.97


def test_results_are_reproducible():
    u, facts = vectors.make("cauchy", 3, 40), ("error", "low", "high", "bias_z", "bits", "bound", "exact")
    first, again = (rows_of(u, ["Correlated()", "QSGD(7)"], 30, seed=5) for _ in range(2))
    for name, row in first.items():
        assert [getattr(row, f) for f in facts] == [getattr(again[name], f) for f in facts]
    other = rows_of(u, ["QSGD(7)"], 30, seed=6)["QSGD(levels=7)"]
    assert other.error != first["QSGD(levels=7)"].error


def test_extreme_vectors():
    for scale in (1e-30, 1e15):
        rows = rows_of(vectors.make("gaussian", 4, 64) * scale, ["Correlated()", "RandK(8)"], 40)
        assert near(rows["RandK(8)"], 7 / 4)
        assert near(rows["Correlated()"], rows["Correlated()"].exact)
    assert rows_of(vectors.make("identical", 4, 64), ["PermK()"], 40)["PermK()"].error < 1e-12


def test_wrong_settings_come_first():
    u = vectors.make("gaussian", 3, 8)
    with pytest.raises(ConfigError, match="zero"):
        mean_estimation(torch.zeros(3, 8))
    with pytest.raises(ConfigError, match="rounds=1"):
        mean_estimation(u, rounds=1)
    with pytest.raises(ConfigError, match="k must be"):
        mean_estimation(u, ["RandK(9)"])
    with pytest.raises(ConfigError, match="unknown name"):
        mean_estimation(u, ["Randk(2)"])
    with pytest.raises(DataError, match="not finite"):
        mean_estimation(np.full((2, 3), np.inf))


def test_the_defaults_are_unbiased_and_fit():
    for n, d in ((3, 8), (1, 1), (8, 3)):
        rows = rows_of(vectors.make("gaussian", n, d), None, 3)
        assert {"Correlated()", "PermK()", "Independent()"} <= set(rows)
        assert not any("TopK" in name for name in rows)
        assert all(row.bias == "none seen" for row in rows.values())


# ------------------------------------------------------------------------------------------------ the papers' figures
def errors_of(family: str, compressors: list, clients: list[int], d: int, rounds: int) -> dict[str, list]:
    """Of each compressor its measurements along the sweep of n."""
    points = [vectors.made(family, n, d, swept=n) for n in clients]
    result = mean_estimation(points, compressors, rounds, sweep="n")
    return {rows[0].compressor: list(rows) for rows in zip(*(point.rows for point in result.points), strict=True)}


def slope(clients: list[int], rows: list) -> float:
    return float(np.polyfit(np.log(clients), np.log([row.error for row in rows]), 1)[0])


@pytest.mark.slow
def test_correlated_errors_fall_twice_as_fast():
    """arXiv:2203.04925 on equal vectors: 1/n^2 against 1/n; 60 rounds of 1024 coordinates are good for 0.02."""
    clients = [4, 16, 64]
    codes = [Correlated(), Correlated(levels=4), Rotated(Correlated()), Grid(), Rotated(Grid())]
    found = errors_of("identical", codes, clients, 1024, 60)
    for name, rows in found.items():
        assert slope(clients, rows) == pytest.approx(-2.0 if "Correlated" in name else -1.0, abs=0.1), name
    for row in [*found["Correlated()"], *found["Correlated(levels=4)"]]:
        assert near(row, row.exact)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gaussian", "lognormal"])
def test_edens_error_is_the_distortions(family):
    """arXiv:2108.08842: n error = 1 / (1 - D_b) - 1 for every vector, and below one bit with p of them kept.

    That is the law for uniform rotations and high dimension: 1/d, 0.1% here, is allowed on top of six standard errors.
    """
    bits = [0.25, 1, 2, 4, 8]
    codes = [Eden(b) for b in bits]
    for rows, b in zip(errors_of(family, codes, [2, 8], 1024, 60).values(), bits, strict=True):
        kept = min(b, 1) * (1.0 - DISTORTION[max(1, int(b))])
        for n, row in zip((2, 8), rows, strict=True):
            assert abs(n * row.error - (1 / kept - 1)) <= n * 3 * (row.high - row.error) + 2e-3 / kept, (n, b)


@pytest.mark.slow
def test_eden_is_below_rotated_rounding():
    """At the same bits, on skewed vectors: by a factor of 3 or more at 4 bits, and by more for fewer."""
    codes = [Eden(b) for b in (1, 2, 4)] + [Rotated(Grid(2**b)) for b in (1, 2, 4)]
    rows = [rows[0] for rows in errors_of("lognormal", codes, [8], 1024, 60).values()]
    ratios = [plain.low / eden.high for eden, plain in zip(rows[:3], rows[3:], strict=True)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] > 3


# ------------------------------------------------------------------------------------------------ what is written
def as_record(result):
    points = [{**vars(point), "rows": [vars(row) for row in point.rows]} for point in result.points]
    return {"points": points, "sweep": result.sweep, "rounds": result.rounds, "seed": result.seed}


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    points = [vectors.made("near-identical:0.2", n, 64, swept=n) for n in (2, 4, 8)]
    result = mean_estimation(points, ["Correlated()", "PermK()", "RandK(0.1)", "TopK(0.1)"], 40, sweep="n")
    folder = result.save(tmp_path_factory.mktemp("mean") / "swept", command="shoal mean --sweep n=2,4,8")
    page.write(folder)
    return folder


def test_a_folder_is_whole(swept):
    names = {"mean.json", "results.parquet", "figure.png", "figure.pdf", "report.html"}
    assert {file.name for file in swept.iterdir()} == names
    record = page.load(swept)
    assert [point["n"] for point in record["points"]] == [2, 4, 8]
    parquet = pytest.importorskip("pyarrow.parquet").read_table(swept / "results.parquet")
    assert parquet.num_rows == 12
    assert page.is_mean(swept)
    with pytest.raises(ConfigError, match="not empty"):
        mean_estimation(np.ones((2, 3)), ["PermK()"], 2).save(swept)


def test_choices_grow_with_the_budget(swept):
    for point in page.load(swept)["points"]:
        picked = page.choices(point)
        errors = [choice.best["error"] for choice in picked]
        assert errors == sorted(errors, reverse=True)
        assert all(choice.best["bits"] <= choice.budget for choice in picked)
        assert all(choice.best["bias"] == "none seen" for choice in picked)


def synthetic(name: str, bits: float, error: float, half: float = 0.01, bias: str = "none seen") -> dict:
    return {"compressor": name, "bits": bits, "bias": bias, "error": error, "exact": None,
            "low": error * (1 - half), "high": error * (1 + half)}  # fmt: skip


def along(**errors: list[float]) -> list[dict]:
    """Points of a sweep: `a1=[..]` is a compressor "a" of 1 bit with these errors."""
    count = len(next(iter(errors.values())))
    return [
        {"swept": 10.0**i, "rows": [synthetic(key[0], float(key[1:]), values[i]) for key, values in errors.items()]}
        for i in range(count)
    ]


def test_the_map_of_choices():
    points = along(a1=[1, 1, 1], b1=[2, 0.5, 1.001], c2=[3, 3, 0.1], d4=[5, 5, 5])
    points[0]["rows"].append(synthetic("e", 1, 0.01, bias="found"))
    budgets, cells = choice.choice_map(points)
    assert budgets == [1.1, 2.1]
    assert [[c.best["compressor"] for c in row] for row in cells] == [["a", "a"], ["b", "b"], ["a", "c"]]
    assert [row[0].rivals for row in cells] == [[], [], ["b"]]
    assert choice.winners(points) == ["a", "b", "c"]
    assert choice.choice_map([{"swept": 1.0, "rows": [synthetic("e", 1, 1.0, bias="stated")]}]) == ([], [[]])


def test_where_compressors_change_places():
    points = along(a1=[1, 1, 1, 1], b1=[0.1, 0.2, 1.005, 3], c1=[9, 9, 9, 9], d8=[0.01] * 4, e2=[3, 0.1, 3, 0.1])
    said = choice.crossings(points, "n", ["a", "b", "c", "d", "e"])
    assert said[0] == "b beats a up to n 10 and loses to it at n 1000; not told apart at n 100."
    assert "a beats c at every n here." in said
    assert "a beats e at n 1, 100 and loses to it at n 10, 1000." in said
    assert not any("d" in line.split() for line in said)  # eight times the bits: another question
    assert choice.crossings(points, "spread", ["a", "b"])[0].startswith("b (1 bit) beats a (1 bit) up to spread 10")


def test_errors_on_the_theory_line():
    rows = [synthetic("a", 1, 1.0) | {"exact": exact} for exact in (1.02, 1.0, 1.1)]
    assert choice.on_the_line([{"rows": rows}]).startswith("2 of 3 errors")
    assert choice.on_the_line([{"rows": [synthetic("a", 1, 1.0)]}]) is None
    assert choice.on_the_line([{"rows": [synthetic("a", 1, 1e-15) | {"exact": 0.0}]}]).startswith("1 of 1")


def test_eighty_columns(swept):
    """Of the default compressors along six points too."""
    points = [vectors.made(f"near-identical:{s}", 16, 64, swept=s) for s in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
    result = mean_estimation(points, None, 2, sweep="spread")
    record = json.loads(json.dumps(as_record(result) | {"leaders": result.leaders}))
    assert 3 <= len(record["leaders"]) <= 10
    for shown in (record, page.load(swept)):
        console = Console(width=80, file=io.StringIO())
        mean_text.print_means(shown, console)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
        assert any(line.startswith("A  ") for line in lines)


def test_two_digits_take_six_characters():
    for error in (0.0, 1e-13, 9.96e-12, 1.23e-7, 0.000999, 0.0012345, 0.9999, 12.34, 99999.0, 123456.0, 3.4e5, 1.2e38):
        assert len(mean_text.two_digits(synthetic("a", 1, error))) <= 6


def test_the_page_loads_nothing(swept):
    text = (swept / "report.html").read_text()
    shown = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", shown)
    assert "shoal mean --sweep n=2,4,8" in shown
    assert "alpha = 0.09375" in shown
    assert "tests/" not in shown


def test_damage_is_one_error(tmp_path):
    for text in ("", "{}", "[]", '{"kind": "mean", "points": []}', '{"kind": "race", "points": [{"rows": [{}]}]}'):
        (tmp_path / "mean.json").write_text(text)
        with pytest.raises(ConfigError, match="damaged"):
            page.load(tmp_path)
    with pytest.raises(ConfigError, match=r"mean\.json"):
        page.load(tmp_path / "absent")


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_in_a_browser(browser: Browser, swept, width, height):  # noqa: F811
    facts = browser.open(swept / "report.html", width, height)
    assert facts["overflow"] == "0"
    assert int(facts["drawn"]) > 12
    before = int(browser.js("document.querySelectorAll('#sweep-plot .scatterlayer .trace').length"))
    browser.js("document.querySelector('#legend [aria-pressed=\"true\"]').click()")  # gray: its band and bound go
    assert int(browser.js("document.querySelectorAll('#sweep-plot .scatterlayer .trace').length")) < before
    browser.js("document.querySelector('[data-point=\"2\"]').click()")
    assert browser.js("document.querySelector('[data-point=\"2\"]').getAttribute('aria-pressed')") == "true"


def test_hostile_names_stay_text(browser: Browser, tmp_path):  # noqa: F811
    result = mean_estimation(vectors.make("gaussian", 2, 8), ["PermK()"], 2)
    (point,) = result.points
    evil = "</script><img src=x onerror=document.body.dataset.evil=1>"
    named = replace(point, inputs=evil, rows=(replace(point.rows[0], compressor=evil),))
    folder = replace(result, points=(named,)).save(tmp_path / "m", command=evil)
    facts = browser.open(page.write(folder), 390, 844)
    assert "evil" not in facts
    assert browser.js("document.images.length") == 0


# ------------------------------------------------------------------------------------------------ commands
def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def test_shoal_mean(tmp_path):
    out = tmp_path / "m"
    done = invoke(
        "mean", "--clients", "4", "--dim", "64", "--data", "near-identical:0.1", "--rounds", "10", "--out", str(out)
    )
    assert done.exit_code == 0, done.output
    assert "Correlated()" in done.output
    assert (out / "report.html").stat().st_size > 1e6
    again = invoke("report", str(out))
    assert again.exit_code == 0, again.output
    assert "near-identical:0.1" in again.output


@pytest.mark.parametrize("sweep", ["n=2,4", "d=16,64", "spread=0.01,0.1,1"])
def test_sweeps(tmp_path, sweep):
    done = invoke("mean", "Correlated()", "PermK()", "--sweep", sweep, "--rounds", "4", "--out", str(tmp_path / "m"))
    assert done.exit_code == 0, done.output
    record = page.load(tmp_path / "m")
    assert [p["swept"] for p in record["points"]] == [float(v) for v in sweep.partition("=")[2].split(",")]


def test_vectors_from_files(tmp_path):
    np.save(tmp_path / "g.npy", np.random.default_rng(0).normal(size=(6, 32)))
    words = ["mean", "Correlated()", "--vectors", str(tmp_path / "g.npy"), "--rounds", "4"]
    assert invoke(*words, "--out", str(tmp_path / "a")).exit_code == 0
    assert invoke(*words, "--out", str(tmp_path / "b"), "--sweep", "n=2,6").exit_code == 0
    assert [p["n"] for p in page.load(tmp_path / "b")["points"]] == [2, 6]
    for bad in (["--sweep", "n=2,7"], ["--sweep", "spread=0.1"], ["--clients", "3"], ["--data", "cauchy"]):
        done = invoke(*words, *bad, "--out", str(tmp_path / "c"))
        assert isinstance(done.exception, ConfigError)
        assert not (tmp_path / "c").exists()


def test_a_compressor_of_ones_own(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from shoal.compressors import RandK\nclass Mine(RandK):\n    '''own'''\n")
    words = ["mean", "Mine(2)", "--clients", "2", "--dim", "8", "--rounds", "3", "--with", str(own)]
    done = invoke(*words, "--out", str(tmp_path / "m"))
    assert done.exit_code == 0, done.output
    assert page.load(tmp_path / "m")["points"][0]["rows"][0]["compressor"] == "Mine(2)"


@pytest.mark.parametrize(
    "words",
    [["RandK(99)", "--dim", "8"], ["Nope()"], ["--data", "fish"], ["--rounds", "1"], ["--clients", "0"],
     ["--sweep", "n=4,2"], ["--sweep", "k=1"], ["--sweep", "spread=0,1"], ["--sweep", "n=1e3"],
     ["--sweep", "n=2", "--clients", "3"],
     ["--vectors", "absent.npy"], ["--with", "absent.py"], ["--sweep", "spread=1", "--data", "cauchy"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_leaves_nothing(tmp_path, words):
    done = invoke("mean", *words, "--out", str(tmp_path / "m"))
    assert isinstance(done.exception, ConfigError), done.output
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "m").exists()


def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shoal", "mean", "RandK(99)", "--dim", "8", "--out", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert (left.value.code, said.out, said.err.count("\n")) == (1, "", 1)
    assert said.err.startswith("error: RandK(k=99)")


def test_an_interrupted_measurement_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("shoal.cli.mean.mean_estimation", stop)
    assert invoke("mean", "--out", str(tmp_path / "m")).exit_code != 0
    assert not (tmp_path / "m").exists()


def test_throughput():
    rows = list(bench.throughput([RandK(3), Correlated()], [64, 1000], repeat=2))
    assert [(row.compressor, row.part, row.d) for row in rows] == [
        (name, part, d) for d in (64, 1000) for name in ("RandK(3)", "Correlated()") for part in bench.PARTS
    ]
    for row in rows:
        assert row.gigabytes == pytest.approx(4 / row.row.median)
        assert row.row.ratio > 0
    assert rows[0].bits * 64 == pytest.approx(96)
    for wrong in ([], [0]):
        with pytest.raises(ConfigError, match="at least 1"):
            bench.throughput([RandK(3)], wrong)
    with pytest.raises(ConfigError, match="k must be"):
        bench.throughput([RandK(100)], [1000, 64])


def test_shoal_bench(tmp_path):
    rows, picture = tmp_path / "rows.json", tmp_path / "speed.png"
    done = invoke(
        "bench", "--dim", "1e3", "--threads", "1", "--repeat", "1", "--json", str(rows), "--plot", str(picture)
    )
    assert done.exit_code == 0, done.output
    assert "TopK(0.01)" in done.output
    facts = json.loads(rows.read_text())
    assert {row["part"] for row in facts["rows"]} == set(bench.PARTS)
    assert all(row["machine"] == facts["machine"] and row["versions"]["numpy"] for row in facts["rows"])
    assert picture.stat().st_size > 10_000
    for words in (
        ["--dim", "x"],
        ["--dim", "1.5"],
        ["--threads", "1000"],
        ["--plot", "speed.txt"],
        ["--json", str(tmp_path / "no" / "x.json")],
    ):
        assert isinstance(invoke("bench", *words).exception, ConfigError)
