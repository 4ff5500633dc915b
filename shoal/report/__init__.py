"""Reports: what recorders wrote, as a leaderboard, figures and one page that opens offline.

    race = load("runs/default")         # a race folder, or a single run folder
    print_leaderboard(race)             # in the terminal; needs no extra
    write("runs/default")               # report.html and the files beside it; needs shoal[report]

Reads run folders only: no problem, method or runtime is imported, so a report can be made where nothing ran.
"""

from __future__ import annotations

from shoal.report.figures import plot
from shoal.report.leaderboard import Entry, Spread, leaderboard, print_leaderboard, verdict
from shoal.report.load import Race, RunRecord, load
from shoal.report.page import render, results_table, write

__all__ = [
    "Entry",
    "Race",
    "RunRecord",
    "Spread",
    "leaderboard",
    "load",
    "plot",
    "print_leaderboard",
    "render",
    "results_table",
    "verdict",
    "write",
]
