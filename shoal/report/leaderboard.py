"""Who needed the fewest bits: one entry for each method and step rule, and the sentences that follow from them.

Bits to target are the payload bits a client had sent when it first reached ||grad f(x^k)||^2 <= target, so they count
everything sent before x^k. Over seeds an entry shows the median and the range. A seed that never got there counts as
infinite; the median is then the middle of the ordered seeds, and where exactly half of them arrived, the dearest of
those that did. With fewer than half, the entry is "not reached", whatever the lucky seeds needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shoal.report.load import Race, RunRecord

TRAFFIC = ("up_bits", "up_framed_bits", "down_bits", "down_framed_bits")


@dataclass(frozen=True)
class Spread:
    """Median and range over seeds; infinite where seeds did not arrive."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value; infinite ones count as larger than all others."""
        ordered = sorted(values)
        lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
        return cls(lower if math.isinf(upper) else (lower + upper) / 2, ordered[0], ordered[-1])

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Entry:
    """One line of the leaderboard: a method under one step rule, over `seeds` runs of which `reached` arrived.

    `value` is the median of f there, or at the end.
    `bits`, `total_bits` (up + down), `rounds` are what it took to reach the target. `spent` holds the medians of the
    four traffic columns and of the seconds, each up to the target for the seeds that reached it and over the whole run
    for the others. `vs_gd` is GD's median bits under the same step rule over this entry's (> 1: fewer bits than GD);
    where GD never arrived it is computed from what GD spent, and `vs_gd_at_least` says that it is a lower bound.
    The step `gamma` is `multiple` times `unit`: "the theory step", or "1/L₋" where no theorem gives one.
    """

    label: str
    step: str
    seeds: int
    reached: int
    unfinished: int
    diverged: int
    bits: Spread
    total_bits: Spread
    rounds: Spread
    grad_norm_sq: float
    value: float
    spent: dict[str, float]
    vs_gd: float | None
    vs_gd_at_least: bool
    multiple: float
    unit: str
    gamma: float | None
    p: float | None
    resolved: str | None
    theorem: str | None

    @property
    def arrived(self) -> bool:
        """Whether the median seed reached the target."""
        return math.isfinite(self.bits.median)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values; null stands for "not reached" and for unknown."""
        return _finite(asdict(self))


def leaderboard(race: Race) -> list[Entry]:
    """The entries of all step rules together, by bits to target, then by final gradient norm."""
    entries: list[Entry] = []
    for step in race.steps:
        gd = next((race.finals(label, step) for label, s in race.curves if s == step and family(label) == "GD"), ())
        entries += [_entry(race, label, step, gd) for label, s in race.curves if s == step]
    return sorted(entries, key=_rank)


def family(label: str) -> str:
    """The method's class name: "Marina" of "Marina(Correlated())"."""
    return label.split("(", 1)[0].strip()


def _rank(entry: Entry) -> tuple[float, float]:
    norm = entry.grad_norm_sq
    return entry.bits.median, norm if math.isfinite(norm) else math.inf


def _entry(race: Race, label: str, step: str, gd: Sequence[RunRecord]) -> Entry:
    runs = race.finals(label, step)
    bits = _to_target(runs, race.target, "up_bits")
    vs_gd, at_least = _against(gd, bits, race.target)
    ended = next((run for run in runs if run.finished), runs[0])
    return Entry(
        label=label,
        step=step,
        seeds=len(runs),
        reached=sum(run.crossing(race.target) is not None for run in runs),
        unfinished=sum(not run.finished for run in runs),
        diverged=sum(run.stopped == "diverged" for run in runs),
        bits=bits,
        total_bits=_to_target(runs, race.target, "total_bits"),
        rounds=_to_target(runs, race.target, "round"),
        grad_norm_sq=Spread.of([_final_norm(run) for run in runs]).median,
        value=_spent(runs, race.target, "value"),
        spent={name: _spent(runs, race.target, name) for name in (*TRAFFIC, "seconds")},
        vs_gd=vs_gd,
        vs_gd_at_least=at_least,
        multiple=runs[0].multiple,
        unit="1/L₋" if label in race.no_theorem else "the theory step",
        gamma=ended.gamma,
        p=ended.p,
        resolved=ended.resolved,
        theorem=ended.theorem,
    )


