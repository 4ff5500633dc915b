"""What is done with an estimate g of the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.messages import Vector


@dataclass(frozen=True)
class Step:
    """x+ = x - gamma g, with a constant step size gamma > 0."""

    gamma: float

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ConfigError(f"step size {self.gamma!r}: it must be a positive finite number.")

    def init(self, x0: Vector) -> Any:
        """No memory."""
        return ()

    def step(self, x: Vector, g: Vector, state: Any) -> tuple[Vector, Any]:
        """Two roundings, never fused, so that every machine gives the same bits."""
        return x - self.gamma * g, state
