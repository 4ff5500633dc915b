"""Threads under the kernels: the same bytes from any number of them, from callers at once, and in a forked child."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from shoal import kernels
from shoal.compressors import Correlated, Independent
from shoal.errors import ConfigError, NonFiniteError
from shoal.kernels import Draw, cpu, reference
from shoal.kernels.cpu import bits, threads
from shoal.kernels.cpu.threads import LEAST, PIECES, spread
from shoal.kernels.cpu.vectors import FAR
from shoal.messages import Round

D = 2 * LEAST + 777  # the least that two threads share, and the end of a tile, a block of words and a byte


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads, woken for whatever they are called for."""
    monkeypatch.setattr(threads, "WAKE", 2)
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
    out["strata"], within = ops.encode_within(u, top, private, tie, 5, place, shared)
    assert within
    out["decoded"] = ops.decode_bits(code[:, 4:], r, d)
    out["mean"] = ops.mean_bits(code[:, 4:], r, d, m + 1)
    out["mean of one scale"] = ops.mean_bits(out["strata"], r[:1].expand(m).contiguous(), d, 3)
    out["words"], out["below"] = ops.words(shared, d), ops.below(shared, d, 1000)
    out["shifts"] = ops.shifts(shared, d, 100)
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


@njit
def note(seen, lo, hi):
    """Where a range begins, how long it is; and one more for every coordinate."""
    seen[0, lo] = hi - lo
    for j in range(lo, hi):
        seen[1, j] += 1


@njit
def odd_one(x, lo, hi):
    """Whether a number in lo..hi-1 is not 0. Raises where one is below 0, with what is done before it."""
    found = False
    for j in range(lo, hi):
        if x[j] < 0:
            raise ValueError("a number below 0")
        found |= x[j] > 0
        x[j] = 7
    return found


