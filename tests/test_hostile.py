"""A million hostile messages: every decoder gives finite numbers of the right shape or raises a WireError.

The mutants of a true message are made by numpy's PCG64, so that every run sees the same: random bytes, flipped bits,
overwritten words (NaN, infinities, the largest and the least numbers), bytes cut off and put on, tails of one byte.
Framed ones pass the checks of the header first, with the checksum mended in half of them.
"""

from __future__ import annotations

import resource
import zlib

import numpy as np
import pytest
import torch
from zoo import COMPRESSORS, fits, inputs, round_of

from shoal import rng
from shoal.compressors import TopK
from shoal.errors import WireError
from shoal.messages import Messages
from shoal.wire import HEADER, UP, Stamp, frame, unframe

MESSAGES = 1_000_000
FRAMED = 100_000
SHAPES = [(1, 12), (1, 33)]
WORDS = np.array([0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000000, 0xFFFFFFFF], np.uint32)
STEP = 4096  # mutants that are made together


def mutants(body: np.ndarray, capacity: int, count: int, draw: np.random.Generator) -> list[np.ndarray]:
    """`count` messages of 0 to capacity + 8 bytes, from a true one."""
    made = []
    kinds, size = draw.integers(0, 6, count), len(body)
    for kind in kinds:
        row = body.copy()
        if kind == 0:
            row = draw.integers(0, 256, size, np.uint8)
        elif kind == 1 and size:
            for bit in draw.integers(0, 8 * size, draw.integers(1, 9)):
                row[bit // 8] ^= 1 << (bit % 8)
        elif kind == 2 and size >= 4:
            at = int(draw.integers(0, size // 4))
            row[4 * at : 4 * at + 4] = np.frombuffer(WORDS[draw.integers(0, len(WORDS))].tobytes(), np.uint8)
        elif kind == 3:
            row = row[: draw.integers(0, size + 1)]
        elif kind == 4:
            row = np.concatenate([row, draw.integers(0, 256, draw.integers(0, 9), np.uint8)])
        else:
            row[draw.integers(0, max(size, 1)) :] = draw.integers(0, 256)
        made.append(row[: capacity + 8])
    return made


def decided(compressor, row: np.ndarray, d: int, rnd) -> bool:
    """Whether the message was taken for one. Anything else than a WireError, or a number that is none, fails."""
    msgs = Messages(torch.from_numpy(row)[None], torch.tensor([len(row)]), rnd.slots, d)
    try:
        out = compressor.decode(msgs, rnd)
    except WireError:
        return False
    assert tuple(out.shape) == (1, d)
    assert np.isfinite(out.numpy()).all(), "what is not a number was accepted"
    return True


@pytest.mark.slow
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_a_million_messages(compressor):
    share = MESSAGES // len(COMPRESSORS) // len(SHAPES) + 1
    for n, d in SHAPES:
        if not fits(compressor, n, d):
            n, d = 5, 33
        u = inputs("gaussian", n, d)
        rnd = round_of(compressor, u)
        true, one = compressor.encode(u, rnd), rnd.rows(slice(0, 1))
        body = true.payload[0, : int(true.nbytes[0])].numpy().copy()
        draw = np.random.Generator(np.random.PCG64(zlib.crc32(repr(compressor).encode())))
        assert decided(compressor, body, d, one)
        taken, most = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for first in range(0, share, STEP):
            for row in mutants(body, compressor.capacity(n, d), min(STEP, share - first), draw):
                taken += decided(compressor, row, d, one)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
        assert 0 < taken < share, "some mutants are messages and some are not"
        assert grown < 2**16, f"messages of a few bytes made the decoder allocate {grown} KiB"


def mended(row: np.ndarray) -> np.ndarray:
    """The frame with the checksum that its header and its declared payload ask for: all but the checksum is tested."""
    size = int.from_bytes(row[32:40].tobytes(), "little")
    head = row[:HEADER].copy()
    head[48:52] = 0
    crc = zlib.crc32(row[HEADER : HEADER + min(size, len(row))].tobytes(), zlib.crc32(head.tobytes()))
    row[48:52] = np.frombuffer(crc.to_bytes(4, "little"), np.uint8)
    return row


@pytest.mark.slow
def test_hostile_frames():
    """One to three bits flipped, in every second frame the checksum mended: refused, or the round's own message."""
    compressor, draw = TopK(5), np.random.Generator(np.random.PCG64(5))
    u = inputs("gaussian", 1, 33)
    rnd = round_of(compressor, u, 3)
    msgs = compressor.encode(u, rnd)
    stamp, width = Stamp(rng.LAYOUT, UP, 3, 1, 33, b"a digest"), msgs.payload.shape[1]
    true = frame(msgs.payload, msgs.nbytes, msgs.slots, stamp, width).numpy()[0]
    seen = {"refused": 0, "no message": 0, "message": 0}
    for i in range(FRAMED):
        row = true.copy()
        for bit in draw.choice(8 * len(row), draw.integers(1, 4), replace=False):
            row[bit // 8] ^= 1 << (bit % 8)
        row = mended(row) if i % 2 else row
        try:
            payload, nbytes, slots = unframe(torch.from_numpy(row)[None], stamp)
        except WireError:
            seen["refused"] += 1
            continue
        assert i % 2, "a flipped bit was not found"
        assert slots.tolist() == [0]
        seen["message" if decided(compressor, payload[0, : int(nbytes[0])].numpy(), 33, rnd) else "no message"] += 1
    assert min(seen.values()) > 1000, seen
