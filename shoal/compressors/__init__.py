"""Compressors. A name in `__all__` is what the command line knows."""

from shoal.compressors.correlated import Correlated
from shoal.compressors.dither import QSGD, Independent
from shoal.compressors.permk import PermK
from shoal.compressors.pointwise import Bernoulli, Natural, NaturalDithering, Sign, Ternary
from shoal.compressors.sparse import RandK, TopK
from shoal.core import Dense

__all__ = ["QSGD", "Correlated", "Dense", "Independent", "PermK", "RandK", "TopK"]
__all__ += ["Bernoulli", "Natural", "NaturalDithering", "Sign", "Ternary"]