def test_rows_that_come_from_memory():
    """What long rows are made of has the bits of their parts; and for parts of a block, those of the reference."""
    d, rng = FAR + 776, np.random.default_rng(2)
    half = d // 16 * 8
    for m in (3, 40):
        payload, r = torch.from_numpy(rng.integers(0, 256, (m, d // 8), np.uint8)), torch.full((m,), 1.5)
        parts = [cpu.mean_bits(payload[:, a // 8 : b // 8], r, b - a, m) for a, b in ((0, half), (half, d))]
        assert torch.equal(cpu.mean_bits(payload, r, d, m), torch.cat(parts))
    u = torch.from_numpy(rng.standard_normal((1, d), np.float32))
    for parts in (16, 1000):
        args = (u, Draw(torch.tensor([9]), 7, 1, 5), torch.tensor([3]), parts, -(-d // parts))
        assert torch.equal(cpu.gather_dealt(*args), reference.gather_dealt(*args))


@pytest.mark.parametrize("spoiled", [float("nan"), float("-inf"), 1.5])
@pytest.mark.parametrize("shape", [(2, D), (5000, 55)], ids=str)
def test_what_a_shared_scale_does_not_hold_is_found_in_every_piece(shape, spoiled, three_threads):
    """A NaN, an infinity or an entry above the scale, in the last row, or in the last but one of many."""
    rnd, u = replace(Round.full(0, 0, shape[0]), agreed=1.0), torch.ones(shape)
    assert Correlated().encode(u, rnd).payload.shape == (shape[0], -(-shape[1] // 8))
    for i, j in ((shape[0] - 1, 0), (shape[0] - 2, shape[1] // 2), (shape[0] - 1, shape[1] - 1)):
        u[i, j] = spoiled
        with pytest.raises(ConfigError if spoiled == 1.5 else NonFiniteError) as caught:
            Correlated().encode(u, rnd)
        if spoiled != 1.5:
            assert caught.value.clients == (i,)
        u[i, j] = 1.0


@pytest.mark.parametrize(("m", "d"), [(1, FAR + 777), (3, FAR // 2 + 1)])
def test_what_is_written_past_the_caches(m, d, three_threads):
    """Decoded rows have the reference's bits whether they begin with a line of the cache (the second of three does
    not), and a code that stands for nothing is found wherever it is."""
    rng = np.random.default_rng(d)
    codes, r = torch.from_numpy(rng.integers(0, 15, (m, d))), torch.from_numpy(rng.uniform(0, 2, m).astype(np.float32))
    signs, packed = cpu.pack(codes % 2, 1), cpu.pack(codes, 4)
    assert torch.equal(cpu.decode_bits(signs, r, d), reference.decode_bits(signs, r, d))
    values, beyond = cpu.decode_levels(packed, r, 15, d)
    assert not beyond
    assert torch.equal(values, reference.decode_levels(packed, r, 15, d)[0])
    for j in (0, d // 2, d - 1):
        spoiled = codes.clone()
        spoiled[-1, j] = 15
        assert cpu.decode_levels(cpu.pack(spoiled, 4), r, 15, d)[1]


def test_ranges_cover_everything_once(three_threads):
    for size in (1, 99, 100, 1000, 1001, 1023, 1024, 3000):
        seen = np.zeros((2, size), np.int64)
        spread(note, (seen,), size, 64, 100)
        assert (seen[1] == 1).all()
        starts = np.flatnonzero(seen[0])
        assert all(length % 64 == 0 for length in seen[0, starts[:-1]])
        assert len(starts) == 1 if size < 200 else 1 < len(starts) <= 3 * PIECES


@pytest.mark.parametrize("where", [0, 1000, 1499])
def test_what_a_range_finds_reaches_the_caller(where, three_threads):
    """Whichever thread it comes from: a True, or an exception, and that only once all ranges have been dealt with."""
    for least in (100, 1500):
        x = np.zeros(1500)
        assert spread(odd_one, (x,), 1500, 1, least) is False
        x[:] = 0
        x[where] = 1
        assert spread(odd_one, (x,), 1500, 1, least) is True
    x[:] = 0
    x[where] = -1
    with pytest.raises(ValueError, match="below 0"):
        spread(odd_one, (x,), 1500, 1, 100)
    assert 1500 - np.count_nonzero(x == 7) <= 125 == 1500 // (3 * PIECES)
    assert spread(odd_one, (np.zeros(1500),), 1500, 1, 100) is False


def test_a_task_is_given_up_by_none(three_threads):
    """Many small tasks one after the other, and from several callers: each is whole when `spread` returns."""

    def caller(wrong: list[int]) -> None:
        for size in range(200, 700):
            seen = np.zeros((2, size), np.int64)
            spread(note, (seen,), size, 1, 1)
            wrong.extend([size] * int((seen[1] != 1).any()))

    wrong: list[int] = []
    callers = [threading.Thread(target=caller, args=(wrong,)) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def test_nobody_watches_an_empty_board_for_long(three_threads):
    """Threads that have nothing to do sleep: an idle process takes no CPU time. And they wake up again."""
    encoded()
    deadline = time.monotonic() + 5.0
    while len(threads._crew.asleep) < threads._crew.size and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(threads._crew.asleep) == threads._crew.size > 0
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.05
    before = encoded()
    assert encoded() == before
    while len(threads._crew.asleep) < threads._crew.size and time.monotonic() < deadline:
        time.sleep(0.01)
    seen = np.zeros((2, 200), np.int64)
    threads.WAKE = 8  # nobody is woken for little, and the caller does it
    spread(note, (seen,), 200, 1, 50)
    assert (seen[1] == 1).all()
    assert np.count_nonzero(seen[0]) == 1


def in_a_thread(call):
    """What it returns; the affinity that it leaves behind ends with its thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(not threads._KNOWN, reason="cores cannot be chosen here")
def test_a_thread_keeps_off_its_callers_core():
    mine = os.sched_getaffinity(0)

    def leaving():
        own, seen = threads.Cores(), []
        own.given = mine
        for core in (*sorted(mine), -1):  # one after the other; the last is nobody's
            seen.append((core, own.leave(core), os.sched_getaffinity(0)))
        own.given = {core}
        return seen, own.leave(core)

    seen, nowhere = in_a_thread(leaving)
    for core, left, now in seen:
        assert left == bool(mine - {core})
        if left:
            assert now == mine - {core}
    assert not nowhere
    assert os.sched_getaffinity(0) == mine  # nobody else's is touched


@pytest.mark.skipif(not threads._KNOWN, reason="cores cannot be chosen here")
def test_threads_keep_to_the_cores_that_their_caller_was_given(three_threads):
    """By its user, before or after they were started; with one core there is no help."""
    many = threads.WAKE * LEAST
    encoded(many)

    def pinned():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return threads._crew.call(2, True)

    assert in_a_thread(pinned) == 0
    mine = os.sched_getaffinity(0)
    deadline = time.monotonic() + 5.0
    while len(threads._crew.asleep) < threads._crew.size and time.monotonic() < deadline:
        time.sleep(0.01)
    known = [cores for _, cores in threads._crew.asleep]
    encoded(many)
    if len(mine) > 1:
        assert known
        assert all(os.sched_getaffinity(cores.thread) < mine for cores in known)


@pytest.mark.slow
def test_an_interpreter_ends_while_threads_watch():
    """Right after a task, with threads that still look for the next."""
    code = (
        "import numpy as np, torch\ntorch.set_num_threads(3)\n"
        "from shoal.kernels.cpu.buffers import copied\nfrom shoal.kernels.cpu.threads import spread\n"
        "x = np.zeros(10**6, np.float32)\nspread(copied, (x + 1, x), x.size)\nassert (x == 1).all()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


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
