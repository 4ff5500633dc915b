"""Kept coordinates: gathered, scattered, added, and the largest found."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.codes import pack_row, put_four, take_four, unpack_row
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.kernels.cpu.vectors import keep_16


@njit(cache=True, nogil=True)
def _gather(u, index, pointer, out):
    out[:] = 0
    for i in range(u.shape[0]):
        lo = pointer[i]
        for c in range(pointer[i + 1] - lo):
            out[i, c] = u[i, index[lo + c]]


def gather(u: Tensor, index: Tensor, pointer: Tensor, width: int) -> Tensor:
    out = ready((len(u), width), np.float32)
    _gather(u.numpy(), index.numpy(), pointer.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _scatter(values, index, pointer, out, scale):
    out[:] = 0
    for i in range(values.shape[0]):
        lo = pointer[i]
        for c in range(pointer[i + 1] - lo):
            out[i, index[lo + c]] = np.float32(np.float64(values[i, c]) * scale)


def scatter(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float) -> Tensor:
    out = ready((len(values), d), np.float32)
    _scatter(values.numpy(), index.numpy(), pointer.numpy(), out, float(scale))
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _mean_sparse(values, index, pointer, out, scale, cohort):
    out[:] = 0.0
    for i in range(values.shape[0]):
        lo = pointer[i]
        for c in range(pointer[i + 1] - lo):
            out[index[lo + c]] += np.float64(values[i, c])
    for j in range(out.size):
        out[j] = out[j] * scale / cohort


def mean_sparse(values: Tensor, index: Tensor, pointer: Tensor, d: int, scale: float, cohort: int) -> Tensor:
    out = ready(d, np.float64)
    _mean_sparse(values.numpy(), index.numpy(), pointer.numpy(), out, float(scale), cohort)
    return torch.from_numpy(out)


BUCKETS = 1024  # by the exponent and two bits of the mantissa
PIECE = 1 << 18  # coordinates of one row that a thread counts or collects at a time
_SIZE, _BITS = np.uint32(0x7FFFFFFF), np.uint32(21)


@njit(cache=True, nogil=True)
def _tally(row, lo, hi, count):
    """count[b] = how many magnitudes of row[lo:hi] are in bucket b."""
    some = np.zeros((4, BUCKETS), np.uint32)  # four counters, so that equal neighbors do not wait for each other
    for j in range(lo, hi - 3, 4):
        some[0, (row[j] & _SIZE) >> _BITS] += np.uint32(1)
        some[1, (row[j + 1] & _SIZE) >> _BITS] += np.uint32(1)
        some[2, (row[j + 2] & _SIZE) >> _BITS] += np.uint32(1)
        some[3, (row[j + 3] & _SIZE) >> _BITS] += np.uint32(1)
    for j in range(hi - (hi - lo) % 4, hi):
        some[0, (row[j] & _SIZE) >> _BITS] += np.uint32(1)
    for b in range(BUCKETS):
        count[b] = some[0, b] + some[1, b] + some[2, b] + some[3, b]


@njit(cache=True, nogil=True)
def _border(counts, k):
    """(bucket, above): the bucket that holds the k-th largest, and how many lie above that bucket."""
    bucket, above = BUCKETS, 0
    while True:
        bucket -= 1
        inside = 0
        for p in range(counts.shape[0]):
            inside += counts[p, bucket]
        if above + inside >= k:
            return bucket, above
        above += inside


@njit(cache=True, nogil=True)
def _collect(row, lo, hi, bucket, near, c):
    """near[c:] = the coordinates in row[lo:hi] of this bucket or one above, ascending: the new c."""
    least = np.uint32(bucket << 21)
    for j in range(lo, hi - 15, 16):
        c = keep_16(row, j, least, near, c)
    for j in range(hi - (hi - lo) % 16, hi):
        if (row[j] & _SIZE) >= least:
            near[c] = j
            c += 1
    return c


@njit(cache=True, nogil=True)
def _settle(row, near, bucket, above, out):
    """Of the coordinates that are near, the k of largest magnitude, ascending; ties go to the lowest."""
    k, inside = out.size, np.empty(near.size - above, np.uint32)
    c, end = 0, np.uint64((bucket + 1) << 21)
    for j in near:
        size = row[j] & _SIZE
        if np.uint64(size) < end:
            inside[c] = size
            c += 1
    place = c - (k - above)
    least = np.partition(inside, place)[place]
    for size in inside:
        above += size > least
    ties, c = k - above, 0
    for j in near:
        size = row[j] & _SIZE
        if size > least or (size == least and ties > 0):
            ties -= size == least
            out[c] = j
            c += 1


@njit(cache=True, nogil=True)
def _largest(row):
    """The lowest coordinate of largest magnitude."""
    first, most, size = 0, np.int32(0), np.int32(0x7FFFFFFF)
    for lo in range(0, row.size, 256):  # a run's largest is found in vectors; only the best run is searched
        run, here = row[lo : lo + 256].view(np.int32), np.int32(0)
        for j in range(run.size):
            here = max(here, run[j] & size)
        if here > most:
            first, most = lo, here
    while (row[first] & _SIZE) != most:
        first += 1
    return first


@njit(cache=True, nogil=True)
def _rows(bits, out, lo, hi):
    """Rows lo..hi-1, each at once."""
    d, k = bits.shape[1], out.shape[1]
    if k == 1:
        for i in range(lo, hi):
            out[i, 0] = _largest(bits[i])
        return
    near, counts = np.empty(d, np.uint32), np.empty((1, BUCKETS), np.uint32)
    for i in range(lo, hi):
        _tally(bits[i], 0, d, counts[0])
        bucket, above = _border(counts, k)
        _settle(bits[i], near[: _collect(bits[i], 0, d, bucket, near, 0)], bucket, above, out[i])


@njit(cache=True, nogil=True)
def _tallies(row, counts, lo, hi):
    for p in range(lo, hi):
        _tally(row, p * PIECE, min(row.size, (p + 1) * PIECE), counts[p])


@njit(cache=True, nogil=True)
def _collects(row, bucket, near, ends, lo, hi):
    for p in range(lo, hi):
        _collect(row, p * PIECE, min(row.size, (p + 1) * PIECE), bucket, near, ends[p - 1] if p else 0)


def _shared(row: np.ndarray, out: np.ndarray) -> None:
    """One long row, by all threads: they count, then collect what each knows to be near, each in its own place."""
    d = row.size
    counts = np.empty((-(-d // PIECE), BUCKETS), np.uint32)

    spread(_tallies, (row, counts), len(counts), least=1)
    bucket, above = _border(counts, out.size)
    ends = np.cumsum(counts[:, bucket:].sum(1, dtype=np.int64))
    near = np.empty(ends[-1], np.uint32)
    spread(_collects, (row, bucket, near, ends), len(counts), least=1)
    _settle(row, near, bucket, above, out)


def topk(u: Tensor, k: int) -> Tensor:
    (m, d), bits = u.shape, u.numpy().view(np.uint32)
    out = np.empty((m, k), np.int64)
    if d < 2 * PIECE:
        spread(_rows, (bits, out), m, least=LEAST // d)
    else:
        for i in range(m):
            _shared(bits[i], out[i])
    return torch.from_numpy(out)


@njit(inline="always")
def _write(row, index, bits, out):
    """out = the entries at these coordinates, then the coordinates."""
    k = index.size
    for c in range(k):
        put_four(out, 4 * c, row[index[c]])
    pack_row(index, out[4 * k :], bits)


@njit(cache=True, nogil=True)
def _written(rows, index, bits, out):
    for i in range(rows.shape[0]):
        _write(rows[i], index[i], bits, out[i])


@njit(cache=True, nogil=True)
def _encode(rows, k, bits, out, lo, hi):
    """Rows lo..hi-1, each at once."""
    index = np.empty((1, k), np.int64)
    for i in range(lo, hi):
        _rows(rows[i : i + 1], index, 0, 1)
        _write(rows[i], index[0], bits, out[i])


def encode_topk(u: Tensor, k: int) -> Tensor:
    (m, d), rows = u.shape, u.numpy().view(np.uint32)
    bits = (d - 1).bit_length()
    out = ready((m, 4 * k + (k * bits + 7) // 8), np.uint8)
    if d < 2 * PIECE:
        spread(_encode, (rows, k, bits, out), m, least=LEAST // d)
    else:
        _written(rows, topk(u, k).numpy(), bits, out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _decode(payload, bits, d, values, index):
    (m, k), good = values.shape, True
    for i in range(m):
        sent, row = payload[i], index[i]
        for c in range(k):
            values[i, c] = take_four(sent, 4 * c)
        unpack_row(sent[4 * k :], row, bits)
        for c in range(1, k):
            good &= row[c] > row[c - 1]
        good &= row[k - 1] < d
    return good


def decode_topk(payload: Tensor, k: int, d: int) -> tuple[Tensor, Tensor, bool]:
    m = len(payload)
    values, index = ready((m, k), np.uint32), ready((m, k), np.int64)
    good = _decode(payload.numpy(), (d - 1).bit_length(), d, values, index)
    return torch.from_numpy(values.view(np.float32)), torch.from_numpy(index.reshape(-1)), good
