"""The kernels for GPUs: the reference's bytes, on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter shows that a kernel computes what it should; it cannot show what a compiler makes of it. So those that
compute with floats are also compiled for a GPU, which needs none, and their code is searched for
instructions that would change bits. Both need Triton; without it they skip.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from test_kernels import CASES, Inputs, on_the_border, read, same
from torch.overrides import TorchFunctionMode

from shoal import kernels
from shoal.errors import ConfigError
from shoal.kernels import cpu, reference
from shoal.messages import Round

HERE = Path(__file__).parent
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

try:
    from shoal.kernels import gpu
except ImportError:  # the tests of devices need no Triton
    gpu = None
needs_triton = pytest.mark.skipif(gpu is None, reason='Triton is not installed: pip install "shoal[gpu]"')


def there(x):
    """x on the GPU where there is one."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    if isinstance(x, kernels.Draw):
        return x._replace(slots=x.slots.to(DEVICE))
    return [there(part) for part in x] if isinstance(x, list) else x


def back(x):
    """What a kernel returned, on the CPU."""
    if isinstance(x, tuple | list):
        return [back(part) for part in x]
    return x.cpu() if isinstance(x, torch.Tensor) else x


def one_nan(x):
    """x with one kind of NaN: a message that is refused gives NaNs, and their bits are nobody's promise."""
    floats = isinstance(x, torch.Tensor) and x.is_floating_point()
    return torch.where(x.isnan(), torch.full_like(x, float("nan")), x) if floats else x


class Carried:
    """A module of kernels whose arguments are taken to the GPU and whose results are brought back."""

    def __getattr__(self, name):
        def call(*arguments, **more):
            moved = [there(x) for x in arguments]
            out = getattr(gpu, name)(*moved, **{key: there(x) for key, x in more.items()})
            if name == "add_rows":
                arguments[1].copy_(moved[1])
            return back(out)

        return call


def levels(ops, v):
    """As `leveled` and `rounded` of test_kernels, fewer: the interpreter takes milliseconds for what takes none."""
    place, shifts = torch.arange(v.m) % 5, torch.from_numpy(v.rng.integers(0, 5, (1, v.d)).astype(np.int32))
    plain = [ops.encode_levels(v.u, v.r, v.private, v.tie, s) for s in (2, 15, 300)]
    placed, own = (place, shifts), [draw._replace(slots=torch.arange(v.m)) for draw in (v.private, v.tie)]
    plain.append(ops.encode_levels(v.u, v.r, *own, 3, 5, v.shared, v.shared))
    return [*plain, *(ops.encode_levels(v.u, v.r, v.private, v.tie, 3, 5, *placed, head) for head in (False, True))]


def within(ops, v):
    kept, out = ops.encode_within(v.u, v.r, v.private, v.tie, 5, torch.arange(v.m) % 5, v.shared)
    return [kept, out, ops.encode_within(v.u, v.r * 0.75, v.private, v.tie, 5, torch.arange(v.m) % 5, v.shared)[1]]


def bits(ops, v):
    place, shifts = torch.arange(v.m) % 5, torch.from_numpy(v.rng.integers(0, 5, (1, v.d)).astype(np.int32))
    out = [ops.encode_bits(v.u, v.r * 0.75, v.private, v.tie, 1, torch.zeros(v.m, dtype=torch.int64), None)]
    drawn = ops.encode_bits(v.u, v.r, v.private, v.tie, 1000, torch.arange(v.m), v.shared, head=True)
    own = [draw._replace(slots=torch.arange(v.m)) for draw in (v.private, v.tie)]
    drawn = [drawn, ops.encode_bits(v.u, v.r, *own, 5, v.shared, v.shared)]
    return [*out, *drawn, *(ops.encode_bits(v.u, v.r, v.private, v.tie, 5, place, s) for s in (shifts, None))]


def offset_grid(ops, v, name):
    out = []
    for strata, levels, steps in ((5, 3, 9), (1000, 2, 999)):
        place, shifts = torch.arange(v.m) % strata, torch.from_numpy(v.rng.integers(0, strata, (1, v.d)).astype("i4"))
        offset, code = torch.from_numpy(v.rng.integers(0, 65536, v.d).astype("i4")), v.codes(levels)
        if name == "encode_strata":
            where = (levels, strata, place, shifts, steps, offset)
            out.append(ops.encode_strata(v.u, v.r * 0.75, v.private, v.tie, *where))
        else:
            more = (7,) if name == "mean_strata" else ()
            out.append(getattr(ops, name)(code, v.r, strata, steps, offset, *more))
    return out


