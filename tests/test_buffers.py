"""Memory that is taken again: never while anyone can see it, and what was in it before never shows."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import COMPRESSORS, fits, inputs, round_of

from shoal import kernels
from shoal.kernels.cpu import buffers

SIZE = buffers.LARGE + 3
USERS = (
    "bits",
    "codes",
    "dealt",
    "drive",
    "levels",
    "philox",
    "points",
    "pointwise",
    "rotation",
    "sparse",
    "strata",
    "sums",
    "sums_of_codes",
    "tables",
    "turned",
)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(buffers, "_held", [])


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_that_nobody_sees_is_taken_again():
    first = address(buffers.ready(SIZE, np.uint8))
    assert address(buffers.ready(SIZE - 1, np.uint8)) == first


@pytest.mark.parametrize(
    "see",
    [
        lambda a: a,
        lambda a: a[-1:],
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a)[7:].view(-1, 4).T,
        lambda a: torch.from_numpy(a).untyped_storage(),
        lambda a: torch.from_numpy(a).numpy()[::2],
        memoryview,
    ],
)
def test_any_view_keeps_its_memory(see):
    array = buffers.ready((SIZE + 4,), np.uint8)
    first, seen = address(array), see(array)
    del array
    assert address(buffers.ready(SIZE + 4, np.uint8)) != first
    del seen
    assert first in {address(a) for a in [buffers.ready(SIZE + 4, np.uint8) for _ in range(2)]}


def test_no_more_is_held_than_said():
    live = [buffers.ready(buffers.KEPT // 4, np.uint8) for _ in range(6)]
    assert sum(array.nbytes for array in buffers._held) <= buffers.KEPT
    assert len({address(array) for array in live}) == 6


def used(shape: tuple[int, ...] | int, dtype: type) -> np.ndarray:
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xA5
    return array


def results(code, u: Tensor) -> list[bytes]:
    rnd = round_of(code, u, 3, 5)
    sent = code.encode(u, rnd)
    out = [sent.payload, sent.nbytes, code.decode(sent, rnd), code.aggregate(sent, rnd)]
    slices = code.slices(u.shape[1], rnd)
    if slices is not None:
        out.append(slices.fold(slices.cut(sent, 0, slices.d), 0))
        out.append(slices.unfold(out[-1:], [(0, slices.d)]))
    return [tensor.contiguous().numpy().tobytes() for tensor in out]


@pytest.mark.parametrize("code", COMPRESSORS, ids=repr)
def test_what_was_there_before_never_shows(code, monkeypatch):
    """Padding bits, rows that are not full, coordinates that nobody sends: all of it is written."""
    for name in USERS:
        monkeypatch.setattr(import_module(f"shoal.kernels.cpu.{name}"), "ready", used)
    for n, d in [(5, 13), (3, 259)]:
        if fits(code, n, d):
            u = inputs("gaussian", n, d)
            compiled = results(code, u)
            with monkeypatch.context() as plain:
                plain.setattr(kernels, "cpu", kernels.reference)
                assert results(code, u) == compiled


def test_every_user_is_listed():
    here = import_module("shoal.kernels.cpu").__path__[0]
    assert {file.stem for file in Path(here).glob("*.py") if "import ready" in file.read_text()} == set(USERS)
