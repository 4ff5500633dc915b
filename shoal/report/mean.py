"""The page about estimated means: which compressor for this n, d, similarity and number of bits.

Reads the mean.json that `shoal mean` and `MeanEstimate.save` write, and nothing else. The look is the race report's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shoal.errors import ConfigError
from shoal.palette import COLORS, SYMBOLS
from shoal.report import figures
from shoal.report.leaderboard import number
from shoal.report.page import environment, replace_file

BUDGETS = (0.1, 0.5, 1.1, 2.1, 4.1, 8.1, 16.1, 32.1)  # bits a coordinate and client, a tenth over for scales
ROUNDING = 1e-12  # normalized errors below this are float32's own
FIELDS = ("compressor", "error", "low", "high", "bits", "framed_bits", "bias", "bound", "exact")
SWEPT = {"n": "clients n", "d": "coordinates d", "spread": "spread S of near-identical:S"}
Row = Mapping[str, Any]


class Choice(NamedTuple):
    """What to take with so many bits: the row of least error, and whom its interval does not tell it apart from."""

    budget: float
    best: Row
    rivals: list[str]


def load(folder: str | Path) -> dict[str, Any]:
    """The record in a folder. Raises ConfigError where there is none that can be read."""
    path = Path(folder) / "mean.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for point in record["points"] for row in point["rows"]]
        if record["kind"] != "mean" or not rows or any(name not in row for row in rows for name in FIELDS):
            raise ValueError(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: run `shoal mean` again.") from None
    return record


def is_mean(folder: str | Path) -> bool:
    """Whether a folder holds estimated means rather than runs."""
    return (Path(folder) / "mean.json").is_file()


def choices(point: Mapping[str, Any]) -> list[Choice]:
    """The least error within each budget, unbiased compressors alone; a budget that buys nothing more is left out."""
    found: list[Choice] = []
    sound = [row for row in point["rows"] if row["bias"] == "none seen"]
    for budget in BUDGETS:
        within = [row for row in sound if row["bits"] <= budget]
        if not within:
            continue
        best = min(within, key=lambda row: (max(row["error"], ROUNDING), row["bits"]))
        if not found or best["compressor"] != found[-1].best["compressor"]:
            rivals = [r["compressor"] for r in within if r is not best and r["low"] <= max(best["high"], ROUNDING)]
            found.append(Choice(budget, best, rivals))
    return found


def verdict(point: Mapping[str, Any]) -> list[str]:
    """The answer in sentences, for one point."""
    said = []
    for budget, best, rivals in choices(point):
        line = (
            f"Up to {budget:g} bits a coordinate: {best['compressor']}, error {_error(best)} of the mean squared norm"
        )
        line += f", for {number(best['bits'])} bits"
        said.append(line + (f"; not told apart from {' and '.join(rivals)}." if rivals else "."))
    whole = [row for row in point["rows"] if row["bias"] == "none seen" and row["error"] > ROUNDING]
    if len(whole) > 1 and all(row["bits"] > 0 for row in whole):
        best = min(whole, key=lambda row: row["error"] * row["bits"])
        said.append(
            f"Least error x bits: {best['compressor']}, {number(best['error'] * best['bits'])}. It is what counts "
            "where a client may send several independent messages, since their mean divides the error by their number."
        )
    return said or ["No compressor here is unbiased: none of these errors averages out over rounds."]


def warnings(record: Mapping[str, Any]) -> list[str]:
    """What must not be overlooked: a bias that theory does not know of, an error above what is proved."""
    said = []
    for point in record["points"]:
        where = f"{point['inputs']}, n = {point['n']}, d = {point['d']}"
        for row in point["rows"]:
            # three half-widths are six standard deviations: a bound that holds with equality is measured above it often
            least = row["error"] - 3.0 * (row["high"] - row["error"])
            if row["bias"] == "found":
                said.append(f"{row['compressor']} ({where}) is biased: z = {number(row['bias_z'])}.")
            if (
                row["evidence"] == "proved"
                and row["bound"] is not None
                and least > row["bound"] * (1 + 1e-5) + ROUNDING
            ):
                said.append(
                    f"{row['compressor']} ({where}): the error is above the proved bound {number(row['bound'])}."
                )
    return said


def print_means(record: Mapping[str, Any], console: Any) -> None:
    """The measurements as a table, and the answer below it."""
    from rich.markup import escape

    if record["sweep"]:
        _print_sweep(record, console)
    else:
        _print_point(record["points"][0], console)
    for line in warnings(record):
        console.print(f"[yellow]{escape(line)}[/yellow]", highlight=False)
    console.print(
        f"\n{record['rounds']} rounds. error: over the mean squared norm M; 95%: half its interval, in percent; bits: "
        "up, a coordinate and client; theory: = the exact error, ≤ a bound, * not proved; ns: CPU time a coordinate "
        "and client to encode / decode / aggregate",
        style="dim", highlight=False,
    )  # fmt: skip


def _table(title: str, columns: Iterable[str]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("compressor", overflow="fold", min_width=24)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_point(point: Mapping[str, Any], console: Any) -> None:
    from rich.markup import escape

    facts = f"{point['inputs']}: n = {point['n']}, d = {point['d']}, V/M = {number(point['spread'])}"
    table = _table(facts, ("bits", "error", "95%", "theory", "bias", "ns"))
    for row in sorted(point["rows"], key=lambda row: row["error"]):
        table.add_row(escape(row["compressor"]), *_narrow(row))
    console.print(table)
    for line in verdict(point):
        console.print(f"- {escape(line)}", highlight=False)


def _print_sweep(record: Mapping[str, Any], console: Any) -> None:
    """Errors, a column a point, and what to take at each."""
    from rich.markup import escape

    points = record["points"]
    what = ", ".join(
        f"{k} = {points[0][k]}"
        for k in ("inputs", "n", "d")
        if k != ("inputs" if record["sweep"] == "spread" else record["sweep"])
    )
    table = _table(f"error over the mean squared norm; {what}", [_name(record, point) for point in points])
    for rows in zip(*(point["rows"] for point in points), strict=True):
        table.add_row(escape(rows[0]["compressor"]), *(_error(row).split()[0] for row in rows))
    console.print(table)
    for point in points:
        best = [f"{c.best['compressor']} up to {c.budget:g} bits ({_error(c.best)})" for c in choices(point)]
        console.print(escape(f"- {_name(record, point)}: {'; '.join(best) or 'nothing unbiased'}"), highlight=False)


def _narrow(row: Row) -> list[str]:
    """The columns of the terminal's table, which has 80 characters."""
    half = "–" if row["error"] < ROUNDING else f"{100 * (row['high'] - row['error']) / row['error']:.2g}%"
    bias = {"stated": "design", "none seen": "no", "found": "YES"}[row["bias"]]
    spent = [float(row[name]) for name in ("encode_ns", "decode_ns", "aggregate_ns")]
    shown = "/".join(f"{ns:.0f}" if ns >= 10 else f"{ns:.2g}" for ns in spent)
    return [number(row["bits"]), _error(row).split()[0], half, _theory(row), bias, shown]