def pointed(ops, v, name):
    out, factor = [], 2.0 / v.r.double().clamp(min=1e-45)
    for bits in (1, 3, 8):
        table = torch.linspace(-2, 2, 2**bits)
        if name == "encode_points":
            out += ops.encode_points(v.u, factor, table)
        else:
            out.append(ops.decode_points(reference.pack(v.codes(2**bits), bits), v.r, table, v.d))
    return out


FEWER = CASES | {
    **{
        f"{verb}_strata": lambda ops, v, n=f"{verb}_strata": offset_grid(ops, v, n)
        for verb in ("encode", "decode", "mean")
    },
    **{f"{verb}_points": lambda ops, v, n=f"{verb}_points": pointed(ops, v, n) for verb in ("encode", "decode")},
    "decode_levels": lambda ops, v: read(lambda p, s: ops.decode_levels(p, v.r, s, v.d), v, (3, 9, 300)),
    "mean_levels": lambda ops, v: read(lambda p, s: ops.mean_levels(p, v.r, s, v.d, 7), v, (3, 9, 300)),
    "decode_natural_levels": lambda ops, v: read(
        lambda p, c: ops.decode_natural_levels(p, v.r, c // 2, v.d), v, (3, 255)
    ),
    "mean_natural_levels": lambda ops, v: read(
        lambda p, c: ops.mean_natural_levels(p, v.r, c // 2, v.d, 7), v, (3, 255)
    ),
    "encode_bits": bits,
    "encode_within": within,
    "encode_levels": levels,
    "encode_natural_levels": lambda ops, v: [ops.encode_natural_levels(v.u, v.r, v.private, s) for s in (1, 7, 127)],
    "decode_bits": lambda ops, v: ops.decode_bits(v.bytes, v.r, v.d),
    "mean_bits": lambda ops, v: ops.mean_bits(v.bytes, v.r, v.d, 7),
    "pack": lambda ops, v: [ops.pack(v.codes(2**b), b) for b in (0, 1, 3, 8, 31)],
    "unpack": lambda ops, v: [ops.unpack(reference.pack(v.codes(2**b), b), v.d, b) for b in (0, 1, 3, 8, 31)],
}


@needs_triton
@pytest.mark.parametrize("name", sorted(FEWER))
@pytest.mark.parametrize(("shape", "scale"), [((1, 1), 1.0), ((2, 130), 1e-39), ((1, 1100), 3e38)], ids=str)
def test_equal_bytes(name, shape, scale):
    with np.errstate(over="ignore", invalid="ignore"):
        ours, theirs = FEWER[name](reference, Inputs(*shape, scale)), FEWER[name](Carried(), Inputs(*shape, scale))
    for a, b in zip(*(x if isinstance(x, list) else [x] for x in (ours, theirs)), strict=True):
        same(one_nan(a), one_nan(b))


@needs_triton
def test_ties_are_settled_alike():
    """Every coordinate ties with its half, so that every bit comes from the second word."""
    v = Inputs(2, 300, 1.0)
    place, r = torch.arange(2), torch.ones(2)
    at = np.broadcast_to(place.numpy()[:, None], (2, 300))
    u = on_the_border(reference.halves(v.private, 300).numpy(), 4, at, v.rng)
    arguments = (u, r, v.private, v.tie, 4, place, None)
    same(cpu.encode_bits(*arguments), Carried().encode_bits(*arguments))
    u = on_the_border(reference.halves(v.private, 300).numpy(), 1, 0 * at, v.rng)
    arguments = (u, r, v.private, v.tie, 2)
    same(cpu.encode_levels(*arguments), Carried().encode_levels(*arguments))


@needs_triton
@pytest.mark.parametrize("n", [3, 16, 100, 128, 129])
def test_shifts_of_long_rows(n):
    """So long that words carry, also among the shifts that `encode_bits` draws for itself."""
    draw, u = Inputs(1, 1, 1.0).shared, torch.zeros(1, 4097)
    for d in (63, 129, 4097, 100_003):
        same(cpu.shifts(draw, d, n), Carried().shifts(draw, d, n))
    carried = reference.shifts(draw, 4097, n) != reference.halves(draw, 4097).long() * n >> 16
    assert n != 100 or carried.any()
    arguments = (u, torch.ones(1), draw._replace(stream=5), draw._replace(stream=6), n, torch.zeros(1).long(), draw)
    same(cpu.encode_bits(*arguments), Carried().encode_bits(*arguments))


@needs_triton
def test_negative_denormals_have_a_floor():
    """floor(-1e-40) is -1; where denormals are taken for zeros it is 0."""
    v = Inputs(2, 130, 1.0)
    u = torch.full((2, 130), -1e-45)
    for name in ("encode_bits", "encode_levels"):
        tail = (1, torch.zeros(2, dtype=torch.int64), None) if name == "encode_bits" else (3,)
        arguments = (u, torch.ones(2), v.private, v.tie, *tail)
        same(getattr(reference, name)(*arguments), getattr(Carried(), name)(*arguments))


@needs_triton
def test_rows_are_summed_block_by_block():
    """A block of 64 coordinates in 16 lanes, then the blocks in order: as numpy adds them one after the other."""
    from shoal.kernels.gpu.sums import sums

    u = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)) * 1e8
    u[:, ::3] = 1e-8
    squares = np.zeros((3, 5, 4, 16))
    squares.reshape(3, -1)[:, :300] = u.double().numpy() ** 2
    lanes = np.add.accumulate(squares, axis=2)[:, :, -1]
    blocks = np.add.accumulate(lanes, axis=2)[:, :, -1]
    expected = np.add.accumulate(blocks, axis=1)[:, -1]
    same(torch.from_numpy(expected.copy()), sums(there(u), there(u), block=64).cpu())


