"""The simulator: every client and the server in this process. Both directions are the identity; bytes are counted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from shoal.core import Compressor, Meter
from shoal.errors import NonFiniteError
from shoal.messages import Messages, Round, Rows, Vector
from shoal.wire import HEADER

SCALAR = 4  # an agreement costs one float32 up and one down a client


class Local:
    """The channel of a process that hosts all n clients."""

    rank, serves = 0, True

    def __init__(self, n: int, meter: Meter | None = None) -> None:
        self.n, self.clients, self.meter = n, torch.arange(n), meter or Meter()

    def open(self, config: dict[str, Any]) -> None:
        """Nobody else is there to have another one."""

    def scatter(self, down: Messages | None, rnd: Round) -> Messages:
        """One row, heard by all n clients, or a row for each of the cohort."""
        assert down is not None
        heard = self.n if down.shared else rnd.cohort
        total = int(down.nbytes[0]) * self.n if down.shared else int(down.nbytes.sum())
        self.meter.down += total
        self.meter.down_framed += total + HEADER * heard
        return down if len(rnd.slots) == rnd.cohort else down.rows(rnd.slots)

    def gather(self, up: Messages, code: Compressor, rnd: Round) -> Messages:
        """Every message of the round, in slot order: all are here already."""
        return up

    def mean(self, up: Messages, code: Compressor, rnd: Round) -> Vector:
        """The mean of all messages, whose bytes are counted."""
        up = self.gather(up, code, rnd)
        total = int(up.nbytes.sum())
        self.meter.up += total
        self.meter.up_framed += total + HEADER * len(up.nbytes)
        return code.aggregate(up, rnd)

    def agree(self, values: Tensor, rnd: Round) -> float:
        """The maximum. 32 bits up and 32 down a client, and as many frames."""
        self.meter.up += SCALAR * rnd.cohort
        self.meter.down += SCALAR * rnd.cohort
        self.meter.up_framed += (SCALAR + HEADER) * rnd.cohort
        self.meter.down_framed += (SCALAR + HEADER) * rnd.cohort
        return float(values.max())

    def fail(self, error: NonFiniteError, rnd: Round) -> NoReturn:
        """Nobody else is there to be told."""
        raise error

    def collect(self, values: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """All rows are here already."""
        return values, rows

    def moved(self) -> list[int]:
        """Nothing moves."""
        return []

    def together(self, mine: Tensor) -> list[Tensor]:
        """There is no other process."""
        return [mine]
