"""The report: arithmetic on rows written by hand, folders that were cut off, hostile names, and a real browser.

Nothing here is statistical: the folders come from fixed seeds, and every expected number is worked out in the test.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from race_folder import METHODS, Model, row, write_race, write_run

from shoal import report
from shoal.errors import ConfigError, DataError
from shoal.report import figures
from shoal.report.leaderboard import curvature, number, rivals, scaled, seconds, span, times, when_to_use
from shoal.report.load import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished race with its report, written once."""
    folder = write_race(tmp_path_factory.mktemp("race") / "default")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def race(folder: Path) -> report.Race:
    return report.load(folder)


def small(
    folder: Path,
    runs: dict[tuple[str, int], list[dict[str, float]]],
    target: float | None = 1e-2,
    stopped: str = "target",
) -> report.Race:
    """A race with theory steps only, its rows given by (label, seed)."""
    labels = list(dict.fromkeys(label for label, _ in runs))
    folder.mkdir()
    (folder / "race.json").write_text(
        json.dumps(
            {
                "format": 1,
                "kind": "race",
                "title": "small",
                "problem": {"name": "toy", "n": 2, "d": 3},
                "methods": labels,
                "steps": ["theory"],
                "seeds": sorted({seed for _, seed in runs}),
                "target": target,
                "status": "done",
            }
        )
    )
    for i, ((label, seed), rows) in enumerate(runs.items()):
        result = {"sha256": "0" * 64, "stopped": stopped, "gamma": 0.5, "resolved": f"{label} p=0.25", "constants": {}}
        place = {"label": label, "step": "theory", "multiple": 1.0, "seed": seed, "trial": False}
        write_run(folder / "runs" / str(i), rows, race=place, result=result)
    return report.load(folder)


def falling(cost: float, arrives: int, rows: int = 6, down: float = 0.0) -> list[dict[str, float]]:
    """Rows that cost `cost` bits up each and are at the target from round `arrives` on."""
    return [row(k, 1e-2 if k >= arrives else 1.0, cost * k, down * k, 0.5 * k) for k in range(rows)]


def test_leaderboard_arithmetic(tmp_path: Path) -> None:
    runs = {("GD()", s): falling(100.0, a, down=10.0) for s, a in enumerate((2, 3, 5))}
    runs |= {("Marina(PermK())", s): falling(10.0, a, down=20.0) for s, a in enumerate((4, 1, 5))}
    first, second = report.leaderboard(small(tmp_path / "r", runs))
    assert (first.label, first.seeds, first.reached, first.p, first.gamma) == ("Marina(PermK())", 3, 3, 0.25, 0.5)
    assert first.bits == report.Spread(40.0, 10.0, 50.0)
    assert first.total_bits == report.Spread(120.0, 30.0, 150.0)
    assert first.rounds == report.Spread(4.0, 1.0, 5.0)
    assert second.bits == report.Spread(300.0, 200.0, 500.0)
    assert first.vs_gd == 300.0 / 40.0
    assert second.vs_gd == 1.0
    assert not first.vs_gd_at_least
    # Median over seeds, each up to its own crossing: 4 rounds of 10 bits and a 64-byte header.
    assert first.spent["up_framed_bits"] == 4 * (10 + 512)
    assert first.spent["down_bits"] == 80.0
    assert first.spent["seconds"] == 2.0


def test_the_first_crossing_counts_and_equality_reaches_the_target(tmp_path: Path) -> None:
    norms = [1.0, 1e-2, 1.0, 1e-3]
    runs = {("GD()", 0): [row(k, norm, 7.0 * k) for k, norm in enumerate(norms)]}
    assert report.leaderboard(small(tmp_path / "r", runs))[0].bits.median == 7.0


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([3.0], 3.0),
        ([1.0, 2.0], 1.5),
        ([1.0, math.inf], 1.0),
        ([math.inf, 5.0, 2.0], 5.0),
        ([math.inf, 1.0, math.inf], math.inf),
        ([1.0, 2.0, math.inf, math.inf], 2.0),
    ],
)
def test_a_seed_that_never_arrived_is_infinitely_dear(values: list[float], median: float) -> None:
    assert report.Spread.of(values).median == median


