"""The curves of a race, over seeds, and the figure for paper.

A curve shows, at each amount spent (bits, rounds, seconds), the median over seeds of ||grad f||^2 at the last iterate
each seed had recorded by then, with the band from the least to the greatest. A seed that has stopped keeps its last
value, and the curve ends where the median seed ended. So, for an odd number of seeds, the curve first goes below the
target exactly at the median of the bits to target that the leaderboard shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import ConfigError
from shoal.palette import COLORS, GD_COLOR, SYMBOLS
from shoal.report.leaderboard import Spread, family, number
from shoal.report.load import Column, Race, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name -> (what the axis says, the quantity of a RunRecord)
AXES: dict[str, tuple[str, str]] = {
    "up_bits": ("uplink payload bits a client", "up_bits"),
    "total_bits": ("uplink + downlink payload bits a client", "total_bits"),
    "framed_bits": ("bits a client with frame headers, both directions", "framed_bits"),
    "rounds": ("communication rounds", "round"),
    "seconds": ("seconds of wall time", "seconds"),
}
POINTS = 400


@dataclass(frozen=True, eq=False)
class Curve:
    """Columns of equal length over the amount spent `x`: median, least and greatest ||grad f||^2, and where it was.

    `rounds` and `up_bits` are medians over seeds at the same point, for the hover text. `crossing` is the x of the
    median crossing of the target, None where the median seed did not get there.
    """

    x: Column
    median: Column
    low: Column
    high: Column
    rounds: Column
    up_bits: Column
    crossing: float | None
    seeds: int


def styles(race: Race) -> dict[str, tuple[str, tuple[str, str]]]:
    """label -> (color, (matplotlib marker, plotly symbol)): the same in every figure of the race."""
    others = [label for label in race.methods if family(label) != "GD"]
    chosen = {label: (COLORS[i % len(COLORS)], SYMBOLS[(i + 1) % len(SYMBOLS)]) for i, label in enumerate(others)}
    return {label: chosen.get(label, (GD_COLOR, SYMBOLS[0])) for label in race.methods}


def curve(runs: Sequence[RunRecord], axis: str, target: float | None, points: int = POINTS) -> Curve:
    """The curve of one method under one step rule, from its runs over seeds, thinned to about `points` points.

    The points kept are recorded ones, evenly spread in log x; each seed's first crossing of the target is kept.
    """
    quantity = _quantity(axis)
    spent = [np.maximum.accumulate(run.quantity(quantity)) for run in runs]
    crossings = [run.crossing(target) for run in runs]
    reached = [float(x[k]) for x, k in zip(spent, crossings, strict=True) if k is not None]
    start, end = max(float(x[0]) for x in spent), sorted(float(x[-1]) for x in spent)[len(runs) // 2]
    if 2 * len(reached) >= len(runs):
        # A seed cut off early must not hide the median crossing that the leaderboard states.
        end = max(end, Spread.of(reached + [math.inf] * (len(runs) - len(reached))).median)
    grid = _thin(np.unique(np.concatenate(spent)), start, end, reached, points)
    rows = [np.searchsorted(x, grid, side="right") - 1 for x in spent]

    def across(name: str) -> Column:
        return np.stack([run.columns[name][k] for run, k in zip(runs, rows, strict=True)])

    norms = across("grad_norm_sq")
    norms = np.where(np.isfinite(norms), norms, np.inf)
    median = np.median(norms, axis=0)
    below = np.flatnonzero(median <= target) if target is not None else np.array([], dtype=np.intp)
    return Curve(
        x=grid,
        median=median,
        low=norms.min(axis=0),
        high=norms.max(axis=0),
        rounds=np.median(across("round"), axis=0),
        up_bits=np.median(across("up_bits"), axis=0),
        crossing=float(grid[below[0]]) if below.size else None,
        seeds=len(runs),
    )


def _thin(x: Column, start: float, end: float, keep: Sequence[float], points: int) -> Column:
    """About `points` of the positive x in start..end, evenly spread in log x, with those of `keep` in that range."""
    x = x[(x > 0) & (x >= start) & (x <= end)]
    if len(x) > points:
        wanted = np.geomspace(x[0], x[-1], points)
        after = np.clip(np.searchsorted(x, wanted), 1, len(x) - 1)
        nearer = np.where(wanted - x[after - 1] < x[after] - wanted, after - 1, after)
        x = x[np.unique(nearer)]
    return np.unique(np.concatenate([x, [k for k in keep if k > 0 and start <= k <= end]]))


def _quantity(axis: str) -> str:
    if axis not in AXES:
        raise ConfigError(f"axis={axis!r}: must be one of {', '.join(AXES)}.")
    return AXES[axis][1]


def plot(race: Race, axis: str = "up_bits") -> Figure:
    """||grad f||^2 against `axis`, log-log, one panel a step rule: a matplotlib Figure, 2000 pixels wide when saved.

    Raises ConfigError for an axis not in AXES and where matplotlib is not installed.
    """
    _quantity(axis)
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    look = styles(race)
    steps = [step for step in race.steps if any(s == step for _, s in race.curves)] or ["theory"]
    figure = Figure(figsize=(10, 5.4 if len(steps) > 1 else 6.0), dpi=200, facecolor="white")
    panels = figure.subplots(1, len(steps), sharex=True, sharey=True, squeeze=False)[0]
    for panel, step in zip(panels, steps, strict=True):
        for label, s in race.curves:
            if s == step:
                _draw(panel, curve(race.finals(label, step), axis, race.target), *look[label])
        _dress(panel, f"{step} steps", AXES[axis][0], race.target)
    panels[0].set_ylabel("$\\|\\nabla f(x^k)\\|^2$")
    handles = [Line2D([], [], color=look[label][0], marker=look[label][1][0], lw=1.8, ms=5) for label in race.methods]
    # Two columns hold the longest labels in use, such as "Marina(Independent(QSGD(levels=4)))".
    figure.legend(
        handles,
        [_plain(label) for label in race.methods],
        loc="lower center",
        frameon=False,
        ncols=min(3, len(handles)) or 1,
        fontsize=8.5,
    )
    lines = math.ceil(len(handles) / 3)
    figure.suptitle(_plain(race.title), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.tight_layout(rect=(0, 0.01 + 0.034 * lines, 1, 1))
    return figure


def _draw(panel: Axes, c: Curve, color: str, symbols: tuple[str, str]) -> None:
    finite = np.where(np.isfinite(c.median) & (c.median > 0), c.median, np.nan)
    if not np.isfinite(finite).any():  # no row yet, or all of them diverged: a log axis has no place for that
        return
    if c.seeds > 1:
        high = np.where(np.isfinite(c.high), c.high, np.nanmax(finite, initial=1.0) * 1e3)
        panel.fill_between(c.x, np.maximum(c.low, 1e-300), high, color=color, alpha=0.15, lw=0)
    panel.plot(c.x, finite, color=color, lw=1.6)
    if c.crossing is not None:
        y = c.median[np.searchsorted(c.x, c.crossing)]
        panel.plot([c.crossing], [y], symbols[0], color=color, ms=6.5, mec="white", mew=0.8, zorder=5)


def _dress(panel: Axes, title: str, x_title: str, target: float | None) -> None:
    panel.set(xscale="log", yscale="log")
    panel.set_title(_plain(title), fontsize=10, loc="left")
    panel.set_xlabel(x_title)
    panel.grid(True, which="major", color="#e3e6ea", lw=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(which="both", color="#9aa3ad")
    panel.set_axisbelow(True)
    if target is not None:
        panel.axhline(target, color="#555555", lw=1.0, ls=(0, (5, 3)))
        panel.annotate(
            f"target {number(target)}",
            (0.01, target),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=7.5,
            color="#555555",
        )


def _plain(text: str) -> str:
    """Without mathtext: a dollar sign in a user's label is a dollar sign."""
    return text.replace("$", r"\$")


def save(race: Race, folder: Path) -> list[Path]:
    """Write figure.png and figure.pdf into `folder`. No dates go in, so the same race makes the same bytes."""
    figure = plot(race)
    paths = [folder / "figure.png", folder / "figure.pdf"]
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return paths


def require(*names: str) -> None:
    """Raise ConfigError, before any work, where a module of the extra [report] is not installed."""
    from importlib import import_module

    for name in names:
        try:
            import_module(name)
        except ImportError:
            raise ConfigError(f'The report needs {name}, which is not installed: pip install "shoal[report]"') from None


def encoded(c: Curve) -> dict[str, Any]:
    """The curve for the page: columns as base64 of little-endian float32, non-finite values as they are."""
    from base64 import b64encode

    def pack(column: Column) -> str:
        with np.errstate(over="ignore", under="ignore"):
            return b64encode(column.astype("<f4").tobytes()).decode("ascii")

    columns = {"x": c.x, "y": c.median, "round": c.rounds, "bits": c.up_bits}
    if c.seeds > 1:
        columns |= {"low": c.low, "high": c.high}
    return {name: pack(column) for name, column in columns.items()} | {"crossing": c.crossing, "seeds": c.seeds}
