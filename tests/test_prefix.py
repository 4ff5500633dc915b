"""The prefix code of sums: its lengths are the best ones, both kernels write and read the same bytes, every body is the
only one that says what it says, and what it saves is what docs/derivations/slices.md tells."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from golden import make
from hypothesis import given, settings
from hypothesis import strategies as st
from test_buffers import used
from torch import Tensor

from shoal.compressors import Correlated
from shoal.kernels import cpu, reference
from shoal.kernels.cpu import prefix as compiled
from shoal.kernels.reference.prefix import LIMIT, SEGMENT, codes_of, complete, lengths_of
from shoal.kernels.reference.sums_of_codes import CODED, DIGITS, SYMBOLS, joint, packed_bytes
from shoal.messages import Round

KERNELS = (reference, cpu)


# ------------------------------------------------------------------------------------------------ lengths
def cost(counts: list[int], lengths: list[int]) -> int:
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


def huffman(counts: list[int]) -> int:
    """Bits of the best code of any length: the sum of all weights that are ever joined."""
    weights, total = sorted(count for count in counts if count), 0
    while len(weights) > 1:
        total += weights[0] + weights[1]
        weights = sorted([weights[0] + weights[1], *weights[2:]])
    return total


@given(st.lists(st.integers(0, 60), min_size=2, max_size=40).filter(any))
def test_lengths_are_huffmans(counts):
    """Where the limit is not in the way; in both kernels the same ones, complete, and no code begins another."""
    lengths = lengths_of(counts)
    assert compiled.lengths_of(np.array(counts)).tolist() == lengths
    assert complete(lengths)
    assert compiled.complete(np.array(lengths))
    if sum(map(bool, counts)) > 1:
        assert cost(counts, lengths) == huffman(counts) or max(lengths) == LIMIT
        assert all(bool(length) is bool(count) for count, length in zip(counts, lengths, strict=True))
    codes = codes_of(lengths)
    assert all(a == b or not codes[b].startswith(codes[a]) for a, b in product(codes, codes))
    turned = [16 * int(codes[s][::-1], 2) + len(codes[s]) if s in codes else 0 for s in range(len(counts))]
    assert compiled.codes_of(np.array(lengths)).tolist() == turned


def test_limited_lengths_are_the_best_of_all(monkeypatch):
    """Counts that double ask for one bit more each; with a limit of 4, against every complete choice for 6 symbols."""
    monkeypatch.setattr("shoal.kernels.reference.prefix.LIMIT", 4)
    choices = [c for c in product(range(1, 5), repeat=6) if sum(1 << 4 - length for length in c) == 16]
    draw = np.random.default_rng(0)
    for counts in ([1, 1, 2, 4, 8, 16], [32, 16, 8, 4, 2, 1], *draw.integers(1, 40, (40, 6)).tolist()):
        assert cost(counts, lengths_of(counts)) == min(cost(counts, list(c)) for c in choices)


def test_lengths_at_the_limit():
    """Fibonacci's numbers would take 29 bits; 4096 symbols of the same count take 12 each; one symbol has a partner."""
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    for counts in (fibonacci, [1] * (1 << LIMIT), [0, 0, 5], [7, 0]):
        lengths = lengths_of(counts)
        assert complete(lengths)
        assert compiled.lengths_of(np.array(counts)).tolist() == lengths
    assert max(lengths_of(fibonacci)) == LIMIT
    assert lengths_of([0, 0, 5]) == [1, 0, 1]
    assert lengths_of([7, 0]) == [1, 1]


# ------------------------------------------------------------------------------------------------ bodies
def folded(codes: np.ndarray, levels: int) -> Tensor:
    """The body of these codes, (m, d), if all kernels agree about it."""
    packed = reference.pack(torch.from_numpy(codes), (levels - 1).bit_length())
    (body, beyond), (other, _) = (ops.fold_codes(packed, levels, codes.shape[1]) for ops in KERNELS)
    assert not beyond
    assert torch.equal(body, other)
    return body


def read(body: Tensor, base: int, d: int) -> list[int] | None:
    """The sums that a body says, if all kernels agree about it."""
    (mean, good), (other, same) = (ops.unfold_codes([body], torch.arange(base).float(), [d]) for ops in KERNELS)
    assert mean.numpy().tobytes() == other.numpy().tobytes()
    assert torch.equal(good, same)
    return mean.long().tolist() if good else None


