"""Kernels that stay on the host: their inputs are copied there, their results back.

`permutation`, `places`, `support`, `encode_entropy`, `decode_entropy` and the orthogonal columns of `low_rank` are
chains of dependent steps, which one core runs faster than one thread of a GPU. `fold_codes` and `unfold_codes` stand
beside a network that reads the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    return type(x)(_moved(part, device) for part in x) if isinstance(x, tuple | list) else x


def _devices(arguments: Iterable[Any]) -> Iterator[torch.device]:
    for x in arguments:
        if isinstance(x, Tensor | Draw):
            yield x.slots.device if isinstance(x, Draw) else x.device
        elif isinstance(x, list | tuple):
            yield from _devices(x)


def hosted(name: str) -> Callable[..., Any]:
    """The host's kernel of this name, for tensors on any device. They are read, and none is written to."""

    def call(*arguments: Any, **more: Any) -> Any:
        home, host = next(_devices((*arguments, *more.values()))), torch.device("cpu")
        given = {key: _moved(x, host) for key, x in more.items()}
        return _moved(getattr(kernels.cpu, name)(*_moved(arguments, host), **given), home)

    return call
