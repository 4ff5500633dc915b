"""Frames: what is written is read, what is damaged or foreign is refused with the error of its kind, and only those."""

from __future__ import annotations

import json
import zlib

import pytest
import torch
from golden import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal import rng
from shoal.errors import (
    BadMagic,
    ChecksumError,
    ConfigMismatch,
    LengthError,
    RoundMismatch,
    VersionMismatch,
    WireError,
)
from shoal.wire import DOWN, HEADER, UP, Stamp, frame, unframe

STAMP = Stamp(rng.LAYOUT, UP, round=5, cohort=4, d=12, digest=b"8 bytes.", attempt=1)


def frames(sizes: list[int], width: int, slots: list[int] | None = None, stamp: Stamp = STAMP) -> Tensor:
    """One frame a size, with payloads 0, 1, 2, ... a row."""
    payload = torch.zeros(len(sizes), width, dtype=torch.uint8)
    for i, size in enumerate(sizes):
        payload[i, :size] = torch.arange(i, size + i) % 256
    return frame(payload, torch.tensor(sizes), torch.tensor(slots or list(range(len(sizes)))), stamp, width)


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.integers(0, 8))
def test_round_trip(bodies, spare):
    """Lengths, slots and bytes come back, whatever the padding; rows are padded with zeros."""
    width = max(map(len, bodies)) + spare
    payload = torch.zeros(len(bodies), width, dtype=torch.uint8)
    for row, body in zip(payload, bodies, strict=True):
        row[: len(body)] = torch.tensor(list(body), dtype=torch.uint8)
    sizes, slots = torch.tensor([len(b) for b in bodies]), torch.arange(len(bodies)).flip(0)
    sent = frame(payload, sizes, slots, STAMP, width)
    assert (sent.dtype, tuple(sent.shape)) == (torch.uint8, (len(bodies), HEADER + width))
    got, nbytes, who = unframe(sent, STAMP)
    assert torch.equal(got, payload)
    assert torch.equal(nbytes, sizes)
    assert torch.equal(who, slots)


def test_golden_frame():
    """Byte for byte, from an independent reading of the header's table."""
    stored = bytes.fromhex(json.loads((make.HERE / "frame.json").read_text())["frame"])
    assert make.frame() == stored.hex()
    body = bytes([0, 255, 1, 128, 77])
    fields = [
        b"SHOL", (1).to_bytes(2, "little"), bytes([rng.LAYOUT]), bytes([UP]), (2).to_bytes(4, "little"),
        (731).to_bytes(4, "little"), (6).to_bytes(4, "little"), (9).to_bytes(4, "little"), (21).to_bytes(8, "little"),
        (5).to_bytes(8, "little"), bytes(range(1, 9)), bytes(4), bytes(12),
    ]  # fmt: skip
    header = b"".join(fields)
    assert len(header) == HEADER
    crc = zlib.crc32(header + body).to_bytes(4, "little")
    assert stored == header[:48] + crc + header[52:] + body + bytes(2)


