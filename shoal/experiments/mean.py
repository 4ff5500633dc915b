"""Distributed mean estimation: n clients send compressed vectors, a server estimates their mean; how well, how dear?

Measured, over independent rounds: the normalized error E||(1/n) sum C_i(a_i) - abar||^2 / M with M = (1/n) sum
||a_i||^2, the bits that were encoded, and the time to encode and to decode. Beside it stands what theory says of these
very vectors: the AB inequality (Szlendak et al., arXiv:2110.03300), and for correlated quantization (Suresh et al.,
arXiv:2203.04925) the exact error of docs/derivations/correlated.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from shoal import compressors as library
from shoal.compressors import Correlated
from shoal.compressors.correlated import exact_error
from shoal.core import Compressor, Round
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import machine, make_folder, versions, write_json
from shoal.experiments.timing import clock
from shoal.experiments.vectors import Inputs, given
from shoal.palette import COLORS, SYMBOLS
from shoal.theory import AB, independent
from shoal.wire import HEADER

if TYPE_CHECKING:
    import pyarrow
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BATCHES = 20  # the rounds are cut into so many, for intervals and for the bias check
BIASED = 6.0  # z above this: see `bias_z`
AGREEMENT = 32  # bits up a client for a scale that all clients agree on
DECODES = 5  # rounds in which rows are also decoded one by one, to time it
EXACT = 30_000_000  # n^2 d up to which the exact error of correlated codes is computed
ROUNDING = 1e-12  # normalized errors below this are float32's own
PARAMETERS = ("RandK(0.03125)", "QSGD(1)", "QSGD(7)", "Correlated()", "Correlated('own')")
Progress = Callable[[str, float], None]  # (what is being measured, the share of all work that is done)


class Facts(NamedTuple):
    """What theory needs of the vectors: M = (1/n) sum ||a_i||^2, ||abar||^2, max ||a_i||^2, whether all are equal."""

    size: float
    mean: float
    top: float
    equal: bool

    @property
    def spread(self) -> float:
        """V/M = 1 - ||abar||^2/M, from 0 (all equal) to 1 (nothing in common)."""
        return 0.0 if self.equal else max(0.0, 1.0 - self.mean / self.size)


@dataclass(frozen=True)
class Measurement:
    """One compressor on n vectors. Errors are in units of M, bits are a coordinate and client, times ns for the same.

    `low` and `high` are a 95% interval of `error`; `bias_z` a test of unbiasedness and `bias` its verdict, "none seen",
    "found" or "stated" (the compressor is biased by design); `bound` is what a theorem guarantees on these vectors, and
    `exact` the error itself where it is known without measuring.
    """

    compressor: str
    error: float
    low: float
    high: float
    bias_z: float
    bias: str
    bits: float
    framed_bits: float
    encode_ns: float
    decode_ns: float
    aggregate_ns: float
    bound: float | None = None
    evidence: str = ""
    source: str = ""
    exact: float | None = None


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
    """What `mean_estimation` found: one point, or several along a sweep of n, d or the spread ("near")."""

    points: tuple[Point, ...]
    rounds: int
    seed: int
    sweep: str | None = None

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
        facts |= {"command": command, "versions": versions(), "machine": machine()}
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
    rounds: int = 200,
    seed: int = 0,
    *,
    sweep: str | None = None,
    files: Iterable[str] = (),
    progress: Progress | None = None,
) -> MeanEstimate:
    """Compress the n rows of `vectors` (n, d) in so many independent rounds, with every compressor.

    vectors: numbers, or what `shoal.experiments.vectors` makes; several of them along a `sweep` ("n", "d" or "near").
    compressors: objects or expressions, with classes of the Python `files` too; by default all unbiased ones of the
    library that fit. Raises ConfigError, before anything is measured, for a compressor that does not fit, for fewer
    than two rounds, and for vectors that are all zero (they have no normalized error).
    """
    inputs = _inputs(vectors)
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


def facts_of(rows: Tensor, name: str = "vectors") -> Facts:
    """M, ||abar||^2 and max ||a_i||^2, in float64. Raises ConfigError where all vectors are zero."""
    norms = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) ** 2).numpy()
    mean = rows.mean(0, dtype=torch.float64)
    if not norms.any():
        raise ConfigError(f"{name}: all vectors are zero, and an error relative to their size means nothing.")
    return Facts(float(norms.mean()), float(mean @ mean), float(norms.max()), bool((rows == rows[0]).all()))


# ------------------------------------------------------------------------------------------------ one compressor
def measure(
    rows: Tensor, facts: Facts, compressor: Compressor, rounds: int, seed: int, tell: Callable[[float], None]
) -> Measurement:
    """One compressor on the rows, in rounds 0..rounds-1; another round before them warms up and is thrown away."""
    (n, d), mean = rows.shape, rows.mean(0, dtype=torch.float64)
    edges = np.linspace(0, rounds, min(BATCHES, rounds) + 1).astype(int)[1:]
    sums = torch.zeros(len(edges), d, dtype=torch.float32)  # of the error vectors of each batch
    errors, sent, times = np.empty(rounds), 0, [[0.0], [0.0], [0.0]]
    _one_round(rows, compressor, Round.full(rounds, seed, n), True)
    for index in range(rounds):
        estimate, nbytes, spent = _one_round(rows, compressor, Round.full(index, seed, n), index < DECODES)
        off = estimate.double() - mean
        errors[index] = float(off @ off) / facts.size
        sums[int(np.searchsorted(edges, index, side="right"))] += off.float()
        sent += nbytes
        for column, value in zip(times, spent, strict=True):
            column.append(value)
        tell((index + 1) / rounds)
    encode, decode, aggregate = (float(np.nanmedian(column[1:])) / (n * d) for column in times)
    low, high = interval(errors, edges)
    z = bias_z(sums)
    lost = float(errors.mean()) < ROUNDING
    ab = stated(compressor, n, d)
    agreement = AGREEMENT if compressor.agrees else 0
    bits = 8.0 * sent / (rounds * n) + agreement
    frames = 8 * HEADER * (2 if compressor.agrees else 1)
    return replace(
        Measurement(
            compact(compressor), float(errors.mean()), low, high, 0.0 if lost else z,
            "stated" if ab is None else "found" if z > BIASED and not lost else "none seen",
            bits / d, (bits + frames) / d, encode, decode, aggregate,
        ),
        **theory(compressor, rows, facts, ab),
    )  # fmt: skip


def _one_round(rows: Tensor, compressor: Compressor, rnd: Round, decode: bool) -> tuple[Tensor, int, list[float]]:
    """(the estimate, bytes of all payloads, CPU nanoseconds to encode, to decode all rows, to aggregate)."""
    began = clock()
    if compressor.agrees:
        rnd = replace(rnd, agreed=float(compressor.prepare(rows, rnd).max()))
    msgs = compressor.encode(rows, rnd)
    encoded = clock()
    estimate = compressor.aggregate(msgs, rnd)
    added = clock()
    if decode:
        compressor.decode(msgs, rnd)
    decoded = clock() - added if decode else math.nan
    return estimate, int(msgs.nbytes.sum()), [encoded - began, decoded, added - encoded]


def interval(errors: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """A 95% interval of the mean of independent errors: Student's t over the means of batches ending at `edges`."""
    means = [part.mean() for part in np.split(errors, edges[:-1])]
    half = float(stdtrit(len(means) - 1, 0.975)) * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    middle = float(errors.mean())
    return max(0.0, middle - half), middle + half