def _to_target(runs: Sequence[RunRecord], target: float | None, name: str) -> Spread:
    rows = [(run, run.crossing(target)) for run in runs]
    return Spread.of([math.inf if k is None else float(run.quantity(name)[k]) for run, k in rows])


def _spent(runs: Sequence[RunRecord], target: float | None, name: str) -> float:
    rows = [(run, run.crossing(target)) for run in runs]
    return float(np.median([run.quantity(name)[-1 if k is None else k] for run, k in rows]))


def _final_norm(run: RunRecord) -> float:
    norm = float(run.columns["grad_norm_sq"][-1])
    return norm if math.isfinite(norm) else math.inf


def _against(gd: Sequence[RunRecord], bits: Spread, target: float | None) -> tuple[float | None, bool]:
    """(GD's median bits / ours, whether that is only a lower bound); (None, False) where nothing can be said."""
    if not gd or not math.isfinite(bits.median) or bits.median <= 0:
        return None, False
    reference = _to_target(gd, target, "up_bits").median
    if math.isfinite(reference):
        return reference / bits.median, False
    ratio = float(np.median([run.columns["up_bits"][-1] for run in gd])) / bits.median
    # A GD that was stopped before it had spent as much tells nothing; a diverged one spends without end.
    sound = ratio > 1 and all(run.stopped != "diverged" for run in gd)
    return (ratio, True) if sound else (None, False)


def verdict(race: Race, entries: Sequence[Entry]) -> list[str]:
    """Plain sentences that follow from the entries: the winner of each step rule, by how much, and what is missing."""
    said = [sentence for step in race.steps for sentence in _winner(race, step, entries)]
    said += _tuning(entries)
    said += _at_the_edge(race, entries)
    if lost := [f"{e.label} ({e.step} steps)" for e in entries if e.diverged]:
        said.append(f"Diverged in at least one seed: {', '.join(lost)}.")
    for label, reason in race.no_theorem.items():
        said.append(f"{label} has no step size from theory here ({reason}); its tuned steps are multiples of 1/L₋.")
    absent = [
        f"{label} ({step} steps)"
        for step in race.steps
        for label in race.methods
        if (label, step) not in race.curves and not (step == "theory" and label in race.no_theorem)
    ]
    if absent:
        said.append(f"{'Not run' if race.status == 'done' else 'No runs yet'}: {', '.join(absent)}.")
    if unfinished := sum(entry.unfinished for entry in entries):
        said.append(
            f"{count(unfinished, 'run')} had not ended when this was written; what was recorded of them counts."
        )
    return said


def _winner(race: Race, step: str, entries: Sequence[Entry]) -> list[str]:
    mine = [entry for entry in entries if entry.step == step]
    if not mine:
        return []
    first, rest = mine[0], mine[1:]
    if race.target is None:
        return [
            f"With {step} steps, no target was set; {first.label} ended with the smallest squared gradient norm, "
            f"{number(first.grad_norm_sq)}, after {bits(first.spent['up_bits'])} a client."
        ]
    goal = f"‖∇f‖² ≤ {number(race.target)}"
    if not first.arrived:
        return [
            f"With {step} steps, no method brought the median seed to {goal}; {first.label} came closest, "
            f"{number(first.grad_norm_sq)}."
        ]
    if not rest:
        return [f"With {step} steps, {first.label} reached {goal} after {bits(first.bits.median)} a client."]
    said = (
        f"With {step} steps, {first.label} needed the fewest bits to reach {goal}: {bits(first.bits.median)} a client"
    )
    said += f" (median of {count(first.seeds, 'seed')})."
    return [f"{said} {_margin(first, rest)}"]


def rivals(first: Entry, rest: Sequence[Entry]) -> list[str]:
    """The labels whose range of bits to target overlaps the winner's: these seeds do not tell them apart from it."""
    return [e.label for e in rest if e.arrived and min(first.seeds, e.seeds) > 1 and first.bits.overlaps(e.bits)]


def _margin(first: Entry, rest: Sequence[Entry]) -> str:
    said, second = "", rest[0]
    if first.vs_gd is not None and family(first.label) != "GD" and family(second.label) != "GD":
        said = f"That is {_ratio(first)} fewer than GD. "
    if not second.arrived:
        return said + "No other method got there with its median seed."
    said += f"The runner-up, {second.label}, needed {times(second.bits.median / first.bits.median)} as many"
    if min(first.seeds, second.seeds) < 2:
        return said + "; with one seed there is no range to compare."
    if close := rivals(first, rest):
        return said + f". The ranges overlap: these seeds do not tell {first.label} apart from {' and '.join(close)}."
    return said + "; the ranges over seeds do not overlap."


def _at_the_edge(race: Race, entries: Sequence[Entry]) -> list[str]:
    """Methods whose chosen multiple is the largest that was tried: more might have been won."""
    largest = {label: race.trials(label)[-1].multiple for label in race.methods if race.trials(label)}
    edge = [e.label for e in entries if e.step == "tuned" and e.multiple >= largest.get(e.label, math.inf)]
    if not edge:
        return []
    return [f"The largest step tried was the best for {', '.join(edge)}: a wider --tune may do better still."]


def _ratio(entry: Entry) -> str:
    assert entry.vs_gd is not None
    return ("at least " if entry.vs_gd_at_least else "") + times(entry.vs_gd)


def _tuning(entries: Sequence[Entry]) -> list[str]:
    """What tuning the step bought the method that gained most from it, and the best of all."""
    theory = {entry.label: entry for entry in entries if entry.step == "theory" and entry.arrived}
    pairs = [(theory[e.label], e) for e in entries if e.step == "tuned" and e.arrived and e.label in theory]
    if not pairs:
        return []
    before, after = max(pairs, key=lambda pair: pair[0].bits.median / pair[1].bits.median)
    gain = before.bits.median / after.bits.median
    if gain <= 1.0:
        return ["Tuning the step size saved no method any bits."]
    return [
        f"Tuning the step size helped {after.label} most: {times(gain)} fewer bits with {times(after.multiple)} the "
        f"theory step."
    ]


# What is generally known of each family, keyed by how it appears in a label. These sentences speak of no race.
_FAMILIES: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    (
        "Correlated quantization",
        lambda s: "Correlated" in s,
        "1 bit a coordinate with two levels; clients share their randomness, so the error of the mean falls as 1/n² "
        "when clients agree. Choose it for many similar clients on a slow link.",
    ),
    (
        "PermK",
        lambda s: "PermK" in s,
        "each client sends its own d/n coordinates unquantized, 32·d/n bits; the error vanishes when clients agree. "
        "Choose it when d is much larger than n and clients are similar.",
    ),
    (
        "RandK",
        lambda s: "RandK" in s,
        "each client sends k random coordinates of its own choice; unbiased and simple, but the error falls only as "
        "1/n even when clients agree. Choose it when clients cannot coordinate.",
    ),
    (
        "Independent quantizers and QSGD",
        lambda s: "Independent" in s or "QSGD" in s,
        "few bits a coordinate, rounded by each client on its own; the error falls as 1/n, agreement or not. Choose it "
        "when shared randomness is not to be had.",
    ),
    (
        "EF21 with TopK",
        lambda s: family(s) == "EF21" or "TopK" in s,
        "biased: the largest k coordinates, with the error fed back; needs no unbiasedness and keeps working when "
        "nothing is known of the clients. Choose it as the robust default.",
    ),
    (
        "GD",
        lambda s: family(s) == "GD",
        "32 bits a coordinate every round, fewest rounds. Choose it when the link is fast and computing is not.",
    ),
)


def when_to_use(race: Race) -> list[tuple[str, str]]:
    """(family, when to choose it) for the compressor families that took part."""
    return [(name, text) for name, belongs, text in _FAMILIES if any(belongs(label) for label in race.methods)]


def print_leaderboard(race: Race, console: Any = None) -> None:
    """The leaderboard and the verdict in the terminal; `console` is a rich Console (default: stdout)."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    entries = leaderboard(race)
    goal = "no target" if race.target is None else f"to ‖∇f‖² ≤ {number(race.target)}"
    table = Table(title=f"{escape(race.title)}: bits sent by a client, {goal}")
    rows = [_cells(entry) for entry in entries]
    # On a narrow terminal the method's name must stay readable: what the page shows anyway goes first.
    left_out = set() if console.width >= 108 else {"min..max", "final ‖∇f‖²"}
    headings = [name for name in _cells(entries[0]) if name not in left_out] if entries else ["nothing recorded yet"]
    for name in headings:
        words = name in ("method", "step")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*(escape(row[name]) for name in headings))
    console.print(table)
    traffic = Table(title="kilobytes a client, up to the target (or the end), medians over seeds")
    for name in ("method", "step", "up", "up, framed", "down", "down, framed"):
        words = name in ("method", "step")
        traffic.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for e in entries:
        sizes = (f"{e.spent[name] / 8000:,.2f}" for name in TRAFFIC)
        traffic.add_row(escape(e.label), e.step, *sizes)
    if entries:
        console.print(traffic)
    for sentence in filter(None, (*verdict(race, entries), curvature(race))):
        console.print(escape(sentence), highlight=False)
    if len(entries) > 1:
        console.print("When to use which:", style="bold")
    for name, text in when_to_use(race) if len(entries) > 1 else ():
        console.print(f"  [bold]{name}[/bold]: {escape(text)}", highlight=False)


def curvature(race: Race) -> str:
    """L_-, L_+ and L_± as stated and as seen along the runs, in a line; what is not known is left out."""
    symbols = {"minus": "L_-", "plus": "L_+", "pm": "L_±"}
    stated = [f"{symbols[k]} = {number(v)} ({how})" for k, (v, how) in race.smoothness.items() if k in symbols]
    seen = [f"{symbols[k]} {number(v)}" for k, v in race.seen.items()]
    return "; ".join([", ".join(stated)] * bool(stated) + [f"seen along the runs: {', '.join(seen)}"] * bool(seen))


def _cells(e: Entry) -> dict[str, str]:
    """A line of the terminal's table: heading -> text."""
    return {
        "method": e.label,
        "step": e.step,
        "bits": bits(e.bits.median) if e.arrived else f"> {bits(e.spent['up_bits'])} ({e.reached} of {e.seeds})",
        "min..max": span(e.bits) if e.arrived and e.seeds > 1 else "",
        "rounds": number(e.rounds.median) if e.arrived else "",
        "vs GD": "" if e.vs_gd is None else ("≥ " if e.vs_gd_at_least else "") + times(e.vs_gd),
        "final ‖∇f‖²": number(e.grad_norm_sq),
        "× step": times(e.multiple),
    }


def number(value: float | None) -> str:
    """Three significant digits, people's way: 1.4e-7, 0.031, 12, 12,300; "∞" and "–" for infinite and unknown."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.10g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def scaled(value: float, unit: str, factor: float = 1000.0) -> str:
    """Three significant digits with an SI prefix: 12.3 kbit, 1.23 Mbit; "not reached" for infinity."""
    if not math.isfinite(value):
        return "not reached"
    for prefix in ("", "k", "M", "G"):
        # 999.7 rounds to 1000 with three digits and belongs to the next prefix.
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= factor
    return f"{value:,.3g} T{unit}"


def bits(value: float) -> str:
    return scaled(value, "bit")


def span(spread: Spread) -> str:
    """The range of bits over seeds, its unit once where both ends share it: 9.05..17.3 kbit."""
    low, high = bits(spread.low), bits(spread.high)
    if low == high:
        return "no spread"
    number_, _, unit = low.partition(" ")
    return f"{number_}..{high}" if high.endswith(f" {unit}") else f"{low}..{high}"


def times(value: float) -> str:
    """A ratio as people read it: 1.83×, 34.2×, 1,204×."""
    return f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×"


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    if value < 60:
        return f"{value:.3g} s"
    # Rounded before it is split, so that 119.7 s is 2 min 0 s and not 1 min 60 s.
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _finite(value: Any) -> Any:
    """NaN and infinities are not JSON: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
