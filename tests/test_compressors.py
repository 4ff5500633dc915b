"""The battery of compressors: bytes, rows, hostile payloads, and every stated constant measured.

Statistical tests fix their seed (the round's index counts the samples) and allow six standard errors a comparison,
2e-9 for a normal variable; the few thousand comparisons of this file have a false-alarm rate below 1e-4 in all, once,
when the seed was chosen. Standard errors of biases come from the exact variance of each coordinate (`variance`), so
that an event that never happened is not mistaken for certainty.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import composition
import numpy as np
import offset_laws
import pointwise_laws
import pytest
import torch
import zoo
from golden import make
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import COMPRESSORS, FAMILIES, SHAPES, fits, inputs, round_of, rows_of

from shoal import kernels
from shoal.compressors import (
    QSGD,
    Bernoulli,
    Coded,
    Composed,
    Correlated,
    CorrelatedOffset,
    Dense,
    Grid,
    Independent,
    LowRank,
    NaturalDithering,
    PerLayer,
    PermK,
    RandK,
    Rotated,
    Scaled,
    TopK,
)  # fmt: skip
from shoal.compressors.correlated import exact_error
from shoal.compressors.drive import Turned, padded
from shoal.compressors.sparse import kept
from shoal.core import Compressor, Unbiased
from shoal.errors import ConfigError, NonFiniteError, WireError
from shoal.kernels import reference
from shoal.messages import Messages, Round
from shoal.theory import AB

every = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
# `numerical` changes the constants that are stated and no byte, so laws are measured once for both.
# The laws of one client under a random rotation are in test_rotation.py; Coded decodes to the bits of its inner one.
ALONE = [c for c in COMPRESSORS if not getattr(c, "numerical", False) and not isinstance(c, Coded | Rotated | Turned)]
laws = pytest.mark.parametrize("compressor", ALONE, ids=repr)
ROUNDING = [c for c in COMPRESSORS if isinstance(c, QSGD | Independent | Correlated | CorrelatedOffset | Grid)]
families = pytest.mark.parametrize("family", FAMILIES)


def encoded(compressor: Compressor, u: torch.Tensor, index: int = 0) -> tuple[Messages, Round]:
    rnd = round_of(compressor, u, index)
    return compressor.encode(u, rnd), rnd


# ------------------------------------------------------------------------------------------------ bytes
def paper_bytes(c: Compressor, n: int, d: int) -> int | set[int]:
    """Bytes of all n messages together, from the papers' formulas."""
    if isinstance(c, pointwise_laws.KINDS):
        return pointwise_laws.total_bytes(c, n, d)
    if isinstance(c, CorrelatedOffset):
        return offset_laws.total_bytes(c, n, d)
    k = kept(c.k, d, "") if isinstance(c, RandK | TopK) else 0
    if isinstance(c, Composed | Correlated | PerLayer | Scaled):
        return composition.paper_bytes(c, n, d, paper_bytes)
    if isinstance(c, Rotated):
        return paper_bytes(c.inner, n, d)
    if isinstance(c, Turned):
        return n * (4 + sum(math.ceil(count * bits / 8) for count, bits in c._parts(padded(d))))
    if isinstance(c, LowRank):
        return n * 4 * c.rank * (math.isqrt(d) + math.ceil(d / math.isqrt(d)))
    if isinstance(c, Grid):
        return n * (4 + math.ceil(d * math.ceil(math.log2(c.levels)) / 8))
    if isinstance(c, Dense):
        return n * 4 * d
    if isinstance(c, RandK):
        return n * 4 * k
    if isinstance(c, TopK):
        return n * (4 * k + math.ceil(k * math.ceil(math.log2(d)) / 8))
    if isinstance(c, PermK):
        return 4 * max(n, d)  # every coordinate once, or every client one coordinate
    if isinstance(c, QSGD):
        return n * (4 + math.ceil(d * math.ceil(math.log2(2 * c.levels + 1)) / 8))
    raise AssertionError(f"no formula for {c!r}")


@every
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_lengths_are_the_papers_and_within_capacity(compressor, n, d):
    if not fits(compressor, n, d):
        with pytest.raises(ConfigError, match=f"d={d}"):
            compressor.capacity(n, d)
        return
    for family in ("gaussian", "zeros"):
        msgs, _ = encoded(compressor, inputs(family, n, d))
        total, coded = int(msgs.nbytes.sum()), isinstance(compressor, Coded)
        expected = paper_bytes(compressor.inner if coded else compressor, n, d)
        possible = expected if isinstance(expected, set) else {expected}
        # Coded is as long as the inner one, or shorter: test_entropy.py says how long.
        assert total <= max(possible) if coded else total in possible
        assert int(msgs.nbytes.max()) <= compressor.capacity(n, d)
        assert (msgs.payload.dtype, msgs.nbytes.dtype, msgs.slots.dtype) == (torch.uint8, torch.int64, torch.int64)
        for row, size in zip(msgs.payload, msgs.nbytes, strict=True):
            assert not row[size:].any(), "bytes beyond a message's end are zero"