def _theory(row: Row) -> str:
    """ "= 0.1" where the error is known without measuring, else the bound; a star where it is not proved."""
    if row["exact"] is not None:
        return f"= {number(row['exact'])}"
    if row["bound"] is None:
        return "–"
    return f"≤ {number(row['bound'])}" + ("" if row["evidence"] == "proved" else " *")


def cells(row: Row) -> list[str]:
    """The columns beside the compressor, as text."""
    bias = "by design" if row["bias"] == "stated" else f"{row['bias']} ({row['bias_z']:.1f})"
    bound = "–" if row["bound"] is None else number(row["bound"]) + ("" if row["evidence"] == "proved" else " *")
    times = [number(row[name]) for name in ("encode_ns", "decode_ns", "aggregate_ns")]
    shown = [number(row["bits"]), number(row["framed_bits"]), _error(row), _interval(row)]
    return [*shown, bound, number(row["exact"]), bias, *times]


def _error(row: Row) -> str:
    return "0 (rounding)" if row["error"] < ROUNDING else number(row["error"])


def _interval(row: Row) -> str:
    return "–" if row["error"] < ROUNDING else f"{number(row['low'])}..{number(row['high'])}"


# ------------------------------------------------------------------------------------------------ the page
def write(folder: str | Path) -> Path:
    """report.html of a folder with a mean.json; its path. Raises ConfigError without the extra [report]."""
    figures.require("jinja2", "plotly")
    return replace_file(Path(folder) / "report.html", render(load(folder)))


