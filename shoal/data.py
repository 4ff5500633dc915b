"""Data sets for binary classification: two bundled ones, and any LIBSVM file.

LIBSVM text has one row a line, `label index:value index:value ...` with ascending indices; `#` starts a comment. Files
may be compressed (.xz, .gz, .bz2). Indices start at 1 unless a 0 occurs. Any two labels do: the smaller becomes -1.
The origin and the license of the bundled data are in bundled/NOTICE.md.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from shoal.errors import ConfigError, DataError

BUNDLED = {
    "mushrooms": "UCI Mushroom, doi:10.24432/C5959T, in the encoding of the LIBSVM page; CC BY 4.0",
    "phishing": "UCI Phishing Websites, doi:10.24432/C51W2X, in the encoding of the LIBSVM page; CC BY 4.0",
}
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows A (N, d), float64 CSR, labels y (N,) in {-1, +1}, and where they come from."""

    name: str
    A: csr_array
    y: NDArray[np.float64]
    source: str


def load(name: str | Path) -> Dataset:
    """A bundled data set by its name, or a LIBSVM file by its path (needs the extra [data]).

    A bundled name wins over a file of that name; write ./phishing for the file. Raises DataError, in one line, for a
    file that is missing, empty, no LIBSVM text, without exactly two labels, or with a value that is not finite.
    """
    if str(name) in BUNDLED:
        return _bundled(str(name))
    path = Path(name).expanduser()
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "is neither a file nor a bundled data set"
        raise DataError(f"data {str(name)!r} {why}: give {' or '.join(BUNDLED)}, or the path of a LIBSVM file.")
    A, labels = _read(path)
    _check(path, A, labels)
    short = path.name
    for suffix in (*OPENERS, ".libsvm", ".svm", ".txt"):
        short = short.removesuffix(suffix)
    # The smaller of the two labels is the negative class.
    return Dataset(short, A, np.where(labels == labels.max(), 1.0, -1.0), str(path))


def _bundled(name: str) -> Dataset:
    resource = files("shoal") / "bundled" / f"{name}.npz"
    with resource.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        # Indices are stored in a byte and values once where they are all equal, to keep the files small.
        indices, indptr = stored["indices"].astype(np.int32), stored["indptr"].astype(np.int32)
        values = np.broadcast_to(stored["data"], indices.shape).astype(np.float64)
        A = csr_array((values, indices, indptr), shape=tuple(stored["shape"]))
        return Dataset(name, A, stored["labels"].astype(np.float64), BUNDLED[name])


def _open(path: Path) -> IO[bytes]:
    return OPENERS.get(path.suffix, open)(path, "rb")


def _read(path: Path) -> tuple[csr_array, NDArray[np.float64]]:
    try:
        from sklearn.datasets import load_svmlight_file
    except ImportError as missing:
        raise ConfigError(f'reading {path.name} needs scikit-learn: pip install "shoal[data]".') from missing
    try:
        with _open(path) as stream:
            if not any(line.split(b"#")[0].strip() for line in stream):
                raise DataError(f"{path}: no rows; a LIBSVM file has one `label index:value ...` a line.")
        with _open(path) as stream:
            A, labels = load_svmlight_file(stream)
    except DataError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as broken:
        raise DataError(f"{path}: the file cannot be read as {path.suffix or 'a file'} ({broken}).") from broken
    except (ValueError, OverflowError) as malformed:
        raise DataError(f"{path}: not a LIBSVM file: {first_bad_line(path) or malformed}.") from malformed
    return csr_array(A), np.asarray(labels, np.float64)


def first_bad_line(path: Path) -> str:
    """Which line is not `label index:value ...` and why; empty if every line is."""
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            words = line.decode(errors="replace").split("#")[0].split()
            last = -1
            for place, word in enumerate(words):
                problem = _complaint(place, word, last)
                if problem:
                    return f"line {number}: {problem}"
                last = int(word.split(":")[0]) if place else -1
    return ""


def _complaint(place: int, word: str, last: int) -> str:
    """What is wrong with a word of a line whose index before it was `last`; empty if nothing is."""
    shown = repr(word if len(word) <= 30 else word[:30] + "...")
    index, colon, value = ("0", ":", word) if place == 0 else word.partition(":")
    try:
        float(value)
        position = int(index)
    except ValueError:
        return f"{shown} is not {'an index:value pair' if place else 'a label (a number)'}"
    if not colon or position < 0:
        return f"{shown} is not an index:value pair with an index of at least 0"
    return f"index {position} after {last}: indices must ascend" if place and position <= last else ""


def _check(path: Path, A: csr_array, labels: NDArray[np.float64]) -> None:
    found = np.unique(labels)
    if len(found) != 2 or not np.isfinite(found).all():
        listed = ", ".join(f"{label:g}" for label in found[:8]) + (", ..." if len(found) > 8 else "")
        raise DataError(f"{path}: {len(found)} labels ({listed}); binary classification needs exactly two finite ones.")
    if A.shape[1] == 0 or A.nnz == 0:
        raise DataError(f"{path}: {A.shape[0]} rows without a single feature: labels alone teach nothing.")
    finite = np.isfinite(A.data)
    if not finite.all():
        row = int(np.searchsorted(A.indptr, np.flatnonzero(~finite)[0], side="right"))
        raise DataError(f"{path}: row {row} holds a NaN or an infinity; every value must be finite.")