@needs_triton
@pytest.mark.parametrize(("power", "smaller"), [(13, {}), (9, {"FIRST": 4, "NEXT": 3, "HELD": 64})], ids=str)
def test_rotations_in_several_passes(power, smaller, monkeypatch):
    """Of a length that is no power of two, with and without padding, there and back; in two passes, and, made smaller,
    in three."""
    for name, value in smaller.items():
        monkeypatch.setattr(f"shoal.kernels.gpu.rotation.{name}", value)
    d, draws = 2**power - 5, [Inputs(1, 1, 1.0).private]
    u = torch.from_numpy(np.random.default_rng(0).normal(size=(1, d)).astype(np.float32))
    y = reference.rotate_padded(u, draws, 2**power)
    moved = [there(draw) for draw in draws]
    same(y, gpu.rotate_padded(there(u), moved, 2**power).cpu())
    same(reference.rotate_padded_back(y, draws, d), gpu.rotate_padded_back(there(y), moved, d).cpu())
    wide, two = y.repeat(1, 2)[:, : 2**power + 3].contiguous(), [*draws, draws[0]._replace(stream=5)]
    for turn in ("rotate", "rotate_back"):
        same(getattr(reference, turn)(wide, two), getattr(gpu, turn)(there(wide), there(two)).cpu())


@needs_triton
def test_kernels_are_called_alike():
    """By position or by name, also those that the host runs."""
    for name in reference.__all__:
        kernel = getattr(gpu, name)
        if kernel.__module__ != "shoal.kernels.gpu.hosted":
            assert [*inspect.signature(kernel).parameters] == [*inspect.signature(getattr(reference, name)).parameters]
    v = Inputs(2, 70, 1.0)
    same(reference.permutation(v.private, 70), gpu.permutation(draw=there(v.private), d=70).cpu())
    code = v.codes(3)
    coded = gpu.encode_entropy(there(code), levels=3, limit=70)
    for ours, theirs in zip(reference.encode_entropy(code, 3, 70), back(coded), strict=True):
        same(ours, theirs)
    start = torch.ones(2, 7, 2)
    factors = gpu.low_rank(u=there(v.u.reshape(2, 10, 7)), start=there(start))
    for ours, theirs in zip(reference.low_rank(v.u.reshape(2, 10, 7), start), back(factors), strict=True):
        same(ours, theirs)


