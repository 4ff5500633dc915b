"""What a reproduction is made of: sweeps, figures with intervals over seeds, and findings beside the paper's claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student

from shoal.errors import ConfigError
from shoal.experiments import sweep as sweeps
from shoal.experiments.folder import machine, versions, write_json
from shoal.experiments.grid import Grid, SweepSpec
from shoal.experiments.prepared import fingerprint
from shoal.experiments.spec import ProblemSpec, RunSpec
from shoal.experiments.sweep import Progress

Verdict = Literal["agrees", "in part", "disagrees", "undecided", "answered"]
Basis = Literal["abstract", "reference code", "remembered", "open question", "our derivation"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """A claim, where we have it from, our figure, and whether the two agree.

    basis "remembered": nobody here had the text at hand when it was written down. "open question": there is no claim,
    and the verdict is "answered".
    """

    claim: str
    basis: Basis
    figure: str
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Listing:
    """A table of figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over seeds with its 95% interval; `bound` where the numerator never arrived, so that the ratio
    is larger."""

    value: float
    low: float
    high: float
    bound: bool = False

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return "-"
        spread = "" if self.high - self.low < 0.005 * self.value else f" ({self.low:.3g}..{self.high:.3g})"
        return f"{'> ' if self.bound else ''}{self.value:.3g}{spread}"

    def beats(self, other: float = 1.0) -> bool | None:
        """Whether it is larger: the whole interval is above, or below; None where it holds the other number."""
        if self.low > other:
            return True
        return False if self.high < other and not self.bound else None


def above(one: Ratio, other: Ratio) -> bool | None:
    """Whether one is the larger; None where the two intervals overlap."""
    if one.low > other.high:
        return True
    return False if one.high < other.low and not one.bound else None


NOWHERE = Ratio(math.nan, -math.inf, math.inf)


def arrived(rows: Rows) -> bool:
    """Whether all of them reached their target."""
    return bool(rows) and all(row["stopped"] == "target" for row in rows)


def ratio(more: Rows, fewer: Rows, column: str = "up_bits") -> Ratio:
    """How many times the bits to the target (or another column) the first runs need, seed by seed.

    NOWHERE where the second did not arrive.
    """
    if not arrived(fewer) or not more:
        return NOWHERE
    seeds = {row["seed"]: row[column] for row in fewer}
    return interval([math.log(row[column] / seeds[row["seed"]]) for row in more], bound=not arrived(more))


def interval(logs: Sequence[float], bound: bool = False) -> Ratio:
    """exp of the mean, with Student's 95% interval; of one value, that value."""
    mean, k = float(np.mean(logs)), len(logs)
    half = float(student.ppf(0.975, k - 1) * np.std(logs, ddof=1) / math.sqrt(k)) if k > 1 else 0.0
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), bound)


def bits(rows: Rows) -> str:
    """Bits a client to the target, geometric mean over seeds with its interval, in thousands."""
    if not arrived(rows):
        return f"not in {max(row['up_bits'] for row in rows) / 1000:.4g}" if rows else "-"
    found = interval([math.log(row["up_bits"] / 1000) for row in rows])
    return str(found)


def where(rows: Rows, **fields: Any) -> Rows:
    """The rows with these values; problem__noise stands for problem.noise. Sorted by seed."""
    wanted = {name.replace("__", "."): value for name, value in fields.items()}
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda row: row["seed"])


def target(problem: Mapping[str, Any], relative: float) -> float:
    """||grad f(x^0)||^2 times `relative`, to three digits."""
    start = fingerprint(ProblemSpec.of(**problem).build())["grad_norm_sq"]
    return float(f"{relative * start:.3g}")


def grid(problem: Mapping[str, Any], over: Mapping[str, Sequence[Any]], relative: float, **run: Any) -> Grid:
    """A grid on one problem, to a share of its first squared gradient norm."""
    fixed = {f"problem.{name}": value for name, value in problem.items()}
    return Grid.of(run=fixed | {"target": target(problem, relative)} | run, over=dict(over))


