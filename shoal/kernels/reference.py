"""Every kernel in plain numpy: slow, obviously right, and the definition of what the others must return, bit for bit.

All functions take and return torch tensors on the CPU. Rows are (m, d) float32; r are (m,) float32 scales. Floats that
end in a message or in an iterate are summed in float64 in a fixed order, so that a row's bits never depend on the rows
beside it, on the chunking or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw

__all__ = [
    "add_rows",
    "dealt_lengths",
    "decode_bits",
    "decode_levels",
    "decode_natural",
    "decode_natural_levels",
    "decode_points",
    "dots",
    "encode_bits",
    "encode_levels",
    "encode_natural",
    "encode_natural_levels",
    "encode_points",
    "encode_signs",
    "gather",
    "gather_dealt",
    "hadamard",
    "halves",
    "maxes",
    "mean_abs",
    "mean_bits",
    "mean_dealt",
    "mean_levels",
    "mean_rows",
    "mean_sparse",
    "norms",
    "pack",
    "pack_trits",
    "permutation",
    "rademacher",
    "rotate",
    "rotate_back",
    "scatter",
    "scatter_dealt",
    "sign_bits",
    "square_norm",
    "support",
    "topk",
    "unpack",
    "unpack_trits",
    "words",
]

LANES = 16  # partial sums of a row: lane l takes coordinates l, l + 16, ...; the lanes are then added from 0 to 15
PIECE = 65536  # coordinates of a scalar product that are summed in lanes before the next ones, by any thread
TINY = np.float32(2.0**-80)  # below this scale a row is multiplied by LIFT first, so that no quotient overflows
LIFT = np.float32(2.0**60)


# ------------------------------------------------------------------------------------------------ random words
def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (..., 4) uint32 under a 64-bit key: (..., 4) uint32 (Salmon et al., SC'11)."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ k0, p1 & low, (p0 >> shift) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, -1).astype(np.uint32)


def _calls(draw: Draw, count: int) -> np.ndarray:
    """(m, count, 4) words: the calls with counters 0..count-1 of every row."""
    slots = draw.slots.numpy().astype(np.uint32)
    counter = np.empty((len(slots), count, 4), np.uint32)
    counter[..., 0] = np.arange(count, dtype=np.uint32)
    counter[..., 1] = slots[:, None]
    counter[..., 2], counter[..., 3] = draw.round & 0xFFFFFFFF, draw.stream
    return philox(counter, (draw.seed & 0xFFFFFFFF, draw.seed >> 32))


def _words(draw: Draw, d: int) -> np.ndarray:
    blocks = -(-d // 64)
    w = _calls(draw, 16 * blocks).reshape(-1, blocks, 16, 4)  # row, block, counter in block, word
    return np.ascontiguousarray(w.transpose(0, 1, 3, 2).reshape(-1, 64 * blocks)[:, :d])


def words(draw: Draw, d: int) -> Tensor:
    """(m, d) uint32. Coordinate 64 b + 16 w + l is word w of counter 16 b + l: planes of 16, to suit wide registers."""
    return torch.from_numpy(_words(draw, d))


def _halves(draw: Draw, d: int) -> np.ndarray:
    blocks = -(-d // 128)
    w = _calls(draw, 16 * blocks).reshape(-1, blocks, 16, 4)
    h = np.stack([w & np.uint32(0xFFFF), w >> np.uint32(16)], -1).astype(np.uint16)  # row, block, counter, word, half
    return np.ascontiguousarray(h.transpose(0, 1, 3, 4, 2).reshape(-1, 128 * blocks)[:, :d])


def halves(draw: Draw, d: int) -> Tensor:
    """(m, d) uint16. Coordinate 128 b + 16 h + l is half h (low before high, word by word) of counter 16 b + l."""
    return torch.from_numpy(_halves(draw, d))


def permutation(draw: Draw, d: int) -> Tensor:
    """(d,) int64: Fisher-Yates from the top, j = floor(word_t (t+1) / 2^32), each draw off by < 2^-32."""
    w = _words(draw, d)[0].astype(np.uint64)
    out = np.arange(d)
    for t in range(d - 1, 0, -1):
        j = int(w[t] * np.uint64(t + 1) >> np.uint64(32))
        out[t], out[j] = out[j], out[t]
    return torch.from_numpy(out)


def support(draw: Draw, d: int, k: int) -> Tensor:
    """(m, k) int64, ascending: a uniform k-subset of 0..d-1 for every row (Floyd's algorithm, word c for the c-th)."""
    w = _words(draw, k).astype(np.uint64)
    out = np.empty((len(w), k), np.int64)
    for i, row in enumerate(w):
        chosen: set[int] = set()
        for c, t in enumerate(range(d - k, d)):
            j = int(row[c] * np.uint64(t + 1) >> np.uint64(32))
            chosen.add(t if j in chosen else j)
        out[i] = sorted(chosen)
    return torch.from_numpy(out)


# ------------------------------------------------------------------------------------------------ sums and scales
def _lane_sums(squares: np.ndarray) -> np.ndarray:
    m, d = squares.shape
    padded = np.zeros((m, -(-d // LANES) * LANES))
    padded[:, :d] = squares
    lanes = np.add.accumulate(padded.reshape(m, -1, LANES), axis=1)[:, -1]
    return np.add.accumulate(lanes, axis=1)[:, -1]


def norms(u: Tensor) -> Tensor:
    """(m,) float32: the Euclidean norm of every row, rounded up, so that no |u_ij| exceeds it."""
    s = np.sqrt(_lane_sums(u.numpy().astype(np.float64) ** 2))
    with np.errstate(over="ignore"):
        r = s.astype(np.float32)
    return torch.from_numpy(np.where(r < s, np.nextafter(r, np.float32(np.inf)), r))


def maxes(u: Tensor) -> Tensor:
    """(m,) float32: max_j |u_ij|; a NaN or infinity in the row is returned as such (the largest bit pattern)."""
    bits = u.numpy().view(np.uint32) & np.uint32(0x7FFFFFFF)
    return torch.from_numpy(bits.max(1).view(np.float32))


def square_norm(x: Tensor) -> float:
    """||x||^2 of one float64 vector, in the lanes' order."""
    return float(_lane_sums(x.numpy()[None] ** 2)[0])


def _total(rows: np.ndarray) -> np.ndarray:
    """The sum of float64 rows, from 0.0 on, row by row: a sum of negative zeros is then a positive one everywhere."""
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    return total


def add_rows(u: Tensor, total: Tensor) -> None:
    """total (d,) float64 += sum_i u_i, in place, from row 0 to row m-1: chunk after chunk gives one call's bits."""
    for row in u.numpy():
        total.numpy()[:] += row


def mean_rows(u: Tensor, cohort: int) -> Tensor:
    """(d,) float64: (1/cohort) sum_i u_i, from row 0 to row m-1."""
    total = torch.zeros(u.shape[1], dtype=torch.float64)
    add_rows(u, total)
    return total / cohort


# ------------------------------------------------------------------------------------------------ stochastic rounding
def _cells(u: Tensor, r: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(floor(z), frac(z)) of z = u 2^15 steps / r: coordinates on [-r, r] in units of 2^-16 of an interval 2r / steps.

    The product keeps its relative accuracy in u (no 1/2 is added in floating point): with the 40 bits of `_below`,
    |bias| <= (2^-23 + 2^-48) |u_j| + 2^-40 (2 r / steps), see docs/derivations/compressors.md.
    """
    r_ = r.numpy()
    lift = np.where((r_ > 0) & (r_ < TINY), LIFT, np.float32(1))
    safe = np.where(r_ == 0, np.float32(1), r_ * lift)
    s = np.where(r_ == 0, np.float32(0), np.float32(steps * 32768) / safe)
    z = (u.numpy() * lift[:, None]) * s[:, None]
    cell = np.floor(z)
    return cell.astype(np.int64), z - cell


def _below(h: np.ndarray, t: np.ndarray, tie: np.ndarray, frac: np.ndarray) -> np.ndarray:
    """U < (t + frac) / 2^16, with U = (h + v) / 2^16 and v from the second word, which matters only where h = t."""
    v = (tie >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return (h < t) | ((h == t) & (v < frac))


def encode_bits(
    u: Tensor, r: Tensor, private: Draw, tie: Draw, strata: int, place: Tensor, shifts: Tensor | None
) -> Tensor:
    """(m, ceil(d/8)) uint8, least significant bit first: bit = [U < y], y = (u + r) / (2 r).

    U_ij = (place_ij + u_ij) / strata with place_ij = (place_i + shifts_j) mod strata and u_ij private, uniform on
    [0, 1) with 40 bits. strata = 1 is independent rounding. A row with r = 0 gives fair bits.
    """
    d = u.shape[1]
    cell, frac = _cells(u, r, strata)
    spot = place.numpy().astype(np.int64)[:, None] + (0 if shifts is None else shifts.numpy().astype(np.int64))
    t = cell + strata * 32768 - (spot % strata) * 65536
    bits = _below(_halves(private, d), t, _words(tie, d), frac)
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


def _signs(payload: Tensor, d: int) -> np.ndarray:
    return 2.0 * np.unpackbits(payload.numpy(), axis=1, count=d, bitorder="little") - 1.0


def decode_bits(payload: Tensor, r: Tensor, d: int) -> Tensor:
    """(m, d) float32: r_i where the bit is set, -r_i where not."""
    return torch.from_numpy((_signs(payload, d) * r.numpy()[:, None]).astype(np.float32))


def mean_bits(payload: Tensor, r: Tensor, d: int, cohort: int) -> Tensor:
    """(d,) float64: (1/cohort) sum_i (±r_i), from row 0 to row m-1."""
    return torch.from_numpy(_total(_signs(payload, d) * r.numpy()[:, None].astype(np.float64)) / cohort)


def encode_levels(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | None = None,
    shifts: Tensor | None = None,
) -> Tensor:
    """(m, ceil(d b / 8)) uint8: each coordinate rounded to a neighbor on `levels` grid points over [-r, r].

    code = floor(y) + [U < frac(y)], y = (u + r) (levels - 1) / (2 r), b = ceil(log2 levels) bits each, with the U of
    `encode_bits`: uniform on [0, 1), and in the stratum (place_i + shifts_j) mod strata of it.
    """
    d = u.shape[1]
    cell, frac = _cells(u, r, (levels - 1) * strata)
    y = cell + (levels - 1) * strata * 32768
    spot = np.zeros((len(u), 1), np.int64) if place is None else place.numpy().astype(np.int64)[:, None]
    spot = spot + (0 if shifts is None else shifts.numpy().astype(np.int64))
    whole = y // (strata * 65536)
    t = y - whole * (strata * 65536) - (spot % strata) * 65536
    up = _below(_halves(private, d), t, _words(tie, d), frac)
    code = np.clip(whole + up, 0, levels - 1).astype(np.int64)
    return pack(torch.from_numpy(code), (levels - 1).bit_length())


def _grid(code: Tensor, r: Tensor, levels: int) -> np.ndarray:
    return r.numpy().astype(np.float64)[:, None] * (2 * code.numpy() - (levels - 1)) / (levels - 1)


def decode_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    """(m, d) float32 of (m, d) unpacked codes: r_i (2 code - (levels - 1)) / (levels - 1)."""
    return torch.from_numpy(_grid(code, r, levels).astype(np.float32))


def mean_levels(code: Tensor, r: Tensor, levels: int, cohort: int) -> Tensor:
    """(d,) float64: (1/cohort) sum_i of the grid values, from row 0 to row m-1."""
    return torch.from_numpy(_total(_grid(code, r, levels)) / cohort)


# ------------------------------------------------------------------------------------------------ bit streams
def pack(values: Tensor, bits: int) -> Tensor:
    """(m, ceil(c bits / 8)) uint8 of (m, c) integers < 2^bits: value j takes bits j b .. j b + b - 1 of a stream that
    starts at the least significant bit of byte 0; the last byte is filled with zeros."""
    planes = (values.numpy()[..., None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little"))


def unpack(payload: Tensor, count: int, bits: int) -> Tensor:
    """(m, count) int64: the inverse of `pack`."""
    planes = np.unpackbits(payload.numpy(), axis=1, count=count * bits, bitorder="little")
    planes = planes.reshape(len(payload), count, bits).astype(np.int64)
    return torch.from_numpy((planes << np.arange(bits)).sum(2))


# ------------------------------------------------------------------------------------------------ sparse rows
def gather(u: Tensor, index: Tensor, pointer: Tensor, width: int) -> Tensor:
    """(m, width) float32: row i holds u[i, index[pointer[i]:pointer[i+1]]], then zeros."""
    out, index_, at = np.zeros((len(u), width), np.float32), index.numpy(), pointer.tolist()
    for i in range(len(u)):
        out[i, : at[i + 1] - at[i]] = u.numpy()[i, index_[at[i] : at[i + 1]]]
    return torch.from_numpy(out)


def scatter(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float) -> Tensor:
    """(m, d) float32: scale times the values at their indices, zero elsewhere."""
    out, index_, at = np.zeros((len(values), d), np.float32), index.numpy(), pointer.tolist()
    for i in range(len(values)):
        row = values.numpy()[i, : at[i + 1] - at[i]].astype(np.float64)
        out[i, index_[at[i] : at[i + 1]]] = (row * scale).astype(np.float32)
    return torch.from_numpy(out)


def mean_sparse(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float, cohort: int) -> Tensor:
    """(d,) float64: (scale/cohort) sum_i of the rows, from row 0 to row m-1."""
    out, index_, at = np.zeros(d), index.numpy(), pointer.tolist()
    for i in range(len(values)):
        row = values.numpy()[i, : at[i + 1] - at[i]].astype(np.float64)
        np.add.at(out, index_[at[i] : at[i + 1]], row)
    return torch.from_numpy(out * scale / cohort)


def _owners(draw: Draw, parts: int, d: int) -> np.ndarray:
    """(d,): coordinate j of block b = floor(j / parts) belongs to part (j + s_b) mod parts, s_b = floor(word_b parts /
    2^32) with the words of the draw's first row."""
    shifts = _words(draw, -(-d // parts))[0].astype(np.uint64) * np.uint64(parts) >> np.uint64(32)
    j = np.arange(d)
    return (j + shifts.astype(np.int64)[j // parts]) % parts


def dealt_lengths(draw: Draw, part: Tensor, parts: int, d: int) -> Tensor:
    """(m,) int64: how many of d coordinates part_i has, floor(d / parts) or one more."""
    return torch.from_numpy(np.bincount(_owners(draw, parts, d), minlength=parts)[part.numpy()].astype(np.int64))


def gather_dealt(u: Tensor, draw: Draw, part: Tensor, parts: int, width: int) -> Tensor:
    """(m, width) float32: row i holds the coordinates of u[i] that belong to part_i, ascending, then zeros."""
    out, owner = np.zeros((len(u), width), np.float32), _owners(draw, parts, u.shape[1])
    for row, sent, own in zip(u.numpy(), out, part.tolist(), strict=True):
        sent[: (owner == own).sum()] = row[owner == own]
    return torch.from_numpy(out)


def scatter_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float) -> Tensor:
    """(m, d) float32: scale times the values at the coordinates of part_i, zero elsewhere."""
    out, owner = np.zeros((len(values), d), np.float32), _owners(draw, parts, d)
    for row, sent, own in zip(out, values.numpy(), part.tolist(), strict=True):
        row[owner == own] = (sent[: (owner == own).sum()].astype(np.float64) * scale).astype(np.float32)
    return torch.from_numpy(out)


def mean_dealt(values: Tensor, draw: Draw, part: Tensor, parts: int, d: int, scale: float, cohort: int) -> Tensor:
    """(d,) float32: (scale/cohort) sum_i of the rows, added in float64 from row 0 to row m-1."""
    out, owner = np.zeros(d), _owners(draw, parts, d)
    for sent, own in zip(values.numpy(), part.tolist(), strict=True):
        out[owner == own] += sent[: (owner == own).sum()].astype(np.float64)
    with np.errstate(over="ignore"):
        return torch.from_numpy((out * scale / cohort).astype(np.float32))


def topk(u: Tensor, k: int) -> Tensor:
    """(m, k) int64, ascending: the k coordinates of largest magnitude; ties go to the lowest index."""
    order = np.argsort(-np.abs(u.numpy()), axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.sort(order, axis=1))


# ------------------------------------------------------------------------------------------------ pointwise codes
TRITS = np.array([1, 3, 9, 27, 81])


def mean_abs(u: Tensor) -> Tensor:
    """(m,) float32: ||u_i||_1 / d, summed in float64 and rounded to nearest, so that it never exceeds max_j |u_ij|."""
    sums = _lane_sums(np.abs(u.numpy().astype(np.float64)))
    return torch.from_numpy((sums / u.shape[1]).astype(np.float32))


def sign_bits(u: Tensor) -> Tensor:
    """(m, ceil(d/8)) uint8, least significant bit first: set where u_ij >= 0, that is for zeros of both signs."""
    return torch.from_numpy(np.packbits(u.numpy() >= 0, axis=1, bitorder="little"))


def pack_trits(code: Tensor) -> Tensor:
    """(m, ceil(d/5)) uint8 of (m, d) integers 0..2: byte b is sum_l 3^l code[5 b + l], with zeros beyond d."""
    m, d = code.shape
    padded = np.zeros((m, -(-d // 5) * 5), np.int64)
    padded[:, :d] = code.numpy()
    return torch.from_numpy((padded.reshape(m, -1, 5) @ TRITS).astype(np.uint8))


def unpack_trits(payload: Tensor, count: int) -> Tensor:
    """(m, count) int64 in 0..2: the inverse of `pack_trits`, for bytes below 243."""
    digits = payload.numpy().astype(np.int64)[..., None] // TRITS % 3
    return torch.from_numpy(np.ascontiguousarray(digits.reshape(len(payload), -1)[:, :count]))


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    """(m, ceil(9 d / 8)) uint8: the exponent's 8 bits, then the sign, of u rounded to a neighboring power of two.

    The 23 bits of the mantissa are the probability of the upper neighbor: it is taken where adding 23 uniform bits
    carries into the exponent. Below 2^-126 the neighbors are 0 and 2^-126, by the same addition.
    """
    bits = u.numpy().view(np.uint32)
    noise = _words(private, u.shape[1]) >> np.uint32(9)
    exponent = ((bits & np.uint32(0x7FFFFFFF)) + noise) >> np.uint32(23)
    return pack(torch.from_numpy(exponent.astype(np.int64) | (bits >> np.uint32(31)).astype(np.int64) << 8), 9)


def decode_natural(code: Tensor) -> Tensor:
    """(m, d) float32 of (m, d) unpacked codes of 9 bits, exponent 0..254: the powers of two that they name, or 0."""
    c = code.numpy()
    bits = (c & 255) << 23 | (c >> 8) << 31
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    """(m, ceil(d b / 8)) uint8: |u_ij| / r_i rounded to a neighbor among 0, 2^(1-s), ..., 1/2, 1 (s = levels).

    code = s + sign(u) l in b = ceil(log2(2 s + 1)) bits, level l standing for 2^(l-s) and l = 0 for 0. With
    t = |u| 2^(s-1) / r in float64, the upper neighbor is taken if (w + 1/2) 2^-32 < frac, w a uniform word, where frac
    is t below the first level and t / 2^floor(log2 t) - 1 above it.
    """
    scale = r.numpy().astype(np.float64)[:, None]
    t = np.abs(u.numpy().astype(np.float64)) * 2.0 ** (levels - 1) / np.where(scale > 0, scale, 1.0)
    t = np.where(scale > 0, t, 0.0)
    mantissa, exponent = np.frexp(t)  # t = mantissa 2^exponent, 1/2 <= mantissa < 1
    frac = np.where(exponent >= 1, 2.0 * mantissa - 1.0, t)
    up = (_words(private, u.shape[1]).astype(np.float64) + 0.5) * 2.0**-32 < frac
    level = np.minimum(np.maximum(exponent, 0) + up, levels)
    code = np.where(u.numpy() < 0, levels - level, levels + level).astype(np.int64)
    return pack(torch.from_numpy(code), (2 * levels).bit_length())


def decode_natural_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    """(m, d) float32 of (m, d) unpacked codes 0..2 s: sign(code - s) r_i 2^(|code - s| - s), and 0 at s."""
    level = code.numpy() - levels
    powers = np.where(level == 0, 0.0, np.sign(level) * 2.0 ** (np.abs(level) - float(levels)))
    return torch.from_numpy((powers * r.numpy().astype(np.float64)[:, None]).astype(np.float32))


# ------------------------------------------------------------------------------------------------ rotations
def rademacher(draw: Draw, d: int) -> Tensor:
    """(m, d) float32 signs: -1 where bit j mod 32 of word floor(j / 32) is set, least significant first, else 1."""
    bits = np.unpackbits(_words(draw, -(-d // 32)).astype("<u4").view(np.uint8), axis=1, count=d, bitorder="little")
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def hadamard(u: Tensor) -> Tensor:
    """(m, d) float32: u H / sqrt(d), H_jl = (-1)^popcount(j & l), d a power of two.

    Each entry is multiplied by float32(d^-1/2), then log2 d stages of butterflies (a + b, a - b) follow, strides
    1, 2, 4, ...: this order defines the bits. Scaling first keeps every partial sum below ||u_i||.
    """
    m, d = u.shape
    with np.errstate(over="ignore", invalid="ignore"):
        x = u.numpy() * np.float32(d**-0.5)
        stride = 1
        while stride < d:
            pairs = x.reshape(m, -1, 2, stride)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            x = np.stack([a + b, a - b], 2).reshape(m, d)
            stride *= 2
    return torch.from_numpy(x)


def _signs_of(draw: Draw, m: int, d: int) -> np.ndarray:
    """(m, d): the signs of each row, or of a shared draw the same for all."""
    return np.broadcast_to(rademacher(draw, d).numpy(), (m, d))


def rotate(u: Tensor, draws: Sequence[Draw], size: int) -> Tensor:
    """(m, size) float32: u padded with zeros to a power of two; then for each draw its signs, then `hadamard`."""
    y = np.zeros((len(u), size), np.float32)
    y[:, : u.shape[1]] = u.numpy()
    for draw in draws:
        y = hadamard(torch.from_numpy(y * _signs_of(draw, *y.shape))).numpy()
    return torch.from_numpy(y)


def rotate_back(y: Tensor, draws: Sequence[Draw], d: int) -> Tensor:
    """(m, d) float32: the inverse of `rotate`, the last draw first: `hadamard`, then signs. The padding is dropped."""
    for draw in reversed(draws):
        y = torch.from_numpy(hadamard(y).numpy() * _signs_of(draw, *y.shape))
    return y[:, :d].contiguous()


def _piece_sums(values: np.ndarray) -> Tensor:
    """(m,) float64: the lanes' sums of PIECE coordinates at a time, then these from the first to the last."""
    pieces = [_lane_sums(values[:, j : j + PIECE]) for j in range(0, values.shape[1], PIECE)]
    return torch.from_numpy(np.add.accumulate(pieces)[-1] + 0.0)


def dots(u: Tensor, v: Tensor) -> Tensor:
    """(m,) float64: sum_j u_ij v_ij, in the pieces' order."""
    return _piece_sums(u.numpy().astype(np.float64) * v.numpy().astype(np.float64))


def encode_signs(y: Tensor) -> tuple[Tensor, Tensor]:
    """(`sign_bits` of y, (m,) float64 sum_j |y_ij| in the pieces' order)."""
    return sign_bits(y), _piece_sums(np.abs(y.numpy().astype(np.float64)))


def encode_points(y: Tensor, factor: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """((m, ceil(d b / 8)) uint8, (m,) float64 sum_j y_ij q_ij): q_ij of 2^b points, the one nearest y_ij factor_i.

    The point's number, in b bits, is how many midpoints of neighboring points lie below y_ij factor_i (float64).
    """
    points = table.numpy()
    edges = (points[1:].astype(np.float64) + points[:-1]) / 2
    code = np.searchsorted(edges, y.numpy().astype(np.float64) * factor.numpy()[:, None])
    along = dots(y, torch.from_numpy(points[code]))
    return pack(torch.from_numpy(code), (len(points) - 1).bit_length()), along


def decode_points(payload: Tensor, scale: Tensor, table: Tensor, d: int) -> Tensor:
    """(m, d) float32: the points that the numbers name, times scale_i."""
    code = unpack(payload, d, (len(table) - 1).bit_length())
    return table[code] * scale[:, None]
