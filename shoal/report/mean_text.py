"""What `shoal mean` prints: the measurements of a point, or the errors along a sweep and a map of what to take.

Tables of 80 columns; the same record makes the page (`shoal.report.mean`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from shoal.report.choice import ROUNDING, Row, choice_map, crossings, error, on_the_line, verdict, winners
from shoal.report.leaderboard import number
from shoal.report.mean import colors, warnings


def print_means(record: Mapping[str, Any], console: Any) -> None:
    """The measurements as a table, and the answer below it."""
    from rich.markup import escape

    if record["sweep"]:
        _print_sweep(record, console)
    else:
        _print_point(record["points"][0], console)
    if (line := on_the_line(record["points"])) is not None:
        console.print(f"- {escape(line)}", highlight=False)
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
    """Errors, a column a point; then the map of choices, and where winners change places."""
    from rich.markup import escape

    points = record["points"]
    what = ", ".join(
        f"{k} = {points[0][k]}"
        for k in ("inputs", "n", "d")
        if k != ("inputs" if record["sweep"] == "spread" else record["sweep"])
    )
    names = [_short_name(record, point) for point in points]
    table = _table(f"error over the mean squared norm; {what}", names)
    for rows in zip(*(point["rows"] for point in points), strict=True):
        table.add_row(escape(rows[0]["compressor"]), *(two_digits(row) for row in rows))
    console.print(table)
    _print_map(record, console)
    for line in crossings(points, record["sweep"], record["leaders"]):
        console.print(f"- {escape(line)}", highlight=False)


def _print_map(record: Mapping[str, Any], console: Any) -> None:
    """A line a point, a column a budget, in each cell the winner's letter and its error."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    points = record["points"]
    (budgets, cells), letters = choice_map(points), _letters(points)
    look = colors(record)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(record["sweep"])
    for budget in budgets:
        table.add_column(f"{budget:g}", no_wrap=True)
    for point, row in zip(points, cells, strict=True):
        shown = []
        for choice in row:
            if choice is None:
                shown.append("")
                continue
            name = choice.best["compressor"]
            mark = "~" if choice.rivals else " "
            shown.append(f"[bold {look[name]}]{letters[name]}[/]{mark}{two_digits(choice.best)}")
        table.add_row(f"{point['swept']:g}", *shown)
    console.print("the least error within so many bits a coordinate:", style="italic", highlight=False)
    console.print(table)
    for name, letter in letters.items():
        console.print(f"[bold {look[name]}]{letter}[/]  {escape(name)}", highlight=False)
    console.print("~  not told apart from another one within as many bits\n", style="dim", highlight=False)


def _letters(points: list[Any]) -> dict[str, str]:
    """A letter for each winner, the fewest bits first; there are fewer budgets times points than this allows for."""
    return {name: chr(ord("A") + i) if i < 26 else f"{i + 1}" for i, name in enumerate(winners(points))}


def two_digits(row: Row) -> str:
    """The error in at most six characters, for tables of 80."""
    if row["error"] < ROUNDING:
        return "0"
    text = number(float(f"{row['error']:.1e}"))
    return text if len(text) <= 6 else f"{row['error']:.0e}".replace("e+0", "e").replace("e-0", "e-")


def _narrow(row: Row) -> list[str]:
    """The columns of the terminal's table, which has 80 characters."""
    half = "–" if row["error"] < ROUNDING else f"{100 * (row['high'] - row['error']) / row['error']:.2g}%"
    bias = {"stated": "design", "none seen": "no", "found": "YES"}[row["bias"]]
    spent = [float(row[name]) for name in ("encode_ns", "decode_ns", "aggregate_ns")]
    shown = "/".join(f"{ns:.0f}" if ns >= 10 else f"{ns:.2g}" for ns in spent)
    return [number(row["bits"]), error(row).split()[0], half, _theory(row), bias, shown]


def _theory(row: Row) -> str:
    """ "= 0.1" where the error is known without measuring, else the bound; a star where it is not proved."""
    if row["exact"] is not None:
        return f"= {number(row['exact'])}"
    if row["bound"] is None:
        return "–"
    return f"≤ {number(row['bound'])}" + ("" if row["evidence"] == "proved" else " *")


def _short_name(record: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    return f"{'S' if record['sweep'] == 'spread' else record['sweep']}={point['swept']:g}"
