# ruff: noqa: F401 (what is imported here is listed in reference.__all__)
"""The kernels of `reference` for tensors on a GPU, written in Triton: same names, same arguments, same bytes.

What the bits rest on: no product is fused with a sum (`launch` says so to the compiler), float32 and float64 divisions
and roots are rounded to nearest, denormals are kept, and floats are added in the reference's order, never in a tree and
never by atomics. What has been checked, and how, is in docs/gpu.md.
"""

from collections.abc import Callable
from typing import Any

from shoal.kernels import reference
from shoal.kernels.gpu.bits import decode_bits, encode_bits, encode_within, mean_bits, read_scales, sign_bits
from shoal.kernels.gpu.dealt import dealt_lengths, gather_dealt, mean_dealt, scatter_dealt
from shoal.kernels.gpu.hosted import hosted
from shoal.kernels.gpu.levels import decode_levels, decode_trits, encode_levels, encode_trits, mean_levels, mean_trits
from shoal.kernels.gpu.lowrank import outer
from shoal.kernels.gpu.packing import pack, pack_trits, unpack, unpack_trits
from shoal.kernels.gpu.philox import below, coins, halves, shifts, symmetric, words
from shoal.kernels.gpu.points import (
    decode_points,
    decode_turned,
    encode_points,
    encode_signs,
    encode_turned,
    rotate_signs,
)
from shoal.kernels.gpu.pointwise import (
    decode_natural,
    decode_natural_levels,
    encode_natural,
    encode_natural_levels,
    mean_natural,
    mean_natural_levels,
)
from shoal.kernels.gpu.rotation import hadamard, rotate, rotate_back, rotate_padded, rotate_padded_back
from shoal.kernels.gpu.sparse import decode_topk, encode_topk, gather, mean_sparse, scatter, topk
from shoal.kernels.gpu.strata import decode_strata, encode_strata, mean_strata
from shoal.kernels.gpu.sums import add_rows, dots, greatest, maxes, mean_abs, mean_rows, norms, square_norm

__all__ = reference.__all__


def __getattr__(name: str) -> Callable[..., Any]:
    """A kernel that is not written for a GPU: the host's."""
    if name not in reference.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hosted(name)
