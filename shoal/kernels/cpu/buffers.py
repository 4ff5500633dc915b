"""Memory for large outputs that was written before: the system clears a fresh page when it is first touched, and that
costs more than the numbers that are then written to it.

An array that nobody refers to any longer is taken again. At most `KEPT` bytes are held on to.
"""

from __future__ import annotations

import math
import os
import threading
from sys import getrefcount

import numpy as np
from numba import njit

from shoal.kernels.cpu.vectors import move

LARGE = 1 << 20  # bytes from which on fresh pages matter
KEPT = 1 << 29  # bytes in all
LINE = 64  # bytes of a line of the cache

_held: list[np.ndarray] = []
_choosing = threading.Lock()


def _forget() -> None:
    global _choosing
    _choosing = threading.Lock()  # another thread may have held it in the parent
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _references(held: list[np.ndarray], at: int) -> int:
    array = held[at]
    return getrefcount(array)


FREE = _references([np.empty(1)], 0)  # to an array that only the list holds, as this interpreter counts them


def ready(shape: tuple[int, ...] | int, dtype: type) -> np.ndarray:
    """An array of that shape with any content, as `numpy.empty` gives it."""
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    nbytes = size * np.dtype(dtype).itemsize
    if not LARGE <= nbytes <= KEPT // 2:
        return np.empty(shape, dtype)
    with _choosing:
        return _reserved(nbytes).view(dtype).reshape(shape)


def _reserved(nbytes: int) -> np.ndarray:
    """That much of a free array that is not much larger, or of a new one in the place of the oldest."""
    for at in range(len(_held)):
        if nbytes <= _held[at].size - LINE <= nbytes + nbytes // 4 and _references(_held, at) == FREE:
            _held.append(_held.pop(at))
            return _aligned(_held[-1], nbytes)
    array = np.empty(nbytes + LINE, np.uint8)
    _held.append(array)
    while sum(held.size for held in _held) > KEPT:
        _held.pop(0)
    return _aligned(array, nbytes)


def _aligned(array: np.ndarray, nbytes: int) -> np.ndarray:
    """From the first whole line of the cache on: else every wide register that is stored would touch two lines."""
    first = -array.__array_interface__["data"][0] % LINE
    return array[first : first + nbytes]


@njit(cache=True, nogil=True)
def copied(source, target, lo, hi):
    """target[lo:hi] = source[lo:hi]: the yardstick of benchmarks on several threads."""
    move(source, target, lo, hi - lo)
