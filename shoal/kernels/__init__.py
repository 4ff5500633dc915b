"""Inner loops. `of(tensor)` is the module for the tensor's device; `reference` is the definition of every kernel.

Every module has the same function names and gives the same bytes; tests iterate over `reference.__all__`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

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


__all__ = ["Draw", "of", "reference", "when_compiling"]


def of(tensor: Tensor) -> ModuleType:
    """The kernels for this tensor's device: numba on CPU, the plain reference elsewhere."""
    return cpu if tensor.device.type == "cpu" else reference