def bias_z(sums: Tensor) -> float:
    """sum_{b<c} <s_b, s_c> / sqrt(sum_{b<c} <s_b, s_c>^2), s_b the sum of the error vectors of batch b.

    The numerator has the mean (number of pairs) x ||E s||^2, which is 0 for an unbiased compressor. Then the ratio is
    about standard normal where many coordinates err, and about (chi^2_1 - 1)/sqrt(2) where one does: above 6 with a
    probability below 0.003 in the worst case. With a bias it grows to sqrt(number of pairs), 13.8 for 20 batches.
    """
    gram = (sums.double() @ sums.double().T).numpy()
    pairs = gram[np.triu_indices(len(gram), 1)]
    scale = math.sqrt(float((pairs**2).sum()))
    return float(pairs.sum()) / scale if scale > 0 else 0.0


# ------------------------------------------------------------------------------------------------ theory
def stated(compressor: Compressor, n: int, d: int) -> AB | None:
    """The AB inequality, from omega where that is all there is; None for a compressor that states neither."""
    try:
        if hasattr(compressor, "ab"):
            return compressor.ab(n, d)
        if hasattr(compressor, "omega"):
            return independent(compressor.omega(d), n, "independent")
    except ConfigError:
        return None  # stated only under a flag that is not set
    return None


