"""Every kernel in plain numpy: slow, obviously right, and the definition of what the others must return, bit for bit.

All functions take and return torch tensors on the CPU. Rows are (m, d) float32; r are (m,) float32 scales. Floats that
end in a message or in an iterate are summed in float64 in a fixed order, so that a row's bits never depend on the rows
beside it, on the chunking or on the number of threads.
"""

from shoal.kernels.reference.bits import decode_bits, encode_bits, encode_within, mean_bits, read_scales, sign_bits
from shoal.kernels.reference.codes import pack, pack_trits, unpack, unpack_trits
from shoal.kernels.reference.dealt import dealt_lengths, gather_dealt, mean_dealt, scatter_dealt
from shoal.kernels.reference.entropy import decode_entropy, encode_entropy
from shoal.kernels.reference.levels import (
    decode_levels,
    decode_trits,
    encode_levels,
    encode_trits,
    mean_levels,
    mean_trits,
)
from shoal.kernels.reference.lowrank import low_rank, outer
from shoal.kernels.reference.philox import (
    below,
    coins,
    halves,
    permutation,
    places,
    shifts,
    support,
    symmetric,
    words,
)
from shoal.kernels.reference.pointwise import (
    decode_natural,
    decode_natural_levels,
    encode_natural,
    encode_natural_levels,
    mean_natural,
    mean_natural_levels,
)
from shoal.kernels.reference.rotation import (
    decode_points,
    encode_points,
    encode_signs,
    hadamard,
    rotate,
    rotate_back,
    rotate_padded,
    rotate_padded_back,
    rotate_signs,
)
from shoal.kernels.reference.sparse import decode_topk, encode_topk, gather, mean_sparse, scatter, topk
from shoal.kernels.reference.strata import decode_strata, encode_strata, mean_strata
from shoal.kernels.reference.sums import add_rows, dots, greatest, maxes, mean_abs, mean_rows, norms, square_norm
from shoal.kernels.reference.sums_of_codes import fold_codes, unfold_codes
from shoal.kernels.reference.turned import decode_turned, encode_turned

__all__ = [
    "add_rows",
    "below",
    "coins",
    "dealt_lengths",
    "decode_bits",
    "decode_entropy",
    "decode_levels",
    "decode_natural",
    "decode_natural_levels",
    "decode_points",
    "decode_strata",
    "decode_topk",
    "decode_trits",
    "decode_turned",
    "dots",
    "encode_bits",
    "encode_entropy",
    "encode_levels",
    "encode_natural",
    "encode_natural_levels",
    "encode_points",
    "encode_signs",
    "encode_strata",
    "encode_topk",
    "encode_trits",
    "encode_turned",
    "encode_within",
    "fold_codes",
    "gather",
    "gather_dealt",
    "greatest",
    "hadamard",
    "halves",
    "low_rank",
    "maxes",
    "mean_abs",
    "mean_bits",
    "mean_dealt",
    "mean_levels",
    "mean_natural",
    "mean_natural_levels",
    "mean_rows",
    "mean_sparse",
    "mean_strata",
    "mean_trits",
    "norms",
    "outer",
    "pack",
    "pack_trits",
    "permutation",
    "places",
    "read_scales",
    "rotate",
    "rotate_back",
    "rotate_padded",
    "rotate_padded_back",
    "rotate_signs",
    "scatter",
    "scatter_dealt",
    "shifts",
    "sign_bits",
    "square_norm",
    "support",
    "symmetric",
    "topk",
    "unfold_codes",
    "unpack",
    "unpack_trits",
    "words",
]