def test_target_reached_by_too_few_seeds(tmp_path: Path) -> None:
    runs = {("Diana()", s): falling(10.0, a) for s, a in enumerate((2, 99, 99))}
    entries = report.leaderboard(race := small(tmp_path / "r", runs, stopped="rounds"))
    assert not entries[0].arrived
    assert (entries[0].reached, entries[0].seeds, entries[0].bits.low) == (1, 3, 20.0)
    assert "no method brought the median seed to ‖∇f‖² ≤ 0.01" in report.verdict(race, entries)[0]
    page = report.render(race)
    assert "not reached" in page
    assert 'class="hero"' not in page
    assert "1 of 3 seeds" in page


def test_gd_that_never_arrives_gives_a_lower_bound(tmp_path: Path) -> None:
    runs = {("GD()", 0): falling(100.0, 99), ("Marina()", 0): falling(10.0, 5)}
    first, gd = report.leaderboard(small(tmp_path / "r", runs, stopped="rounds"))
    assert (first.vs_gd, first.vs_gd_at_least) == (500.0 / 50.0, True)
    assert (gd.vs_gd, gd.vs_gd_at_least) == (None, False)


def test_entries_without_target_are_ordered_by_gradient_norm(tmp_path: Path) -> None:
    runs = {("GD()", 0): [row(0, 1.0, 0.0), row(1, 0.5, 9.0)], ("Marina()", 0): [row(0, 1.0, 0.0), row(1, 0.25, 99.0)]}
    race = small(tmp_path / "r", runs, target=None, stopped="rounds")
    entries = report.leaderboard(race)
    assert [entry.label for entry in entries] == ["Marina()", "GD()"]
    assert "no target was set; Marina() ended with the smallest squared gradient norm, 0.25" in " ".join(
        report.verdict(race, entries)
    )
    assert 'id="bar-plot"' not in report.render(race)


def test_verdict_tells_overlapping_ranges_from_separate_ones(tmp_path: Path) -> None:
    near = {("A()", s): falling(10.0, a) for s, a in enumerate((1, 2, 4))}
    near |= {("B()", s): falling(10.0, a) for s, a in enumerate((3, 4, 5))}
    race = small(tmp_path / "near", near)
    entries = report.leaderboard(race)
    assert rivals(entries[0], entries[1:]) == ["B()"]
    assert (
        "needed 2× as many. The ranges overlap: these seeds do not tell A() apart from B()."
        in report.verdict(race, entries)[0]
    )
    far = near | {("B()", s): falling(100.0, a) for s, a in enumerate((3, 4, 5))}
    race = small(tmp_path / "far", far)
    assert report.verdict(race, report.leaderboard(race))[0].endswith(
        "20× as many; the ranges over seeds do not overlap."
    )
    single = {key: rows for key, rows in far.items() if key[1] == 0}
    race = small(tmp_path / "one", single)
    assert report.verdict(race, report.leaderboard(race))[0].endswith("with one seed there is no range to compare.")


def test_a_method_without_theorem_says_so(tmp_path: Path) -> None:
    folder = write_race(tmp_path / "r", methods={"DCGD(RandK(3))": METHODS["Dcgd(RandK(k=4))"]}, seeds=(0,))
    for path in (folder / "runs").glob("*-theory-*"):
        shutil.rmtree(path)
    facts = json.loads((folder / "race.json").read_text())
    facts["no_theorem"] = {"DCGD(RandK(3))": "no lower bound is known"}
    (folder / "race.json").write_text(json.dumps(facts))
    race = report.load(folder)
    entries = report.leaderboard(race)
    assert [(e.step, e.unit) for e in entries] == [("tuned", "1/L₋")]
    said = " ".join(report.verdict(race, entries))
    assert "DCGD(RandK(3)) has no step size from theory here (no lower bound is known)" in said
    assert "Not run" not in said
    assert "of 1/L₋" in report.render(race)


def test_families_are_those_that_took_part(tmp_path: Path) -> None:
    race = small(tmp_path / "r", {("GD()", 0): falling(1.0, 1), ("EF21(TopK(k=2))", 0): falling(1.0, 1)})
    assert [name for name, _ in when_to_use(race)] == ["EF21 with TopK", "GD"]


def test_torn_last_line_is_dropped_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps(row(k, 1.0, 8.0 * k)) + "\n" for k in range(4)]
    for end in ("", lines[3][:25], "\xff{", "\n\n"):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + end, encoding="latin-1")
        columns, torn = read_metrics(tmp_path / "metrics.jsonl")
        assert columns["up_bits"].tolist() == [0.0, 8.0, 16.0]
        assert torn == (1 if end.strip() else 0)


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(0, 1.0, 0.0)) + "\n{oops\n" + json.dumps(row(2, 1.0, 2.0)) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        read_metrics(path)
    path.write_text('{"round": 0}\n')
    with pytest.raises(DataError, match="without a number for 'value'"):
        read_metrics(path)


