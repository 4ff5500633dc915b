"""What compressors cost on this machine: encode, decode and aggregate, each beside a memory copy of the same numbers.

One client's row of d standard normal coordinates is encoded and decoded; `CLIENTS` messages are aggregated. Times are
nanoseconds a coordinate (aggregate: a client-coordinate), of the CPU on one thread and of the clock on several, as
`shoal.experiments.timing` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.compressors.correlated import agree_locally
from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact
from shoal.experiments.folder import versions, write_json
from shoal.experiments.goals import Checked, using
from shoal.experiments.timing import Row, beside_copy, machine_line, normal_rows
from shoal.messages import Round
from shoal.palette import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS = 4
PARTS = ("encode", "decode", "aggregate")
SMALL = 10_000_000  # coordinates in all samples of a row that come on top of the samples asked for


@dataclass(frozen=True)
class Throughput:
    """One part of one compressor at d coordinates: `row` holds ns a coordinate, `bits` what its messages take."""

    compressor: str
    part: str
    d: int
    threads: int
    bits: float
    row: Row

    @property
    def gigabytes(self) -> float:
        """Float32 numbers dealt with, in GB a second."""
        return 4.0 / self.row.median

    def facts(self) -> dict[str, Any]:
        """The row as JSON has it."""
        own = {"compressor": self.compressor, "part": self.part, "d": self.d, "threads": self.threads}
        return own | {"bits": self.bits, "gigabytes_a_second": self.gigabytes} | self.row.facts()


def throughput(
    compressors: Sequence[Compressor], dims: Sequence[int], repeat: int = 7, threads: Sequence[int] = (1,)
) -> Iterator[Throughput]:
    """Every part of every compressor with every number of threads at every d: d outermost, parts innermost.

    Raises ConfigError, before anything is timed, for an impossible d or repeat and for a compressor that does not fit.
    """
    if repeat < 1 or not dims or min(dims) < 1 or not threads or min(threads) < 1:
        said = f"repeat={repeat}, d={', '.join(map(str, dims))}, threads={', '.join(map(str, threads))}"
        raise ConfigError(f"{said}: all are integers, at least 1.")
    for d in dims:
        for compressor in compressors:
            compressor.check(CLIENTS, d)
    return _timed(compressors, dims, repeat, threads)


def _timed(
    compressors: Sequence[Compressor], dims: Sequence[int], repeat: int, threads: Sequence[int]
) -> Iterator[Throughput]:
    for d in dims:
        rows, samples = normal_rows(CLIENTS, d, 0), repeat + min(SMALL // d, 100)
        for count, compressor in product(threads, compressors):
            everyone = agree_locally(rows, compressor, Round.full(0, 0, CLIENTS))
            first = everyone.rows(slice(0, 1))
            all_msgs, msgs = compressor.encode(rows, everyone), compressor.encode(rows[:1], first)
            calls = {
                "encode": (lambda c=compressor, r=first, u=rows[:1]: _encode(c, u, r), d),
                "decode": (lambda c=compressor, r=first, m=msgs: c.decode(m, r), d),
                "aggregate": (lambda c=compressor, r=everyone, m=all_msgs: c.aggregate(m, r), CLIENTS * d),
            }
            bits = (8.0 * float(all_msgs.nbytes.sum()) / CLIENTS + (32 if compressor.agrees else 0)) / d
            label = compact(compressor)
            for part, (call, floats) in calls.items():
                with using(count):
                    taken, ratio = beside_copy(call, floats, samples, wall=count > 1)
                row = Row("bench", f"{label}, {part}, d={d}", "ns", [1e9 * t / floats for t in taken], ratio)
                yield Throughput(label, part, d, count, bits, row)


def _encode(compressor: Compressor, u: Any, rnd: Round) -> None:
    """What a client does: its own part of an agreement, then the message."""
    if compressor.agrees:
        compressor.prepare(u, rnd)
    compressor.encode(u, rnd)


def save(rows: Sequence[Throughput], checked: Sequence[Checked], path: Path) -> None:
    """The rows with the machine and the versions, and what was held against the goals, as JSON."""
    facts = {"format": 1, "kind": "bench", "machine": machine_line(), "versions": versions()}
    held = [{**asdict(goal), "met": goal.met, **_where(facts)} for goal in checked]
    write_json(path, {**facts, "rows": [{**row.facts(), **_where(facts)} for row in rows], "goals": held})


def _where(facts: dict[str, Any]) -> dict[str, Any]:
    return {"machine": facts["machine"], "versions": facts["versions"]}


def plot(rows: Sequence[Throughput]) -> Figure:
    """GB of float32 a second at the largest d and the most threads: a bar a part and compressor, the copy as a line.

    Needs the extra [report].
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('a plot needs matplotlib: pip install "shoal[report]".') from None
    last, most = max(row.d for row in rows), max(row.threads for row in rows)
    shown = [row for row in rows if (row.d, row.threads) == (last, most)]
    names = list(dict.fromkeys(row.compressor for row in shown))
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(names)), dpi=200, layout="constrained")
    panel = figure.subplots()
    for i, part in enumerate(PARTS):
        speed = [next(r.gigabytes for r in shown if (r.compressor, r.part) == (name, part)) for name in names]
        places = [j + (i - 1) * 0.27 for j in range(len(names))]
        panel.barh(places, speed, 0.25, color=COLORS[i], label=part)
    copy = [r.gigabytes / r.row.ratio for r in shown if r.part == "encode" and r.row.ratio]
    panel.axvline(sorted(copy)[len(copy) // 2], color="#555555", lw=1.0, ls="--", label="memory copy")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel=f"GB of float32 a second, d = {last:,}, threads: {most}")
    panel.grid(True, axis="x", color="#e3e6ea", lw=0.7)
    panel.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure
