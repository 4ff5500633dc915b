"""Which compressor to take: within so many bits, along a sweep, and where one begins to beat another.

Two compressors are told apart where their 95% intervals do not meet. Only those in which no bias was seen are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shoal.report.leaderboard import number

BUDGETS = (0.11, 0.27, 0.55, 1.1, 2.1, 4.1, 8.1, 16.1, 32.1)  # bits a coordinate and client, a tenth over for scales
ROUNDING = 1e-12  # normalized errors below this are float32's own
ALIKE = 2.1  # compressors whose bits differ by more than this factor are not set against each other
Row = Mapping[str, Any]
Point = Mapping[str, Any]


class Choice(NamedTuple):
    """What to take with so many bits: the row of least error, and whom its interval does not tell it apart from."""

    budget: float
    best: Row
    rivals: list[str]


def sound(point: Point) -> list[Row]:
    """The rows in which no bias was seen."""
    return [row for row in point["rows"] if row["bias"] == "none seen"]


def chosen(point: Point, budget: float) -> Choice | None:
    """The least error for at most so many bits; None where nothing is as cheap."""
    within = [row for row in sound(point) if row["bits"] <= budget]
    if not within:
        return None
    best = min(within, key=lambda row: (max(row["error"], ROUNDING), row["bits"]))
    return Choice(budget, best, [r["compressor"] for r in within if r is not best and not order(best, r)])


def choices(point: Point) -> list[Choice]:
    """The least error within each budget; a budget that buys nothing more is left out."""
    found: list[Choice] = []
    for choice in (chosen(point, budget) for budget in BUDGETS):
        if choice and (not found or choice.best["compressor"] != found[-1].best["compressor"]):
            found.append(choice)
    return found


def order(x: Row, y: Row) -> int:
    """1 where x has the smaller error, -1 where y has, 0 where their intervals do not tell them apart."""
    if max(x["high"], ROUNDING) < max(y["low"], ROUNDING):
        return 1
    return -1 if max(y["high"], ROUNDING) < max(x["low"], ROUNDING) else 0


# ------------------------------------------------------------------------------------------------ along a sweep
def choice_map(points: Sequence[Point]) -> tuple[list[float], list[list[Choice | None]]]:
    """(budgets, for each point the choice within each): budgets that change no choice at any point are left out."""
    budgets: list[float] = []
    columns: list[list[Choice | None]] = []
    for budget in BUDGETS:
        column = [chosen(point, budget) for point in points]
        if any(column) and (not columns or _names(column) != _names(columns[-1])):
            budgets.append(budget)
            columns.append(column)
    return budgets, [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in points]


def _names(column: Sequence[Choice | None]) -> list[str | None]:
    return [choice and choice.best["compressor"] for choice in column]


def winners(points: Sequence[Point]) -> list[str]:
    """Whoever is chosen somewhere on the map, the fewest bits first."""
    bits: dict[str, float] = {}
    for row in choice_map(points)[1]:
        for choice in filter(None, row):
            bits.setdefault(choice.best["compressor"], choice.best["bits"])
    return sorted(bits, key=lambda name: bits[name])


def crossings(points: Sequence[Point], what: str, leaders: Sequence[str]) -> list[str]:
    """Sentences: which leader beats which, and up to where; pairs that have about as many bits.

    All pairs that change places, and those of the same bits that never do.
    """
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for i, x in enumerate(leaders):
        for y in leaders[i + 1 :]:
            signs = _signs(points, x, y)
            changes = 1 in signs and -1 in signs
            if not changes and (not all(signs) or not _same_bits(points, x, y)):
                continue
            first, second = (x, y) if (signs.index(1) < signs.index(-1) if changes else 1 in signs) else (y, x)
            found.setdefault((first, tuple(_signs(points, first, second))), []).append(second)
    values = [f"{point['swept']:g}" for point in points]
    bits = {row["compressor"]: row["bits"] for row in points[0]["rows"]} if what != "n" else {}

    def rank(item: tuple[tuple[str, tuple[int, ...]], list[str]]) -> tuple[bool, bool]:
        (name, signs), others = item
        return -1 not in signs, not all(_same_bits(points, name, other) for other in others)

    kinds = sorted(found.items(), key=rank)
    return [_sentence(name, others, signs, what, values, bits) for (name, signs), others in kinds]


def _same_bits(points: Sequence[Point], x: str, y: str) -> bool:
    rows = {row["compressor"]: row["bits"] for row in points[0]["rows"]}
    return max(rows[x], rows[y]) <= 1.1 * min(rows[x], rows[y])


def _signs(points: Sequence[Point], x: str, y: str) -> list[int]:
    """`order` at each point; 0 too where one of them is biased or has many more bits than the other."""
    signs = []
    for point in points:
        rows = {row["compressor"]: row for row in sound(point)}
        pair = [rows[name] for name in (x, y) if name in rows]
        few = len(pair) < 2 or max(r["bits"] for r in pair) > ALIKE * min(r["bits"] for r in pair)
        signs.append(0 if few else order(*pair))
    return signs


def _sentence(
    name: str, others: list[str], signs: tuple[int, ...], what: str, values: list[str], bits: dict[str, float]
) -> str:
    """ "PermK() (2 bits) beats Drive() (1 bits) up to spread 0.03 and loses to it from spread 0.3 on; ..."."""
    told = [f"{o} ({_bits(bits[o])})" if o in bits else o for o in (name, *others)]
    if -1 not in signs:
        return f"{told[0]} beats {' and '.join(told[1:])} at every {what} here."
    better, worse, tied = ([v for v, s in zip(values, signs, strict=True) if s == sign] for sign in (1, -1, 0))
    clean = list(signs) == sorted(signs, reverse=True)
    up = f"up to {what} {better[-1]}" if clean and len(better) > 1 else f"at {what} {', '.join(better)}"
    on = f"from {what} {worse[0]} on" if clean and len(worse) > 1 else f"at {what} {', '.join(worse)}"
    line = f"{told[0]} beats {' and '.join(told[1:])} {up} and loses to {'it' if len(others) == 1 else 'them'} {on}"
    return line + (f"; not told apart at {what} {', '.join(tied)}." if tied else ".")


def _bits(bits: float) -> str:
    text = number(float(f"{bits:.2g}"))
    return f"{text} bit" if text == "1" else f"{text} bits"


# ------------------------------------------------------------------------------------------------ in words
def verdict(point: Point) -> list[str]:
    """The answer in sentences, for one point."""
    said = []
    for budget, best, rivals in choices(point):
        line = f"Up to {budget:g} bits a coordinate: {best['compressor']}, error {error(best)} of the mean squared norm"
        line += f", for {number(best['bits'])} bits"
        said.append(line + (f"; not told apart from {' and '.join(rivals)}." if rivals else "."))
    whole = [row for row in sound(point) if row["error"] > ROUNDING]
    if len(whole) > 1 and all(row["bits"] > 0 for row in whole):
        best = min(whole, key=lambda row: row["error"] * row["bits"])
        said.append(
            f"Least error x bits: {best['compressor']}, {number(best['error'] * best['bits'])}. It is what counts "
            "where a client may send several independent messages, since their mean divides the error by their number."
        )
    return said or ["No compressor here is unbiased: none of these errors averages out over rounds."]


def on_the_line(points: Sequence[Point]) -> str | None:
    """How many measured errors sit on the exact one, within three half-widths; None where none is known.

    Three half-widths are six standard errors; of few rounds, Student's t makes a false alarm of 8 about 2e-4.
    """
    known = [row for point in points for row in point["rows"] if row["exact"] is not None]
    if not known:
        return None
    slack = [3.0 * (row["high"] - row["error"]) + 1e-5 * row["exact"] + ROUNDING for row in known]
    near = [row for row, most in zip(known, slack, strict=True) if abs(row["error"] - row["exact"]) <= most]
    off = max((abs(row["error"] / row["exact"] - 1.0) for row in known if row["exact"] > ROUNDING), default=0.0)
    return (
        f"{len(near)} of {len(known)} errors of correlated quantization sit on the theory line, within three "
        f"half-widths of the interval; the farthest is {100 * off:.2g}% off."
    )


def error(row: Row) -> str:
    """Three digits, or that it is float32's own rounding."""
    return "0 (rounding)" if row["error"] < ROUNDING else number(row["error"])