def test_rounds_repeated_after_a_resume_count_once(tmp_path: Path) -> None:
    rows = [row(0, 1.0, 0.0), row(1, 0.5, 8.0), row(2, 0.4, 16.0), row(1, 0.5, 8.0), row(2, 0.3, 16.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    columns, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert columns["round"].tolist() == [0.0, 1.0, 2.0]
    assert columns["grad_norm_sq"].tolist() == [1.0, 0.5, 0.3]


def test_interrupted_race(tmp_path: Path) -> None:
    methods = {label: METHODS[label] for label in ("GD()", "Marina(Correlated())")}
    folder = write_race(tmp_path / "r", methods=methods, seeds=(0, 1), interrupted=True)
    (folder / "runs" / "zz-made-last").mkdir()
    race = report.load(folder)
    cut = [run for run in race.runs if not run.finished]
    assert [run.stopped for run in cut] == ["interrupted"]
    assert (cut[0].rows, cut[0].torn, race.torn, race.skipped) == (5, 1, 1, 1)
    page = report.write(folder).read_text(encoding="utf-8")
    assert "This race has not run to its end (status: interrupted)" in page
    assert "1 half-written line left out." in page
    assert any("had not ended" in sentence for sentence in report.verdict(race, report.leaderboard(race)))


def test_a_race_cut_off_before_its_first_row_still_has_a_report(tmp_path: Path) -> None:
    folder = write_race(tmp_path / "r", methods={})
    (folder / "race.json").write_text(
        (folder / "race.json").read_text().replace('"methods": []', '"methods": ["GD()"]')
    )
    page = report.write(folder).read_text(encoding="utf-8")
    assert "Not run: GD() (theory steps), GD() (tuned steps)." in page


def test_single_run_folder(tmp_path: Path) -> None:
    result = {"sha256": "ab" * 32, "stopped": "target", "gamma": 0.1, "resolved": "GD()", "constants": {"L_minus": 2.0}}
    result |= {"seen": {"minus": [1.25, "estimate"], "plus": [1.5, "estimate"], "pm": [0.0, "estimate"]}}
    stated = {"minus": [2.0, "bound"], "plus": [3.0, "bound"], "pm": [0.0, "exact"]}
    folder = write_run(tmp_path / "run", falling(96.0, 3), target=1e-2, seed=7, result=result, smoothness=stated)
    race = report.load(folder)
    assert (race.title, race.methods, race.steps, race.seeds, race.status) == (
        "GD() on toy",
        ("GD()",),
        ("theory",),
        (7,),
        "done",
    )
    page = report.write(folder).read_text(encoding="utf-8")
    assert "With theory steps, GD() reached ‖∇f‖² ≤ 0.01 after 288 bit a client." in page
    assert "ab" * 32 in page
    assert "L_minus = 2" in page
    assert "seen: L₋ = 1.25, L₊ = 1.5, L± = 0<" in page
    assert "largest seen along a run; 62% of the bound above" in page
    line = "L_- = 2 (bound), L_+ = 3 (bound), L_± = 0 (exact); seen along the runs: L_- 1.25, L_+ 1.5, L_± 0"
    assert curvature(race) == line
    tuned = write_run(tmp_path / "tuned", falling(96.0, 3), step={"multiple": 4.0})
    assert (report.load(tuned).steps, report.load(tuned).status) == (("tuned",), "interrupted")


def test_a_folder_that_is_neither_race_nor_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither race\.json nor config\.json"):
        report.load(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        report.load(tmp_path / "absent")
    (tmp_path / "race.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="has format 99: this version reads format 1"):
        report.load(tmp_path)
    (tmp_path / "race.json").write_text('{"format"')
    with pytest.raises(DataError, match="is not JSON"):
        report.load(tmp_path)


def test_names_from_users_are_escaped(tmp_path: Path) -> None:
    label, title = "Evil(<script>alert(1)</script>)", "</script><img src=x onerror=alert(2)>$x$"
    folder = write_race(tmp_path / "r", methods={label: Model(64, 0.0, 0.02, 4.0)}, seeds=(0,), title=title)
    page = report.write(folder).read_text(encoding="utf-8")
    outside = _without_plotly(page)
    assert "<script>alert" not in outside
    assert "<img" not in outside
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in outside
    assert json.loads(re.search(r'id="race-data">(.*?)</script>', page, re.S)[1])["methods"][0]["label"] == label


def test_page_loads_nothing(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count('id="plotlyjs"') == 1
    assert len(page.encode()) < 6e6
    outside = _without_plotly(page)
    assert not re.findall(
        r"""(?:src|href|action)\s*=\s*["']?+(?!data:)|url\(|@import|\bfetch\(|XMLHttpRequest""", outside
    )
    assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.(?:com|org|io|net)", outside)
    assert "default-src 'none'" in outside


def _without_plotly(page: str) -> str:
    start = page.index('<script id="plotlyjs">')
    return page[:start] + page[page.index("</script>", start) :]


@pytest.mark.parametrize("missing", ["jinja2", "plotly", "matplotlib", "pyarrow"])
def test_missing_extra_is_one_sentence_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    folder = write_run(tmp_path / "run", falling(1.0, 1))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf'needs {missing}, .*: pip install "shoal\[report\]"$'):
        report.write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "metrics.jsonl"]
    assert report.leaderboard(report.load(folder))[0].label == "GD()"


def test_files_beside_the_page(folder: Path, race: report.Race) -> None:
    from matplotlib.image import imread
    from pyarrow import parquet

    table = parquet.read_table(folder / "results.parquet")
    assert table.column_names[:5] == ["label", "step", "multiple", "seed", "trial"]
    assert table.num_rows == sum(run.rows for run in race.runs)
    assert table.schema == report.results_table(race).schema
    assert table["up_bits"].to_numpy().sum() == sum(run.columns["up_bits"].sum() for run in race.runs)
    board = json.loads((folder / "leaderboard.json").read_text(), parse_constant=pytest.fail)
    assert board["entries"][0]["bits"]["median"] == report.leaderboard(race)[0].bits.median
    assert any(entry["bits"]["median"] is None for entry in board["entries"])
    picture = imread(folder / "figure.png")
    assert picture.shape[1] >= 1600
    assert len(np.unique((picture[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 500
    assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_race_makes_the_same_bytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", falling(1.0, 3), target=1e-2)
    names = ("report.html", "figure.png", "figure.pdf", "leaderboard.json")
    report.write(folder)
    before = [(folder / name).read_bytes() for name in names]
    report.write(folder)
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("axis", figures.AXES)
def test_curves_cross_where_the_leaderboard_says(race: report.Race, axis: str) -> None:
    for label, step in race.curves:
        runs = race.finals(label, step)
        curve = figures.curve(runs, axis, race.target)
        spent = [run.quantity(figures.AXES[axis][1]) for run in runs]
        crossing = report.Spread.of(
            [math.inf if (k := run.crossing(race.target)) is None else x[k] for run, x in zip(runs, spent, strict=True)]
        )
        assert (math.inf if curve.crossing is None else curve.crossing) == crossing.median
        assert len(curve.x) <= figures.POINTS + len(runs)
        assert np.isin(curve.x, np.concatenate(spent)).all()
        assert (np.diff(curve.x) > 0).all()
        assert (curve.low <= curve.median).all()
        assert (curve.median <= curve.high).all()


def test_a_curve_is_the_last_recorded_value_at_each_cost(tmp_path: Path) -> None:
    runs = {
        ("A()", 0): [row(0, 1.0, 0.0), row(1, 0.5, 10.0), row(2, 0.1, 30.0)],
        ("A()", 1): [row(0, 1.0, 0.0), row(1, 0.7, 20.0), row(2, 0.2, 30.0)],
        ("A()", 2): [row(0, 1.0, 0.0), row(1, 0.6, 10.0), row(2, 0.3, 40.0)],
    }
    curve = figures.curve(small(tmp_path / "r", runs, target=0.25).finals("A()", "theory"), "up_bits", 0.25)
    assert curve.x.tolist() == [10.0, 20.0, 30.0]
    assert curve.median.tolist() == [0.6, 0.6, 0.2]
    assert curve.low.tolist() == [0.5, 0.5, 0.1]
    assert curve.high.tolist() == [1.0, 0.7, 0.6]
    assert curve.rounds.tolist() == [1.0, 1.0, 2.0]
    assert curve.crossing == 30.0


def test_a_diverged_run_is_shown_and_named(tmp_path: Path) -> None:
    rows = [row(0, 1.0, 0.0), row(1, 1e9, 8.0), row(2, math.inf, 16.0), row(3, math.nan, 24.0)]
    race = small(tmp_path / "r", {("A()", 0): rows, ("A()", 1): rows}, stopped="diverged")
    entries = report.leaderboard(race)
    assert (entries[0].diverged, entries[0].grad_norm_sq) == (2, math.inf)
    assert "Diverged in at least one seed: A() (theory steps)." in report.verdict(race, entries)
    report.write(race.folder)
    assert json.loads((race.folder / "leaderboard.json").read_text())["entries"][0]["grad_norm_sq"] is None


def test_plot_refuses_an_unknown_axis(race: report.Race) -> None:
    with pytest.raises(ConfigError, match="axis='bytes': must be one of up_bits, total_bits"):
        report.plot(race, "bytes")
    assert len(report.plot(race, "seconds").axes) == 2


def test_colors_stay_with_their_method(race: report.Race) -> None:
    look = figures.styles(race)
    assert look["GD()"][0] == figures.GD_COLOR
    assert len({color for color, _ in look.values()}) == len(race.methods)


def test_leaderboard_in_the_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    race = small(tmp_path / "r", {("GD()", 0): falling(100.0, 2), ("Odd([bold])", 0): falling(10.0, 99)})
    out = io.StringIO()
    report.print_leaderboard(race, Console(file=out, width=140))
    assert "Odd([bold])" in out.getvalue()
    assert "(0 of 1)" in out.getvalue()
    assert "200 bit" in out.getvalue()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(1.4e-7), "1.4e-7"),
        (number(0.0312), "0.0312"),
        (number(12300.0), "12,300"),
        (number(None), "–"),
        (number(1.0e-6), "1e-6"),
        (number(0.99996), "1"),
        (number(math.inf), "∞"),
        (number(2.5e9), "2.5e9"),
        (scaled(12_345, "bit"), "12.3 kbit"),
        (scaled(999.7, "bit"), "1 kbit"),
        (scaled(1.234e9, "bit"), "1.23 Gbit"),
        (scaled(math.inf, "bit"), "not reached"),
        (times(34.21), "34.2×"),
        (times(1204.0), "1,204×"),
        (seconds(0.0123), "12.3 ms"),
        (seconds(0.9999), "1 s"),
        (seconds(119.7), "2 min 0 s"),
        (seconds(7500), "2 h 5 min"),
        (span(report.Spread(10e3, 9050, 17300)), "9.05..17.3 kbit"),
        (span(report.Spread(1.0, 1.0, 1.0)), "no spread"),
        (span(report.Spread(2e3, 900.0, math.inf)), "900 bit..not reached"),
    ],
)
def test_numbers_as_people_write_them(shown: str, expected: str) -> None:
    assert shown == expected


class Browser:
    """Headless chromium over its debugging pipe: messages are JSON ended by a zero byte, on descriptors 3 and 4.

    The pipe, and not --dump-dom, because chromium makes no window narrower than 500 pixels: a phone is emulated.
    """

    def __init__(self, program: str, profile: Path) -> None:
        (inner_read, outer_write), (outer_read, inner_write) = os.pipe(), os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
        ]
        # The shell renumbers: chromium wants its ends of the pipes as 3 and 4.
        script = f'exec "$0" "$@" 3<&{inner_read} 4>&{inner_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, program, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(inner_read, inner_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inner_read)
        os.close(inner_write)
        self.read, self.write, self.buffer, self.numbers = outer_read, outer_write, b"", itertools.count(1)
        self.session: dict[str, str] = {}
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        me = next(self.numbers)
        os.write(self.write, json.dumps({"id": me, "method": method, "params": params} | self.session).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                if not select.select([self.read], [], [], 60)[0]:
                    raise TimeoutError(f"chromium did not answer {method} within 60 s")
                if not (more := os.read(self.read, 1 << 16)):
                    raise ConnectionError(f"chromium went away during {method}")
                self.buffer += more
            message, self.buffer = self.buffer.split(b"\0", 1)
            if (answer := json.loads(message)).get("id") == me:
                return answer["result"]

    def js(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)[
            "result"
        ].get("value")

    def open(self, page: Path, width: int, height: int) -> dict[str, str]:
        """The facts that the page states about itself once it has drawn."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.resolve().as_uri())
        return self.facts("document.body && document.body.dataset.ready")

    def facts(self, until: str) -> dict[str, str]:
        """document.body.dataset, as soon as `until` holds; fails after 30 s."""
        waiting = (
            f"new Promise(done => {{ let left = 600; const t = setInterval(() => {{ const ok = {until};"
            "if (ok || --left < 0) { clearInterval(t); done(Boolean(ok)); } }, 50); })"
        )
        assert self.js(waiting), f"the page never got to: {until}"
        return self.js("Object.assign({}, document.body.dataset)")

    def picture(self) -> np.ndarray:
        from matplotlib.image import imread

        shot = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        return (imread(io.BytesIO(shot))[..., :3] * 255).astype(int)

    def close(self) -> None:
        self.session = {}
        try:
            self.call("Browser.close")
        finally:
            os.close(self.write)
            os.close(self.read)
            self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on this machine: the page is not looked at")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844), (360, 740)])
def test_the_page_draws_its_curves_and_fits(browser: Browser, folder: Path, width: int, height: int) -> None:
    facts = browser.open(folder / "report.html", width, height)
    entries = report.leaderboard(report.load(folder))
    assert facts["drawn"] == facts["expected"] == str(len(entries))
    assert facts["bars"] == str(sum(entry.arrived for entry in entries))
    assert (facts["width"], facts["overflow"], facts["requests"]) == (str(width), "0", "0")
    # Not a canvas or WebGL picture that a headless browser might leave empty: paths in the document.
    paths = browser.js("[...document.querySelectorAll('#panels .js-line')].map(p => p.getAttribute('d').length)")
    assert len(paths) == len(entries)
    assert min(paths) > 200
    browser.js("document.querySelector('#panels .plot').scrollIntoView({block: 'start'})")
    x0, y0, x1, y1 = browser.js(
        "(r => [r.left, r.top, r.right, r.bottom].map(Math.round))"
        "(document.querySelector('#panels .plot').getBoundingClientRect())"
    )
    box = browser.picture()[max(y0, 0) : y1, x0:x1]
    colors = np.unique(box.reshape(-1, 3), axis=0)
    assert len(colors) > 100
    for label, (color, _) in figures.styles(report.load(folder)).items():
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(box - wanted).max(axis=-1) < 12).sum() > 40, f"{label} is not in the picture"


def test_the_switches_of_the_page(browser: Browser, folder: Path) -> None:
    browser.open(folder / "report.html", 390, 844)
    for axis in figures.AXES:
        browser.js(f"delete document.body.dataset.axis; document.querySelector('[data-axis={axis}]').click()")
        facts = browser.facts(f"document.body.dataset.axis === '{axis}'")
        assert (facts["drawn"], facts["overflow"]) == ("14", "0")
    browser.js("delete document.body.dataset.drawn; document.querySelector('[data-steps=tuned]').click()")
    assert browser.facts("document.body.dataset.drawn")["drawn"] == "7"
    browser.js("delete document.body.dataset.drawn; document.querySelector('#legend button').click()")
    assert browser.facts("document.body.dataset.drawn")["drawn"] == "6"
    sizes = browser.js("[...document.querySelectorAll('button')].map(b => b.getBoundingClientRect().height)")
    assert min(sizes) >= 40


def test_hostile_names_run_nothing_in_the_browser(browser: Browser, tmp_path: Path) -> None:
    label = "<img src=x onerror=document.body.dataset.evil=1>"
    methods = {label: Model(64, 0.0, 0.02, 4.0), "<b>bold</b>$" + "long" * 30: Model(64, 0.0, 0.02, 4.0)}
    folder = write_race(
        tmp_path / "r", methods=methods, seeds=(0,), title="</script><script>document.title='evil'</script>"
    )
    facts = browser.open(report.write(folder), 360, 740)
    assert "evil" not in facts
    assert browser.js("document.title").startswith("</script>")
    assert (facts["drawn"], facts["overflow"], facts["requests"]) == ("4", "0", "0")


def test_an_empty_race_still_makes_a_page(browser: Browser, tmp_path: Path) -> None:
    facts = browser.open(report.write(write_race(tmp_path / "r", methods={})), 1280, 900)
    assert (facts["drawn"], facts["expected"], facts["overflow"]) == ("0", "0", "0")