@dataclass(frozen=True)
class Outcome:
    """What a reproduction found: findings, and the tables they rest on."""

    findings: tuple[Finding, ...]
    listings: tuple[Listing, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """One experiment. grids(quick, data): what is run, maybe nothing; judge(rows, quick): what is found in its table.

    `data` are the paths of LIBSVM files, of which those in `files` (by the beginning of their names) are used, and of a
    folder with the data set that it `needs`, where it does (a quick version needs none).
    """

    name: str
    title: str
    paper: str
    about: str
    judge: Callable[[Rows, bool], Outcome]
    grids: Callable[[bool, Sequence[Path]], list[Grid]] = field(default=lambda quick, data: [])
    files: tuple[str, ...] = ()
    needs: str = ""

    def can_run(self, quick: bool, data: Sequence[Path]) -> bool:
        """Whether the folder that it needs is given."""
        return quick or not self.needs or any(Path(path).is_dir() for path in data)


def chosen(data: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Of the files, those whose names begin with one of the names. Raises ConfigError for a path that is not there."""
    for path in data:
        if not path.exists():
            raise ConfigError(f"--data {path}: no such file or folder; give a LIBSVM file, or the folder of MNIST.")
    return [str(path) for path in data if path.is_file() and any(path.name.startswith(name) for name in names)]


def folder(data: Sequence[Path]) -> str:
    """The first folder among the paths."""
    return next(str(path) for path in data if path.is_dir())


def reproduce(
    what: Reproduction,
    out: Path,
    quick: bool = False,
    data: Sequence[Path] = (),
    workers: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_failure: Callable[[RunSpec, str], None] = lambda point, error: None,
) -> Outcome:
    """Run what is missing in `out`, judge it, and write report.md and findings.json.

    Raises ConfigError where a point failed: a judgment over half of the points is none.
    """
    torch.set_num_threads(1)
    used = chosen(data, what.files)
    if not what.can_run(quick, data):
        raise ConfigError(f"{what.name} needs {what.needs}: --data FOLDER, or --quick, which does without.")
    used += [folder(data)] if what.needs and not quick else []
    grids, rows, failed = what.grids(quick, data), Rows(), 0
    command = f"shoal reproduce {what.name}{' --quick' if quick else ''}"
    command += "".join(f" --data {Path(path).name}" for path in used)
    if grids:
        spec = SweepSpec(title=what.title, grids=tuple(grids))
        there = sweeps.is_sweep(out)
        rows = sweeps.sweep(spec, out, command, there, workers, on_progress, on_failure)
        failed = sum(row["status"] != "done" for row in rows)
    if failed:
        raise ConfigError(f"{what.name}: {failed} of {len(rows)} points have no result; see {out / 'failed'}.")
    outcome = what.judge(rows, quick)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"format": 1, "name": what.name, "quick": quick, "command": command, "versions": versions()}
    facts |= {"machine": machine(), "findings": [asdict(finding) for finding in outcome.findings]}
    write_json(out / "findings.json", facts)
    (out / "report.md").write_text(page(what, outcome, rows, command))
    return outcome


def page(what: Reproduction, outcome: Outcome, rows: Rows, command: str) -> str:
    """The report in Markdown."""
    seeds = sorted({row["seed"] for row in rows})
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    said = f"{len(rows)} runs, {which}" if rows else "computed, no runs"
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    header = ("claim", "known from", "our figure", "verdict", "why")
    found = [(f.claim, f.basis, f.figure, f.verdict, f.why) for f in outcome.findings]
    tables = (*outcome.listings, *curvature(rows))
    parts = [
        f"# {what.title}", f"{what.paper}. {what.about}", f"`{command}`: {said}. {machine()}; {used}.",
        "Figures over seeds are geometric means with Student's 95% interval in parentheses; bits are uplink payload a "
        "client, counted from encoded bytes; ||grad f||² is that of the mean, measured exactly.",
        _markdown(header, found),
        *(f"## {table.title}\n\n{_markdown(table.header, table.rows)}" for table in tables),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def curvature(rows: Rows) -> tuple[Listing, ...]:
    """A line a problem: its L_-, L_+ and L_± as stated, and the largest seen between recorded points of its runs."""
    problems: dict[str, Rows] = {}
    for row in rows:
        given = {k.removeprefix("problem."): v for k, v in row.items() if k.startswith("problem.") and v is not None}
        given = {k: Path(v).name if k in ("name", "data") else v for k, v in given.items()}
        problems.setdefault(", ".join(f"{k} = {v}" for k, v in given.items()), []).append(row)
    listing = []
    for name, runs in problems.items():
        cells = [name.removeprefix("name = ")]
        for column in ("L_minus", "L_plus", "L_pm"):
            seen = max((row[f"{column}_seen"] for row in runs if row["stopped"] != "diverged"), default=math.nan)
            cells += [f"{runs[0][column]:.4g} ({runs[0][f'{column}_status']})", f"{seen:.4g}"]
        listing.append(tuple(cells))
    header = ("problem", *(f"{L}{what}" for L in ("L₋", "L₊", "L±") for what in ("", ", seen")))
    return (Listing("Smoothness: stated, and the largest seen along the runs", header, tuple(listing)),) * bool(rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load_findings(folder: Path) -> dict[str, Any] | None:
    """findings.json of a reproduction that has been judged."""
    file = folder / "findings.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None
