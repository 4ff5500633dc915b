"""Signs, three levels, powers of two."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.bits import pack_flags
from shoal.kernels.cpu.levels import pack
from shoal.kernels.cpu.philox import TILE, fill_words, key
from shoal.kernels.cpu.sums import added_lanes, block_sums
from shoal.kernels.draw import Draw
from shoal.kernels.reference import LANES, SUM_BLOCK


@njit(cache=True, nogil=True)
def _abs_sums(u, blocks, out, lo, hi):
    for k in range(lo, hi):
        first = k % blocks * SUM_BLOCK
        block = u[k // blocks, first : min(first + SUM_BLOCK, u.shape[1])]
        lanes = np.zeros(LANES)
        whole = block.size // LANES * LANES
        for at in range(0, whole, LANES):
            for lane in range(LANES):
                lanes[lane] += abs(np.float64(block[at + lane]))
        for j in range(whole, block.size):
            lanes[j - whole] += abs(np.float64(block[j]))
        out[k] = added_lanes(lanes)


def mean_abs(u: Tensor) -> Tensor:
    rows = u.numpy()
    sums = block_sums(lambda *part: _abs_sums(rows, *part), *rows.shape)
    return torch.from_numpy((np.add.accumulate(sums, axis=1)[:, -1] / rows.shape[1]).astype(np.float32))


@njit(cache=True, nogil=True)
def _sign_bits(u, out):
    d = u.shape[1]
    flags = np.zeros(TILE, np.uint8)
    for i in range(u.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            for j in range(count):
                flags[j] = u[i, lo + j] >= np.float32(0)
            flags[count : (count + 7) // 8 * 8] = 0
            pack_flags(flags[: (count + 7) // 8 * 8], out[i, lo // 8 : (lo + count + 7) // 8])


def sign_bits(u: Tensor) -> Tensor:
    out = np.empty((len(u), (u.shape[1] + 7) // 8), np.uint8)
    _sign_bits(u.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _pack_trits(code, out):
    d = code.shape[1]
    for i in range(code.shape[0]):
        for b in range(d // 5):
            c = code[i, 5 * b : 5 * b + 5]
            out[i, b] = np.uint8(c[0] + 3 * c[1] + 9 * c[2] + 27 * c[3] + 81 * c[4])
        if d % 5:
            byte = 0
            for j in range(d - 1, d // 5 * 5 - 1, -1):
                byte = 3 * byte + code[i, j]
            out[i, d // 5] = np.uint8(byte)


def pack_trits(code: Tensor) -> Tensor:
    out = np.empty((len(code), (code.shape[1] + 4) // 5), np.uint8)
    _pack_trits(code.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _unpack_trits(payload, out):
    d = out.shape[1]
    for i in range(out.shape[0]):
        for b in range((d + 4) // 5):
            byte = np.uint32(payload[i, b])
            for j in range(5 * b, min(5 * b + 5, d)):
                out[i, j] = byte % np.uint32(3)
                byte //= np.uint32(3)


def unpack_trits(payload: Tensor, count: int) -> Tensor:
    out = np.empty((len(payload), count), np.int64)
    _unpack_trits(payload.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _encode_natural(bits, out, slots, index, stream, k0, k1):
    d = bits.shape[1]
    tile = np.empty(TILE, np.uint32)
    for i in range(bits.shape[0]):
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            fill_words(tile[: (count + 63) // 64 * 64], lo // 64, np.uint64(slots[i]), index, stream, k0, k1)
            for j in range(count):
                b = np.int64(bits[i, lo + j])
                exponent = ((b & 0x7FFFFFFF) + (np.int64(tile[j]) >> 9)) >> 23
                out[i, lo + j] = exponent | ((b >> 31) << 8)


def encode_natural(u: Tensor, private: Draw) -> Tensor:
    code = np.empty(u.shape, np.int64)
    _encode_natural(u.numpy().view(np.uint32), code, private.slots.numpy(), *key(private))
    return pack(torch.from_numpy(code), 9)


@njit(cache=True, nogil=True)
def _decode_natural(code, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            c = np.uint32(code[i, j])
            out[i, j] = ((c & np.uint32(255)) << np.uint32(23)) | ((c >> np.uint32(8)) << np.uint32(31))


def decode_natural(code: Tensor) -> Tensor:
    out = np.empty(code.shape, np.uint32)
    _decode_natural(code.numpy(), out)
    return torch.from_numpy(out.view(np.float32))


_MANTISSA = (1 << 52) - 1


@njit(cache=True, nogil=True)
def _encode_natural_levels(u, r, out, slots, index, stream, k0, k1, levels, top):
    d = u.shape[1]
    tile, t = np.empty(TILE, np.uint32), np.empty(TILE)
    bits = t.view(np.int64)
    for i in range(u.shape[0]):
        ri = np.float64(r[i])
        for lo in range(0, d, TILE):
            count = min(TILE, d - lo)
            fill_words(tile[: (count + 63) // 64 * 64], lo // 64, np.uint64(slots[i]), index, stream, k0, k1)
            x = u[i, lo : lo + count]
            for j in range(count):
                t[j] = abs(np.float64(x[j])) * top / ri if ri > 0.0 else 0.0
            for j in range(count):
                exponent = max((bits[j] >> 52) - 1022, 0)  # frexp's, by the bits of a float64 that is never denormal
                frac = np.float64(bits[j] & _MANTISSA) * 2.0**-52 if exponent > 0 else t[j]
                up = np.int64((np.float64(tile[j]) + 0.5) * 2.0**-32 < frac)
                level = min(exponent + up, levels)
                out[i, lo + j] = levels - level if x[j] < np.float32(0) else levels + level


def encode_natural_levels(u: Tensor, r: Tensor, private: Draw, levels: int) -> Tensor:
    code = np.empty(u.shape, np.int64)
    top = 2.0 ** (levels - 1)
    _encode_natural_levels(u.numpy(), r.numpy(), code, private.slots.numpy(), *key(private), levels, top)
    return pack(torch.from_numpy(code), (2 * levels).bit_length())


@njit(cache=True, nogil=True)
def _decode_natural_levels(code, r, table, out, levels):
    for i in range(out.shape[0]):
        ri = np.float64(r[i])
        for j in range(out.shape[1]):
            level = code[i, j] - levels
            value = np.float32(table[abs(level)] * ri)
            out[i, j] = -value if level < 0 else value


def decode_natural_levels(code: Tensor, r: Tensor, levels: int) -> Tensor:
    out = np.empty(code.shape, np.float32)
    table = np.array([0.0] + [2.0 ** (level - levels) for level in range(1, levels + 1)])
    _decode_natural_levels(code.numpy(), r.numpy(), table, out, levels)
    return torch.from_numpy(out)
