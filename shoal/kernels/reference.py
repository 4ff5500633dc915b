"""Every kernel in plain numpy: slow, obviously right, and the definition of what the others must return, bit for bit.

All functions take and return torch tensors on the CPU. Rows are (m, d) float32; r are (m,) float32 scales. Floats that
end in a message or in an iterate are summed in float64 in a fixed order, so that a row's bits never depend on the rows
beside it, on the chunking or on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.draw import Draw

__all__ = [
    "add_rows",
    "below",
    "dealt_lengths",
    "decode_bits",
    "decode_entropy",
    "decode_levels",
    "decode_natural",
    "decode_natural_levels",
    "decode_points",
    "decode_strata",
    "decode_trits",
    "dots",
    "encode_bits",
    "encode_entropy",
    "encode_levels",
    "encode_natural",
    "encode_natural_levels",
    "encode_points",
    "encode_signs",
    "encode_strata",
    "encode_trits",
    "gather",
    "gather_dealt",
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

LANES = 16  # partial sums of a block: lane l takes coordinates l, l + 16, ...; the lanes are then added from 0 to 15
SUM_BLOCK = 1 << 16  # coordinates of a block: what threads share; the blocks' sums are then added in order
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


def _below_n(draw: Draw, d: int, n: int) -> np.ndarray:
    return (_words(draw, d).astype(np.uint64) * np.uint64(n) >> np.uint64(32)).astype(np.int32)


def below(draw: Draw, d: int, n: int) -> Tensor:
    """(m, d) int32, uniform on 0..n-1, n < 2^31: floor(word n / 2^32), each probability off by less than 2^-32."""
    return torch.from_numpy(_below_n(draw, d, n))


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
def _lane_sums(terms: np.ndarray) -> np.ndarray:
    """(m,): blocks of SUM_BLOCK coordinates, each summed in its lanes, and the blocks' sums added in order."""
    m, d = terms.shape
    blocks = []
    for lo in range(0, d, SUM_BLOCK):
        part = terms[:, lo : lo + SUM_BLOCK]
        padded = np.zeros((m, -(-part.shape[1] // LANES) * LANES))
        padded[:, : part.shape[1]] = part
        lanes = np.add.accumulate(padded.reshape(m, -1, LANES), axis=1)[:, -1]
        blocks.append(np.add.accumulate(lanes, axis=1)[:, -1])
    return np.add.accumulate(np.stack(blocks, 1), axis=1)[:, -1]


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
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    strata: int,
    place: Tensor,
    shifts: Tensor | Draw | None,
    head: bool = False,
) -> Tensor:
    """(m, ceil(d/8)) uint8, least significant bit first: bit = [U < y], y = (u + r) / (2 r), |u| <= 2 r at most.

    U_ij = (place_ij + u_ij) / strata with place_ij = (place_i + shifts_j) mod strata and u_ij private, uniform on
    [0, 1) with 40 bits. strata = 1 is independent rounding. A row with r = 0 gives fair bits.
    A draw stands for below(shifts, d, strata), which a kernel may draw piece by piece. With `head` a row starts with
    r_i, little-endian.
    """
    d = u.shape[1]
    cell, frac = _cells(u, r, strata)
    shifts = torch.from_numpy(_below_n(shifts, d, strata)) if isinstance(shifts, Draw) else shifts
    spot = place.numpy().astype(np.int64)[:, None] + (0 if shifts is None else shifts.numpy().astype(np.int64))
    t = cell + strata * 32768 - (spot % strata) * 65536
    bits = _below(_halves(private, d), t, _words(tie, d), frac)
    code = np.packbits(bits, axis=1, bitorder="little")
    scale = r.numpy().astype("<f4").view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(np.hstack([scale, code]) if head else code)


def _signs(payload: Tensor, d: int) -> np.ndarray:
    return 2.0 * np.unpackbits(payload.numpy(), axis=1, count=d, bitorder="little") - 1.0


def decode_bits(payload: Tensor, r: Tensor, d: int) -> Tensor:
    """(m, d) float32: r_i where the bit is set, -r_i where not."""
    return torch.from_numpy((_signs(payload, d) * r.numpy()[:, None]).astype(np.float32))


def mean_bits(payload: Tensor, r: Tensor, d: int, cohort: int) -> Tensor:
    """(d,) float32: (1/cohort) sum_i (±r_i), in float64 from row 0 to row m-1, then rounded."""
    total = _total(_signs(payload, d) * r.numpy()[:, None].astype(np.float64))
    return torch.from_numpy((total / cohort).astype(np.float32))


def encode_levels(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | None = None,
    shifts: Tensor | None = None,
    head: bool = False,
) -> Tensor:
    """(m, ceil(d b / 8)) uint8: each coordinate rounded to a neighbor on `levels` grid points over [-r, r].

    code = floor(y) + [U < frac(y)], y = (u + r) (levels - 1) / (2 r), b = ceil(log2 levels) bits each, with the U of
    `encode_bits`: uniform on [0, 1), and in the stratum (place_i + shifts_j) mod strata of it. With `head`, the four
    bytes of r_i stand before them.
    """
    code = _rounded(u, r, private, tie, levels, strata, place, shifts)
    packed = pack(torch.from_numpy(code), (levels - 1).bit_length())
    return _headed(r, packed) if head else packed


def _headed(r: Tensor, code: Tensor) -> Tensor:
    return torch.cat([r[:, None].contiguous().view(torch.uint8), code], 1)


def _rounded(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int = 1,
    place: Tensor | None = None,
    shifts: Tensor | None = None,
) -> np.ndarray:
    d = u.shape[1]
    cell, frac = _cells(u, r, (levels - 1) * strata)
    y = cell + (levels - 1) * strata * 32768
    spot = np.zeros((len(u), 1), np.int64) if place is None else place.numpy().astype(np.int64)[:, None]
    spot = spot + (0 if shifts is None else shifts.numpy().astype(np.int64))
    whole = y // (strata * 65536)
    t = y - whole * (strata * 65536) - (spot % strata) * 65536
    up = _below(_halves(private, d), t, _words(tie, d), frac)
    return np.clip(whole + up, 0, levels - 1).astype(np.int64)


def _grid(code: Tensor, r: Tensor, levels: int) -> tuple[np.ndarray, bool]:
    c = code.numpy()
    values = r.numpy().astype(np.float64)[:, None] * (2 * c - (levels - 1)) / (levels - 1)
    return np.where(c < levels, values, np.nan), bool((c >= levels).any())


def decode_levels(payload: Tensor, r: Tensor, levels: int, d: int) -> tuple[Tensor, bool]:
    """(m, d) float32 of packed codes: r_i (2 code - (levels - 1)) / (levels - 1), or NaN where code >= levels.

    And whether there is such a code.
    """
    values, beyond = _grid(unpack(payload, d, (levels - 1).bit_length()), r, levels)
    return torch.from_numpy(values.astype(np.float32)), beyond


def mean_levels(payload: Tensor, r: Tensor, levels: int, d: int, cohort: int) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i of the grid values in float64, from row 0 to row m-1. And the same check."""
    values, beyond = _grid(unpack(payload, d, (levels - 1).bit_length()), r, levels)
    return torch.from_numpy((_total(values) / cohort).astype(np.float32)), beyond


# ------------------------------------------------------------------------------------------------ grids with an offset
def encode_strata(
    u: Tensor,
    r: Tensor,
    private: Draw,
    tie: Draw,
    levels: int,
    strata: int,
    place: Tensor,
    shifts: Tensor,
    steps: int,
    offset: Tensor,
) -> Tensor:
    """(m, ceil(d b / 8)) uint8: each coordinate rounded to a neighbor on a grid of its own, for all rows the same.

    `encode_levels` with `steps` strata in place of (levels - 1) strata over [-r, r], on points that start
    offset_j 2^-16 strata below -r and are `strata` strata apart. offset (d,) is in 0..65535.
    """
    cell, frac = _cells(u, r, steps)
    y = cell + steps * 32768 + offset.numpy().astype(np.int64)
    spot = place.numpy().astype(np.int64)[:, None] + shifts.numpy().astype(np.int64)
    whole = y // (strata * 65536)
    t = y - whole * (strata * 65536) - (spot % strata) * 65536
    up = _below(_halves(private, u.shape[1]), t, _words(tie, u.shape[1]), frac)
    code = np.clip(whole + up, 0, levels - 1).astype(np.int64)
    return pack(torch.from_numpy(code), (levels - 1).bit_length())


def _points(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor) -> np.ndarray:
    at = code.numpy() * (strata * 65536) - offset.numpy().astype(np.int64) - steps * 32768
    return r.numpy().astype(np.float64)[:, None] * at / (steps * 32768)


def decode_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor) -> Tensor:
    """(m, d) float32 of (m, d) unpacked codes: r_i (code strata 2^16 - offset_j - steps 2^15) / (steps 2^15)."""
    return torch.from_numpy(_points(code, r, strata, steps, offset).astype(np.float32))


def mean_strata(code: Tensor, r: Tensor, strata: int, steps: int, offset: Tensor, cohort: int) -> Tensor:
    """(d,) float64: (1/cohort) sum_i of the grid values, from row 0 to row m-1."""
    return torch.from_numpy(_total(_points(code, r, strata, steps, offset)) / cohort)


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


# ------------------------------------------------------------------------------------------------ an entropy code
LOW, DIGIT = 16, 8  # states lie in [d 2^16, d 2^24), and a byte at a time leaves or enters them


def state_bytes(d: int) -> int:
    """Bytes that hold any state of the code of d symbols."""
    return ((d << (LOW + DIGIT)) - 1).bit_length() + 7 >> 3


def _gamma(number: int) -> list[int]:
    """Elias' gamma code of number >= 1: k zeros, a one, then its k lowest bits, k = floor(log2 number)."""
    k = number.bit_length() - 1
    return [0] * k + [1] + [number >> i & 1 for i in range(k)]


def _read_counts(head: np.ndarray, d: int, levels: int) -> tuple[list[int], int] | None:
    """(how often each symbol occurs, bytes read), or None where the bits are no such thing."""
    bits, at, counts = np.unpackbits(head, bitorder="little").tolist(), 0, [0] * levels
    for symbol in range(levels):
        if symbol == (levels - 1) // 2:
            continue
        k = 0
        while at + k < len(bits) and not bits[at + k] and k <= 40:
            k += 1
        if k > 40 or at + 2 * k + 1 > len(bits):
            return None
        counts[symbol] = (1 << k) - 1 + sum(bits[at + k + 1 + i] << i for i in range(k))
        at += 2 * k + 1
    used = at + 7 >> 3
    if sum(counts) > d or any(bits[at : 8 * used]):
        return None
    counts[(levels - 1) // 2] = d - sum(counts)
    return counts, used


def encode_entropy(code: Tensor, levels: int, limit: int) -> tuple[Tensor, Tensor]:
    """((m, limit) uint8, (m,) int64 bytes used) of (m, d) integers 0..levels-1: an entropy code of each row.

    First count + 1 of every symbol but (levels-1)//2 in Elias' gamma code, filled with zeros to a byte; then the last
    state of an asymmetric numeral system, `state_bytes` long; then the bytes that left it, the latest first. The state
    starts at d 2^16 and takes the symbols from the last to the first: for one that occurs c times, with b smaller ones
    in the row, bytes leave until x < c 2^24, and then x becomes floor(x/c) d + b + (x mod c).
    A row that does not get shorter than `limit` is left out: its length is `limit`, its bytes are zero.
    """
    m, d = code.shape
    out, nbytes = np.zeros((m, limit), np.uint8), np.full(m, limit)
    for i, row in enumerate(code.numpy()):
        counts = np.bincount(row, minlength=levels).tolist()
        below = np.concatenate([[0], np.cumsum(counts)]).tolist()
        bits = [bit for s in range(levels) if s != (levels - 1) // 2 for bit in _gamma(counts[s] + 1)]
        x, gone = d << LOW, []
        for s in reversed(row.tolist()):
            while x >= counts[s] << (LOW + DIGIT):
                gone.append(x & 255)
                x >>= DIGIT
            x = x // counts[s] * d + below[s] + x % counts[s]
        head = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
        sent = head + x.to_bytes(state_bytes(d), "little") + bytes(reversed(gone))
        if len(sent) < limit:
            out[i, : len(sent)], nbytes[i] = np.frombuffer(sent, np.uint8), len(sent)
    return torch.from_numpy(out), torch.from_numpy(nbytes)


def decode_entropy(payload: Tensor, nbytes: Tensor, d: int, levels: int) -> tuple[Tensor, Tensor]:
    """((m, d) int64, (m,) bool): the inverse of `encode_entropy`, and which rows are messages of it; others are zeros.

    A row is one if its counts add up to at most d, its state is in range, it gives back d symbols, each as often as
    counted, ends at the state d 2^16, and leaves neither a byte nor a bit over.
    """
    out, good = np.zeros((len(payload), d), np.int64), np.zeros(len(payload), bool)
    for i, size in enumerate(nbytes.tolist()):
        row, wide = payload.numpy()[i, :size], state_bytes(d)
        read = _read_counts(row, d, levels)
        if read is None or read[1] + wide > size:
            continue
        counts, at = read
        x, at = int.from_bytes(row[at : at + wide].tobytes(), "little"), at + wide
        if not d << LOW <= x < d << (LOW + DIGIT):
            continue
        below = np.concatenate([[0], np.cumsum(counts)])
        symbols = []
        for _ in range(d):
            s = int(np.searchsorted(below, x % d, side="right")) - 1
            x = counts[s] * (x // d) + x % d - int(below[s])
            while x < d << LOW and at < size:
                x, at = x << DIGIT | int(row[at]), at + 1
            if x < d << LOW:
                break
            symbols.append(s)
        same = len(symbols) == d and np.bincount(symbols, minlength=levels).tolist() == counts
        if same and at == size and x == d << LOW:
            out[i], good[i] = symbols, True
    return torch.from_numpy(out), torch.from_numpy(good)


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
    """(m, count) int64: the inverse of `pack_trits`; a byte from 243 on, no five digits, becomes five times 3."""
    byte = payload.numpy().astype(np.int64)[..., None]
    digits = np.where(byte < 243, byte // TRITS % 3, 3).reshape(len(payload), -1)
    return torch.from_numpy(np.ascontiguousarray(digits[:, :count]))


def encode_trits(u: Tensor, r: Tensor, private: Draw, tie: Draw) -> Tensor:
    """(m, 4 + ceil(d/5)) uint8: r_i, then the codes of `encode_levels` for three levels, as `pack_trits` has them."""
    return _headed(r, pack_trits(torch.from_numpy(_rounded(u, r, private, tie, 3))))


def decode_trits(payload: Tensor, r: Tensor, d: int) -> tuple[Tensor, bool]:
    """(m, d) float32: r_i (digit - 1), or NaN. And whether a byte is not five digits in base 3, with zeros beyond d."""
    code = unpack_trits(payload, 5 * payload.shape[1])
    values, bad = _grid(code[:, :d], r, 3)
    return torch.from_numpy(values.astype(np.float32)), bad or bool(code[:, d:].any())


def mean_trits(payload: Tensor, r: Tensor, d: int, cohort: int) -> tuple[Tensor, bool]:
    """(d,) float32: (1/cohort) sum_i r_i (digit - 1) in float64, from row 0 to row m-1. And the same check."""
    code = unpack_trits(payload, 5 * payload.shape[1])
    values, bad = _grid(code[:, :d], r, 3)
    return torch.from_numpy((_total(values) / cohort).astype(np.float32)), bad or bool(code[:, d:].any())


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    """(m, ceil(9 d / 8)) uint8: the exponent's 8 bits, then the sign, of u rounded to a neighboring power of two.

    The 23 bits of the mantissa are the probability of the upper neighbor: it is taken where adding 23 uniform bits
    carries into the exponent. Below 2^-126 the neighbors are 0 and 2^-126, by the same addition.
    """
    bits = u.numpy().view(np.uint32)
    noise = _words(private, u.shape[1]) >> np.uint32(9)
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
        return mean_rows(rows, cohort).float(), bad


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
    up = (_words(private, u.shape[1]).astype(np.float64) + 0.5) * 2.0**-32 < frac
    level = np.minimum(np.maximum(exponent, 0) + up, levels)
    code = np.where(u.numpy() < 0, levels - level, levels + level).astype(np.int64)
    return _headed(r, pack(torch.from_numpy(code), (2 * levels).bit_length()))


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
    return mean_rows(rows, cohort).float(), beyond


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


def _block_sums(terms: np.ndarray) -> Tensor:
    """(m,) float64: `_lane_sums`, where a sum of negative zeros is a positive one."""
    return torch.from_numpy(_lane_sums(terms) + 0.0)


def dots(u: Tensor, v: Tensor) -> Tensor:
    """(m,) float64: sum_j u_ij v_ij, in the blocks' order."""
    return _block_sums(u.numpy().astype(np.float64) * v.numpy().astype(np.float64))


def encode_signs(y: Tensor) -> tuple[Tensor, Tensor]:
    """(`sign_bits` of y, (m,) float64 sum_j |y_ij| in the blocks' order)."""
    return sign_bits(y), _block_sums(np.abs(y.numpy().astype(np.float64)))


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


# ------------------------------------------------------------------------------------------------ matrices of low rank
LOST = 2.0**-40  # what is left of a column after it was made orthogonal, below which it is rounding


def _unit_columns(p: np.ndarray) -> np.ndarray:
    """Gram and Schmidt's method, each column twice; a column that depends on earlier ones becomes zero."""
    q = np.zeros_like(p)
    for c in range(p.shape[1]):
        x = p[:, c].copy()
        size = math.sqrt(_in_order(x, x))
        for e in [*range(c), *range(c)]:
            x -= _in_order(x, q[:, e]) * q[:, e]
        left = math.sqrt(_in_order(x, x))
        if left > LOST * size:
            q[:, c] = x / left
    return q


def _in_order(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        total += a * b
    return total


def low_rank(u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """((m, a, r), (m, b, r)) float32: P, the unit columns of M G, and M' P, of matrices M (m, a, b) and G (m, b, r).

    In float64; M G is summed by ascending column of M, the others by ascending row.
    """
    left, right = [], []
    for M, G in zip(u.numpy().astype(np.float64), start.numpy().astype(np.float64), strict=True):
        p, q = np.zeros((len(M), G.shape[1])), np.zeros(G.shape)
        for j in range(M.shape[1]):
            p += M[:, j : j + 1] * G[j]
        unit = _unit_columns(p)
        for i in range(len(M)):
            q += M[i][:, None] * unit[i]
        left.append(unit)
        right.append(q)
    shapes = (len(u), u.shape[1], start.shape[2]), tuple(start.shape)
    with np.errstate(over="ignore"):
        both = [np.array(x).reshape(s).astype(np.float32) for x, s in zip((left, right), shapes, strict=True)]
    return torch.from_numpy(both[0]), torch.from_numpy(both[1])


def outer(left: Tensor, right: Tensor) -> Tensor:
    """(m, a, b) float32: sum_c left_c right_c', c ascending, in float64."""
    p, q = left.numpy().astype(np.float64), right.numpy().astype(np.float64)
    total = np.zeros((len(p), p.shape[1], q.shape[1]))
    for c in range(p.shape[2]):
        total += p[:, :, None, c] * q[:, None, :, c]
    with np.errstate(over="ignore"):
        return torch.from_numpy(total.astype(np.float32))