def test_every_flipped_bit_is_found():
    """Of the header and of the payload, one at a time: 8 (64 + 9) frames, all refused."""
    good = frames([9], 9)
    accepted = []
    for bit in range(8 * good.shape[1]):
        bad = good.clone()
        bad[0, bit // 8] ^= 1 << (bit % 8)
        try:
            unframe(bad, STAMP)
            accepted.append((bit // 8, bit % 8))
        except WireError:
            pass
    assert not accepted, f"accepted with a flipped bit, at (byte, bit): {accepted}"


def test_padding_carries_nothing():
    """Bytes beyond a message's end are outside its checksum: they must not reach whoever reads the row."""
    bad = frames([3, 9], 9)
    bad[0, HEADER + 5] = 77
    try:
        payload, nbytes, _ = unframe(bad, STAMP)
    except WireError:
        return
    assert not payload[0, nbytes[0] :].any()


MISMATCHES = [
    ({"layout": rng.LAYOUT + 1}, VersionMismatch),
    ({"digest": b"8 bytes!"}, ConfigMismatch),
    ({"d": 13}, ConfigMismatch),
    ({"cohort": 5}, ConfigMismatch),
    ({"round": 6}, RoundMismatch),
    ({"round": 4}, RoundMismatch),
    ({"attempt": 0}, RoundMismatch),
    ({"kind": DOWN}, RoundMismatch),
]


@pytest.mark.parametrize(("change", "error"), MISMATCHES, ids=lambda v: str(v))
def test_each_mismatch_has_its_error(change, error):
    """A sound frame of another run, round, or direction; every field of the stamp is here. Names the sender."""
    with pytest.raises(error, match="slot 3"):
        unframe(frames([9], 9, slots=[3], stamp=STAMP._replace(**change)), STAMP)
    assert {name for fields, _ in MISMATCHES for name in fields} == set(Stamp._fields)


def test_foreign_bytes_and_versions():
    bad = frames([9], 9)
    bad[0, 0] = ord("s")
    with pytest.raises(BadMagic):
        unframe(bad, STAMP)
    bad = frames([9], 9)
    bad[0, 4] = 2
    with pytest.raises(VersionMismatch, match="format 2"):
        unframe(bad, STAMP)


def test_lengths():
    """A longer message than was agreed, and a row cut off before its end, whatever its header says."""
    with pytest.raises(LengthError, match="at most 8"):
        unframe(frames([9], 9)[:, :-1], STAMP)
    bad = frames([9], 9)
    bad[0, 39] = 0x80  # 2^63 bytes: nothing may be allocated for it
    with pytest.raises(LengthError):
        unframe(bad, STAMP)
    shorter = frames([9], 9)
    shorter[0, 32] = 8
    with pytest.raises(ChecksumError):
        unframe(shorter, STAMP)


def test_a_slot_outside_the_cohort_is_refused():
    """Round and compressor look slots up in tables of the cohort's size: slot 4 of 4 has no place there."""
    with pytest.raises(WireError):
        unframe(frames([9], 9, slots=[4]), STAMP)


def test_one_bad_frame_among_good_ones():
    bad = frames([9, 9, 9], 9)
    bad[1, HEADER] ^= 1
    with pytest.raises(ChecksumError, match="slot 1"):
        unframe(bad, STAMP)


@settings(max_examples=300)
@given(st.data())
def test_random_bytes_raise_wire_errors_only(data):
    """Noise, noise behind a sound magic, and sound headers with a few bytes changed; of any width."""
    width = data.draw(st.integers(0, HEADER + 12))
    body = bytearray(data.draw(st.binary(min_size=width, max_size=width)))
    good = frames([9], 12)[0].numpy().tobytes()
    trusted = data.draw(st.sampled_from([0, 4, 8, 48, HEADER]))
    body[:trusted] = good[: min(trusted, width)]
    try:
        payload, nbytes, slots = unframe(torch.tensor([list(body)], dtype=torch.uint8).reshape(1, width), STAMP)
    except WireError:
        return
    assert bytes(body[: HEADER + 9]) == good[: HEADER + 9]
    assert (nbytes.tolist(), slots.tolist(), payload.shape[1]) == ([9], [0], width - HEADER)


def test_empty_messages_and_no_messages():
    """A message of no bytes is a header; no messages are no frames."""
    payload, nbytes, slots = unframe(frames([0, 0], 0), STAMP)
    assert (tuple(payload.shape), nbytes.tolist(), slots.tolist()) == ((2, 0), [0, 0], [0, 1])
    payload, nbytes, slots = unframe(torch.zeros(0, HEADER + 3, dtype=torch.uint8), STAMP)
    assert (tuple(payload.shape), len(nbytes), len(slots)) == ((0, 3), 0, 0)
