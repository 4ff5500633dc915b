"""Heart disease in four hospitals: what is read, what is made of it, and what is refused."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from shoal import heart
from shoal.errors import ConfigError, DataError
from shoal.experiments.spec import ProblemSpec

LINES = [
    "63.0,1.0,1.0,140.0,0,1.0,2.0,150.0,0.0,2.0,3.0,0.0,6.0,0",
    "41,0,4,?,200,?,0,?,1,?,?,?,?,3",
    "52,1,2,160,300,0,?,130,1,1,2,?,?,1",
]


def write(folder: Path, lines=LINES) -> Path:
    folder.mkdir(exist_ok=True)
    for k, hospital in enumerate(heart.HOSPITALS):
        text = "\n".join(lines[: 2 + k % 2]) + "\n"
        with lzma.open(folder / f"processed.{hospital}.data.xz", "wb") as stream:
            stream.write(text.encode())
    return folder


def test_a_small_copy_is_read(tmp_path):
    A, y, parts = heart.load(write(tmp_path / "h"))
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert A.shape == (10, 16)
    assert y[:5].tolist() == [-1, 1, -1, 1, 1]
    pressure = np.array([140, np.nan, 140, np.nan, 160, 140, np.nan, 140, np.nan, 160])
    there = np.isfinite(pressure)
    expected = np.where(there, (pressure - pressure[there].mean()) / pressure[there].std(), 0.0)
    assert np.allclose(A[:, 2], expected)
    cholesterol = A[:, 3]
    assert cholesterol[0] == 0.0  # a zero is a missing value
    assert cholesterol[4] > 0 > cholesterol[1]
    assert A[0, 8:].tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    assert A[4, 8:].tolist() == [0, 1, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["1,2,3"], "line 1: 13 features"),
        ([LINES[0], LINES[0][:-1] + "?"], "line 2: 13 features"),
        ([LINES[0].replace("140.0", "inf")], "line 1"),
        ([LINES[0].replace("140.0", "high")], "cannot be read"),
        ([], "no patients"),
    ],
)
def test_malformed_files_are_named(tmp_path, lines, word):
    with pytest.raises(DataError, match=word):
        heart.load(write(tmp_path / "h", lines))
    with pytest.raises(DataError, match=r"holds no processed\.cleveland\.data"):
        heart.load(tmp_path)


def test_hospitals_are_the_clients(tmp_path):
    problem = ProblemSpec.of(name="heart", data=str(write(tmp_path / "h")), lam=0.1, loss="nonconvex").build()
    assert (problem.n, problem.d, problem.name, problem.total_rows) == (4, 16, "heart", 10)
    assert problem.smoothness().pm.status == "bound"
    for settings, word in (({}, "--data FOLDER"), ({"data": ".", "clients": 3}, "clients: not a setting of heart")):
        with pytest.raises(ConfigError, match=word):
            ProblemSpec.of(name="heart", **settings).build()


def test_the_data_themselves():
    folder = Path(os.environ.get("SHOAL_DATA", "")) / "heart_disease"
    if "SHOAL_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("SHOAL_DATA names no folder with heart_disease/")
    A, y, parts = heart.load(folder)
    assert [len(part) for part in parts] == [303, 294, 123, 200]
    assert [int((y[part] > 0).sum()) for part in parts] == [139, 106, 115, 149]
    assert np.abs(A[:, :8].mean(axis=0)).max() < 1e-12
