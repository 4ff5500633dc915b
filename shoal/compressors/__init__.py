"""Compressors. A name in `__all__` is what the command line knows."""

from shoal.compressors.correlated import Correlated
from shoal.compressors.dither import QSGD, Independent
from shoal.compressors.drive import Drive, Eden
from shoal.compressors.entropy import Coded
from shoal.compressors.lowrank import LowRank
from shoal.compressors.offset import CorrelatedOffset
from shoal.compressors.permk import PermK
from shoal.compressors.pointwise import Bernoulli, Natural, NaturalDithering, Sign, Ternary
from shoal.compressors.rotation import Grid, Rotated
from shoal.compressors.sparse import RandK, TopK
from shoal.compressors.wrap import Composed, PerLayer, Scaled
from shoal.core import Dense

__all__ = [
    "QSGD", "Bernoulli", "Coded", "Composed", "Correlated", "CorrelatedOffset", "Dense", "Drive", "Eden", "Grid",
    "Independent", "LowRank", "Natural", "NaturalDithering", "PerLayer", "PermK", "RandK", "Rotated", "Scaled",
    "Sign", "Ternary", "TopK",
]  # fmt: skip
