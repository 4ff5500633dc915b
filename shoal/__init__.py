"""shoal: distributed nonconvex optimization over slow links.

n clients minimize f(x) = (1/n) sum f_i(x) and send compressed messages. `shoal.simulate` runs a method on a problem;
`shoal.core` is where to start reading.
"""

from importlib.metadata import PackageNotFoundError, version

from shoal.compressors import (
    QSGD,
    Bernoulli,
    Coded,
    Composed,
    Correlated,
    CorrelatedOffset,
    Dense,
    Drive,
    Eden,
    Grid,
    Independent,
    LowRank,
    Natural,
    NaturalDithering,
    PerLayer,
    PermK,
    RandK,
    Rotated,
    Scaled,
    Sign,
    Ternary,
    TopK,
)  # fmt: skip
from shoal.errors import ShoalError
from shoal.experiments.mean import MeanEstimate, mean_estimation
from shoal.experiments.run import Run, simulate
from shoal.methods import (
    DCGD,
    EF21,
    GD,
    Dasha,
    Diana,
    Marina,
    MarinaP,
    PPMarina,
    TwoWayEF21,
    TwoWayMarina,
    VRDiana,
    VRMarina,
)
from shoal.problems import Autoencoder, Classification, Module, Quadratics
from shoal.runtimes.group import connect

try:
    __version__ = version("shoal")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "DCGD", "EF21", "GD", "QSGD", "Autoencoder", "Bernoulli", "Classification", "Coded", "Composed", "Correlated",
    "CorrelatedOffset", "Dasha", "Dense", "Diana", "Drive", "Eden", "Grid", "Independent", "LowRank", "Marina",
    "MarinaP", "MeanEstimate", "Module", "Natural", "NaturalDithering", "PPMarina", "PerLayer", "PermK", "Quadratics",
    "RandK", "Rotated", "Run", "Scaled", "ShoalError", "Sign", "Ternary", "TopK", "TwoWayEF21", "TwoWayMarina",
    "VRDiana", "VRMarina", "connect", "mean_estimation", "simulate",
]  # fmt: skip