@every
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_rows_are_independent(compressor, n, d):
    """encode and decode of any rows, alone or in another order, give the bits of the whole batch."""
    if not fits(compressor, n, d):
        return
    u = inputs("gaussian", n, d)
    msgs, rnd = encoded(compressor, u, index=3)
    whole, decoded = rows_of(msgs), compressor.decode(msgs, rnd)
    for part in [*([i] for i in range(n)), list(range(n))[::-1], list(range(1, n))]:
        if not part:
            continue
        ids = torch.tensor(part)
        alone = compressor.encode(u[ids], rnd.rows(ids))
        assert rows_of(alone) == [whole[i] for i in part]
        assert compressor.decode(alone, rnd.rows(ids)).numpy().tobytes() == decoded[ids].numpy().tobytes()


@every
@families
def test_aggregate_is_the_mean_of_decoded_rows(compressor, family):
    for n, d in ((5, 12), (7, 3), (4, 130)):
        if fits(compressor, n, d):
            msgs, rnd = encoded(compressor, inputs(family, n, d))
            rows = compressor.decode(msgs, rnd)
            assert (rows.dtype, tuple(rows.shape)) == (torch.float32, (n, d))
            mean, out = rows.double().mean(0), compressor.aggregate(msgs, rnd)
            assert (out.dtype, tuple(out.shape)) == (torch.float32, (d,))
            # Decoded rows are rounded to float32 and so is the mean: 2^-23 of the largest entry covers both. A
            # rotation rounds at each of its stages, relative to the norm of a row.
            most = 12 * rows.norm(dim=1).max() if isinstance(compressor, Rotated) else rows.abs().max()
            assert (out.double() - mean).abs().max() <= 2.0**-23 * most


FRESH = """
import json, sys
import numpy as np, torch
from shoal.compressors import *
from shoal.messages import Messages, Round
folder = sys.argv[1]
out = {}
for i, job in enumerate(json.load(open(folder + "/jobs.json"))):
    payload = torch.from_numpy(np.fromfile(f"{folder}/{i}.bin", np.uint8).reshape(job["n"], -1))
    ids = torch.arange(job["n"])
    rnd = Round(job["index"], job["seed"], job["n"], ids, ids, job["n"], job["agreed"])
    msgs = Messages(payload, torch.tensor(job["nbytes"]), rnd.slots, job["d"])
    compressor = eval(job["compressor"])
    out[f"rows{i}"] = compressor.decode(msgs, rnd).numpy()
    out[f"mean{i}"] = compressor.aggregate(msgs, rnd).numpy()
np.savez(folder + "/out.npz", **out)
"""


