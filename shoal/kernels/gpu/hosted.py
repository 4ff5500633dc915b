"""Kernels that stay on the host: their inputs are copied there, their results back.

`permutation` and `support` are chains of d or k dependent steps, which one core runs faster than one thread of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shoal import kernels
from shoal.kernels.draw import Draw


def _moved(x: Any, device: torch.device) -> Any:
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, Draw):
        return x._replace(slots=x.slots.to(device))
    return tuple(_moved(part, device) for part in x) if isinstance(x, tuple) else x


def _devices(arguments: tuple[Any, ...]) -> Iterator[torch.device]:
    for x in arguments:
        if isinstance(x, Tensor | Draw):
            yield x.slots.device if isinstance(x, Draw) else x.device


def hosted(name: str) -> Callable[..., Any]:
    """The host's kernel of this name, for tensors on any device. It takes tensors to read, none to write to."""

    def call(*arguments: Any) -> Any:
        home = next(_devices(arguments))
        return _moved(getattr(kernels.cpu, name)(*_moved(arguments, torch.device("cpu"))), home)

    return call
