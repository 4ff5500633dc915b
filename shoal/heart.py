"""Heart disease in four hospitals: Cleveland, Budapest, Zurich and Basel, Long Beach.

Janosi, Steinbrunn, Pfisterer, Detrano (1989), UCI Machine Learning Repository, doi:10.24432/C52P4X, the four files
processed.<hospital>.data (CC BY 4.0): 13 features and a diagnosis 0 to 4 a line, comma separated, `?` where missing.
The task is whether the diagnosis is above 0. FLamby (NeurIPS 2022, Datasets and Benchmarks) has the same four clients;
the encoding below is ours, and keeps all 920 patients.
"""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data import OPENERS
from shoal.errors import DataError

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
# slope, ca and thal are left out: outside Cleveland they are mostly missing.
NUMBERS = {"age": 0, "sex": 1, "trestbps": 3, "chol": 4, "fbs": 5, "thalach": 7, "exang": 8, "oldpeak": 9}
CHOICES = {"cp": (2, (1, 2, 3, 4)), "restecg": (6, (0, 1, 2))}
NEVER_ZERO = ("trestbps", "chol")  # a pressure or a cholesterol of 0 is a missing one: all of Switzerland's are
Floats = NDArray[np.float64]


def load(folder: str | Path) -> tuple[Floats, Floats, list[NDArray[np.int64]]]:
    """(A (N, 16), y (N,) in {-1, +1}, the rows of each hospital), of the 920 patients.

    Columns: the eight NUMBERS, standardized over all patients with missing ones at the mean; one column of 0 or 1 for
    each of the CHOICES; and a 1. Raises DataError, naming the line, for files that are absent or malformed.
    """
    tables = [_table(Path(folder).expanduser(), hospital) for hospital in HOSPITALS]
    whole, ends = np.concatenate(tables), np.cumsum([len(table) for table in tables])
    columns = [_standardized(whole[:, at], name in NEVER_ZERO) for name, at in NUMBERS.items()]
    columns += [(whole[:, at] == choice).astype(np.float64) for at, choices in CHOICES.values() for choice in choices]
    A = np.column_stack([*columns, np.ones(len(whole))])
    return A, np.where(whole[:, 13] > 0, 1.0, -1.0), np.split(np.arange(len(whole)), ends[:-1])


def _standardized(column: Floats, zero_is_missing: bool) -> Floats:
    """(v - mean) / deviation of the values that are there, 0 for the others."""
    there = np.isfinite(column) & ~((column == 0.0) & zero_is_missing)
    if not there.any():
        return np.zeros_like(column)
    deviation = column[there].std()
    return np.where(there, (column - column[there].mean()) / (deviation if deviation > 0 else 1.0), 0.0)


def _table(folder: Path, hospital: str) -> Floats:
    name = f"processed.{hospital}.data"
    path = next((p for s in ("", *OPENERS) if (p := folder / (name + s)).is_file()), None)
    if path is None:
        raise DataError(
            f"{folder} holds no {name} (nor .xz, .gz, .bz2): give the folder of the four files, doi:10.24432/C52P4X."
        )
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as stream:
            lines = stream.read().decode("ascii").split()
        rows = [[float("nan") if word == "?" else float(word) for word in line.split(",")] for line in lines]
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as broken:
        raise DataError(f"{path}: the file cannot be read ({broken}).") from broken
    for number, row in enumerate(rows, 1):
        if len(row) != 14 or not np.isfinite(row[13]) or bool(np.isinf(row).any()):
            raise DataError(f"{path}: line {number}: 13 features and a diagnosis are needed, all finite or `?`.")
    if not rows:
        raise DataError(f"{path}: no patients; one line each.")
    return np.array(rows)