def made(m: int, d: int, levels: int, alike: float, seed: int) -> np.ndarray:
    """Codes of which a share is the middle one, so that sums crowd together."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, levels, (m, d))
    codes[:, draw.random(d) < alike] = levels // 2
    return codes


CROWDS = st.tuples(
    st.integers(1, 40), st.integers(1, 1500), st.sampled_from([2, 3, 5, 17, 257]), st.floats(0, 1), st.integers(0, 99)
)


@given(CROWDS)
@settings(max_examples=60, deadline=None)
def test_sums_come_back(crowd):
    """Never longer than digits, and the sums that went in."""
    m, d, levels, *_ = crowd
    codes, base = made(*crowd), m * (levels - 1) + 1
    body = folded(codes, levels)
    assert len(body) <= 1 + packed_bytes(d, base)
    assert body[0] == (CODED if len(body) < 1 + packed_bytes(d, base) else DIGITS)
    assert read(body, base, d) == codes.sum(0).tolist()


@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 300])
def test_segments_and_threads(m, monkeypatch):
    """Symbols of 8, 5, 3, 2, 2 and 1 sums; nine segments or more, four of which are read in turns; a last one cut
    short. What was in the memory before does not show."""
    monkeypatch.setattr("shoal.kernels.cpu.sums_of_codes.ready", used)
    d, before = 9 * SEGMENT * joint(m + 1) + 11, torch.get_num_threads()
    packed = reference.pack(torch.from_numpy(made(m, d, 2, 0.8, m)), 1)
    body, _ = reference.fold_codes(packed, 2, d)
    values = torch.randn(m + 1, generator=torch.Generator().manual_seed(m))
    sums = reference.unfold_codes([body], torch.arange(m + 1).float(), [d])[0].long().numpy()
    assert body[0] == CODED
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(cpu.fold_codes(packed, 2, d)[0], body)
            mean, good = cpu.unfold_codes([body, body], values, [d, d])
            assert good.all()
            assert torch.equal(mean, values[np.tile(sums, 2)])
    finally:
        torch.set_num_threads(before)


def test_symbols_are_few():
    assert [joint(base) for base in (2, 3, 5, 9, 17, 22, 23, 4096, 4097)] == [8, 5, 3, 2, 2, 2, 1, 1, 0]
    assert all(base ** joint(base) <= max(SYMBOLS, base) for base in range(2, 4097))


# ------------------------------------------------------------------------------------------------ hostile bytes
def body_of(lengths: list[int], segments: list[str], base: int) -> Tensor:
    """A body with these lengths and these bits, however wrong."""
    even = lengths + [0] * (len(lengths) % 2)
    out = [CODED, *(low | high << 4 for low, high in zip(even[::2], even[1::2], strict=True))]
    parts = [np.packbits(np.array(list(bits), np.uint8), bitorder="little").tobytes() for bits in segments]
    for part in parts:
        out += [len(part) & 255, len(part) >> 8]
    return torch.tensor([*out, *b"".join(parts)], dtype=torch.uint8)


def sound() -> tuple[list[int], list[int], list[str], int]:
    """(symbols, lengths, bits of the only segment, d) of sums 0..4, three to a symbol, one missing at the end."""
    sums = made(4, 599, 2, 0.9, 1).sum(0)
    symbols = np.append(sums, 0).reshape(-1, 3) @ [1, 5, 25]
    lengths = lengths_of(np.bincount(symbols, minlength=125).tolist())
    codes = codes_of(lengths)
    return symbols.tolist(), lengths, [codes[s] for s in symbols.tolist()], 599


def test_what_no_fold_writes_is_refused():
    """One rule after the other is broken; all else is right. As made, the body is that of `fold`."""
    symbols, lengths, bits, d = sound()
    whole = "".join(bits)
    filled = whole + "0" * (-len(whole) % 8)
    good = body_of(lengths, [whole], 5)
    assert torch.equal(folded(made(4, 599, 2, 0.9, 1), 2), good)
    assert read(good, 5, d) is not None
    assert -len(whole) % 8, "there is padding"
    rare, often = lengths.index(max(lengths)), lengths.index(min(x for x in lengths if x))
    head = 1 + 63
    bad = {
        "over-subscribed": body_of([x if s != rare else 1 for s, x in enumerate(lengths)], [whole], 5),
        "incomplete": body_of([x if s != rare else 0 for s, x in enumerate(lengths)], [whole], 5),
        "no lengths": body_of([0] * 125, [whole], 5),
        "a length of 13": body_of([x if s != rare else 13 for s, x in enumerate(lengths)], [whole], 5),
        "something behind the lengths": good.clone(),
        "not the best lengths": body_of([lengths[often] if s == rare else lengths[rare] if s == often else x
                                         for s, x in enumerate(lengths)], [whole], 5),
        "a byte more": body_of(lengths, [filled + "00000000"], 5),
        "codes run over": body_of(lengths, [filled[:-8]], 5),
        "padding": body_of(lengths, [filled[:-1] + "1"], 5),
        "another order": body_of(lengths, ["".join(bits[1:] + bits[:1])], 5),
        "one segment more": body_of(lengths, [whole, ""], 5),
        "an empty directory": good.clone(),
        "an unknown kind": good.clone(),
        "cut off in the lengths": good[:40],
        "cut off in the directory": good[: head + 1],
        "nothing": good[:0],
        "the kind alone": good[:1],
    }  # fmt: skip
    bad["something behind the lengths"][head - 1] |= 0xF0
    bad["an empty directory"][head : head + 2] = 0
    bad["an unknown kind"][0] = 2
    last = [s if k < len(symbols) - 1 else s + 50 for k, s in enumerate(symbols)]  # a sum where there is none
    again = lengths_of(np.bincount(last, minlength=125).tolist())
    bad["a sum behind the last"] = body_of(again, ["".join(codes_of(again)[s] for s in last)], 5)
    accepted = [why for why, body in bad.items() if why != "another order" and read(body, 5, d) is not None]
    assert not accepted
    assert read(bad["another order"], 5, d) != read(good, 5, d)


def test_sums_have_one_body():
    """Digits where the code is shorter, and a code where digits are: refused, though they can be read."""
    from shoal.kernels.reference.sums_of_codes import _coded, _digits

    for alike, count, other in ((0.9, 599, _digits), (0.0, 150, None)):
        sums = made(4, count, 2, alike, 1).sum(0).tolist()
        if other is None:
            symbols = np.array(sums + [0] * (-count % 3)).reshape(-1, 3) @ [1, 5, 25]
            raw = _coded(sums, 5, lengths_of(np.bincount(symbols, minlength=125).tolist()))
        else:
            raw = other(sums, 5)
        body = torch.tensor(list(raw), dtype=torch.uint8)
        assert folded(made(4, count, 2, alike, 1), 2)[0] == 1 - body[0]
        assert read(body, 5, count) is None


@given(CROWDS, st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_changed_bytes_are_refused_or_say_other_sums(crowd, changes):
    """Both kernels give the same verdict; what is still accepted is what `fold` writes of the sums that it says."""
    m, d, levels, *_ = crowd
    base, body = m * (levels - 1) + 1, folded(made(*crowd), levels)
    bad = body.clone()
    for at, by in changes:
        bad[at % len(bad)] ^= by
    found = read(bad, base, d)
    if found is not None:
        codes = np.stack([np.clip(np.array(found) - i * (levels - 1), 0, levels - 1) for i in range(m)])
        assert torch.equal(folded(codes, levels), bad)


@given(st.binary(max_size=300), st.integers(0, 400), st.sampled_from([2, 3, 5, 9, 17, 257, 4096, 5000]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_by_both(noise, d, base, coded):
    raw = [CODED, *noise] if coded else list(noise)
    read(torch.tensor(raw, dtype=torch.uint8), base, d)


# ------------------------------------------------------------------------------------------------ what is written down
def test_golden_means():
    """Both kinds, byte for byte."""
    assert make.means() == json.loads((make.HERE / "means.json").read_text())
    assert [bytes.fromhex(one)[0] for one in make.means().values()] == [DIGITS, CODED]


DRAWS = {
    "Gaussian": lambda draw, shape: draw.normal(size=shape),
    "Laplace": lambda draw, shape: draw.laplace(size=shape),
    "Student, 3": lambda draw, shape: draw.standard_t(3, size=shape),
}
SAVED = {  # docs/derivations/slices.md: bits a sum, and their entropy
    (2, "Gaussian"): (0.738, 0.727), (2, "Laplace"): (0.432, 0.390), (2, "Student, 3"): (0.225, 0.054),
    (4, "Gaussian"): (1.182, 1.151), (4, "Laplace"): (0.715, 0.679), (4, "Student, 3"): (0.369, 0.099),
    (8, "Gaussian"): (1.498, 1.470), (8, "Laplace"): (1.016, 0.980), (8, "Student, 3"): (0.579, 0.244),
    (16, "Gaussian"): (2.008, 1.975), (16, "Laplace"): (1.492, 1.448), (16, "Student, 3"): (0.580, 0.233),
}  # fmt: skip


@pytest.mark.parametrize(("n", "name"), SAVED, ids=str)
def test_what_the_code_saves(n, name):
    """Of 200,000 coordinates, all clients' drawn alike and on their own: the table of docs/derivations/slices.md."""
    d, draw = 200_000, np.random.default_rng(n)
    u = torch.from_numpy(DRAWS[name](draw, (n, d)).astype(np.float32))
    rnd = replace(Round.full(0, 0, n), agreed=float(u.abs().max()))
    slices = Correlated().slices(d, rnd)
    body = slices.fold(Correlated().encode(u, rnd), 0)
    share = np.unique(slices.unfold([body], [(0, d)]).numpy(), return_counts=True)[1] / d
    found = 8 * len(body) / d, -float(share @ np.log2(share))
    assert found == pytest.approx(SAVED[n, name], abs=6e-4)
    told = "{:.3f} ({:.3f})".format(*SAVED[n, name])
    assert told in (make.ROOT / "docs/derivations/slices.md").read_text(encoding="utf-8")