def render(record: Mapping[str, Any]) -> str:
    """The page as text: plotly.js, tables, and the curves as JSON."""
    figures.require("jinja2", "plotly")
    from plotly.offline import get_plotlyjs

    points = record["points"]
    labels = [row["compressor"] for row in points[0]["rows"]]
    return environment().get_template("mean.html").render(
        record=record,
        points=points,
        single=points[0] if len(points) == 1 else None,
        names=[_name(record, point) for point in points],
        verdicts=[verdict(point) for point in points],
        choices=[choices(point) for point in points],
        warnings=warnings(record),
        colors={label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)},
        cells=cells,
        swept=SWEPT.get(record["sweep"] or "", record["sweep"]),
        data={"points": [_at(point) for point in points], "sweep": _along(record) if record["sweep"] else None,
              "values": [point["swept"] for point in points]},
        plotlyjs=get_plotlyjs(),
    )  # fmt: skip


def _name(record: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    if record["sweep"] in ("n", "d"):
        return f"{record['sweep']} = {point[record['sweep']]}"
    return str(point["inputs"])


def _floor(errors: Iterable[float]) -> float:
    """Where errors of float32's own size are drawn: a log axis has no zero."""
    seen = [error for error in errors if error > ROUNDING]
    return min(seen) / 10 if seen else ROUNDING


def _at(point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Error against bits at one point: a marker with its interval, and a dash at the bound."""
    floor = _floor(row["error"] for row in point["rows"])
    traces = []
    for i, row in enumerate(point["rows"]):
        name, color, y = html.escape(row["compressor"]), COLORS[i % len(COLORS)], max(row["error"], floor)
        traces.append({
            "x": [row["bits"]], "y": [y], "name": name, "mode": "markers", "type": "scatter", "legendgroup": name,
            "marker": {"size": 11, "color": color, "symbol": SYMBOLS[i % len(SYMBOLS)][1]},
            "error_y": {"type": "data", "symmetric": False, "array": [max(0.0, row["high"] - y)],
                        "arrayminus": [max(0.0, y - max(row["low"], floor))]},
            "hovertemplate": f"<b>{name}</b><br>error {_error(row)} ({_interval(row)})<br>"
                             f"{number(row['bits'])} bits, bound {number(row['bound'])}<extra></extra>",
        })  # fmt: skip
        if row["bound"] is not None and row["bound"] > floor:
            traces.append(_dash([row["bits"]], [row["bound"]], name, color) | {
                "mode": "markers",
                "marker": {"size": 16, "color": color, "symbol": "line-ew-open", "line": {"width": 2}},
            })  # fmt: skip
    return traces


def _along(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Error along the sweep: measured with its band, the bound dashed, the exact error dotted."""
    points = record["points"]
    x, traces = [point["swept"] for point in points], []
    floor = _floor(row["error"] for point in points for row in point["rows"])
    for i, rows in enumerate(zip(*(point["rows"] for point in points), strict=True)):
        name, color = html.escape(rows[0]["compressor"]), COLORS[i % len(COLORS)]
        y, high = [max(r["error"], floor) for r in rows], [max(r["high"], floor) for r in rows]
        low = [max(r["low"], floor) for r in rows]
        traces.append(_dash(x + x[::-1], high + low[::-1], name, color) | {
            "mode": "none", "fill": "toself", "fillcolor": color + "26", "type": "scatter",
        })  # fmt: skip
        traces.append({
            "x": x, "y": y, "name": name, "mode": "lines+markers", "type": "scatter", "legendgroup": name,
            "line": {"color": color, "width": 2.2}, "marker": {"size": 8, "symbol": SYMBOLS[i % len(SYMBOLS)][1]},
            "hovertemplate": f"<b>{name}</b><br>%{{x}}: error %{{y:.3g}}<extra></extra>",
        })  # fmt: skip
        for field, dash in (("bound", "dash"), ("exact", "dot")):
            line = [r[field] if r[field] is not None and r[field] > floor else None for r in rows]
            if any(v is not None and math.isfinite(v) for v in line):
                traces.append(_dash(x, line, name, color) | {"line": {"color": color, "width": 1.2, "dash": dash}})
    return traces


def _dash(x: list[float], y: list[Any], name: str, color: str) -> dict[str, Any]:
    """A trace that belongs to a compressor's own and has no line in the legend."""
    return {"x": x, "y": y, "name": name, "mode": "lines", "type": "scatter", "legendgroup": name,
            "showlegend": False, "hoverinfo": "skip"}  # fmt: skip