@needs_triton
def test_no_rows_and_columns_of_a_wider_tensor():
    v, none = Inputs(2, 70, 1.0), torch.zeros(0, 5)
    assert gpu.norms(there(none)).shape == (0,)
    assert gpu.mean_rows(there(none), 3).tolist() == [0.0] * 5
    wide = torch.cat([torch.zeros(2, 4, dtype=torch.uint8), v.bytes], 1)
    same(reference.decode_bits(v.bytes, v.r, v.d), gpu.decode_bits(there(wide)[:, 4:], there(v.r), v.d).cpu())
    same(reference.unpack(v.bytes, 20, 3), gpu.unpack(there(wide)[:, 4:], 20, 3).cpu())


KINDS = {type(c): c for c in zoo.COMPRESSORS}  # the last of each class: its richest parameters


@needs_triton
@pytest.mark.parametrize("compressor", KINDS.values(), ids=repr)
def test_compressors_have_the_same_bytes(compressor, monkeypatch):
    n, d = 4, 11
    u = zoo.inputs("gaussian", n, d)
    rnd = zoo.round_of(compressor, u)
    sent = compressor.encode(u, rnd)
    expected = (zoo.rows_of(sent), compressor.decode(sent, rnd), compressor.aggregate(sent, rnd))
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "of", lambda tensor: gpu)
        rnd = replace(rnd.to(DEVICE), agreed=rnd.agreed)
        sent = compressor.encode(there(u), rnd)
        decoded, mean = compressor.decode(sent, rnd), compressor.aggregate(sent, rnd)
    assert {sent.payload.device.type, decoded.device.type, mean.device.type} == {DEVICE}
    assert [
        row[:size].cpu().numpy().tobytes() for row, size in zip(sent.payload, sent.nbytes, strict=True)
    ] == expected[0]
    same(expected[1], decoded.cpu())
    same(expected[2], mean.cpu())


# ------------------------------------------------------------------------------------------------ devices
class Devices(TorchFunctionMode):
    """Fails where a tensor is made on a device not named, or read by numpy without being brought to the CPU."""

    MADE = (torch.arange, torch.as_tensor, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros)

    def __init__(self):
        super().__init__()
        self.host = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in self.MADE or "device" in kwargs, f"{func.__name__} does not say on which device"
        assert func is not torch.from_numpy, "torch.from_numpy makes tensors of the CPU: torch.as_tensor(..., device=)"
        if func is torch.Tensor.cpu:
            self.host.append(args[0].clone())
            return self.host[-1]
        if func is torch.Tensor.numpy:
            assert any(args[0] is x for x in self.host), ".numpy() of a tensor that may be on a GPU: .cpu().numpy()"
        return func(*args, **kwargs)


class Unwatched:
    """The kernels, which may do as they please."""

    def __getattr__(self, name):
        def call(*arguments, **more):
            with torch._C.DisableTorchFunction():
                return getattr(cpu, name)(*arguments, **more)

        return call


@pytest.mark.parametrize("compressor", zoo.COMPRESSORS, ids=repr)
def test_compressors_say_on_which_device(compressor, monkeypatch):
    n, d = 4, 11
    u = zoo.inputs("gaussian", n, d)
    rnd = zoo.round_of(compressor, u)
    monkeypatch.setattr(kernels, "of", lambda tensor: Unwatched())
    compressor.decode(compressor.encode(u, rnd), rnd)  # tables that are made once and kept
    with Devices():
        sent = compressor.encode(u, rnd)
        compressor.decode(sent, rnd)
        compressor.aggregate(sent, rnd)


def test_devices_without_kernels_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="a tensor on meta: there are kernels for cpu and cuda"):
        kernels.of(torch.empty(1, device="meta"))
    with pytest.raises(ConfigError, match="rows on meta in a round on cpu"):
        zoo.COMPRESSORS[0].encode(torch.empty(2, 3, device="meta"), Round.full(0, 0, 2))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(kernels, "import_module", missing)
    kernels._gpu.cache_clear()
    with pytest.raises(ConfigError, match=r"need Triton: pip install \"shoal\[gpu\]\""):
        kernels._gpu()


# ------------------------------------------------------------------------------------------------ what a compiler makes
@needs_triton
@pytest.mark.slow
def test_compiled_code_keeps_the_bits():
    """It compiles, no product is fused with a sum, no denormal flushed, no quotient or root approximated, and no float
    is added by an atomic."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / "gpu_code.py", "90"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 30, done.stdout