def theory(compressor: Compressor, rows: Tensor, facts: Facts, ab: AB | None) -> dict[str, Any]:
    """bound, evidence, source and exact, as `Measurement` has them.

    bound = (a M - b ||abar||^2 + c max ||a_i||^2) / M, the least of the inequalities stated; for a biased compressor
    1 - alpha, since ||(1/n) sum e_i||^2 <= (1/n) sum ||e_i||^2.
    """
    found: dict[str, Any] = {"exact": exact(compressor, rows, facts)}
    if ab is None:
        if hasattr(compressor, "alpha"):
            alpha = float(compressor.alpha(rows.shape[1]))
            found |= {"bound": 1.0 - alpha, "evidence": "proved", "source": f"1 - alpha, alpha = {alpha:.4g}"}
        return found
    for candidate in _chain(ab):
        if candidate.evidence == "homogeneous" and not facts.equal:
            continue
        value = candidate.a * facts.size - candidate.b * facts.mean + candidate.c * facts.top
        value = max(0.0, value / facts.size)
        if found.get("bound") is None or value < found["bound"]:
            found |= {"bound": value, "evidence": candidate.evidence, "source": candidate.source}
    return found


def _chain(ab: AB | None) -> list[AB]:
    return [] if ab is None else [ab, *_chain(ab.other)]


def exact(compressor: Compressor, rows: Tensor, facts: Facts) -> float | None:
    """The error of correlated quantization on these rows in units of M, where n >= 2 and n^2 d is at most `EXACT`."""
    n, d = rows.shape
    if not isinstance(compressor, Correlated) or n < 2 or n * n * d > EXACT:
        return None
    settings = {"levels": 2, "blocks": 1, **vars(compressor)}
    if settings["blocks"] != 1:
        return None
    u = rows.double().numpy()
    tops = np.abs(u).max(1)
    scales = {"shared": np.full(n, tops.max()), "own": np.linalg.norm(u, axis=1), "max": tops}[compressor.scale]
    width = max(1, 1_000_000 // (n * n))  # the sum over coordinates in pieces: n^2 numbers a coordinate are held
    parts = [exact_error(u[:, j : j + width], scales, settings["levels"]) for j in range(0, d, width)]
    return math.fsum(parts) / facts.size


# ------------------------------------------------------------------------------------------------ figures
def _draw_bits(panel: Axes, result: MeanEstimate) -> None:
    (point,) = result.points
    floor = _floor(row.error for row in point.rows)
    for i, row in enumerate(point.rows):
        color, (marker, _) = COLORS[i % len(COLORS)], SYMBOLS[i % len(SYMBOLS)]
        y = max(row.error, floor)
        bars = [[max(0.0, y - max(row.low, floor))], [max(0.0, row.high - y)]]
        panel.errorbar([row.bits], [y], bars, color=color, marker=marker, ls="", ms=6, capsize=3, label=row.compressor)
        if row.bound is not None and row.bound > floor:
            panel.plot([row.bits], [row.bound], "_", color=color, ms=14)
            panel.plot([row.bits, row.bits], [y, row.bound], color=color, lw=0.7, ls=":")
    panel.set_xlabel("bits a coordinate and client")
    panel.set_title(
        f"{point.inputs}, n = {point.n}, d = {point.d}: measured, and the bound (dash)", loc="left", size=10
    )


def _draw_sweep(panel: Axes, result: MeanEstimate) -> None:
    floor = _floor(row.error for point in result.points for row in point.rows)
    x = [point.swept or 0.0 for point in result.points]
    for i, rows in enumerate(zip(*(point.rows for point in result.points), strict=True)):
        color, (marker, _) = COLORS[i % len(COLORS)], SYMBOLS[i % len(SYMBOLS)]
        panel.plot(x, [max(r.error, floor) for r in rows], color=color, marker=marker, ms=4, label=rows[0].compressor)
        low, high = [max(r.low, floor) for r in rows], [max(r.high, floor) for r in rows]
        panel.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        bound = [math.nan if r.bound is None or r.bound < floor else r.bound for r in rows]
        panel.plot(x, bound, color=color, lw=0.9, ls="--")
    panel.set_xlabel({"near": "spread S of near:S"}.get(result.sweep or "", result.sweep or ""))
    panel.set_title("measured with 95% band, and the bound (dashed)", loc="left", size=10)


def _floor(errors: Iterable[float]) -> float:
    """Where errors of float32's own size are drawn: a log axis has no zero."""
    seen = [error for error in errors if error > ROUNDING]
    return min(seen) / 10 if seen else ROUNDING
