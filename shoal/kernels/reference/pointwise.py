"""Powers of two."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw
from shoal.kernels.reference.bits import headed
from shoal.kernels.reference.codes import pack, unpack
from shoal.kernels.reference.philox import word_array
from shoal.kernels.reference.sums import mean_rows


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    """(m, ceil(9 d / 8)) uint8: the exponent's 8 bits, then the sign, of u rounded to a neighboring power of two.

    The 23 bits of the mantissa are the probability of the upper neighbor: it is taken where adding 23 uniform bits
    carries into the exponent. Below 2^-126 the neighbors are 0 and 2^-126, by the same addition.
    """
    bits = u.numpy().view(np.uint32)
    noise = word_array(private, u.shape[1]) >> np.uint32(9)
    exponent = ((bits & np.uint32(0x7FFFFFFF)) + noise) >> np.uint32(23)
    return pack(torch.from_numpy(exponent.astype(np.int64) | (bits >> np.uint32(31)).astype(np.int64) << 8), 9)


def decode_natural(payload: Tensor, d: int) -> tuple[Tensor, bool]:
    """(m, d) float32 of codes of 9 bits: the powers of two that they name, or 0. And whether an exponent is 255."""
    c = unpack(payload, d, 9).numpy()
    bits = (c & 255) << 23 | (c >> 8) << 31
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32)), bool(((c & 255) == 255).any())


def mean_natural(payload: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i of these powers in float64, from row 0 to row m-1. And the same check."""
    rows, bad = decode_natural(payload, d)
    with np.errstate(invalid="ignore"):  # infinities of both signs, where an exponent is 255
        return mean_rows(rows, cohort), bad


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    """(m, 4 + ceil(d b / 8)) uint8: r_i, then |u_ij| / r_i rounded to a neighbor among 0, 2^(1-s), ..., 1/2, 1
    (s = levels).

    code = s + sign(u) l in b = ceil(log2(2 s + 1)) bits, level l standing for 2^(l-s) and l = 0 for 0. With
    t = |u| 2^(s-1) / r in float64, the upper neighbor is taken if (w + 1/2) 2^-32 < frac, w a uniform word, where frac
    is t below the first level and t / 2^floor(log2 t) - 1 above it.
    """
    scale = r.numpy().astype(np.float64)[:, None]
    t = np.abs(u.numpy().astype(np.float64)) * 2.0 ** (levels - 1) / np.where(scale > 0, scale, 1.0)
    t = np.where(scale > 0, t, 0.0)
    mantissa, exponent = np.frexp(t)  # t = mantissa 2^exponent, 1/2 <= mantissa < 1
    frac = np.where(exponent >= 1, 2.0 * mantissa - 1.0, t)
    up = (word_array(private, u.shape[1]).astype(np.float64) + 0.5) * 2.0**-32 < frac
    level = np.minimum(np.maximum(exponent, 0) + up, levels)
    code = np.where(u.numpy() < 0, levels - level, levels + level).astype(np.int64)
    return headed(r, pack(torch.from_numpy(code), (2 * levels).bit_length()))


def decode_natural_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    """(m, d) float32 of packed codes: sign(code - s) r_i 2^(|code - s| - s), 0 at s, NaN above 2 s.

    And whether there is such a code.
    """
    level = unpack(payload, d, (2 * levels).bit_length()).numpy() - levels
    beyond = level > levels
    powers = np.where(level == 0, 0.0, np.sign(level) * 2.0 ** (np.abs(level) - float(levels)))
    rows = np.where(beyond, np.nan, powers) * r.numpy().astype(np.float64)[:, None]
    return torch.from_numpy(rows.astype(np.float32)), bool(beyond.any())


def mean_natural_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i of these rows in float64, from row 0 to row m-1. And the same check."""
    rows, beyond = decode_natural_levels(payload, r, levels, d)
    return mean_rows(rows, cohort), beyond
