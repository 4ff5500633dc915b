"""The two questions every problem asks before it evaluates: whose data are here, and does x fit?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import ConfigError

Ids = NDArray[np.int64]


def slot_table(n: int, hosted: Ids) -> Ids:
    """(n,): the place of each client among the hosted ones, -1 for those that are not hosted."""
    if len(hosted) and not (hosted.min() >= 0 and hosted.max() < n):
        raise ConfigError(f"clients {hosted.tolist()[:5]}: the ids of n={n} clients are 0..{n - 1}.")
    table = np.full(n, -1, np.int64)
    table[hosted] = np.arange(len(hosted))
    return table


def slots(table: Ids, clients: Tensor) -> Ids:
    """The places of these clients. Raises ConfigError, naming them, where some are unknown or not hosted here."""
    ids = torch.as_tensor(clients, dtype=torch.int64).cpu().numpy()
    inside = (ids >= 0) & (ids < len(table))
    found = np.where(inside, table[np.where(inside, ids, 0)], -1)
    if (found < 0).any():
        stray, held = ids[found < 0][:5].tolist(), int((table >= 0).sum())
        raise ConfigError(f"clients {stray} are not hosted here: {held} of the clients 0..{len(table) - 1} are.")
    return found


def point(x: Tensor, d: int) -> NDArray[np.float64]:
    """x as float64 (d,); ConfigError for another shape."""
    if tuple(x.shape) != (d,):
        raise ConfigError(f"x has shape {tuple(x.shape)}: this problem has d={d} coordinates, so x must be ({d},).")
    return x.detach().cpu().double().numpy()
