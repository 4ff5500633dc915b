"""Kernels: numba's and the reference's bytes are equal, for every name in `reference.__all__`, with no tolerance.

CASES says how each kernel is called; a kernel without a case is a failure. Shapes reach one coordinate, both sides of
a block of 128, one tile and several; scales reach denormals, where the row is lifted first, and the edge of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal import kernels
from shoal.kernels import Draw, cpu, reference
from shoal.kernels.reference.turned import Part

SHAPES = [(1, 1), (3, 5), (4, 127), (4, 128), (4, 129), (4, 130), (2, 1000), (3, 2500)]
SCALES = [0.0, 1e-44, 1e-39, 1e-30, 1.0, 1e30, 3e38]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
scales = pytest.mark.parametrize("scale", SCALES)


def same(a: Tensor | float, b: Tensor | float) -> None:
    """Equal dtype, shape and bytes: -0.0 is not 0.0, and a NaN equals itself."""
    if isinstance(a, bool):
        assert a is b
        return
    if isinstance(a, float):
        assert np.float64(a).tobytes() == np.float64(b).tobytes()
        return
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.numpy().tobytes() == b.numpy().tobytes()


class Inputs:
    """Arguments of the given shape and scale, the same in every run."""

    def __init__(self, m: int, d: int, scale: float) -> None:
        self.m, self.d, self.scale = m, d, scale
        self.rng = np.random.default_rng([m, d, int(np.float32(scale).view(np.int32))])
        u = (self.rng.uniform(-1, 1, (m, d)) * scale).astype(np.float32)
        u[self.rng.random((m, d)) < 0.1] *= np.float32(0)  # zeros of both signs
        self.u = torch.from_numpy(u)
        self.r = reference.maxes(self.u)
        self.slots = torch.from_numpy(self.rng.choice(2**32, m, replace=False))
        self.private, self.tie = Draw(self.slots, 2**31 + 5, 77, 2**63 + 9), Draw(self.slots, 2**31 + 5, 78, 2**63 + 9)
        self.shared = Draw(torch.tensor([2**32 - 1]), 2**31 + 5, 79, 2**63 + 9)
        self.bytes = torch.from_numpy(self.rng.integers(0, 256, (m, (d + 7) // 8), np.uint8))

    def codes(self, levels: int) -> Tensor:
        return torch.from_numpy(self.rng.integers(0, levels, (self.m, self.d)))

    def blocks(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Ragged rows of distinct coordinates, as PermK has them: (values, index, pointer, width)."""
        lengths = self.rng.integers(0, self.d + 1, self.m)
        index = torch.from_numpy(np.concatenate([self.rng.permutation(self.d)[:k] for k in lengths]))
        pointer = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        width = int(lengths.max())
        return reference.gather(self.u, index, pointer, width), index, pointer, width


def added(ops: ModuleType, v: Inputs) -> Tensor:
    total = torch.arange(v.d, dtype=torch.float64) * v.scale
    assert ops.add_rows(v.u, total) is None
    return total


def rounded(ops: ModuleType, v: Inputs) -> list[Tensor]:
    """Both scales a caller may give (the largest entry, the norm) and one that rows exceed; strata with and without
    shifts, where one stratum is independent rounding."""
    out = []
    norm = torch.where(torch.isfinite(n := reference.norms(v.u)), n, v.r)
    for r in (v.r, norm, v.r * 0.75):
        out.append(ops.encode_bits(v.u, r, v.private, v.tie, 1, torch.zeros(v.m, dtype=torch.int64), None))
        for strata in (2, 5, 16, 127, 1000):
            place = torch.arange(v.m) % strata
            shifts = torch.from_numpy(np.random.default_rng(strata).integers(0, strata, (1, v.d)).astype(np.int32))
            out.append(ops.encode_bits(v.u, r, v.private, v.tie, strata, place, shifts))
            out.append(ops.encode_bits(v.u, r, v.private, v.tie, strata, place, v.shared, head=strata == 5))
            out.append(ops.encode_bits(v.u, r, v.private, v.tie, strata, place, None))
    own = [draw._replace(slots=torch.arange(v.m)) for draw in (v.private, v.tie)]
    out.append(ops.encode_bits(v.u, v.r, *own, 5, v.shared, v.shared, head=True))
    return out


def watched(ops: ModuleType, v: Inputs) -> list[object]:
    """A scale that is the largest entry, one that some rows exceed, and a row with a NaN."""
    spoiled, places = v.u.clone(), torch.arange(v.m) % 5
    spoiled[-1:, -1] = float("nan")
    out: list[object] = []
    for u, r in ((v.u, v.r), (v.u, v.r * 0.75), (spoiled, v.r)):
        code, within = ops.encode_within(u, r, v.private, v.tie, 5, places, v.shared)
        out += [within, code if within else torch.empty(0)]
    return out


