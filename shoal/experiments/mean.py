"""Distributed mean estimation: n clients send compressed vectors, a server estimates their mean; how well, how dear?

Measured, over independent rounds: the normalized error E||(1/n) sum C_i(a_i) - abar||^2 / M with M = (1/n) sum
||a_i||^2, the bits that were encoded, and the time to encode and to decode. Beside it stands what theory says of these
very vectors: the AB inequality (Szlendak et al., arXiv:2110.03300), and for correlated quantization (Suresh et al.,
arXiv:2203.04925) the exact error of docs/derivations/correlated.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from shoal import compressors as library
from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import machine, make_folder, versions, write_json
from shoal.experiments.measurement import ROUNDING, Measurement, facts_of, measure, stated
from shoal.experiments.vectors import Inputs, given
from shoal.palette import COLORS, SYMBOLS

if TYPE_CHECKING:
    import pyarrow
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARAMETERS = (
    "RandK(0.03125)", "QSGD(1)", "QSGD(7)", "Correlated()", "Correlated('own')", "Correlated(levels=4)",
    "Correlated(levels=16)", "Correlated(blocks=4)", "Rotated(Correlated())", "Grid()", "Rotated(Grid())",
    "Rotated(Grid(16))", "Drive(numerical=True)", "Eden(2, numerical=True)", "Eden(4, numerical=True)",
    "Composed(PermK(), QSGD(7))",
)  # fmt: skip
WORK = 200_000_000  # client-coordinates of one compressor, over all points, that the default number of rounds asks for
FEWEST, MOST = 8, 200  # rounds, by default
LED = 10  # compressors with a color of their own
GRAY = "#c9d0d7"
Progress = Callable[[str, float], None]  # (what is being measured, the share of all work that is done)


@dataclass(frozen=True)
class Point:
    """All compressors on the same n vectors; `spread` = V/M tells how much they differ, `peak` = max ||a_i||^2 / M."""

    inputs: str
    n: int
    d: int
    swept: float | None
    size: float
    spread: float
    peak: float
    rows: tuple[Measurement, ...]


@dataclass(frozen=True)
class MeanEstimate:
    """What `mean_estimation` found: one point, or several along a sweep of n, d or the spread ("spread")."""

    points: tuple[Point, ...]
    rounds: int
    seed: int
    sweep: str | None = None

    @property
    def leaders(self) -> list[str]:
        """Whom figures show in color: at most `LED`, the most often among the three best for 1/16, 1/8, .. 32 bits."""
        score: dict[str, int] = {}
        for point in self.points:
            sound = sorted((row for row in point.rows if row.bias == "none seen"), key=lambda row: row.error)
            for budget in (1.1 * 2.0**k for k in range(-4, 6)):
                for place, row in enumerate([row for row in sound if row.bits <= budget][:3]):
                    score[row.compressor] = score.get(row.compressor, 0) + 3 - place
        return sorted(score, key=lambda name: -score[name])[:LED]

    def table(self) -> pyarrow.Table:
        """A row a compressor and point, as an Arrow table (extra [report])."""
        try:
            import pyarrow as pa
        except ImportError:
            raise ConfigError('a table needs pyarrow: pip install "shoal[report]".') from None
        facts = ("inputs", "n", "d", "swept", "spread", "peak")
        rows = [{k: getattr(p, k) for k in facts} | asdict(row) for p in self.points for row in p.rows]
        return pa.Table.from_pylist(rows)

    def plot(self) -> Figure:
        """Error against bits, or along the sweep, theory beside it, both on log scales (extra [report])."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigError('a plot needs matplotlib: pip install "shoal[report]".') from None
        figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
        panel = figure.subplots()
        (_draw_bits if self.sweep is None else _draw_sweep)(panel, self)
        panel.set(xscale="log", yscale="log", ylabel="error / mean squared norm")
        panel.grid(True, which="major", color="#e3e6ea", lw=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", frameon=False, fontsize=7.5)
        return figure

    def save(self, folder: str | Path, command: str = "") -> Path:
        """Write mean.json, and results.parquet, figure.png and figure.pdf where the extra [report] is installed.

        Raises ConfigError where the folder is not empty or cannot be written.
        """
        path = Path(folder)
        make_folder(path)
        points = [asdict(point) for point in self.points]
        facts = {"format": 1, "kind": "mean", "sweep": self.sweep, "rounds": self.rounds, "seed": self.seed}
        facts |= {"leaders": self.leaders, "command": command, "versions": versions(), "machine": machine()}
        try:
            from pyarrow import parquet

            figure = self.plot()
        except (ImportError, ConfigError):
            pass  # mean.json holds the same numbers
        else:
            parquet.write_table(self.table(), path / "results.parquet")
            figure.savefig(path / "figure.png", metadata={"Software": None})
            figure.savefig(path / "figure.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
        write_json(path / "mean.json", {**facts, "points": points})
        return path


# ------------------------------------------------------------------------------------------------ what is measured
def mean_estimation(
    vectors: Tensor | np.ndarray | Inputs | Sequence[Inputs],
    compressors: Sequence[Compressor | str] | None = None,
    rounds: int | None = None,
    seed: int = 0,
    *,
    sweep: str | None = None,
    files: Iterable[str] = (),
    progress: Progress | None = None,
) -> MeanEstimate:
    """Compress the n rows of `vectors` (n, d) in so many independent rounds, with every compressor.

    vectors: numbers, or what `shoal.experiments.vectors` makes; several of them along a `sweep` ("n", "d" or "spread").
    rounds: by default 200, and fewer, down to 8, for vectors so long that each of them tells as much.
    compressors: objects or expressions, with classes of the Python `files` too; by default all unbiased ones of the
    library that fit. Raises ConfigError, before anything is measured, for a compressor that does not fit, for fewer
    than two rounds, and for vectors that are all zero (they have no normalized error).
    """
    inputs = _inputs(vectors)
    if rounds is None:
        rounds = min(MOST, max(FEWEST, WORK // sum(i.n * i.d for i in inputs)))
    if rounds < 2:
        raise ConfigError(f"rounds={rounds}: an interval needs at least 2 rounds.")
    chosen = _chosen(inputs, compressors, files)
    total, points = sum(i.n * i.d for i in inputs) * len(chosen) or 1, []
    done = 0.0
    for given_ in inputs:
        rows = given_.vectors()
        facts, measured = facts_of(rows, given_.name), []
        for compressor in chosen:
            label = compact(compressor)
            share = given_.n * given_.d / total

            def tell(part: float, label: str = label, start: float = done, share: float = share) -> None:
                if progress is not None:
                    progress(label, start + part * share)

            measured.append(measure(rows, facts, compressor, rounds, seed, tell))
            done += share
        peak = facts.top / facts.size
        points.append(
            Point(given_.name, given_.n, given_.d, given_.swept, facts.size, facts.spread, peak, tuple(measured))
        )
    return MeanEstimate(tuple(points), rounds, seed, sweep)


def _inputs(vectors: Any) -> list[Inputs]:
    if isinstance(vectors, Inputs):
        return [vectors]
    if isinstance(vectors, list | tuple) and vectors and all(isinstance(v, Inputs) for v in vectors):
        return list(vectors)
    return [given(vectors)]


def _chosen(inputs: list[Inputs], asked: Sequence[Compressor | str] | None, files: Iterable[str]) -> list[Compressor]:
    names = known_names(files)
    if asked:
        chosen = [parse(c, names, Compressor) if isinstance(c, str) else c for c in asked]
        for compressor in chosen:
            for i in inputs:
                compressor.check(i.n, i.d)
        return list({compact(c): c for c in chosen}.values())
    return [c for c in defaults(names) if all(_fits(c, i) for i in inputs)]


def _fits(compressor: Compressor, inputs: Inputs) -> bool:
    try:
        compressor.check(inputs.n, inputs.d)
    except ConfigError:
        return False
    return stated(compressor, inputs.n, inputs.d) is not None


def defaults(names: dict[str, type]) -> list[Compressor]:
    """The library's compressors with sensible parameters: `PARAMETERS`, and every class that needs none, but Dense."""
    made = [parse(text, names, Compressor) for text in PARAMETERS]
    for name in library.__all__:
        if any(type(c).__name__ == name for c in made) or name == "Dense":
            continue
        try:
            made.append(getattr(library, name)())
        except TypeError:
            continue  # it has a parameter that somebody must choose
    return made


# ------------------------------------------------------------------------------------------------ figures
class _Look(NamedTuple):
    color: str
    marker: str
    label: str | None
    led: bool


def _looks(result: MeanEstimate) -> list[_Look]:
    """Of the rows of a point: colors for the leaders, gray for the others, who share one line of the legend."""
    leaders, looks, told = result.leaders, [], False
    for row in result.points[0].rows:
        if row.compressor in leaders:
            rank = leaders.index(row.compressor)
            looks.append(_Look(COLORS[rank], SYMBOLS[rank % len(SYMBOLS)][0], row.compressor, True))
        else:
            looks.append(_Look(GRAY, "o", None if told else "others", False))
            told = True
    return looks


def _draw_bits(panel: Axes, result: MeanEstimate) -> None:
    (point,) = result.points
    floor = _floor(row.error for row in point.rows)
    for look, row in zip(_looks(result), point.rows, strict=True):
        color, y = look.color, max(row.error, floor)
        bars = [[max(0.0, y - max(row.low, floor))], [max(0.0, row.high - y)]]
        panel.errorbar([row.bits], [y], bars, color=color, marker=look.marker, ls="", ms=6, capsize=3, label=look.label)
        if look.led and row.bound is not None and row.bound > floor:
            panel.plot([row.bits], [row.bound], "_", color=color, ms=14)
            panel.plot([row.bits, row.bits], [y, row.bound], color=color, lw=0.7, ls=":")
    panel.set_xlabel("bits a coordinate and client")
    panel.set_title(
        f"{point.inputs}, n = {point.n}, d = {point.d}: measured, and the bound (dash)", loc="left", size=10
    )


def _draw_sweep(panel: Axes, result: MeanEstimate) -> None:
    floor = _floor(row.error for point in result.points for row in point.rows)
    x = [point.swept or 0.0 for point in result.points]
    for look, *rows in zip(_looks(result), *(point.rows for point in result.points), strict=True):
        color, order = look.color, 2 if look.led else 1
        y = [max(r.error, floor) for r in rows]
        panel.plot(x, y, color=color, marker=look.marker, ms=4, label=look.label, zorder=order)
        if not look.led:
            continue
        low, high = [max(r.low, floor) for r in rows], [max(r.high, floor) for r in rows]
        panel.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        for name, style in (("bound", "--"), ("exact", ":")):
            values = [getattr(r, name) for r in rows]
            line = [math.nan if v is None or v < floor else v for v in values]
            panel.plot(x, line, color=color, lw=0.9, ls=style)
    panel.set_xlabel({"spread": "spread S of near-identical:S"}.get(result.sweep or "", result.sweep or ""))
    panel.set_title("measured with 95% band, the bound (dashed), the exact error (dotted)", loc="left", size=10)


def _floor(errors: Iterable[float]) -> float:
    """Where errors of float32's own size are drawn: a log axis has no zero."""
    seen = [error for error in errors if error > ROUNDING]
    return min(seen) / 10 if seen else ROUNDING
