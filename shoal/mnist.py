"""MNIST from a folder of IDX files, and who wrote each digit.

IDX: two zero bytes, the type of the numbers (8: a byte, 12: a big-endian int32), how many dimensions, a big-endian
int32 for each, then the numbers. Files may be compressed (.xz, .gz, .bz2) and are checked by the SHA-256 of what they
hold. LeCun, Cortes, Burges, "The MNIST database of handwritten digits"; LeCun, Bottou, Bengio, Haffner, 1998.
Writers: Yadav, Bottou, "Cold case: the lost MNIST digits", 2019, arXiv:1905.10498.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data import OPENERS
from shoal.errors import DataError

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # the mirror that torchvision uses
SHA256 = {  # of the raw files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TYPES: dict[int, np.dtype] = {8: np.dtype("u1"), 12: np.dtype(">i4")}
KNOWN = ("train", "t10k")


def images(folder: str | Path, part: str = "train") -> NDArray[np.uint8]:
    """(N, 28, 28): the images of "train" (60000) or "t10k" (10000). Raises DataError."""
    return _read(folder, f"{_checked(part)}-images-idx3-ubyte", (28, 28))


def labels(folder: str | Path, part: str = "train") -> NDArray[np.uint8]:
    """(N,): the digits. Raises DataError."""
    return _read(folder, f"{_checked(part)}-labels-idx1-ubyte", ())


def writers(folder: str | Path) -> NDArray[np.int64]:
    """(60000,): who wrote each training digit, 539 people in all, from QMNIST's `qmnist-train-labels-idx2-int`.

    That file has eight int32 a row: the digit, then NIST's series, the writer, and more. Raises DataError where it is
    absent, or where its digits are not those of the labels beside it.
    """
    there = Path(folder).expanduser()
    name = "qmnist-train-labels-idx2-int"
    path = _find(there, name)
    if path is None:
        raise DataError(
            f"{there} holds no {name} (nor .xz, .gz, .bz2): take it from the repository of arXiv:1905.10498."
        )
    table = idx(_bytes(path), str(path))
    if table.ndim != 2 or table.shape[1] < 3 or not np.array_equal(table[:, 0], labels(folder)):
        raise DataError(f"{path}: its first column is not MNIST's training labels; the rows would be other images.")
    return table[:, 2].astype(np.int64)


def fetch(folder: str | Path, source: str = SOURCE) -> list[Path]:
    """Download what is missing of MNIST's four files (11 MB), check their SHA-256, and write them; the paths.

    Nothing else in the library reads the network. Raises DataError without a network, and for other bytes than MNIST's.
    """
    there = Path(folder).expanduser()
    there.mkdir(parents=True, exist_ok=True)
    written = []
    for name in SHA256:
        if _find(there, name) is not None:
            continue
        try:
            with urllib.request.urlopen(f"{source}{name}.gz", timeout=60) as stream:
                packed = stream.read()
            raw = zlib.decompress(packed, wbits=31)
        except (OSError, urllib.error.URLError, zlib.error, ValueError) as error:
            raise DataError(
                f"{source}{name}.gz cannot be had ({error}): without a network, put MNIST's files into {there}."
            ) from None
        _check_sum(raw, name, f"{source}{name}.gz")
        target = there / f"{name}.gz"
        target.with_suffix(".part").write_bytes(packed)
        target.with_suffix(".part").replace(target)
        written.append(target)
    return written


def idx(raw: bytes, where: str = "an IDX file") -> NDArray:
    """The array of an IDX file's bytes. Raises DataError where they are not what their header says."""
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in TYPES or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{where}: not an IDX file of bytes or int32; it begins with {raw[:4].hex() or 'nothing'}.")
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3]))
    kind, begin = TYPES[raw[2]], 4 + 4 * raw[3]
    if len(raw) != begin + math.prod(shape) * kind.itemsize:
        raise DataError(f"{where}: {len(raw)} bytes for shape {shape}: it is cut off, or longer than its header says.")
    return np.frombuffer(raw, kind, offset=begin).reshape(shape)


def _checked(part: str) -> str:
    if part not in KNOWN:
        raise DataError(f"part={part!r}: MNIST has the parts {' and '.join(KNOWN)}.")
    return part


def _find(folder: Path, name: str) -> Path | None:
    return next((p for s in ("", *OPENERS) if (p := folder / (name + s)).is_file()), None)


def _read(folder: str | Path, name: str, shape: tuple[int, ...]) -> NDArray:
    there = Path(folder).expanduser()
    path = _find(there, name)
    if path is None:
        raise DataError(
            f"{there} holds no {name} (nor .xz, .gz, .bz2): give the folder of MNIST's files, "
            f"or download them with: shoal.mnist.fetch({str(there)!r})."
        )
    raw = _bytes(path)
    _check_sum(raw, name, str(path))
    return idx(raw, str(path))


def _bytes(path: Path) -> bytes:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as stream:
            return bytes(stream.read())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as broken:
        raise DataError(f"{path}: the file cannot be read ({broken}).") from broken


def _check_sum(raw: bytes, name: str, where: str) -> None:
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256[name]:
        raise DataError(
            f"{where}: SHA-256 {found[:12]}... and not {SHA256[name][:12]}...: these are not MNIST's bytes."
        )
