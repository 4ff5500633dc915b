"""The workers' state, of some of the hosted clients at a time: taken apart for a chunk, and put together again.

A state is a value, and large: a row of d numbers a client. So rows are copied only where they lie apart.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.messages import Rows

Hosted = slice | Tensor  # places among the clients hosted here


@cache
def row_fields(kind: type) -> frozenset[str]:
    """The fields of a state that hold one row a hosted client."""
    return frozenset(name for name, hint in get_type_hints(kind, include_extras=True).items() if hint == Rows)


def _fields(state: Any) -> frozenset[str]:
    return frozenset() if state == () else row_fields(type(state))  # type: ignore[arg-type]


def take(state: Any, part: Hosted) -> Any:
    """The state of some of the hosted clients: their rows of every `Rows` field."""
    rows = {name: getattr(state, name)[part] for name in _fields(state)}
    return state._replace(**rows) if rows else state


class Joined:
    """m rows, from some at a time: where those lie, if they are one piece of memory as they come, else in new memory.

    Gradients that were remembered are such a piece, and then the state of a method that keeps them.
    """

    def __init__(self, m: int) -> None:
        self.rows: Rows = torch.empty(0)
        self._m, self._filled, self._moved = m, 0, False

    def put(self, some: Rows) -> None:
        """The next rows."""
        start, self._filled = self._filled, self._filled + len(some)
        if start == 0:
            self.rows = some
        elif not self._moved and _follows(some, self.rows):
            shape = (self._filled, *some.shape[1:])
            self.rows = self.rows.as_strided(shape, self.rows.stride(), self.rows.storage_offset())
        else:
            if not self._moved:
                before, self._moved = self.rows, True
                self.rows = torch.from_numpy(ready((self._m, *some.shape[1:]), some.numpy().dtype.type))
                self.rows[:start] = before
            self.rows[start : self._filled] = some


def _follows(some: Rows, rows: Rows) -> bool:
    """Whether these are the next rows of the same memory."""
    packed = some.is_contiguous() and rows.is_contiguous() and some.dtype == rows.dtype
    same = some.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    return packed and same and some.data_ptr() == rows.data_ptr() + rows.nbytes


class After:
    """The workers' state behind a round, from that of the m hosted clients in order, some at a time, or of a cohort's.

    The state before it stays what it was: it has been yielded.
    """

    def __init__(self, before: Any, m: int, cohort: bool) -> None:
        self.state = before
        self._joined = {} if cohort else {name: Joined(m) for name in _fields(before)}
        self._own = {name: getattr(before, name).clone() for name in _fields(before)} if cohort else {}

    def put(self, part: Hosted, new: Any) -> None:
        """These clients' rows, and what all workers share."""
        for name, joined in self._joined.items():
            joined.put(getattr(new, name))
        for name, rows in self._own.items():
            rows[part] = getattr(new, name)
        rows = self._own | {name: joined.rows for name, joined in self._joined.items()}
        self.state = new._replace(**rows) if rows else new