def leveled(ops: ModuleType, v: Inputs) -> list[Tensor]:
    norm = torch.where(torch.isfinite(n := reference.norms(v.u)), n, v.r)
    out = [ops.encode_levels(v.u, r, v.private, v.tie, s) for r in (v.r, norm) for s in (2, 3, 7, 15, 16, 32767)]
    for strata in (2, 5, 1000):
        place = torch.arange(v.m) % strata
        shifts = torch.from_numpy(np.random.default_rng(strata).integers(0, strata, (1, v.d)).astype(np.int32))
        for s in (2, 3, 16):
            out.append(ops.encode_levels(v.u, v.r, v.private, v.tie, s, strata, place, shifts))
            out.append(ops.encode_levels(v.u, norm, v.private, v.tie, s, strata, place, None))
    own = [draw._replace(slots=torch.arange(v.m)) for draw in (v.private, v.tie)]
    out.append(ops.encode_levels(v.u, v.r, *own, 3, 5, v.shared, v.shared, True))
    headed = ops.encode_levels(v.u, v.r, v.private, v.tie, 16, head=True)
    same(headed[:, :4].contiguous(), v.r[:, None].view(torch.uint8))
    return [*out, headed]


def packed(ops: ModuleType, v: Inputs) -> list[Tensor]:
    return [ops.pack(v.codes(2**bits), bits) for bits in (0, 1, 2, 3, 7, 8, 13, 31)]


COUNTS = (2, 3, 4, 5, 8, 9, 15, 16, 17, 200, 256, 257, 32767)  # of codes: 1 to 5 bits, 8, 9 and 15


def read(decode: Callable[[Tensor, int], tuple[Tensor, bool]], v: Inputs, counts: tuple[int, ...]) -> list[object]:
    """What is decoded of packed codes below `count`, and of the same with one code at its bits' end (NaN, if beyond).

    The payload is part of wider rows, as that of a message with a scale in front is.
    """
    out: list[object] = []
    for count in counts:
        bits, codes = (count - 1).bit_length(), v.codes(count)
        for last in (int(codes[-1, -1]), 2**bits - 1):
            codes[-1, -1] = last
            rows = reference.pack(codes, bits)
            values, beyond = decode(torch.cat([v.bytes[:, :1], rows], 1)[:, 1:], count)
            assert beyond is (last >= count) is bool(values.isnan().any())
            out += [values, beyond]
    return out


def trits(v: Inputs, decode: Callable[[Tensor], tuple[Tensor, bool]]) -> list[object]:
    """Five digits a byte; then a byte that has none, and a digit behind the last coordinate."""
    rows = reference.pack_trits(v.codes(3))
    out: list[object] = [*decode(rows)]
    for byte in (242, 243, 255):
        rows[-1, -1] = byte
        values, bad = decode(rows)
        assert bad is (byte > 242 or v.d % 5 > 0)
        out += [values, bad]
    return out


def powers(v: Inputs, decode: Callable[[Tensor], tuple[Tensor, bool]]) -> list[object]:
    """Nine bits a coordinate, first those of rows, then with an exponent of 255 at the end."""
    rows = reference.encode_natural(v.u / 2, v.private)
    out: list[object] = [*decode(rows)]
    assert out[-1] is False
    codes = reference.unpack(rows, v.d, 9)
    codes[0, -1] = 255
    values, bad = decode(reference.pack(codes, 9))
    assert bad is True
    return [*out, values, bad]


def sparse(ops: ModuleType, v: Inputs, name: str) -> Tensor:
    values, index, pointer, width = v.blocks()
    if name == "gather":
        return ops.gather(v.u, index, pointer, width)
    tail = (1.0 / 3.0,) if name == "scatter" else (v.d / 3.0, 7)
    return getattr(ops, name)(values, index, pointer, v.d, *tail)


