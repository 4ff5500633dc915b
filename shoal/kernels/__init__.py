"""Inner loops. `of(tensor)` is the module for the tensor's device; `reference` is the definition of every kernel.

Every module has the same function names and gives the same bytes; tests iterate over `reference.__all__`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.kernels import reference
from shoal.kernels.draw import Draw

cpu: ModuleType
if find_spec("numba"):
    from shoal.kernels import cpu as cpu
    from shoal.kernels.cpu.compiling import when_compiling
else:  # numba is a dependency, but no compiled kernel is needed for correctness
    cpu = reference

    def when_compiling(say: Callable[[], None]) -> None:
        """Nothing is compiled."""


__all__ = ["Draw", "divided", "of", "reference", "when_compiling"]


def divided(x: Tensor, by: float) -> Tensor:
    """x / by, rounded to nearest: by a number of Python's, torch on a GPU multiplies with the reciprocal."""
    return x / torch.full_like(x, by)


@cache
def _gpu() -> ModuleType:
    try:
        return import_module("shoal.kernels.gpu")  # only here: without a GPU nobody waits for Triton
    except ImportError as missing:
        raise ConfigError(
            'tensors on a GPU need Triton: pip install "shoal[gpu]", or move them to the CPU.'
        ) from missing


def of(tensor: Tensor) -> ModuleType:
    """The kernels for this tensor's device: numba's on the CPU, Triton's on a GPU.

    Raises ConfigError on any other device, and on a GPU where Triton is not installed.
    """
    if tensor.is_cpu:  # the other question costs as much as some calls take
        return cpu
    kind = tensor.device.type
    if kind != "cuda":
        raise ConfigError(f"a tensor on {tensor.device}: there are kernels for cpu and cuda; move it to one of them.")
    return _gpu()
