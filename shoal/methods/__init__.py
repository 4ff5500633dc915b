"""Methods. A name in `__all__` is what the command line knows."""

from shoal.methods.dasha import Dasha
from shoal.methods.dcgd import DCGD
from shoal.methods.diana import Diana
from shoal.methods.ef21 import EF21
from shoal.methods.gd import GD
from shoal.methods.marina import Marina
from shoal.methods.marina_p import MarinaP
from shoal.methods.pp_marina import PPMarina
from shoal.methods.two_way_ef21 import TwoWayEF21
from shoal.methods.two_way_marina import TwoWayMarina
from shoal.methods.vr_diana import VRDiana
from shoal.methods.vr_marina import VRMarina

__all__ = [
    "DCGD", "EF21", "GD", "Dasha", "Diana", "Marina", "MarinaP", "PPMarina", "TwoWayEF21", "TwoWayMarina",
    "VRDiana", "VRMarina",
]  # fmt: skip
