"""Problems: n local functions with their gradients, values and smoothness constants."""

from __future__ import annotations

from shoal.problems.autoencoder import Autoencoder
from shoal.problems.classification import Classification
from shoal.problems.curvature import estimated
from shoal.problems.module import Module
from shoal.problems.natural import mnist_cnn, resnet18, shakespeare
from shoal.problems.quadratic import Quadratics
from shoal.problems.smoothness import measured_pm

__all__ = [
    "Autoencoder",
    "Classification",
    "Module",
    "Quadratics",
    "estimated",
    "measured_pm",
    "mnist_cnn",
    "resnet18",
    "shakespeare",
]
