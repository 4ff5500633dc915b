"""report.html and the files beside it: one page that opens offline, and the numbers behind it.

The page carries plotly.js once, its curves as base64 columns, its tables as HTML; it loads nothing, and its
Content-Security-Policy forbids the browser to. Everything that a user named (methods, titles, files) is escaped by
jinja2, by `</` never standing in the embedded JSON, and by the page's script before it reaches a figure.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.report import figures
from shoal.report.leaderboard import (
    Entry,
    bits,
    count,
    leaderboard,
    number,
    rivals,
    scaled,
    seconds,
    span,
    times,
    verdict,
    when_to_use,
)
from shoal.report.load import COLUMNS, Race, RunRecord, load

if TYPE_CHECKING:
    import pyarrow as pa
    from jinja2 import Environment

# plotly.js alone is 4.8 MB. The curves share this many bytes, so that the page stays below 6 MB for any race.
CURVE_BYTES = 800_000
TRAFFIC_NAMES = {
    "up_bits": "up: payload",
    "up_headers": "up: frame headers",
    "down_bits": "down: payload",
    "down_headers": "down: frame headers",
}


def write(folder: str | Path) -> Path:
    """Everything the report consists of, into `folder`; the path of its report.html.

    Writes leaderboard.json, results.parquet, figure.png, figure.pdf, report.html. Raises ConfigError, before anything
    is written, where the folder holds no run or where the extra [report] is not installed.
    """
    figures.require("jinja2", "plotly", "matplotlib", "pyarrow")
    from pyarrow import parquet

    race = load(folder)
    entries = leaderboard(race)
    board = {
        "format": 1,
        "title": race.title,
        "target": race.target,
        "status": race.status,
        "entries": [entry.as_json() for entry in entries],
        "verdict": verdict(race, entries),
    }
    replace_file(
        race.folder / "leaderboard.json", json.dumps(board, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    parquet.write_table(results_table(race), race.folder / "results.parquet", compression="zstd")
    figures.save(race, race.folder)
    return replace_file(race.folder / "report.html", render(race, entries))


def replace_file(path: Path, text: str) -> Path:
    """Write a file whole or not at all: a page being read is never half a page."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def results_table(race: Race) -> pa.Table:
    """All recorded rows of all runs, trials too: label, step, multiple, seed, trial and the metrics, as one table."""
    figures.require("pyarrow")
    import pyarrow as pa

    rows = [run.rows for run in race.runs]

    def each(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        return pa.array(list(chain.from_iterable([value] * k for value, k in zip(values, rows, strict=True))), kind)

    table = {
        "label": each([run.label for run in race.runs], pa.string()),
        "step": each([run.step for run in race.runs], pa.string()),
        "multiple": each([run.multiple for run in race.runs], pa.float64()),
        "seed": each([run.seed for run in race.runs], pa.int64()),
        "trial": each([run.trial for run in race.runs], pa.bool_()),
    }
    for name in COLUMNS:
        column = np.concatenate([run.columns[name] for run in race.runs] or [np.empty(0)])
        table[name] = pa.array(column.astype(np.int64) if name == "round" else column)
    return pa.table(table)


def environment() -> Environment:
    """The templates beside this file, with the filters that write numbers the way people read them."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "bits": bits,
        "number": number,
        "times": times,
        "seconds": seconds,
        "breakable": _breakable,
        "bytes": _bytes,
        "span": span,
    }
    return made


def render(race: Race, entries: Sequence[Entry] | None = None) -> str:
    """The page as text: a few MB, most of it plotly.js."""
    figures.require("jinja2", "plotly")
    from plotly.offline import get_plotlyjs

    entries = leaderboard(race) if entries is None else entries
    look = figures.styles(race)
    return (
        environment()
        .get_template("template.html")
        .render(
            race=race,
            entries=entries,
            colors={label: look[label][0] for label in race.methods},
            verdict=verdict(race, entries),
            families=when_to_use(race),
            question=_question(race),
            chips=_chips(race),
            heroes=_heroes(race, entries),
            status=_status(race),
            steps=[step for step in race.steps if any(s == step for _, s in race.curves)],
            step_sizes=[_step_sizes(race, label, entries) for label in race.methods],
            tuning_seeds=sorted({run.seed for run in race.runs if run.trial}),
            traffic=[(entry, _shares(entry)) for entry in entries],
            traffic_names=TRAFFIC_NAMES,
            facts=_facts(race),
            smoothness=_smoothness(race),
            hashes=_hashes(race),
            data=_data(race, entries),
            plotlyjs=get_plotlyjs(),
        )
    )


def _question(race: Race) -> str:
    where = f"on {race.problem.get('name', 'this problem')}"
    if "n" in race.problem:
        where += f" over {race.problem['n']} clients"
    if race.target is None:
        return f"How far does each method bring the squared gradient norm {where} for the bits each client sends?"
    return (
        f"Which method brings the squared gradient norm {where} down to {number(race.target)} "
        "with the fewest bits sent by each client?"
    )


def _heroes(race: Race, entries: Sequence[Entry]) -> list[tuple[Entry, list[str]]]:
    """(the winner, whom these seeds do not tell it apart from) for each step rule that has a winner."""
    ranked = [[entry for entry in entries if entry.step == step] for step in race.steps]
    return [(mine[0], rivals(mine[0], mine[1:])) for mine in ranked if mine and mine[0].arrived]


def _chips(race: Race) -> list[tuple[str, str]]:
    """The facts that a reader needs beside the title."""
    chips = [
        (name, _show(race.problem[key]))
        for key, name in (("name", "problem"), ("n", "clients"), ("d", "dimension"))
        if key in race.problem
    ]
    chips += [("methods", str(len(race.methods))), ("seeds", str(len(race.seeds)))]
    return chips + ([("target ‖∇f‖² ≤", number(race.target))] if race.target is not None else [])


def _status(race: Race) -> list[str]:
    """What the reader must know before trusting the page: that the race is not over, or that rows are missing."""
    said = []
    if race.status != "done":
        ended = sum(run.finished for run in race.runs)
        said.append(
            f"This race has not run to its end (status: {race.status}): {ended} of the {len(race.runs)} runs "
            "found had ended. What is shown is what had been recorded."
        )
    if race.torn:
        said.append(f"{count(race.torn, 'half-written line')} left out.")
    if race.skipped:
        said.append(f"{count(race.skipped, 'run folder')} without readable settings left out.")
    return said


def _step_sizes(race: Race, label: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """One row of the step-size table: the theorem and its constants, both steps, and every multiple tried."""
    mine = {entry.step: entry for entry in entries if entry.label == label}
    ended = [run for step in race.steps for run in race.finals(label, step) if run.finished]
    constants = ended[0].constants if ended else {}
    return {
        "label": label,
        "entries": mine,
        "theorem": race.no_theorem.get(label) or (ended[0].theorem if ended else None),
        "unit": "1/L₋" if label in race.no_theorem else None,
        "resolved": _rounded(ended[0].resolved or "") if ended else None,
        "p": ended[0].p if ended else None,
        "constants": [(k, _show(v)) for k, v in constants.items() if k != "p" and not isinstance(v, str)],
        "words": [(k, v) for k, v in constants.items() if isinstance(v, str) and v],
        "seen": _seen(ended),
        "chosen": mine["tuned"].multiple if "tuned" in mine else None,
        "tried": [(run.multiple, _outcome(run, race.target), run.seed) for run in race.trials(label)],
    }


def _seen(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(symbol, the largest seen along these runs) of L_-, L_+ and L_±."""
    names = dict.fromkeys(name for run in runs for name in run.seen)
    return [(_MEANING[name][0], number(max(run.seen.get(name, 0.0) for run in runs))) for name in names]


def _outcome(run: RunRecord, target: float | None) -> str:
    """What a try on the tuning seed came to: its bits to target, or how far it got."""
    if (k := run.crossing(target)) is not None:
        return bits(float(run.columns["up_bits"][k]))
    if run.stopped == "diverged" or not run.rows:
        return "diverged" if run.rows else "nothing recorded"
    # A try is given up once it has spent more than the best one before it, so this is often what that one needed.
    return f"> {bits(float(run.columns['up_bits'][-1]))}"


def _shares(entry: Entry) -> list[tuple[str, float, float]]:
    """(part, its bits, its share in percent) of all traffic of a client, both directions, headers apart."""
    spent = entry.spent
    parts = {
        "up_bits": spent["up_bits"],
        "up_headers": max(0.0, spent["up_framed_bits"] - spent["up_bits"]),
        "down_bits": spent["down_bits"],
        "down_headers": max(0.0, spent["down_framed_bits"] - spent["down_bits"]),
    }
    total = sum(parts.values()) or 1.0
    return [(name, value, 100.0 * value / total) for name, value in parts.items()]


def _facts(race: Race) -> list[tuple[str, str]]:
    """The problem and the budget, as (name, value) pairs of text."""
    facts = [(name, _show(value)) for name, value in race.problem.items()]
    facts.append(("seeds", ", ".join(map(str, race.seeds))))
    if race.target is not None:
        facts.append(("target", f"‖∇f(x)‖² ≤ {number(race.target)}"))
    if race.rounds is not None:
        facts.append(("most rounds", f"{race.rounds:,}"))
    if race.bits is not None:
        facts.append(("most bits a client", bits(race.bits)))
    return facts


_MEANING = {
    "minus": ("L₋", "Lipschitz constant of ∇f"),
    "plus": ("L₊", "mean-square Lipschitz constant of the ∇fᵢ"),
    "pm": ("L±", "Hessian variance: how far clients differ; 0 when they agree"),
    "tilde": ("L̃", "root mean square of the Lᵢ"),
    "max": ("max Lᵢ", "the steepest client"),
    "mu": ("μ", "Polyak–Łojasiewicz constant of f"),
    "f_inf": ("f_inf", "mean of the clients' lower bounds"),
    "samples": ("N/n", "samples a client, on average"),
    "most": ("max Nᵢ", "samples of the largest client"),
    "sample": ("L_s", "spread of the samples' gradient differences"),
    "noise": ("σ²", "variance of a sample's gradient"),
}


def _smoothness(race: Race) -> list[tuple[str, str, str, str]]:
    """(symbol, value, status, meaning) of each constant, and beside it what the runs have seen of it."""
    rows = []
    for name, (value, status) in race.smoothness.items():
        symbol, meaning = _MEANING.get(name, (name, ""))
        rows.append((symbol, number(value), status, meaning))
        if name in race.seen:
            seen = race.seen[name]
            share = f"; {100 * seen / value:.2g}% of the {status} above" if value > 0 else ""
            rows.append((f"{symbol} along the way", number(seen), "estimate", f"largest seen along a run{share}"))
    return rows


def _hashes(race: Race) -> list[tuple[RunRecord, str]]:
    """SHA-256 of the final iterate of each run that ended, the counted ones first."""
    ended = [(run, str(run.result.get("sha256", ""))) for run in race.runs if run.result is not None]
    place = {label: i for i, label in enumerate(race.methods)}
    return sorted(ended, key=lambda pair: (pair[0].trial, place[pair[0].label], pair[0].step, pair[0].seed))


def _data(race: Race, entries: Sequence[Entry]) -> dict[str, Any]:
    """What the page's script draws: styles, curves for every axis, bars."""
    look = figures.styles(race)
    columns = 6 * len(figures.AXES) * max(1, len(race.curves))
    points = min(figures.POINTS, max(60, int(CURVE_BYTES / (columns * 4 * 4 / 3))))
    return {
        "target": race.target,
        "axes": {name: title for name, (title, _) in figures.AXES.items()},
        "methods": [{"label": label, "color": color, "symbol": symbols[1]} for label, (color, symbols) in look.items()],
        "curves": [
            {
                "label": label,
                "step": step,
                "axes": {
                    axis: figures.encoded(figures.curve(race.finals(label, step), axis, race.target, points))
                    for axis in figures.AXES
                },
            }
            for label, step in race.curves
        ],
        "bars": [_bar(entry) for entry in entries],
    }


def _bar(entry: Entry) -> dict[str, Any]:
    return {"label": entry.label, "step": entry.step, "seeds": entry.seeds, "reached": entry.reached} | {
        name: value for name, value in entry.as_json()["bits"].items()
    }


def _breakable(label: str) -> Any:
    """A label that may wrap after an opening parenthesis, a comma or a slash, escaped."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?:(?<=\w\()|(?<=[,/]))(?!\))", label))


def _rounded(resolved: str) -> str:
    """A resolved method with its long decimals at four digits; leaderboard.json has them all."""
    return re.sub(r"\d*\.\d{5,}(?:e[+-]?\d+)?", lambda found: f"{float(found.group()):.4g}", resolved)


def _bytes(value: float) -> str:
    return scaled(value / 8, "B")


def _show(value: Any) -> str:
    """A setting of any kind as text: numbers rounded, nested settings as name = value."""
    if isinstance(value, bool) or value is None:
        return "–" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_show(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_show(item) for item in value)
    return str(value)