def test_decode_in_a_fresh_process(tmp_path):
    """All a decoder gets is bytes in a file and the round's numbers; it gives the encoder's own bits."""
    jobs, expected = [], []
    for compressor in COMPRESSORS:
        for n, d in ((5, 12), (7, 3), (4, 130)):
            if fits(compressor, n, d):
                msgs, rnd = encoded(compressor, inputs("cauchy", n, d), index=17)
                msgs.payload.numpy().tofile(tmp_path / f"{len(jobs)}.bin")
                jobs.append({"compressor": repr(compressor), "n": n, "d": d, "index": 17, "seed": 0,
                             "nbytes": msgs.nbytes.tolist(), "agreed": rnd.agreed})  # fmt: skip
                expected.append((compressor.decode(msgs, rnd), compressor.aggregate(msgs, rnd)))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    root = str(Path(__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, env=env, timeout=300)
    with np.load(tmp_path / "out.npz") as found:
        for i, (rows, mean) in enumerate(expected):
            assert found[f"rows{i}"].tobytes() == rows.numpy().tobytes(), jobs[i]
            assert found[f"mean{i}"].tobytes() == mean.numpy().tobytes(), jobs[i]


@every
@pytest.mark.parametrize("ops", ["cpu", "reference"])
def test_golden_bytes(compressor, ops, monkeypatch):
    """The payloads of one fixed input, from both kernel modules. To change them on purpose: tests/golden/make.py."""
    if ops == "reference":
        monkeypatch.setattr(kernels, "cpu", reference)
    stored = json.loads((make.HERE / "payloads.json").read_text())
    u = make.vectors()
    rnd = round_of(compressor, u, make.INDEX, make.SEED)
    assert [row.hex() for row in rows_of(compressor.encode(u, rnd))] == stored[repr(compressor)]


def test_golden_bytes_cover_the_zoo():
    assert set(json.loads((make.HERE / "payloads.json").read_text())) == set(map(repr, COMPRESSORS))


# ------------------------------------------------------------------------------------------------ inputs
SPECIAL = {
    "zeros": [0.0],
    "negative zeros": [-0.0],
    "constant": [1.0],
    "least denormal": [1.4e-45],
    "denormals": [1e-44, -3e-42, 0.0],
    "tiny": [1e-30, -2e-30],
    "normal and denormal": [1.0, -1e-44],
    "huge": [1e30, -1e30, 3.0],
    "largest": [3.4028234663852886e38],
    "largest and least": [3.4028234663852886e38, -1.4e-45],
    "signs": [1.0, -1.0],
}


def overflows(c: Compressor, u: torch.Tensor) -> bool:
    """Whether what the compressor makes of u, by its definition, is beyond float32: a multiple, or a norm."""
    n, d = u.shape
    if isinstance(c, Coded):
        return overflows(c.inner, u)
    if isinstance(c, LowRank):
        return 2 * float(u.double().norm(dim=1).max()) > torch.finfo(torch.float32).max
    if isinstance(c, Composed | PerLayer | Scaled) or (isinstance(c, Correlated) and c.blocks > 1):
        return composition.overflows(c, u, overflows)
    if isinstance(c, Rotated | Turned):
        gain = float(d)
        if isinstance(c, Turned):
            table = c._table(c._parts(padded(d))[0][1])
            least = float(table.abs().min())
            gain = max(padded(d) ** 0.5 * float(table[-1]) / least, 1.0 / least)  # what is sent back, and the scale
        return float(u.double().norm(dim=1).max()) * gain > torch.finfo(torch.float32).max
    gain = d / kept(c.k, d, "") if isinstance(c, RandK) else min(n, d) if isinstance(c, PermK) else 1.0
    gain = pointwise_laws.gain(c) if isinstance(c, pointwise_laws.KINDS) else gain
    gain = offset_laws.gain(c, n) if isinstance(c, CorrelatedOffset) else gain
    owns = isinstance(c, Correlated | CorrelatedOffset) and c.scale == "own"
    normed = isinstance(c, QSGD | Independent | NaturalDithering) or owns
    most = float((u.double().norm(dim=1) if normed else u.double().abs().amax(1)).max()) * gain
    return most > torch.finfo(torch.float32).max


@every
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(("n", "d"), [(5, 12), (7, 3), (1, 9), (3, 1)])
def test_special_inputs(compressor, special, n, d):
    """Finite in, finite out, or an error that says what overflowed; never a changed argument or dtype."""
    if not fits(compressor, n, d):
        return
    pattern = torch.tensor(SPECIAL[special], dtype=torch.float32)
    u = pattern.repeat(n * d)[: n * d].reshape(n, d).clone()
    before = u.clone()
    if overflows(compressor, u):
        with pytest.raises(NonFiniteError, match=r"client 0, round 0.*overflows"):
            encoded(compressor, u)
        return
    msgs, rnd = encoded(compressor, u)
    rows, mean = compressor.decode(msgs, rnd), compressor.aggregate(msgs, rnd)
    assert torch.isfinite(rows).all()
    assert torch.isfinite(mean).all()
    assert u.numpy().tobytes() == before.numpy().tobytes()
    if not u.any():
        assert not rows.any(), "zeros stay zeros"
        assert not mean.any()


@pytest.mark.parametrize("compressor", ROUNDING, ids=repr)
@pytest.mark.parametrize("power", [-110, -85, -60, 40, 100])
def test_rounding_does_not_see_the_scale(compressor, power):
    """Multiplying by a power of two is exact, so it may change the scale on the wire and no bit of the codes."""
    u = inputs("cauchy", 5, 130)
    bits, scaled = (encoded(compressor, u * 2.0**p, index=1)[0].payload for p in (0, power))
    start = 0 if compressor.agrees else 4
    assert torch.equal(bits[:, start:], scaled[:, start:])


@every
def test_what_is_not_finite_is_named(compressor):
    """The client's id is in the error, not its row: here clients 7 and 9 are hosted."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        u = torch.ones(2, 12)
        u[1, 11] = bad
        rnd = Round.full(31, 0, 10, torch.tensor([7, 9]))
        doors = [compressor.prepare] if compressor.agrees else [compressor.encode]
        for door in doors:
            with pytest.raises(NonFiniteError, match=r"client 9, round 31.*not finite"):
                door(u, rnd)
    if compressor.agrees:
        with pytest.raises(NonFiniteError, match="client 9"):
            compressor.encode(u, replace(rnd, agreed=1.0))


@every
def test_wrong_dtypes_and_shapes(compressor):
    rnd = replace(Round.full(0, 0, 5), agreed=1.0)
    good = inputs("gaussian", 5, 12)
    wrong = [good.double(), good.half(), good.bfloat16(), good.long(), good[0], good[None], good[:4], good[:, :0]]
    for u in wrong:
        with pytest.raises(ConfigError, match="float32 with d >= 1"):
            compressor.encode(u, rnd)
    if compressor.agrees:
        with pytest.raises(ConfigError, match="float32 with d >= 1"):
            compressor.prepare(good.double(), rnd)
        with pytest.raises(ConfigError, match="agreed"):
            compressor.encode(good, Round.full(0, 0, 5))


@every
def test_strides_and_gradients_do_not_matter(compressor):
    """Transposed, strided and expanded rows, and rows that autograd watches, give the bytes of a plain copy."""
    wide = inputs("gaussian", 12, 24)
    for u in (wide[:, :5].T, wide[:5, ::2], wide[0, :12].expand(5, 12), wide[:5, 3:15].clone().requires_grad_()):
        msgs, rnd = encoded(compressor, u)
        assert rows_of(msgs) == rows_of(encoded(compressor, u.detach().clone().contiguous())[0])
        assert not compressor.decode(msgs, rnd).requires_grad


@pytest.mark.parametrize("k", [0, -1, 1.0, 0.0, 1.5, True, "3", None, float("nan")])
@pytest.mark.parametrize("kind", [RandK, TopK])
def test_impossible_k(kind, k):
    with pytest.raises(ConfigError, match="k is a number of coordinates"):
        kind(k)


@pytest.mark.parametrize("kind", [RandK, TopK])
def test_more_coordinates_than_there_are(kind):
    rnd = Round.full(0, 0, 5)
    for ask in (
        lambda c: c.check(5, 7),
        lambda c: c.capacity(5, 7),
        lambda c: c.encode(torch.zeros(5, 7), rnd),
        lambda c: c.omega(7) if kind is RandK else c.alpha(7),
    ):
        with pytest.raises(ConfigError, match=r"k must be in 1\.\.7"):
            ask(kind(8))
    kind(7).check(5, 7)
    assert kept(0.3, 2, "") == 1, "a fraction keeps one coordinate at least"


def test_impossible_parameters():
    for levels in (0, -1, 2.0, True, 16384):
        with pytest.raises(ConfigError, match="levels"):
            QSGD(levels)
    with pytest.raises(ConfigError, match="scale"):
        Correlated("l2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="proved"):
        Correlated(numerical=True)
    with pytest.raises(ConfigError, match="no omega"):
        Correlated().omega(10)


# ------------------------------------------------------------------------------------------------ hostile bytes
def accepts(compressor: Compressor, msgs: Messages, rnd: Round) -> None:
    """decode and aggregate raise a WireError, or give finite numbers of the right shape; nothing else."""
    for read, shape in ((compressor.decode, (len(msgs.slots), msgs.d)), (compressor.aggregate, (msgs.d,))):
        try:
            out = read(msgs, rnd)
        except WireError:
            continue
        assert tuple(out.shape) == shape
        assert torch.isfinite(out).all(), "a payload that is not a number was accepted"


@every
@settings(max_examples=60)
@given(st.data())
def test_hostile_payloads(compressor, data):
    """Random bytes of right and of wrong lengths."""
    n, d = 3, data.draw(st.sampled_from([3, 5, 12]))
    true, rnd = encoded(compressor, inputs("gaussian", n, d))
    wide = data.draw(st.one_of(st.just(true.payload.shape[1]), st.integers(0, 60)))
    body = data.draw(st.binary(min_size=n * wide, max_size=n * wide))
    payload = torch.tensor(list(body), dtype=torch.uint8).reshape(n, wide)
    sizes = st.lists(st.integers(0, 70), min_size=n, max_size=n)
    nbytes = data.draw(st.one_of(st.just(true.nbytes.tolist()), sizes))
    accepts(compressor, Messages(payload, torch.tensor(nbytes), rnd.slots, d), rnd)


@every
def test_truncated_and_padded_rows(compressor):
    for n, d in ((3, 12), (5, 3)):
        true, rnd = encoded(compressor, inputs("gaussian", n, d))
        for delta in (-1, 1, -4, 4):
            nbytes = true.nbytes.clone()
            nbytes[1] += delta
            wide = torch.cat([true.payload, torch.zeros(n, 8, dtype=torch.uint8)], 1)
            with pytest.raises(WireError):
                compressor.decode(Messages(wide, nbytes, rnd.slots, d), rnd)
        with pytest.raises(WireError):
            compressor.aggregate(replace(true, payload=true.payload[:, :-1]), rnd)


@every
@pytest.mark.parametrize("word", ["0000c07f", "0000807f", "000080ff", "ffff7f7f"])
def test_payloads_of_special_floats(compressor, word):
    """Every four bytes a NaN, an infinity, or the largest float32, which decoding would scale beyond it."""
    true, rnd = encoded(compressor, inputs("gaussian", 3, 12))
    pattern = torch.tensor(list(bytes.fromhex(word)), dtype=torch.uint8)
    payload = pattern.repeat(20)[: true.payload.shape[1]].expand(3, -1).clone()
    accepts(compressor, replace(true, payload=payload), rnd)


def test_payloads_that_are_no_message_of_theirs():
    """TopK's indices ascend within d; QSGD's levels are at most 2 s; a scale is finite and not negative."""
    rnd = Round.full(0, 0, 1)
    for compressor, body in (
        (TopK(2), bytes(8) + bytes([0b0001_0001])),  # index 1 twice
        (TopK(2), bytes(8) + bytes([0b0001_0010])),  # 2, then 1
        (TopK(2), bytes(8) + bytes([0b1111_0001])),  # 15 of d = 12
        (QSGD(1), np.float32(1).tobytes() + bytes([0b11, 0, 0])),
        (QSGD(1), np.float32(-1).tobytes() + bytes(3)),
        (Independent(), np.float32(np.nan).tobytes() + bytes(2)),
        (Correlated("max"), np.float32(np.inf).tobytes() + bytes(2)),
    ):
        payload = torch.tensor([list(body)], dtype=torch.uint8)
        with pytest.raises(WireError):
            compressor.decode(Messages(payload, torch.tensor([len(body)]), rnd.slots, 12), rnd)


# ------------------------------------------------------------------------------------------------ laws
SIX = 6.0
REGIMES = [(5, 7), (1, 4), (7, 3), (6, 3), (4, 8), (5, 5), (2, 1)]


class Moments(NamedTuple):
    """Of `samples` draws of C_1(u_1), ..., C_n(u_n)."""

    samples: int
    mean: np.ndarray  # (n, d) of the rows
    square: np.ndarray  # (n,) of ||C_i(u_i) - u_i||^2
    square_error: np.ndarray  # (n,) its standard error
    joint: float  # the mean of ||(1/n) sum C_i(u_i) - ubar||^2
    joint_error: float  # its standard error
    joint_most: float  # the largest of them


@cache
def moments(compressor: Compressor, family: str, n: int, d: int) -> Moments:
    """Independent laws come in one batch, joint ones round by round."""
    u = inputs(family, n, d)
    if isinstance(compressor, Unbiased | LowRank):  # a cohort of T n clients is T cohorts of n
        T = 20_000
        rnd = Round.full(0, 0, T * n)
        drawn = compressor.decode(compressor.encode(u.repeat(T, 1), rnd), rnd).double().reshape(T, n, d).numpy()
    else:
        T = 2 if isinstance(compressor, TopK) else 1_000
        rnd, drawn = round_of(compressor, u), np.empty((T, n, d))
        for k in range(T):
            now = round_of(compressor, u, k)
            drawn[k] = compressor.decode(compressor.encode(u, now), now).numpy()
    off = drawn - u.double().numpy()
    each, joint = (off**2).sum(2), (off.mean(1) ** 2).sum(1)
    error = math.sqrt(T)
    return Moments(
        T, drawn.mean(0), each.mean(0), each.std(0) / error, joint.mean(), joint.std() / error, joint.max()
    )  # fmt: skip


def regimes(compressor: Compressor, family: str) -> list[tuple[int, int]]:
    """(n, d) at which a law is measured: every case of PermK's constants, and some for the others."""
    if family not in ("gaussian", "identical", "one-hot"):
        return REGIMES[:1]
    chosen = REGIMES if isinstance(compressor, PermK) else REGIMES[:3]
    return [(n, d) for n, d in chosen if fits(compressor, n, d)]


def scales(c: Compressor, u: np.ndarray) -> np.ndarray:
    """(n, 1): the r_i of a compressor that rounds onto [-r_i, r_i]."""
    if isinstance(c, Grid) or (isinstance(c, Correlated | CorrelatedOffset) and c.scale != "own"):
        top = np.abs(u).max(1, keepdims=True)
        return np.full_like(top, top.max()) if c.agrees else top
    return np.linalg.norm(u, axis=1, keepdims=True)


def variance(c: Compressor, u: np.ndarray) -> np.ndarray:
    """(n, d): the exact variance of each coordinate of C_i(u_i)."""
    n, d = u.shape
    if isinstance(c, pointwise_laws.KINDS):
        return pointwise_laws.variance(c, u)
    if isinstance(c, RandK):
        return u**2 * (d / kept(c.k, d, "") - 1.0)
    if isinstance(c, PermK):
        return u**2 * (min(n, d) - 1.0)
    if isinstance(c, Composed | PerLayer) or (isinstance(c, Correlated) and c.blocks > 1):
        return composition.variance(c, u, variance)
    r = scales(c, u)
    if isinstance(c, CorrelatedOffset):
        return offset_laws.variance(c, u, r)
    if isinstance(c, Correlated):
        return composition.grid_variance(u, r, c.levels)
    if isinstance(c, Grid):
        z = (u + r) * (c.levels - 1) / (2 * np.where(r > 0, r, 1.0))
        f = z - np.floor(z)
        return (2 * r / (c.levels - 1)) ** 2 * f * (1.0 - f)
    if isinstance(c, QSGD):
        z = c.levels * np.abs(u) / np.where(r > 0, r, 1.0)
        f = z - np.floor(z)
        return (r / c.levels) ** 2 * f * (1.0 - f)
    assert isinstance(c, Dense), f"no variance for {c!r}"
    return np.zeros_like(u) if isinstance(c, Dense) else np.maximum(0.0, r**2 - u**2)


@laws
@families
def test_unbiased(compressor, family):
    """Each coordinate of each client, on fixed vectors: |mean - u_ij| within six standard errors, and 2^-20 of the
    row's scale for float32. Where the variance is zero, that leaves equality to rounding."""
    if not hasattr(compressor, "ab"):
        return
    for n, d in regimes(compressor, family):
        u, seen = inputs(family, n, d).double().numpy(), moments(compressor, family, n, d)
        error = np.abs(seen.mean - u)
        allowed = SIX * np.sqrt(variance(compressor, u) / seen.samples) + 2.0**-20 * scales(compressor, u)
        if isinstance(compressor, Grid):
            # The largest entry is a grid point, from which a rounded quotient sends it to the next with probability
            # below (levels-1) 2^-23: two such samples are allowed for (three: below 1e-7 for 5 levels).
            allowed += 2 * 2 * scales(compressor, u) / (compressor.levels - 1) / seen.samples
        assert (error <= allowed).all(), (n, d)


@laws
@families
def test_variance_of_every_client(compressor, family):
    """The measured squared error against `variance`, for each client; with it omega, and for a biased one alpha."""
    for n, d in regimes(compressor, family):
        u, seen = inputs(family, n, d).double().numpy(), moments(compressor, family, n, d)
        size = (u**2).sum(1)
        if hasattr(compressor, "ab"):
            exact = variance(compressor, u).sum(1)
            assert (np.abs(seen.square - exact) <= SIX * seen.square_error + 1e-6 * (exact + size)).all(), (n, d)
            if zoo.has(compressor, "omega"):
                assert (exact <= compressor.omega(d) * size * (1 + 1e-9) + 1e-12).all(), (n, d)
        if hasattr(compressor, "alpha"):
            allowed = SIX * seen.square_error + 1e-6 * size  # TopK is not random: its standard error is 0
            assert (seen.square <= (1.0 - compressor.alpha(d)) * size + allowed).all(), (n, d)


def test_omega_is_tight():
    """RandK and Independent (and Correlated with the norm as its scale) for every vector; QSGD at (1, ..., 1) where
    d >= 4 s^2, and below that at most what is stated."""
    for family in FAMILIES[:-1]:
        u = inputs(family, 5, 7).double().numpy()
        for c in (RandK(1), RandK(3), RandK(0.3), Independent(), Correlated("own")):
            assert np.allclose(variance(c, u).sum(1), c.omega(7) * (u**2).sum(1), rtol=1e-12)
    for s, d in ((1, 4), (1, 7), (2, 16), (3, 40), (3, 36)):
        ones = np.ones((1, d))
        assert variance(QSGD(s), ones).sum() / d == pytest.approx(QSGD(s).omega(d), rel=1e-12)
        assert QSGD(s).omega(d) == pytest.approx(math.sqrt(d) / s - 1, rel=1e-12)
        u, rnd = torch.ones(20_000, d), Round.full(0, 0, 20_000)
        square = (QSGD(s).decode(QSGD(s).encode(u, rnd), rnd).double() - 1.0).square().sum(1) / d
        assert abs(float(square.mean()) - QSGD(s).omega(d)) <= SIX * float(square.std()) / math.sqrt(20_000) + 1e-6


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_omega_of_qsgd_is_never_exceeded(d, s, seed):
    """Random vectors, and the worst kind: all fractions one half."""
    rng = np.random.default_rng(seed)
    worst = (rng.integers(0, s, d) + 0.5) / s
    for u in (rng.normal(size=d), rng.standard_cauchy(d), worst):
        assert variance(QSGD(s), u[None]).sum() <= QSGD(s).omega(d) * (u**2).sum() * (1 + 1e-9)


@settings(max_examples=100)
@given(st.data())
def test_alpha_of_topk(data):
    """||C(u) - u||^2 <= (1 - k/d) ||u||^2 for every u, with equality at (1, ..., 1)."""
    d = data.draw(st.integers(1, 30))
    c = TopK(data.draw(st.integers(1, d)))
    entries = st.floats(-1e6, 1e6, width=32)
    u = torch.tensor([data.draw(st.lists(entries, min_size=d, max_size=d)), [1.0] * d])
    rnd = Round.full(0, 0, 2)
    lost = (c.decode(c.encode(u, rnd), rnd).double() - u.double()).square().sum(1)
    bound = (1.0 - c.alpha(d)) * u.double().square().sum(1)
    assert float(lost[0]) <= float(bound[0]) * (1 + 1e-12) + 1e-300
    assert float(lost[1]) == pytest.approx(float(bound[1]), abs=1e-9)


def stated(compressor: Compressor, n: int, d: int) -> list[AB]:
    """Every AB inequality that it states: the first and what stands in `other`."""
    found, ab = [], compressor.ab(n, d)
    while ab is not None:
        found.append(ab)
        ab = ab.other
    return found


def ab_bound(ab: AB, u: np.ndarray) -> float:
    """The right side of the AB inequality."""
    squares = (u**2).sum(1)
    return float(ab.a * squares.mean() - ab.b * (u.mean(0) ** 2).sum() + ab.c * squares.max())


@every
@families
def test_ab_inequality(compressor, family):
    """E||(1/n) sum C_i(u_i) - ubar||^2 against the stated constants, with equality where the docstring claims it."""
    if not hasattr(compressor, "ab"):
        return
    measured = replace(compressor, numerical=False) if getattr(compressor, "numerical", False) else compressor
    measured = compressor.inner if isinstance(compressor, Coded) else measured
    for n, d in regimes(compressor, family):
        u, seen = inputs(family, n, d).double().numpy(), moments(measured, family, n, d)
        rounding = 1e-6 * (u**2).sum()
        for ab in stated(compressor, n, d):
            bound = ab_bound(ab, u)
            assert seen.joint <= bound + SIX * seen.joint_error + rounding, (n, d)
            if isinstance(compressor, RandK | PermK | Bernoulli) or compressor == Independent():
                assert seen.joint >= bound - SIX * seen.joint_error - rounding, (n, d)
        if isinstance(compressor, PermK) and family == "identical" and (d >= n or n % d == 0):
            assert seen.joint_most <= rounding, "equal inputs are aggregated without error"


def test_permk_constants():
    """The published ones; with a remainder, A - B = r (d - r) / n^2 is what equal inputs still lose."""
    assert (PermK().ab(5, 7).a, PermK().ab(5, 7).b) == (1.0, 1.0)
    assert (PermK().ab(1, 7).a, PermK().ab(1, 7).b) == (0.0, 0.0)
    for n, d in ((6, 3), (7, 3), (11, 4), (100, 99)):
        ab, r = PermK().ab(n, d), n % d
        assert ab.a - ab.b == pytest.approx(r * (d - r) / n**2, abs=1e-12)
        if r == 0:
            assert ab.a == pytest.approx((d - 1) / (n - 1), rel=1e-12)


def test_permk_messages_tile_the_coordinates():
    """d >= n: every coordinate comes from exactly one client. d < n: from floor(n/d) or ceil(n/d)."""
    for n, d in REGIMES[:6]:
        for k in range(20):
            msgs, rnd = encoded(PermK(), torch.ones(n, d), index=k)
            rows = PermK().decode(msgs, rnd)
            senders = (rows != 0).sum(0)
            assert set(senders.tolist()) <= ({1} if d >= n else {n // d, -(-n // d)})
            assert set(rows[rows != 0].tolist()) == {float(min(n, d))}


# ------------------------------------------------------------------------------------------------ correlated rounding
def correlated_inputs(kind: str, n: int, d: int) -> np.ndarray:
    rng = np.random.default_rng([n, d])
    same, apart = rng.normal(size=d), rng.normal(size=(n, d))
    if kind == "homogeneous":
        return np.tile(same, (n, 1))
    if kind == "near-homogeneous":
        return same + 0.05 * apart
    if kind == "one active client":
        return np.where(np.arange(n)[:, None] == n - 1, apart, 0.0)
    return apart


@pytest.mark.parametrize("scale", ["shared", "own", "max"])
@pytest.mark.parametrize(("n", "d"), [(2, 8), (5, 8), (16, 32)])
@pytest.mark.parametrize("kind", ["homogeneous", "near-homogeneous", "gaussian", "one active client"])
def test_exact_error_of_correlated_rounding(scale, n, d, kind):
    """The formula against 300 rounds of the bytes, on vectors written out 512/d times: the coordinates of a round are
    so many samples of one law. Standard error at most 2 %, mostly below 1 %."""
    u = np.tile(correlated_inputs(kind, n, d), (1, 512 // d)).astype(np.float32)
    compressor, rows = Correlated(scale), torch.from_numpy(u)
    mean, start = u.astype(np.float64).mean(0), round_of(compressor, rows)
    errors = np.empty(300)
    for k in range(300):
        rnd = replace(start, index=k)
        errors[k] = ((compressor.aggregate(compressor.encode(rows, rnd), rnd).double().numpy() - mean) ** 2).sum()
    exact = exact_error(u, scales(compressor, u.astype(np.float64))[:, 0])
    error = errors.std() / math.sqrt(len(errors))
    assert error <= 0.02 * exact
    assert abs(errors.mean() - exact) <= SIX * error


def adversaries(n: int, d: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Vectors on which correlated rounding is at its worst or its bounds are tight."""
    half = np.where(np.arange(n)[:, None] < n / 2, 1.0, -1.0) * np.ones(d)
    ramp = np.linspace(-1, 1, n)[:, None] * np.ones(d)
    lone = np.zeros((n, d))
    lone[0, 0] = 1.0
    middle = np.full((n, d), 1.0 / n - 1.0 + 1e-3)
    middle[0, 0] = 1.0
    return [
        half, ramp, lone, middle, np.ones((n, d)), rng.normal(size=(n, d)), rng.standard_cauchy((n, d)),
        rng.choice([-1.0, 0.0, 1.0], (n, d)), np.round(rng.uniform(-1, 1, (n, d)) * n) / n, np.eye(n, d),
        np.tile(rng.uniform(-1, 1, d), (n, 1)) + 1e-2 * rng.normal(size=(n, d)),
    ]  # fmt: skip


def hardest(ratio, n: int, d: int, steps: int = 60) -> float:
    """The largest ratio that the adversaries and a random search from the three worst of them reach."""
    rng = np.random.default_rng([n, d])
    found = sorted(((ratio(u), i, u) for i, u in enumerate(adversaries(n, d, rng))), reverse=True)
    best = found[0][0]
    for value, _, u in found[:3]:
        width = 0.5
        for _ in range(steps):
            moved = u + width * rng.normal(size=u.shape) * (rng.random(u.shape) < 0.5)
            new = ratio(moved)
            if new > value:
                value, u = new, moved
            else:
                width = max(1e-3, 0.93 * width)
        best = max(best, value)
    return best


SEARCHED = [(2, 1), (2, 2), (2, 8), (3, 4), (4, 40), (5, 1), (5, 3), (8, 2), (16, 4)]


def spread(u: np.ndarray) -> tuple[float, float]:
    """(M, V): the mean square and how much the clients differ."""
    M = float((u**2).sum(1).mean())
    return M, M - float((u.mean(0) ** 2).sum())


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize(("n", "d"), SEARCHED)
def test_shared_scale_theorem(n, d, levels):
    """E||error||^2 <= d Delta^2 / (4 n^2) + V, Delta = 2 R / (levels - 1), R = max |u_ij|: never exceeded (the search
    reaches ratios close to 1), and never worse than independent rounding on the same grid."""

    def ratio(u: np.ndarray) -> float:
        R = np.abs(u).max()
        return exact_error(u, np.full(n, R), levels) / (d * (2 * R / (levels - 1)) ** 2 / (4 * n**2) + spread(u)[1])

    def against_independent(u: np.ndarray) -> float:
        R = np.abs(u).max()
        step = 2 * R / (levels - 1)
        f = (u + R) / step - np.floor((u + R) / step)
        independent = step**2 * (f * (1 - f)).sum() / n**2
        return (exact_error(u, np.full(n, R), levels) + 1e-12) / (independent + 1e-12)

    assert hardest(ratio, n, d) <= 1 + 1e-9
    assert hardest(against_independent, n, d) <= 1 + 1e-9


@pytest.mark.parametrize("scale", ["own", "max"])
@pytest.mark.parametrize(("n", "d"), SEARCHED)
def test_own_scales(n, d, scale):
    """((d - 1)/n, 0): proved, tight for own scales where one client is active. The l2 scales' second inequality and
    the numerical constants survive the same search."""
    proved, numerical = (Correlated(scale, numerical=b).ab(n, d) for b in (False, True))

    def ratio(ab: AB, u: np.ndarray) -> float:
        bound = ab_bound(ab, u)
        error = exact_error(u, scales(Correlated(scale), u)[:, 0])
        return (error + 1e-12) / (bound + 1e-12)

    assert (proved.a, proved.b, proved.c) == ((d - 1) / n, 0.0, 0.0)
    assert proved.evidence == "proved"
    assert numerical.evidence == "numerical"
    assert (numerical.a - numerical.b, numerical.b) == (pytest.approx(d / n**2), max(d / n, 0.5))
    for ab in [*stated(Correlated(scale), n, d), numerical]:
        assert hardest(lambda u, ab=ab: ratio(ab, u), n, d) <= 1 + 1e-9, ab
    if scale == "own":
        assert (proved.other.a - proved.other.b, proved.other.b) == (pytest.approx(d / n**2), 1 + (d - 1) / (n - 1))
        alone = correlated_inputs("one active client", n, d)
        assert ratio(proved, alone) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [*SEARCHED, (2, 64), (6, 50)])
def test_shared_constants(n, d):
    """a = b = 1, c = d/n^2: with R^2 <= max ||u_i||^2 the theorem's d R^2/n^2 + V. For even n < sqrt(d) a second one,
    that trades c for a: nothing that the search finds exceeds either."""
    first, *others = stated(Correlated(), n, d)
    assert (first.a, first.b, first.c, first.evidence) == (1.0, 1.0, d / n**2, "proved")
    assert len(others) == (n % 2 == 0 and d > n * n)
    for ab in others:
        lam = math.sqrt(d) / n
        assert (ab.a, ab.b, ab.c, ab.evidence) == (lam, 1.0, pytest.approx(d / (lam * n**2)), "proved")
    for ab in (first, *others):

        def ratio(u: np.ndarray, ab: AB = ab) -> float:
            return (exact_error(u, np.full(n, np.abs(u).max())) + 1e-12) / (ab_bound(ab, u) + 1e-12)

        assert hardest(ratio, n, d, steps=30) <= 1 + 1e-9, ab


def test_strata_are_hit_once():
    """All clients at one value y: of n uniforms one a stratum, ceil or floor of n y lie below y in every coordinate."""
    n, d = 7, 500
    for y in (0.0, 0.13, 0.5, 0.86, 1.0):
        u = torch.full((n, d), 2 * y - 1)
        rnd = replace(Round.full(3, 0, n), agreed=1.0)
        ups = (Correlated().decode(Correlated().encode(u, rnd), rnd) > 0).sum(0)
        assert set(ups.tolist()) <= {math.floor(n * y), math.ceil(n * y)}
