"""Threads under the kernels: the same bytes from any number of them, from callers at once, and in a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal import kernels
from shoal.compressors import Independent
from shoal.kernels import Draw, cpu, reference
from shoal.kernels.cpu import bits
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.messages import Round

D = 2 * LEAST + 777  # the least that two threads share, and the end of a tile, a block of words and a byte


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def outputs(ops: object, m: int, d: int) -> dict[str, Tensor]:
    """What every kernel here makes of m rows of d coordinates."""
    rng = np.random.default_rng([m, d])
    u = torch.from_numpy(rng.standard_cauchy((m, d)).astype(np.float32))
    slots, place = torch.arange(m), torch.arange(m) % 5
    private, tie, shared = (Draw(rows, 7, k, 2**63 + 1) for k, rows in enumerate((slots, slots, torch.tensor([9]))))
    r, top = ops.norms(u), ops.maxes(u)
    code = ops.encode_bits(u, r, private, tie, 1, place, None, head=True)
    out = {"norms": r, "maxes": top, "code": code, "mean_abs": ops.mean_abs(u), "dots": ops.dots(u, u.flip(1))}
    out["square_norm"] = torch.tensor([ops.square_norm(u[0].double())], dtype=torch.float64)
    out["strata"] = ops.encode_bits(u, top, private, tie, 5, place, shared)
    out["decoded"] = ops.decode_bits(code[:, 4:], r, d)
    out["mean"] = ops.mean_bits(code[:, 4:], r, d, m + 1)
    out["mean of one scale"] = ops.mean_bits(out["strata"], r[:1].expand(m).contiguous(), d, 3)
    out["words"], out["below"] = ops.words(shared, d), ops.below(shared, d, 1000)
    return out


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        other = theirs[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.numpy().tobytes() == other.numpy().tobytes(), name


@pytest.mark.parametrize("shape", [(1, D), (5000, 55)], ids=str)
def test_equal_bytes_for_any_number_of_threads(shape, three_threads):
    """Long rows are cut, and many short ones dealt out: neither shows, in blocks of sums either."""
    ours = outputs(cpu, *shape)
    same(outputs(reference, *shape), ours)
    torch.set_num_threads(1)
    same(ours, outputs(cpu, *shape))


def test_a_norm_is_summed_in_blocks():
    """The order that the reference states, written out: lanes of a block, then the blocks from first to last."""
    u = np.random.default_rng(1).standard_normal(2**16 + 40).astype(np.float32)
    sums = []
    for block in (u[: 2**16], u[2**16 :]):
        lanes = [0.0] * 16
        for j, v in enumerate(block.astype(np.float64)):
            lanes[j % 16] += float(v * v)
        total = lanes[0]
        for lane in lanes[1:]:
            total += lane
        sums.append(total)
    for ops in (reference, cpu):
        assert ops.square_norm(torch.from_numpy(u.astype(np.float64))) == sums[0] + sums[1]


@pytest.mark.parametrize(("m", "cohort"), [(1, 1), (16, 16), (255, 300), (256, 7), (600, 601)])
@pytest.mark.parametrize("d", [1, 511, 1537])
def test_counted_means(m, cohort, d):
    """More rows than a byte counts; and the division that is left out changes nothing where it is left out."""
    rng = np.random.default_rng([m, d])
    payload = torch.from_numpy(rng.integers(0, 256, (m, (d + 7) // 8), np.uint8))
    scale = np.float32(rng.random())
    r = torch.full((m,), float(scale))
    mean = reference.mean_bits(payload, r, d, cohort).numpy()
    assert cpu.mean_bits(payload, r, d, cohort).numpy().tobytes() == mean.tobytes()
    out = np.empty(d, np.float32)
    bits._count_bits(payload.numpy(), float(scale), 0.0, cohort, out, 0, d)
    assert out.tobytes() == mean.tobytes()


def test_ranges_cover_everything_once(three_threads):
    for size in (0, 1, 99, 100, 1000, 1001, 1023, 1024, 3000):
        seen: list[tuple[int, int]] = []
        spread(lambda lo, hi, seen=seen: seen.append((lo, hi)), size, 64, 100)
        seen.sort()
        assert [lo for lo, _ in seen] == [0, *(hi for _, hi in seen[:-1])]
        assert seen[-1][1] == size
        assert all((hi - lo) % 64 == 0 for lo, hi in seen[:-1])
        assert len(seen) <= 3


@pytest.mark.parametrize("where", [0, 1000])
def test_an_error_in_a_share_reaches_the_caller(where, three_threads):
    """Whichever thread it comes from, and only once all of them have finished."""
    finished = []

    def work(lo: int, hi: int) -> None:
        if lo <= where < hi:
            raise ValueError("here")
        finished.append(lo)

    with pytest.raises(ValueError, match="here"):
        spread(work, 1500, 1, 100)
    assert len(finished) == 2


def encoded(d: int = D) -> bytes:
    u = torch.from_numpy(np.random.default_rng(0).standard_normal((1, d)).astype(np.float32))
    return Independent().encode(u, Round.full(3, 1, 1)).payload.numpy().tobytes()


def test_callers_at_once(three_threads):
    """Four Python threads encode at the same time, each with its own rows, and get what they get alone."""
    sizes = [D + 64 * k for k in range(4)]
    alone = [encoded(d) for d in sizes]
    results: list[list[bytes]] = [[] for _ in sizes]
    callers = [
        threading.Thread(target=lambda k=k: results[k].extend(encoded(sizes[k]) for _ in range(5))) for k in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [[expected] * 5 for expected in alone]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_encodes(three_threads):
    """The parent's threads are not in the child, which starts its own."""
    expected = encoded()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion may leave this branch: the child must not run the other tests
        try:
            os.write(writer, b"y" if encoded() == expected and encoded() == expected else b"n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == b"y"
    os.waitpid(child, 0)
    assert encoded() == expected


def test_the_compiled_kernels_are_the_ones_tested():
    assert kernels.of(torch.zeros(1)) is cpu
