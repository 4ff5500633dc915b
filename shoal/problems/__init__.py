"""Problems: n local functions with their gradients, values and smoothness constants."""

from __future__ import annotations

from shoal.problems.classification import Classification
from shoal.problems.quadratic import Quadratics
from shoal.problems.smoothness import measured_pm

__all__ = ["Classification", "Quadratics", "measured_pm"]