def dealt(ops: ModuleType, v: Inputs, name: str) -> list[Tensor]:
    """One part, few, as many as coordinates, and more; rows that share a part."""
    out, shared = [], v.private._replace(slots=torch.tensor([0xFFFFFFFF]))
    for parts in sorted({1, 2, 3, 16, 130, max(1, v.d - 1), v.d, v.d + 3}):
        part, width = torch.from_numpy(v.rng.integers(0, parts, v.m)), -(-v.d // parts)
        values = reference.gather_dealt(v.u, shared, part, parts, width)
        where = (shared, part, parts)
        if name == "dealt_lengths":
            out.append(ops.dealt_lengths(*where, v.d))
        elif name == "gather_dealt":
            out.append(ops.gather_dealt(v.u, *where, width))
        else:
            tail = (1 / 3,) if name == "scatter_dealt" else (v.d / 3, 7)
            out.append(getattr(ops, name)(values, *where, v.d, *tail))
    return out


CASES: dict[str, Callable[[ModuleType, Inputs], object]] = {
    "add_rows": added,
    "decode_bits": lambda ops, v: ops.decode_bits(v.bytes, v.r, v.d),
    "decode_levels": lambda ops, v: read(lambda p, s: ops.decode_levels(p, v.r, s, v.d), v, COUNTS),
    "dots": lambda ops, v: ops.dots(v.u, v.u.flip(1).contiguous()),
    "encode_bits": rounded,
    "encode_within": watched,
    "encode_levels": leveled,
    "gather": lambda ops, v: sparse(ops, v, "gather"),
    "hadamard": lambda ops, v: ops.hadamard(v.u[:, : 1 << (v.d.bit_length() - 1)].contiguous()),
    "halves": lambda ops, v: ops.halves(v.private, v.d),
    "maxes": lambda ops, v: ops.maxes(v.u),
    "mean_bits": lambda ops, v: ops.mean_bits(v.bytes, v.r, v.d, 7),
    "mean_levels": lambda ops, v: read(lambda p, s: ops.mean_levels(p, v.r, s, v.d, 7), v, COUNTS),
    "mean_rows": lambda ops, v: [ops.mean_rows(v.u, 7), ops.mean_rows(v.u / 2, 7, 0.6)],
    "mean_sparse": lambda ops, v: sparse(ops, v, "mean_sparse"),
    "norms": lambda ops, v: ops.norms(v.u),
    "pack": packed,
    "permutation": lambda ops, v: ops.permutation(v.private, v.d),
    "scatter": lambda ops, v: sparse(ops, v, "scatter"),
    "square_norm": lambda ops, v: ops.square_norm(v.u[0].double()),
    "support": lambda ops, v: [ops.support(v.private, v.d, k) for k in {1, (v.d + 1) // 2, v.d, max(1, v.d // 40)}],
    "topk": lambda ops, v: [ops.topk(v.u, k) for k in {1, (v.d + 1) // 2, v.d}],
    "unpack": lambda ops, v: [
        ops.unpack(reference.pack(v.codes(2**bits), bits), v.d, bits) for bits in (0, 1, 2, 3, 7, 8, 13, 31)
    ],
    "words": lambda ops, v: ops.words(v.private, v.d),
}

CASES |= {
    name: lambda ops, v, name=name: dealt(ops, v, name)  # type: ignore[misc]
    for name in ("dealt_lengths", "gather_dealt", "mean_dealt", "scatter_dealt")
}


def turned(ops: ModuleType, v: Inputs, name: str) -> list[Tensor]:
    """Signs a row and shared ones, one round and two, with padding (d is no power of two) and without. Norms are kept
    finite, as the compressors do: the sign of a NaN is nobody's promise."""
    out, size, u = [], 1 << (v.d - 1).bit_length(), v.u / (64 if v.scale > 1e38 else 1)
    for draws in ([v.private], [v.private._replace(slots=torch.tensor([0xFFFFFFFF])), v.tie]):
        if name == "rotate_padded":
            out.append(ops.rotate_padded(u, draws, size))
        elif name == "rotate_signs":
            out += ops.rotate_signs(u, draws, size)
        else:
            y = reference.rotate_padded(u, draws, size)
            out += [ops.rotate_padded_back(y, draws, v.d), ops.rotate_padded_back(y, draws, size)]
    return out


def overlapping(ops: ModuleType, v: Inputs, name: str) -> list[Tensor]:
    """As `turned`: two transforms, of h + 1 and 2h - 1 coordinates too; where d is a power of two one, or one after
    the other."""
    shared, h = v.private._replace(slots=torch.tensor([0xFFFFFFFF])), reference.rotation.window(v.d)
    out, u = [], v.u / (64 if v.scale > 1e38 else 1)
    for d in sorted({v.d, h, h // 2 + 1, max(1, h - 1)}):
        for draws in ([v.private, v.tie], [shared, v.tie], [v.tie]):
            if len(draws) == 2 or d == reference.rotation.window(d):
                out.append(getattr(ops, name)(u[:, v.d - d :].contiguous(), draws))
    return out


def pointed(ops: ModuleType, v: Inputs, name: str) -> list[Tensor]:
    out: list[Tensor] = []
    for bits in (1, 2, 3, 5, 8):
        table = torch.linspace(-2, 2, 2**bits)
        coded = reference.encode_points(v.u, 2.0 / v.r.double().clamp(min=1e-45), table)
        ours = ops.encode_points(v.u, 2.0 / v.r.double().clamp(min=1e-45), table)
        out += ours if name == "encode_points" else [ops.decode_points(coded[0], v.r, table, v.d)]
    return out


CASES |= {
    "decode_points": lambda ops, v: pointed(ops, v, "decode_points"),
    "encode_points": lambda ops, v: pointed(ops, v, "encode_points"),
    "encode_signs": lambda ops, v: list(ops.encode_signs(v.u)),
    "rotate": lambda ops, v: overlapping(ops, v, "rotate"),
    "rotate_back": lambda ops, v: overlapping(ops, v, "rotate_back"),
    "rotate_padded": lambda ops, v: turned(ops, v, "rotate_padded"),
    "rotate_padded_back": lambda ops, v: turned(ops, v, "rotate_padded_back"),
    "rotate_signs": lambda ops, v: turned(ops, v, "rotate_signs"),
}
CASES |= {
    "below": lambda ops, v: [ops.below(v.private, v.d, n) for n in (1, 2, 16, 2**31 - 1)],
    "shifts": lambda ops, v: [ops.shifts(v.private, v.d, n) for n in (1, 3, 16, 127, 128, 129, 2**31 - 1)],
    "decode_natural_levels": lambda ops, v: read(
        lambda p, c: ops.decode_natural_levels(p, v.r, c // 2, v.d), v, (3, 5, 15, 31, 255)
    ),
    "decode_natural": lambda ops, v: powers(v, lambda p: ops.decode_natural(p, v.d)),
    "decode_trits": lambda ops, v: trits(v, lambda p: ops.decode_trits(p, v.r, v.d)),
    "encode_natural": lambda ops, v: ops.encode_natural(v.u, v.private),
    "encode_natural_levels": lambda ops, v: [
        ops.encode_natural_levels(v.u, r, v.private, s) for r in (v.r, v.r * 0.75) for s in (1, 2, 7, 127)
    ],
    "pack_trits": lambda ops, v: ops.pack_trits(v.codes(3)),
    "unpack_trits": lambda ops, v: ops.unpack_trits(v.codes(256)[:, : (v.d + 4) // 5].to(torch.uint8), v.d),
    "encode_trits": lambda ops, v: [ops.encode_trits(v.u, r, v.private, v.tie) for r in (v.r, v.r * 2)],
    "mean_abs": lambda ops, v: ops.mean_abs(v.u),
    "mean_natural": lambda ops, v: powers(v, lambda p: ops.mean_natural(p, v.d, 7)),
    "mean_natural_levels": lambda ops, v: read(
        lambda p, c: ops.mean_natural_levels(p, v.r, c // 2, v.d, 7), v, (3, 5, 15, 31, 255)
    ),
    "mean_trits": lambda ops, v: trits(v, lambda p: ops.mean_trits(p, v.r, v.d, 7)),
    "sign_bits": lambda ops, v: ops.sign_bits(v.u),
}


def kept(ops: ModuleType, v: Inputs) -> list[object]:
    """What TopK writes, read again; and rows whose coordinates go beyond d, or say one twice."""
    out: list[object] = []
    for k in sorted({1, (v.d + 1) // 2, v.d}):
        payload = reference.encode_topk(v.u, k)
        out += ops.decode_topk(payload, k, v.d)
        assert out[-1] is True
        for last in (2 ** (v.d - 1).bit_length() - 1, 0):
            index = reference.unpack(payload[:, 4 * k :].contiguous(), k, (v.d - 1).bit_length())
            index[-1, -1] = last
            spoiled = torch.cat([payload[:, : 4 * k], reference.pack(index, (v.d - 1).bit_length())], 1)
            out += ops.decode_topk(spoiled, k, v.d)
            assert out[-1] is (last < v.d and (k == 1 or last > int(index[-1, -2])))
    return out


def scales_read(ops: ModuleType, v: Inputs) -> list[object]:
    """Good ones, of rows that lie apart, as well; then one that is negative, infinite, no number, or too large."""
    rows = torch.cat([v.r[:, None].view(torch.uint8), v.bytes], 1)
    out: list[object] = [*ops.read_scales(rows, 1.0), *ops.read_scales(rows[:, :4], 0.5)]
    for value in (-1e-45, -0.0, float("inf"), float("nan"), 3e38):
        r = v.r.clone()
        r[-1] = value
        read, good = ops.read_scales(r[:, None].view(torch.uint8), 2.0)
        assert good is bool(value == 0 and (r.double() * 2 <= torch.finfo(torch.float32).max).all())
        out += [read, good]
    return out


def tossed(ops: ModuleType, v: Inputs) -> list[Tensor]:
    """Impossible, even, certain; and odds that a row's two words just do not reach, and just do."""
    high, low = reference.words(v.private, 2)[0].tolist()
    out = [ops.coins(v.private, odds) for odds in (0, 2**63, 2**64, high << 32 | low, (high << 32 | low) + 1)]
    assert [bool(heads[0]) for heads in (out[0], *out[2:])] == [False, True, False, True]
    return out


CASES |= {
    "coins": tossed,
    "decode_topk": kept,
    "encode_topk": lambda ops, v: [ops.encode_topk(v.u, k) for k in {1, (v.d + 1) // 2, v.d}],
    "greatest": lambda ops, v: [ops.greatest(v.u), ops.greatest(v.u[:0]), ops.greatest(v.u * float("nan"))],
    "places": lambda ops, v: [ops.places(v.shared, n, torch.arange(v.m) % n) for n in (1, 7, 1000)],
    "read_scales": scales_read,
    "symmetric": lambda ops, v: ops.symmetric(v.private, v.d),
}


def points_of(size: int) -> list[tuple[Part, ...]]:
    """Signs, numbers of three bits, of four and of three, and signs of a beginning."""
    two, eight, sixteen = (torch.linspace(-2, 2, count) for count in (2, 8, 16))
    half = (size + 1) // 2
    mixed = (Part(half, sixteen), Part(size - half, eight)) if size > 1 else (Part(1, sixteen),)
    return [(Part(size, two),), (Part(size, eight),), mixed, (Part(half, two),)]


def whole(ops: ModuleType, v: Inputs, name: str) -> list[Tensor]:
    """Messages of rotated rows, of one round of signs and of two; norms are kept finite, as in `turned`."""
    out, size, u = [], 1 << (v.d - 1).bit_length(), v.u / (64 if v.scale > 1e38 else 1)
    other = v.tie._replace(slots=v.slots)
    for parts in points_of(size):
        for draws in ([v.private], [v.private, other], [v.shared, v.tie]):
            if name == "encode_turned":
                out += [
                    *ops.encode_turned(u, draws, size, parts, False),
                    *ops.encode_turned(u, draws, size, parts, True),
                ]
            else:
                payload = reference.encode_turned(u, draws, size, parts, False)[0]
                out.append(ops.decode_turned(payload, v.r / 64, draws, size, parts, v.d))
    return out


CASES |= {name: lambda ops, v, n=name: whole(ops, v, n) for name in ("decode_turned", "encode_turned")}  # type: ignore[misc]


def entropy(v: Inputs) -> list[tuple[Tensor, int, int]]:
    """(symbols, how many there are, bytes they may take): rare, even, one alone, too many, too little room."""
    rare = v.codes(3) * (v.codes(20) == 0).long()
    return [
        (rare, 3, v.d), (v.codes(3), 3, v.d // 4 + 1), (torch.full((v.m, v.d), 4), 9, v.d), (v.codes(40), 512, 2 * v.d),
        (rare, 2**9, v.d), (v.codes(2), 2, 9),
    ]  # fmt: skip


def uncoded(ops: ModuleType, v: Inputs) -> list[Tensor]:
    out = []
    for code, levels, limit in entropy(v):
        payload, nbytes = reference.encode_entropy(code, levels, limit)
        spoiled = payload.clone()
        spoiled[:, v.d % max(limit, 1)] ^= 4
        for bytes_, sizes in ((payload, nbytes), (payload, nbytes - 1), (spoiled, nbytes)):
            out += ops.decode_entropy(bytes_, sizes.clamp(0, limit), v.d, levels)
    return out


def matrices(v: Inputs, rank: int) -> tuple[Tensor, Tensor]:
    b = max(1, int(v.d**0.5))
    rows = v.u[:, : v.d // b * b].reshape(v.m, -1, b)
    start = torch.from_numpy(v.rng.uniform(-1, 1, (v.m, b, min(rank, b))).astype(np.float32))
    return rows, start


CASES |= {
    "decode_entropy": uncoded,
    "encode_entropy": lambda ops, v: [x for case in entropy(v) for x in ops.encode_entropy(*case)],
    "low_rank": lambda ops, v: [x for rank in (1, 3) for x in ops.low_rank(*matrices(v, rank))],
    "outer": lambda ops, v: ops.outer(*(x * s for x, s in zip([matrices(v, 2)[1]] * 2, (3.0, v.scale), strict=True))),
}


def on_an_offset_grid(ops: ModuleType, v: Inputs) -> list[Tensor]:
    out = []
    for strata, levels, steps in ((2, 2, 1), (5, 2, 4), (5, 3, 9), (16, 16, 239), (1000, 2, 999)):
        draw = np.random.default_rng(strata)
        shifts = torch.from_numpy(draw.integers(0, strata, (1, v.d)).astype(np.int32))
        offset = torch.from_numpy(draw.integers(0, 65536, v.d).astype(np.int32))
        place = torch.arange(v.m) % strata
        for r in (v.r, v.r * 0.75):
            out.append(ops.encode_strata(v.u, r, v.private, v.tie, levels, strata, place, shifts, steps, offset))
            own = [draw._replace(slots=place) for draw in (v.private, v.tie)]
            out.append(ops.encode_strata(v.u, r, *own, levels, strata, v.shared, v.shared, steps, v.shared, True))
        with np.errstate(over="ignore"):
            out.append(ops.decode_strata(v.codes(levels), v.r, strata, steps, offset))
            out.append(ops.decode_strata(v.codes(levels), v.r, strata, steps, v.shared))
        out.append(ops.mean_strata(v.codes(levels), v.r, strata, steps, offset, 7))
        out.append(ops.mean_strata(v.codes(levels), v.r, strata, steps, v.shared, 7))
    return out


CASES |= {name: on_an_offset_grid for name in ("encode_strata", "decode_strata", "mean_strata")}


def summed(ops: ModuleType, v: Inputs) -> list[object]:
    """Sums of codes of 1 to 8 bits in digits, also of a code that there is not, and what the digits stand for."""
    out: list[object] = []
    for count in (2, 3, 4, 5, 17, 200, 256):
        bits, codes = (count - 1).bit_length(), v.codes(count)
        for last in (int(codes[-1, -1]), 2**bits - 1):
            codes[-1, -1] = last
            body, beyond = ops.fold_codes(reference.pack(codes, bits), count, v.d)
            assert beyond is (last >= count)
            out += [body, beyond]
    return out


def counted(ops: ModuleType, v: Inputs) -> list[object]:
    """Two bodies of few and of many digits a byte; then bytes that no digits make unless the base is a power of two."""
    out: list[object] = []
    for levels in (2, 3, 17, 256):
        body, _ = reference.fold_codes(reference.pack(v.codes(levels), (levels - 1).bit_length()), levels, v.d)
        values = torch.from_numpy(v.rng.normal(size=v.m * (levels - 1) + 1).astype(np.float32))
        out += ops.unfold_codes([body, body], values, [v.d, v.d])
        out += ops.unfold_codes([body, torch.full_like(body, 255)], values, [v.d, v.d])
    return out


CASES |= {"fold_codes": summed, "unfold_codes": counted}


def test_every_kernel_has_a_case_and_a_twin():
    assert sorted(CASES) == sorted(reference.__all__)
    assert all(callable(getattr(cpu, name)) for name in reference.__all__)
    assert kernels.of(torch.zeros(1)) is cpu, "numba is installed wherever the tests run"


@pytest.mark.parametrize("power", range(8, 19))
def test_long_rotations_on_any_number_of_threads(power):
    """Every grouping of the stages beyond registers, and the pieces of a scalar product: bytes and threads alike."""
    v = Inputs(1 + (power < 12), 2**power - 3 * (power % 2), 1.0)
    draws, size = [v.private, v.tie], 2**power
    y = reference.rotate_padded(v.u, draws, size)
    back, table = reference.rotate_padded_back(y, draws, v.d), torch.linspace(-2, 2, 8)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            same(cpu.rotate_padded(v.u, draws, size), y)
            same(cpu.rotate_padded_back(y, draws, v.d), back)
            same(cpu.dots(v.u, v.u), reference.dots(v.u, v.u))
            for ours, theirs in (
                (cpu.encode_signs(y), reference.encode_signs(y)),
                (cpu.encode_points(y, v.r.double(), table), reference.encode_points(y, v.r.double(), table)),
            ):
                for a, b in zip(ours, theirs, strict=True):
                    same(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("d", [257, 300, 511, 513, 4_099, 8_191, 65_537, 131_071, 200_001, 263_000])
def test_overlapping_rotations_on_any_number_of_threads(d):
    """An overlap of one coordinate and of nearly all, from one leaf to passes over memory, at any alignment."""
    v = Inputs(1 + (d < 2**18), d, 1.0)
    y, back = reference.rotate(v.u, [v.private, v.tie]), reference.rotate_back(v.u, [v.private, v.tie])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            same(cpu.rotate(v.u, [v.private, v.tie]), y)
            same(cpu.rotate_back(v.u, [v.private, v.tie]), back)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("d", [65_537, 200_001, 2**18, 600_000, 2**20 + 70_000])
def test_signs_of_long_rotations_on_any_number_of_threads(d):
    """Every count of rows in the last pass, padding that is left out, and zeros: the bytes of three steps in memory."""
    v = Inputs(1 + (d < 2**18), d, 1.0)
    v.u[0, d // 3 :] *= d % 2  # a row whose last blocks are zeros, as the padding is
    size = 1 << (d - 1).bit_length()
    expected = reference.rotate_signs(v.u, [v.private], size)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for a, b in zip(cpu.rotate_signs(v.u, [v.private], size), expected, strict=True):
                same(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16, 23, 31, 32, 255, 256])
def test_means_of_bits_with_one_scale(m):
    """Counted in planes, in bytes, in several rounds of bytes; columns of longer messages; a scale that overflows."""
    v = Inputs(m, 1100, 1.0)
    for d in (1, 513, 1100):
        for r in (1e-45, 0.3, 3.4e38):
            for payload in (v.bytes, v.bytes[:, 3:]):
                code, scale = payload[:, : (d + 7) // 8], torch.full((m,), r)
                same(cpu.mean_bits(code, scale, d, m + 3), reference.mean_bits(code, scale, d, m + 3))


@pytest.mark.parametrize("threads", [1, 2])
def test_long_rows_that_threads_share(threads):
    """TopK among pieces, ties across them, and blocks dealt by several threads: the reference's bytes."""
    d, shared, part = 600_000, Draw(torch.tensor([0xFFFFFFFF]), 3, 4, 5), torch.tensor([2, 0])
    u = torch.from_numpy(np.random.default_rng(1).normal(size=(2, d)).astype(np.float32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for v, k in ((u[:1], 6000), ((u[:1] * 4).round(), 6000), (torch.zeros(1, d), 3)):
            same(cpu.topk(v, k), reference.topk(v, k))
        for parts in (4, 7):
            values = cpu.gather_dealt(u, shared, part, parts, -(-d // parts))
            same(values, reference.gather_dealt(u, shared, part, parts, -(-d // parts)))
            tail = (shared, part, parts, d)
            same(cpu.scatter_dealt(values, *tail, 3.0), reference.scatter_dealt(values, *tail, 3.0))
            same(cpu.mean_dealt(values, *tail, 3.0, 5), reference.mean_dealt(values, *tail, 3.0, 5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted(CASES))
@shapes
@scales
def test_equal_bytes(name, shape, scale):
    # numpy warns of overflowing sums at 3e38, which are among the answers to compare.
    with np.errstate(over="ignore", invalid="ignore"):
        ours, theirs = CASES[name](reference, Inputs(*shape, scale)), CASES[name](cpu, Inputs(*shape, scale))
    for a, b in zip(*(x if isinstance(x, list) else [x] for x in (ours, theirs)), strict=True):
        same(a, b)


# ------------------------------------------------------------------------------------------------ ties
def on_the_border(h: np.ndarray, strata: int, place: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Vectors for r = 1 whose y lies on the 16-bit cell of each coordinate's own random half: z = cell + fraction."""
    cell = h.astype(np.int64) + place * 65536 - strata * 32768
    fraction = rng.choice([0.0, 0.25, 0.5, 0.75], cell.shape)
    return torch.from_numpy(((cell + fraction) / (strata * 32768.0)).astype(np.float32))


@pytest.mark.parametrize("strata", [1, 2, 4, 64])
def test_ties_of_bits_are_settled_alike(strata):
    """Every coordinate is made to tie with its half (counted), so every bit comes from the second word."""
    v = Inputs(3, 2500, 1.0)
    place = torch.arange(3) % strata
    shifts = reference.shifts(v.shared, 2500, strata)
    at = ((place[:, None] + shifts.long()) % strata).numpy()
    h, r = reference.halves(v.private, 2500).numpy(), torch.ones(3)
    u = on_the_border(h, strata, at, v.rng)
    cell, fraction = reference.bits.cells(u, r, strata)
    ties = (cell + strata * 32768 - at * 65536 == h).mean()
    assert ties > 0.99, "the vectors miss the border"
    arguments = (u, r, v.private, v.tie, strata, place, v.shared)
    same(reference.encode_bits(*arguments), cpu.encode_bits(*arguments))
    bits = reference.unpack(reference.encode_bits(*arguments), 2500, 1).numpy()
    second = (reference.words(v.tie, 2500).numpy() >> 8) * 2.0**-24
    assert np.array_equal(bits, second < fraction), "a tie is settled by v < fraction"


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_ties_of_levels_are_settled_alike(levels):
    v = Inputs(3, 2500, 1.0)
    h, r = reference.halves(v.private, 2500).numpy().astype(np.int64), torch.ones(3)
    below = v.rng.integers(0, levels - 1, h.shape)
    z = (below << 16) + h - (levels - 1) * 32768 + v.rng.choice([0.0, 0.25, 0.5, 0.75], h.shape)
    u = torch.from_numpy((z / ((levels - 1) * 32768.0)).astype(np.float32))
    cell, fraction = reference.bits.cells(u, r, levels - 1)
    assert (((cell + (levels - 1) * 32768) & 65535) == h).mean() > 0.9
    arguments = (u, r, v.private, v.tie, levels)
    same(reference.encode_levels(*arguments), cpu.encode_levels(*arguments))
    code = reference.unpack(reference.encode_levels(*arguments), 2500, (levels - 1).bit_length()).numpy()
    second = (reference.words(v.tie, 2500).numpy() >> 8) * 2.0**-24
    y = cell + (levels - 1) * 32768
    tied = (y & 65535) == h
    assert np.array_equal((code - (y >> 16))[tied], (second < fraction)[tied])


@pytest.mark.parametrize("strata", [1, 5])
@scales
def test_a_scale_of_zero_gives_fair_bits(strata, scale):
    """Whatever stands in the row: as the docstring says, and alike in both modules."""
    v = Inputs(3, 130, scale)
    arguments = (torch.zeros(3), v.private, v.tie, strata, torch.arange(3), torch.zeros(1, 130, dtype=torch.int32))
    bits = reference.encode_bits(torch.zeros(3, 130), *arguments)
    for ops in (reference, cpu):
        same(ops.encode_bits(v.u, *arguments), bits)
    if strata == 1:
        fair = reference.unpack(bits, 130, 1).double().mean()
        assert abs(float(fair) - 0.5) < 6 * 0.5 / 390**0.5  # six standard errors: 2e-9


def test_topk_ties_go_to_the_lowest_index():
    u = torch.tensor([[1.0, -2.0, 2.0, 0.0, -0.0, 1.0, -1.0, 2.0]])
    expected = {1: [1], 2: [1, 2], 3: [1, 2, 7], 4: [0, 1, 2, 7], 7: [0, 1, 2, 3, 5, 6, 7]}
    for ops in (reference, cpu):
        assert {k: ops.topk(u, k)[0].tolist() for k in expected} == expected


# ------------------------------------------------------------------------------------------------ meaning
@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_norms_are_rounded_up(ops):
    """r >= ||u|| always, and r is the least such float32: one step down is below the norm."""
    for scale in SCALES[1:]:
        u = Inputs(4, 130, scale).u
        with np.errstate(over="ignore"):
            r = ops.norms(u).numpy()
        exact = np.array([np.sqrt(sum(float(x) ** 2 for x in row)) for row in u])
        below = np.nextafter(r, np.float32(0)).astype(np.float64)
        # The exact norm is itself summed in float64, in another order: good to 1e-14.
        assert (r.astype(np.float64) >= exact * (1 - 1e-14)).all()
        assert (below <= exact * (1 + 1e-14)).all()
        assert (r >= u.abs().max(1).values.numpy()).all()


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_maxes_sees_what_is_not_finite(ops):
    u = torch.zeros(4, 9)
    u[0, 3], u[1, 8], u[2, 0] = float("nan"), float("-inf"), -3.0
    top = ops.maxes(u)
    assert torch.isnan(top[0])
    assert top[1:].tolist() == [float("inf"), 3.0, 0.0]


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_sums_run_from_row_to_row(ops):
    """Chunk after chunk gives the bits of one call, and the order is that of the rows: 2^60 + 1 - 2^60 = 0, not 1."""
    u = Inputs(7, 130, 1.0).u
    for cut in (1, 3, 6):
        total = torch.zeros(130, dtype=torch.float64)
        ops.add_rows(u[:cut], total)
        ops.add_rows(u[cut:], total)
        same((total / 7).float(), ops.mean_rows(u, 7))
    assert ops.mean_rows(torch.tensor([[2.0**60], [1.0], [-(2.0**60)]]), 1).tolist() == [0.0]


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_means_of_codes_are_means_of_rows(ops):
    v = Inputs(4, 130, 1.0)
    same(ops.mean_bits(v.bytes, v.r, 130, 9), ops.mean_rows(ops.decode_bits(v.bytes, v.r, 130), 9))
    values, index, pointer, _ = v.blocks()
    # A power of two scales exactly, so that scaling the sum is scaling the rows.
    rows = ops.scatter(values, index, pointer, 130, 4.0)
    same(ops.mean_sparse(values, index, pointer, 130, 4.0, 9).float() + 0.0, ops.mean_rows(rows, 9) + 0.0)


@given(st.data())
def test_pack_and_unpack(data):
    """unpack(pack(v)) = v; the bytes are the little-endian bytes of sum_j v_j 2^(j b), in both modules."""
    bits, m, count = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    rows = [data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)) for _ in range(m)]
    values = torch.tensor(rows)
    packed = [ops.pack(values, bits) for ops in (reference, cpu)]
    same(*packed)
    size = (count * bits + 7) // 8
    for row, out in zip(rows, packed[0], strict=True):
        assert out.numpy().tobytes() == sum(v << (j * bits) for j, v in enumerate(row)).to_bytes(size, "little")
    for ops in (reference, cpu):
        same(ops.unpack(packed[0], count, bits), values)


@given(st.data())
def test_equal_bytes_on_any_floats(data):
    """Rounding and selection on vectors of arbitrary finite floats, mixed over 80 orders of magnitude."""
    d = data.draw(st.integers(1, 20))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    u = torch.tensor([data.draw(st.lists(finite, min_size=d, max_size=d)) for _ in range(2)])
    r, slots = reference.maxes(u), torch.tensor([0, 1])
    private = Draw(slots, 0, 1, data.draw(st.integers(0, 2**64 - 1)))
    tie = private._replace(stream=2)
    for strata in (1, 3):
        arguments = (u, r, private, tie, strata, slots, private._replace(slots=slots[:1], stream=3))
        same(reference.encode_bits(*arguments), cpu.encode_bits(*arguments))
    same(reference.encode_levels(u, r, private, tie, 7), cpu.encode_levels(u, r, private, tie, 7))
    same(reference.topk(u, (d + 1) // 2), cpu.topk(u, (d + 1) // 2))
    same(reference.maxes(u), cpu.maxes(u))
    with np.errstate(over="ignore"):
        same(reference.norms(u), cpu.norms(u))


LEVELED = [
    *("decode_levels", "decode_natural", "decode_natural_levels", "decode_trits", "encode_levels", "encode_natural"),
    *("encode_natural_levels", "encode_trits", "mean_levels", "mean_natural", "mean_natural_levels", "mean_trits"),
    "sign_bits",
]


def coded(v: Inputs, name: str) -> list[object]:
    """The kernel of this name on long rows: four bits, nine, strata, digits."""
    kernel, place, shifts = getattr(cpu, name), torch.arange(v.m), torch.zeros(1, v.d, dtype=torch.int32)
    draws, more = (v.private, v.tie), (7,) if name.startswith("mean") else ()
    if name == "encode_levels":
        return [kernel(v.u, v.r, *draws, c, s, place, shifts) for c in (12, 300) for s in (1, 3)]
    rows = cpu.pack(v.codes(9), 9 if name.endswith("natural") else 4)
    arguments = {
        "sign_bits": (v.u,),
        "encode_trits": (v.u, v.r, *draws),
        "encode_natural": (v.u, v.private),
        "encode_natural_levels": (v.u, v.r, v.private, 5),
    }
    for verb in ("decode", "mean"):
        arguments |= {
            f"{verb}_levels": (rows, v.r, 12, v.d, *more),
            f"{verb}_natural_levels": (rows, v.r, 5, v.d, *more),
            f"{verb}_natural": (rows, v.d, *more),
            f"{verb}_trits": (rows[:, : (v.d + 4) // 5] % 9, v.r, v.d, *more),
        }
    out = kernel(*arguments[name])
    return [*out] if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("name", LEVELED)
def test_two_threads_give_the_bytes_of_one(name):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(coded(Inputs(2, 300_001, 1.0), name))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            same(a, b)
