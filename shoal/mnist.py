"""MNIST from a folder of IDX files, and who wrote each digit.

IDX: two zero bytes, the type of the numbers (8: a byte, 12: a big-endian int32), how many dimensions, a big-endian
int32 for each, then the numbers. Files may be compressed (.xz, .gz, .bz2) and are checked by the SHA-256 of what they
hold. LeCun, Cortes, Burges, "The MNIST database of handwritten digits"; LeCun, Bottou, Bengio, Haffner, 1998.
Writers: Yadav, Bottou, "Cold case: the lost MNIST digits", 2019, arXiv:1905.10498.
"""

from __future__ import annotations

import io
import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal import files
from shoal.errors import DataError
from shoal.files import Remote

SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # the mirror that torchvision uses
WROTE = "https://raw.githubusercontent.com/facebookresearch/qmnist/94061367ec2e099ea18c553c75727ecf849ddb9b/"
SHA256 = {  # of the raw files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SIZES = {
    "train-images-idx3-ubyte": 47040016,
    "train-labels-idx1-ubyte": 60008,
    "t10k-images-idx3-ubyte": 7840016,
    "t10k-labels-idx1-ubyte": 10008,
}
QMNIST, PICKED = "qmnist-train-labels-idx2-int", "mnist-writers.npz"
WRITERS = "10804de73fa65ca45f6076e667137549cf9ae06d02951ed59eedf22380647e8c"  # of the 60000 writers as uint16
TYPES: dict[int, np.dtype] = {8: np.dtype("u1"), 12: np.dtype(">i4")}
KNOWN = ("train", "t10k")


def images(folder: str | Path, part: str = "train") -> NDArray[np.uint8]:
    """(N, 28, 28): the images of "train" (60000) or "t10k" (10000). Raises DataError."""
    return _read(folder, f"{_checked(part)}-images-idx3-ubyte", (28, 28))


def labels(folder: str | Path, part: str = "train") -> NDArray[np.uint8]:
    """(N,): the digits. Raises DataError."""
    return _read(folder, f"{_checked(part)}-labels-idx1-ubyte", ())


def writers(folder: str | Path) -> NDArray[np.int64]:
    """(60000,): who wrote each training digit, 539 people in all; from either of two files, whichever is there.

    QMNIST's `qmnist-train-labels-idx2-int` has eight int32 a row: the digit, NIST's series, the writer, and more;
    `mnist-writers.npz` has the third of them as its array `train_writer`. Raises DataError where both are absent, or
    do not have these writers.
    """
    there = Path(folder).expanduser()
    picked = there / PICKED
    if picked.is_file():
        return _picked(files.read(picked), str(picked))
    path = files.find(there, QMNIST)
    if path is None:
        raise DataError(
            f"{there} holds no {QMNIST} (nor .xz, .gz, .bz2) and no {PICKED}: put {WROTE}{QMNIST}.gz there, or "
            "download it with --data mnist."
        )
    table = _table(files.read(path), str(path))
    if not np.array_equal(table[:, 0], labels(folder)):
        raise DataError(f"{path}: its first column is not MNIST's training labels; the rows would be other images.")
    return _known(table[:, 2], str(path))


def fetch(folder: str | Path, source: str = SOURCE) -> list[Path]:
    """Download what is missing of MNIST's four files (11 MB), check their SHA-256, and write them; the paths.

    Raises DataError without a network, and for other bytes than MNIST's.
    """
    return files.fetch(folder, _remotes(source))


def located(given: str | Path, with_writers: bool = False) -> Path:
    """The folder of MNIST's files: a path, or "mnist" for where `shoal.files` finds them or downloads them to.

    `with_writers`: the file of `writers` has to be there as well. Raises DataError.
    """
    wanted = [name for name in SHA256 if name.startswith("train")]
    remotes = [remote for remote in _remotes(SOURCE) if remote.name in wanted]
    if with_writers:
        remotes.append(Remote(QMNIST, f"{WROTE}{QMNIST}.gz", 12 + 60000 * 8 * 4, _check_writers))

    def complete(place: Path) -> bool:
        written = (place / PICKED).is_file() or files.find(place, QMNIST) is not None
        return all(files.find(place, name) for name in wanted) and (written or not with_writers)

    return files.folder(given, "mnist", complete, remotes)


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


def _remotes(source: str) -> list[Remote]:
    return [Remote(name, f"{source}{name}.gz", SIZES[name], partial(_check, name)) for name in SHA256]


def _check(name: str, raw: bytes, where: str) -> None:
    files.check_sum(raw, SHA256[name], where, "MNIST's")


def _read(folder: str | Path, name: str, shape: tuple[int, ...]) -> NDArray:
    there = Path(folder).expanduser()
    path = files.find(there, name)
    if path is None:
        raise DataError(
            f"{there} holds no {name} (nor .xz, .gz, .bz2): give the folder of MNIST's files, "
            f"or download them with --data mnist, or with shoal.mnist.fetch({str(there)!r})."
        )
    raw = files.read(path)
    _check(name, raw, str(path))
    return idx(raw, str(path))


def _table(raw: bytes, where: str) -> NDArray:
    table = idx(raw, where)
    if table.ndim != 2 or table.shape[1] < 3:
        raise DataError(f"{where}: shape {table.shape}; QMNIST's labels have eight numbers a row.")
    return table


def _check_writers(raw: bytes, where: str) -> None:
    _known(_table(raw, where)[:, 2], where)


def _picked(raw: bytes, where: str) -> NDArray[np.int64]:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
            return _known(stored["train_writer"], where)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as broken:
        if isinstance(broken, DataError):
            raise
        raise DataError(f"{where}: no file of writers ({broken}).") from broken


def _known(found: NDArray, where: str) -> NDArray[np.int64]:
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(f"{where}: {found.dtype} of shape {found.shape}; one integer for each training digit.")
    files.check_sum(found.astype("<u2").tobytes(), WRITERS, where, "the writers'")
    return found.astype(np.int64)
