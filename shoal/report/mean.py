"""The page about estimated means: which compressor for this n, d, similarity and number of bits.

Reads the mean.json that `shoal mean` and `MeanEstimate.save` write, and nothing else. The look is the race report's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError
from shoal.palette import COLORS, SYMBOLS
from shoal.report import figures
from shoal.report.choice import (
    ROUNDING,
    Row,
    choice_map,
    choices,
    crossings,
    error,
    on_the_line,
    verdict,
)  # fmt: skip
from shoal.report.leaderboard import number
from shoal.report.page import environment, replace_file

FIELDS = ("compressor", "error", "low", "high", "bits", "framed_bits", "bias", "bound", "exact")
SWEPT = {"n": "clients n", "d": "coordinates d", "spread": "spread S of near-identical:S"}
GRAY = "#b9c2cc"


def load(folder: str | Path) -> dict[str, Any]:
    """The record in a folder. Raises ConfigError where there is none that can be read."""
    path = Path(folder) / "mean.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for point in record["points"] for row in point["rows"]]
        known = {row["compressor"] for row in rows} >= set(record["leaders"])
        if record["kind"] != "mean" or not rows or not known or any(name not in row for row in rows for name in FIELDS):
            raise ValueError(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged: run `shoal mean` again.") from None
    return record


def is_mean(folder: str | Path) -> bool:
    """Whether a folder holds estimated means rather than runs."""
    return (Path(folder) / "mean.json").is_file()


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


def cells(row: Row) -> list[str]:
    """The columns beside the compressor, as text."""
    bias = "by design" if row["bias"] == "stated" else f"{row['bias']} ({row['bias_z']:.1f})"
    bound = "–" if row["bound"] is None else number(row["bound"]) + ("" if row["evidence"] == "proved" else " *")
    times = [number(row[name]) for name in ("encode_ns", "decode_ns", "aggregate_ns")]
    shown = [number(row["bits"]), number(row["framed_bits"]), error(row), _interval(row)]
    return [*shown, bound, number(row["exact"]), bias, *times]


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
        map=choice_map(points),
        crossings=crossings(points, record["sweep"], record["leaders"]) if record["sweep"] else [],
        line=on_the_line(points),
        warnings=warnings(record),
        colors=colors(record),
        labels=labels,
        cells=cells,
        swept=SWEPT.get(record["sweep"] or "", record["sweep"]),
        data={"points": [_at(record, point) for point in points], "leaders": record["leaders"], "gray": GRAY,
              "sweep": _along(record) if record["sweep"] else None, "values": [point["swept"] for point in points]},
        plotlyjs=get_plotlyjs(),
    )  # fmt: skip


def colors(record: Mapping[str, Any]) -> dict[str, str]:
    """Colors of all compressors: the leaders' differ, and the others', which figures show in gray at first, repeat."""
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(_ranked(record))}


def _ranked(record: Mapping[str, Any]) -> list[str]:
    """The leaders, then the others."""
    leaders = list(record["leaders"])
    return leaders + [row["compressor"] for row in record["points"][0]["rows"] if row["compressor"] not in leaders]


def _name(record: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    if record["sweep"] in ("n", "d"):
        return f"{record['sweep']} = {point[record['sweep']]}"
    return str(point["inputs"])


def _floor(errors: Iterable[float]) -> float:
    """Where errors of float32's own size are drawn: a log axis has no zero."""
    seen = [error for error in errors if error > ROUNDING]
    return min(seen) / 10 if seen else ROUNDING


def _at(record: Mapping[str, Any], point: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Error against bits at one point: a marker with its interval, and a dash at the bound."""
    floor, look, ranked = _floor(row["error"] for row in point["rows"]), colors(record), _ranked(record)
    traces: list[dict[str, Any]] = []
    for row in point["rows"]:
        i, color, y = ranked.index(row["compressor"]), look[row["compressor"]], max(row["error"], floor)
        name, own = html.escape(row["compressor"]), {"meta": row["compressor"]}
        traces.append(own | {
            "x": [row["bits"]], "y": [y], "name": name, "mode": "markers", "type": "scatter", "legendgroup": name,
            "marker": {"size": 11, "color": color, "symbol": SYMBOLS[i % len(SYMBOLS)][1]},
            "error_y": {"type": "data", "symmetric": False, "array": [max(0.0, row["high"] - y)],
                        "arrayminus": [max(0.0, y - max(row["low"], floor))]},
            "hovertemplate": f"<b>{name}</b><br>error {error(row)} ({_interval(row)})<br>"
                             f"{number(row['bits'])} bits, bound {number(row['bound'])}<extra></extra>",
        })  # fmt: skip
        if row["bound"] is not None and row["bound"] > floor:
            traces.append(own | _dash([row["bits"]], [row["bound"]], name, color) | {
                "mode": "markers",
                "marker": {"size": 16, "color": color, "symbol": "line-ew-open", "line": {"width": 2}},
            })  # fmt: skip
    return traces


def _along(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Error along the sweep: measured with its band, the bound dashed, the exact error dotted."""
    points = record["points"]
    x, traces = [point["swept"] for point in points], []
    floor = _floor(row["error"] for point in points for row in point["rows"])
    look, ranked = colors(record), _ranked(record)
    for rows in zip(*(point["rows"] for point in points), strict=True):
        label = rows[0]["compressor"]
        i, color, name, own = ranked.index(label), look[label], html.escape(label), {"meta": label}
        y, high = [max(r["error"], floor) for r in rows], [max(r["high"], floor) for r in rows]
        low = [max(r["low"], floor) for r in rows]
        traces.append(own | _dash(x + x[::-1], high + low[::-1], name, color) | {
            "mode": "none", "fill": "toself", "fillcolor": color + "26", "type": "scatter",
        })  # fmt: skip
        traces.append(own | {
            "x": x, "y": y, "name": name, "mode": "lines+markers", "type": "scatter", "legendgroup": name,
            "line": {"color": color, "width": 2.2}, "marker": {"size": 8, "symbol": SYMBOLS[i % len(SYMBOLS)][1]},
            "hovertemplate": f"<b>{name}</b><br>%{{x}}: error %{{y:.3g}}<extra></extra>",
        })  # fmt: skip
        for field, dash in (("bound", "dash"), ("exact", "dot")):
            line = [r[field] if r[field] is not None and r[field] > floor else None for r in rows]
            if any(v is not None and math.isfinite(v) for v in line):
                traces.append(
                    own | _dash(x, line, name, color) | {"line": {"color": color, "width": 1.2, "dash": dash}}
                )
    return traces


def _dash(x: list[float], y: list[Any], name: str, color: str) -> dict[str, Any]:
    """A trace that belongs to a compressor's own and has no line in the legend."""
    return {"x": x, "y": y, "name": name, "mode": "lines", "type": "scatter", "legendgroup": name,
            "showlegend": False, "hoverinfo": "skip"}  # fmt: skip
