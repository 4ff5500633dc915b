"""Numbers of a few bits to bytes and back: whole rows of integers, and tiles of codes that never leave the cache.

A tile holds SPAN uint16 codes. Eight codes of b <= 15 bits fill b bytes exactly, whatever b is: two words of four.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from shoal.kernels.cpu.buffers import ready
from shoal.kernels.cpu.lookup import put_word, take_eight

SPAN = 2560  # coordinates a tile: whole blocks of random words, whole bytes of any width and of five digits in base 3
ROOM = SPAN * 15 // 8 + 16  # bytes of a tile's widest codes, and of the words that reach beyond them
TRITS = -3  # in place of a number of bits: five digits in base 3 a byte
NO_DIGITS = 243  # the least byte that is not five digits

# A byte's five digits with two bits each; what is no five digits becomes five times 3, which is none either.
_DIGITS = np.array(
    [sum((b // 3**q % 3 if b < NO_DIGITS else 3) << (2 * q) for q in range(5)) for b in range(256)], np.uint64
)
_EVEN, _ODD, _LOW = np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFF0000FFFF0000), np.uint64(0xFFFFFFFF)


@njit
def _pack_any(code, buffer, bits):
    """Four codes to a word's lowest 4 b bits, all of them; then two words to the 8 b bits of their bytes."""
    b, half, odd = np.uint64(bits), bits >> 1, np.uint64(4 * (bits & 1))
    four = code.view(np.uint64)
    for g in range(four.size):
        v = (four[g] & _EVEN) | ((four[g] & _ODD) >> (np.uint64(16) - b))
        four[g] = (v & _LOW) | ((v >> np.uint64(32)) << (np.uint64(2) * b))
    for g in range(four.size // 2):
        low, high = four[2 * g], four[2 * g + 1]
        put_word(buffer, g * bits, low)
        # Of an odd b, the second word begins in the middle of the byte in which the first one ends.
        shared = low >> (np.uint64(4) * b - np.uint64(4)) if odd else np.uint64(0)
        put_word(buffer, g * bits + half, (high << odd) | shared)


@njit
def _pack_trits(code, out):
    for k in range(out.size):
        low = code[5 * k] + 3 * code[5 * k + 1] + 9 * code[5 * k + 2]
        out[k] = np.uint8(low + 27 * code[5 * k + 3] + 81 * code[5 * k + 4])


@njit
def pack_tile(code, count, out, buffer, bits):
    """out, all of it: the first `count` codes, b bits each. `code` is used up."""
    code[count : min(count + 8, code.size)] = 0
    if bits == TRITS:
        _pack_trits(code, out)
    elif bits == 4:
        two = code.view(np.uint32)
        for k in range(out.size):
            out[k] = np.uint8(two[k] | (two[k] >> np.uint32(12)))
    elif bits == 2:
        four = code.view(np.uint64)
        for k in range(out.size):
            v = four[k]
            out[k] = np.uint8(v | (v >> np.uint64(14)) | (v >> np.uint64(28)) | (v >> np.uint64(42)))
    elif bits == 8:
        for k in range(out.size):
            out[k] = np.uint8(code[k])
    else:
        _pack_any(code[: (count + 7) // 8 * 8], buffer, bits)
        out[:] = buffer[: out.size]


@njit
def unpack_tile(row, code, buffer, bits):
    """The codes of `row`, at most a tile's bytes, and up to seven zeros behind them."""
    buffer[: row.size] = row
    buffer[row.size : row.size + 16] = 0
    for g in range((row.size + bits - 1) // bits):
        take_eight(buffer, g * bits, bits, code, 8 * g)


@njit
def digits_tile(row, out):
    """The digits of `row` with two bits each, four bytes of five to five bytes; reads nothing behind `row`."""
    whole = row.size // 4
    for k in range(whole):
        v = _DIGITS[row[4 * k]] | (_DIGITS[row[4 * k + 1]] << np.uint64(10))
        v |= (_DIGITS[row[4 * k + 2]] << np.uint64(20)) | (_DIGITS[row[4 * k + 3]] << np.uint64(30))
        put_word(out, 5 * k, v)
    if 4 * whole < row.size:
        v = np.uint64(0)
        for k in range(4 * whole, row.size):
            v |= _DIGITS[row[k]] << np.uint64(10 * (k - 4 * whole))
        put_word(out, 5 * whole, v)


@njit
def room(count, bits):
    """Bytes of `count` codes."""
    return (count + 4) // 5 if bits == TRITS else (count * bits + 7) // 8


def bytes_of(payload: Tensor) -> tuple[np.ndarray, int]:
    """(flat, stride): row i is flat[i stride : i stride + width]. Part of a message's rows is seen without a copy."""
    if len(payload) == 0:
        return np.empty(0, np.uint8), 0
    if payload.stride(1) != 1:
        payload = payload.contiguous()
    stride = payload.stride(0)
    span = (len(payload) - 1) * stride + payload.shape[1]
    return payload.as_strided((span,), (1,)).numpy(), stride


@njit(inline="always")
def put_four(out, at, word):
    """out[at:at+4] = the word's bytes, from the lowest on."""
    for b in range(4):
        out[at + b] = np.uint8((word >> np.uint32(8 * b)) & np.uint32(255))


@njit(inline="always")
def take_four(source, at):
    """The word that `put_four` wrote."""
    word = np.uint32(0)
    for b in range(4):
        word |= np.uint32(source[at + b]) << np.uint32(8 * b)
    return np.uint32(word)


@njit(inline="always")
def pack_row(values, out, bits):
    """out = the numbers, `bits` each, filled with zeros."""
    held, count, at = np.uint64(0), 0, 0
    for j in range(values.size):
        held |= np.uint64(values[j]) << np.uint64(count)
        count += bits
        while count >= 8:
            out[at] = np.uint8(held & np.uint64(0xFF))
            held >>= np.uint64(8)
            count -= 8
            at += 1
    if count:
        out[at] = np.uint8(held & np.uint64(0xFF))


@njit(inline="always")
def unpack_row(payload, out, bits):
    """out = the numbers of `bits` each that the bytes begin with."""
    mask = np.uint64((1 << bits) - 1)
    held, count, at = np.uint64(0), 0, 0
    for j in range(out.size):
        while count < bits:
            held |= np.uint64(payload[at]) << np.uint64(count)
            count += 8
            at += 1
        out[j] = np.int64(held & mask)
        held >>= np.uint64(bits)
        count -= bits


@njit(cache=True, nogil=True)
def _pack(values, out, bits):
    for i in range(values.shape[0]):
        pack_row(values[i], out[i], bits)


def pack(values: Tensor, bits: int) -> Tensor:
    out = np.empty((len(values), (values.shape[1] * bits + 7) // 8), np.uint8)
    _pack(values.numpy(), out, bits)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _unpack(payload, out, bits):
    for i in range(out.shape[0]):
        unpack_row(payload[i], out[i], bits)


def unpack(payload: Tensor, count: int, bits: int) -> Tensor:
    out = ready((len(payload), count), np.int64)
    _unpack(payload.numpy(), out, bits)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _pack_fives(code, out):
    d = code.shape[1]
    for i in range(code.shape[0]):
        for b in range(out.shape[1]):
            byte = 0
            for j in range(min(5 * b + 5, d) - 1, 5 * b - 1, -1):
                byte = 3 * byte + code[i, j]
            out[i, b] = np.uint8(byte)


def pack_trits(code: Tensor) -> Tensor:
    out = np.empty((len(code), (code.shape[1] + 4) // 5), np.uint8)
    _pack_fives(code.numpy(), out)
    return torch.from_numpy(out)


@njit(cache=True, nogil=True)
def _unpack_fives(payload, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            byte = np.uint32(payload[i, j // 5])
            for _ in range(j % 5):
                byte //= np.uint32(3)
            out[i, j] = byte % np.uint32(3) if payload[i, j // 5] < 243 else 3


def unpack_trits(payload: Tensor, count: int) -> Tensor:
    out = ready((len(payload), count), np.int64)
    _unpack_fives(payload.numpy(), out)
    return torch.from_numpy(out)
