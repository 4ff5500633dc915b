# ruff: noqa: F401 (what is imported here is listed in reference.__all__)
"""The kernels of `reference`, compiled by numba: same names, same arguments, same bytes.

Every compiled function is at module level (numba finds only those again in its cache) and releases the interpreter
lock. No fastmath: results are defined bit for bit, whatever the number of threads (`threads.spread`).
"""

from shoal.kernels import reference
from shoal.kernels.cpu.bits import decode_bits, encode_bits, encode_within, mean_bits, read_scales
from shoal.kernels.cpu.codes import pack, pack_trits, unpack, unpack_trits
from shoal.kernels.cpu.dealt import dealt_lengths, gather_dealt, mean_dealt, scatter_dealt
from shoal.kernels.cpu.drive import decode_turned, encode_turned
from shoal.kernels.cpu.entropy import decode_entropy, encode_entropy
from shoal.kernels.cpu.levels import decode_levels, decode_trits, encode_levels, encode_trits, mean_levels, mean_trits
from shoal.kernels.cpu.lowrank import low_rank, outer
from shoal.kernels.cpu.philox import below, coins, halves, permutation, places, shifts, support, symmetric, words
from shoal.kernels.cpu.points import decode_points, encode_points, encode_signs
from shoal.kernels.cpu.pointwise import (
    decode_natural,
    decode_natural_levels,
    encode_natural,
    encode_natural_levels,
    mean_abs,
    mean_natural,
    mean_natural_levels,
    sign_bits,
)
from shoal.kernels.cpu.rotation import dots, hadamard, rotate, rotate_back, rotate_padded, rotate_padded_back
from shoal.kernels.cpu.sparse import decode_topk, encode_topk, gather, mean_sparse, scatter, topk
from shoal.kernels.cpu.strata import decode_strata, encode_strata, mean_strata
from shoal.kernels.cpu.sums import add_rows, greatest, maxes, mean_rows, norms, square_norm
from shoal.kernels.cpu.sums_of_codes import fold_codes, unfold_codes
from shoal.kernels.cpu.turned import rotate_signs

__all__ = reference.__all__
