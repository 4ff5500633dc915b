"""Checkpoints: a file is as it was written or refused, a set is whole or passed over, a run goes on at the same bits.

Every bit of a small file is flipped and every length tried: nothing here is sampled.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import resource
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from shoal import container
from shoal.compressors import TopK
from shoal.container import DIGEST, MAGIC, PREFIX, read, write
from shoal.core import Row, State
from shoal.descents import Step
from shoal.errors import CheckpointCorrupt, CheckpointError, CheckpointWriteFailed
from shoal.experiments import checkpoint, interrupts
from shoal.experiments.checkpoint import Checkpoints
from shoal.experiments.interrupts import PERIOD, Pulse
from shoal.experiments.run import simulate
from shoal.methods import EF21
from shoal.problems.secants import Trail
from shoal.runtimes import Local, rounds
from shoal.runtimes.rounds import take

TENSORS = {
    "x": torch.tensor([1.5, -0.0, float("inf"), float("nan")]),
    "rows": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "ids": torch.tensor([2**62, -1]),
    "none": torch.zeros(0, 5),
    "scalar": torch.tensor(7, dtype=torch.int32),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
}
META = {"index": 12, "words": "naïve", "nested": {"a": [1, 2.5, None]}}


@pytest.fixture
def small(tmp_path) -> tuple[Path, bytes]:
    """A container and its bytes."""
    write(tmp_path / "small.shoal", {"k": 1}, {"x": torch.tensor([1.0, 2.0]), "i": torch.tensor([3])})
    return tmp_path / "small.shoal", (tmp_path / "small.shoal").read_bytes()


# ------------------------------------------------------------------------------------------------ the container
def test_what_is_written_is_read(tmp_path):
    digest = write(tmp_path / "a", META, TENSORS)
    held = read(tmp_path / "a")
    assert held.meta == META
    assert held.sha256 == digest == hashlib.sha256((tmp_path / "a").read_bytes()[:-DIGEST]).digest()
    assert held.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = held.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.numpy().tobytes() == tensor.numpy().tobytes(), "bits, whatever is no number"
    assert os.listdir(tmp_path) == ["a"]
    write(tmp_path / "b", META, {name: t.expand(3, *t.shape).transpose(0, -1) for name, t in TENSORS.items()})
    assert torch.equal(read(tmp_path / "b").tensors["ids"], TENSORS["ids"].expand(3, 2).T), "whatever the strides"


def test_the_layout_is_the_one_that_is_written_down(small):
    """From the table at the top of the file, by hand."""
    _, content = small
    body = struct.pack("<2fq", 1.0, 2.0, 3)
    crcs = zlib.crc32(body[:8]), zlib.crc32(body[8:])
    table = [["x", "float32", [2], crcs[0]], ["i", "int64", [1], crcs[1]]]
    header = json.dumps({"meta": {"k": 1}, "tensors": table}).encode()
    front = b"SHOALCK1" + struct.pack("<II", len(header), zlib.crc32(header)) + header + body
    assert content == front + hashlib.sha256(front).digest()


def refused(path: Path) -> bool:
    """Whether the file is; thousands of times, so without pytest's machinery."""
    try:
        read(path)
    except CheckpointCorrupt as error:
        return str(error).startswith(str(path))
    return False


def test_every_flipped_bit_is_found(small):
    path, content = small
    with path.open("r+b", buffering=0) as stream:
        for place, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit]), place)
                assert refused(path), f"bit {bit} of byte {place}"
            os.pwrite(stream.fileno(), bytes([byte]), place)
    assert not refused(path)


def test_every_other_length_is_found(small):
    path, content = small
    path.write_bytes(content + b"\0")
    assert refused(path)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        assert refused(path), f"{length} bytes"


def sealed(header: bytes, body: bytes = b"") -> bytes:
    """A file whose checksums and digest are right, whatever its header says: what an enemy can write."""
    front = PREFIX.pack(MAGIC, len(header), zlib.crc32(header)) + header + body
    return front + hashlib.sha256(front).digest()


def table(*rows: object) -> bytes:
    return json.dumps({"meta": {}, "tensors": list(rows)}).encode()


EMPTY = zlib.crc32(b"")
HOSTILE = {
    "not JSON": b"{",
    "not UTF-8": b"\xff",
    "a number": b"3",
    "a list": b"[]",
    "no tensors": b'{"meta": {}}',
    "more": b'{"meta": {}, "tensors": [], "more": 1}',
    "meta is a list": b'{"meta": [], "tensors": []}',
    "NaN": b'{"meta": {"a": NaN}, "tensors": []}',
    "a name twice": b'{"meta": {"a": 1, "a": 2}, "tensors": []}',
    "deep": b'{"meta": {"a": ' + b"[" * 10**5 + b"]" * 10**5 + b'}, "tensors": []}',
    "a long number": b'{"meta": {"a": ' + b"9" * 10**4 + b'}, "tensors": []}',
    "a tensor twice": table(["x", "uint8", [0], EMPTY], ["x", "uint8", [0], EMPTY]),
    "a word": table("x"),
    "two words": table(["x", "uint8"]),
    "a name that is none": table([3, "uint8", [0], EMPTY]),
    "a name that cannot be a key": table([[], "uint8", [0], EMPTY]),
    "another dtype": table(["x", "object", [0], EMPTY]),
    "a dtype of numpy's": table(["x", "O", [0], EMPTY]),
    "a dtype that cannot be a key": table(["x", {}, [0], EMPTY]),
    "a shape that is none": table(["x", "uint8", 0, EMPTY]),
    "a negative size": table(["x", "uint8", [-1], EMPTY]),
    "two negative sizes": table(["x", "uint8", [-1, -1], EMPTY]),
    "half a size": table(["x", "uint8", [0.5], EMPTY]),
    "a size of True": table(["x", "uint8", [True], EMPTY]),
    "2^62 bytes": table(["x", "uint8", [2**62], EMPTY]),
    "2^80 of nothing": table(["x", "uint8", [2**40, 2**40, 0], EMPTY]),
    "2^64 bytes, which are 0": table(["x", "uint8", [2**32, 2**32], EMPTY]),
    "sizes that cancel": table(["x", "uint8", [2**63], EMPTY], ["y", "uint8", [-(2**63)], EMPTY]),
    "nine dimensions": table(["x", "uint8", [0] * 9, EMPTY]),
    "a checksum that is none": table(["x", "uint8", [0], None]),
    "a wrong checksum": table(["x", "uint8", [0], 1]),
    "more than there is": table(["x", "uint8", [1], EMPTY]),
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(tmp_path, header):
    (tmp_path / "a").write_bytes(sealed(header))
    with pytest.raises(CheckpointCorrupt) as error:
        read(tmp_path / "a")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_header_has_a_greatest_length(tmp_path):
    for size in (container.MAX_HEADER + 1, 2**32 - 1):
        (tmp_path / "a").write_bytes(PREFIX.pack(MAGIC, size, 0) + b" " * (container.MAX_HEADER + 99))
        with pytest.raises(CheckpointCorrupt, match="does not fit"):
            read(tmp_path / "a")
    with pytest.raises(ValueError, match="at most"):
        write(tmp_path / "b", {"a": "x" * container.MAX_HEADER}, {})
    with pytest.raises(TypeError, match="holds float32"):
        write(tmp_path / "b", {}, {"x": torch.zeros(1, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == ["a"]


@given(content=st.one_of(st.binary(max_size=200), st.binary(max_size=120).map(sealed)))
def test_other_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt):
        read(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CheckpointCorrupt):
            read(path)


# ------------------------------------------------------------------------------------------------ failing disks
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_the_old_file(small, monkeypatch, call, number):
    path, content = small

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(container.os, call, fail)
    with pytest.raises(CheckpointWriteFailed, match=f"errno {number}") as error:
        write(path, META, TENSORS)
    assert (error.value.errno, error.value.filename) == (number, str(path))
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_may_not_grow_leaves_the_old_one(small):
    """The kernel itself refuses the bytes behind the first 4096."""
    path, content = small
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointWriteFailed) as error:
            write(path, META, {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_a_writer_that_is_interrupted_leaves_the_old_file(small):
    path, content = small

    def pieces():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        container.place(path, pieces())
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


# ------------------------------------------------------------------------------------------------ sets of shares
N, ROUNDS = 5, 12
FAULTS = [{"round": 3, "clients": [1], "said": "naïve", "policy": "skip"}]
TRAIL = Trail()
TRAIL.restore(torch.arange(float(zoo.MIXED.d)), torch.tensor([3.0, 0.5, 0.25, 0.125], dtype=torch.float64))
STATEFUL = list({type(m): m for m in reversed(zoo.METHODS)}.values())  # one of each kind


class Ranks:
    """What `world` processes have in common, on threads of this one: `together` is a meeting of all."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.given = world, threading.Barrier(world, timeout=20), [None] * world

    def channel(self, rank: int) -> Local:
        """The clients of one rank."""
        channel = Local(N)
        channel.rank, channel.clients = rank, torch.arange(N).tensor_split(self.world)[rank]
        channel.together = lambda mine: self.meet(rank, mine)
        return channel

    def meet(self, rank: int, mine: torch.Tensor) -> list[torch.Tensor]:
        """Everyone's, once all are here."""
        self.given[rank] = mine
        self.barrier.wait()
        out = list(self.given)
        self.barrier.wait()
        return out

    def each(self, work) -> list:
        """work(channel) of every rank at once: what it returned, or what it raised."""

        def guarded(rank: int):
            try:
                return work(self.channel(rank))
            except CheckpointError as error:
                return error

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(guarded, range(self.world)))


def states(method, length: int) -> list[State]:
    """The states of a simulator, before rounds 0, 1, ..."""
    events = rounds(zoo.resolved(method, zoo.MIXED), Step(0.125), zoo.MIXED, Local(N), seed=3)
    return [next(events).state for _ in range(length)]


def hosted(state: State, channel: Local) -> State:
    """What a process that hosts these clients has of it."""
    return replace(state, workers=take(state.workers, channel.clients))


def rows_until(index: int) -> list[Row]:
    return [Row(k, 0.5 / (k + 1), math.nan if k == 3 else 0.1, 8.0 * k, 8.0, 9.0, 9.0, k / 7) for k in range(index + 1)]


def equal(one: State, two: State) -> bool:
    """Bit for bit, with the meter but what each process moved itself."""
    parts = ([s.x, *s.server, *s.workers, *s.descent] for s in (one, two))
    same = all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    return same and one.index == two.index and replace(one.meter, moved=0) == replace(two.meter, moved=0)


@pytest.mark.parametrize("method", STATEFUL, ids=repr)
def test_any_number_of_processes_goes_on_from_any_other(tmp_path, method):
    """Written by 1 and 3, read by 1, 2 and 3: rows belong to clients, and every other field to all."""
    fresh, *_, last = states(method, 5)
    for before in (1, 3):
        folder = tmp_path / str(before)
        folder.mkdir()

        def save(channel, folder=folder):
            mine = replace(hosted(last, channel), meter=replace(last.meter, moved=100 + channel.rank))
            Checkpoints(folder, "d", channel).save(mine, rows_until(4), FAULTS, TRAIL)

        assert Ranks(before).each(save) == [None] * before
        for after in (1, 2, 3):
            ranks = Ranks(after)
            found = ranks.each(lambda c, folder=folder: Checkpoints(folder, "d", c).load(hosted(fresh, c)))
            for rank, (state, rows, faults, trail) in enumerate(found):
                assert faults == FAULTS
                assert all(torch.equal(trail[k], v) for k, v in TRAIL.arrays().items())
                assert equal(state, hosted(last, ranks.channel(rank)))
                assert state.meter.moved == (100 + rank if after == before else 0)
                assert repr(rows) == repr(rows_until(4))


@pytest.fixture
def two_sets(tmp_path) -> tuple[Path, list[State]]:
    """Checkpoints of rounds 3 and 7, by three processes; those of rounds 1 and 2 were there and have gone."""
    all_states = states(EF21(TopK(3)), 8)
    for index in (1, 2, 3, 7):
        ranks = Ranks(3)
        done = ranks.each(
            lambda c, i=index: Checkpoints(tmp_path, "d", c).save(hosted(all_states[i], c), rows_until(i), [], TRAIL)
        )
        assert done == [None] * 3
    return tmp_path, all_states


def loaded(folder: Path, fresh: State, world: int = 2, digest: str = "d") -> list:
    """What every process makes of the folder: a round, or an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Ranks(world).each(lambda c: Checkpoints(folder, digest, c).load(hosted(fresh, c)))
    told = [f"{w.category.__name__}: {w.message}" for w in caught]
    return [f if isinstance(f, Exception) or f is None else f[0].index for f in found] + told


def test_two_sets_are_kept_and_a_damaged_one_is_passed_over(two_sets):
    """Whatever is wrong with a file of the newer one, every process goes on from the older, and one of them says so."""
    folder, (fresh, *_) = two_sets
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"checkpoint-{k}.{share}shoal" for k in (3, 7) for share in ("0of3.", "1of3.", "2of3.", "")]
    assert loaded(folder, fresh) == [7, 7]
    shares = [folder / f"checkpoint-7.{r}of3.shoal" for r in range(3)]
    contents = {file: file.read_bytes() for file in [*shares, folder / "checkpoint-7.shoal"]}
    older = (folder / "checkpoint-3.1of3.shoal").read_bytes()
    for file, content in contents.items():
        for damaged in (content[:-1], content[:90] + bytes([content[90] ^ 1]) + content[91:], b"", older, None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            if damaged is None and file not in shares:
                assert loaded(folder, fresh) == [3, 3], "without its manifest it is no checkpoint"
            else:
                *found, told = loaded(folder, fresh)
                assert found == [3, 3]
                assert told.startswith(f"CheckpointWarning: {folder}/checkpoint-7.")
                assert told.endswith("Going on from round 3.")
            file.write_bytes(content)
    shares[0].write_bytes(contents[shares[1]])
    assert loaded(folder, fresh)[:2] == [3, 3], "shares that were exchanged"
    shares[0].write_bytes(contents[shares[0]])
    assert loaded(folder, fresh) == [7, 7]


def test_where_no_set_is_whole_every_process_says_so(two_sets):
    folder, (fresh, *_) = two_sets
    for k in (3, 7):
        os.truncate(folder / f"checkpoint-{k}.2of3.shoal", 50)
    for found in loaded(folder, fresh, world=3):
        assert isinstance(found, CheckpointCorrupt)
        assert str(found).endswith(f"Delete {folder}/checkpoint-* to begin the run again.")
        assert "\n" not in str(found)
    for other in loaded(folder, fresh, digest="e"):
        assert "belongs to another run" in str(other)


def test_what_was_passed_over_does_not_come_back(two_sets):
    """The damaged set of round 7 is gone once a checkpoint of round 5 has been written, with all that was left over."""
    folder, all_states = two_sets
    os.truncate(folder / "checkpoint-7.0of3.shoal", 50)
    (folder / ".checkpoint-4.1of3.shoal.123").touch()
    (folder / "checkpoint-4.1of2.shoal").touch()
    (folder / "config.json").touch()
    done = Ranks(2).each(lambda c: Checkpoints(folder, "d", c).save(hosted(all_states[5], c), rows_until(5), [], TRAIL))
    assert done == [None] * 2
    names = [f"checkpoint-3.{share}shoal" for share in ("0of3.", "1of3.", "2of3.", "")]
    names += [f"checkpoint-5.{share}shoal" for share in ("0of2.", "1of2.", "")]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "config.json"]
    assert loaded(folder, all_states[0]) == [5, 5]
    Ranks(2).each(lambda c: Checkpoints(folder, "d", c).discard())
    assert os.listdir(folder) == ["config.json"]
    assert loaded(folder, all_states[0]) == [None, None]


def test_a_forged_manifest_is_refused(two_sets):
    """Its digest is right, and what it says is not: no exception but CheckpointCorrupt."""
    folder, (fresh, *_) = two_sets
    (folder / "checkpoint-3.shoal").unlink()
    held = read(folder / "checkpoint-7.shoal")
    shares = held.meta["shares"]
    wrong = [
        {"index": 8}, {"meter": {}}, {"meter": 3}, {"meter": held.meta["meter"] | {"up": -1}}, {"moved": 3},
        {"moved": ["x"]}, {"moved": [2**70]}, {"shares": []}, {"shares": 3}, {"shares": [[0, 5]]},
        {"shares": shares[1:]}, {"shares": [[0, 5, "zz"]]}, {"shares": [*shares, [5, 6, "00" * 32]]},
        {"shares": shares[::-1]}, {"shares": [[0, 5, shares[0][2]]]}, {"meter": held.meta["meter"] | {"up": True}},
    ]  # fmt: skip
    for changed in wrong:
        write(folder / "checkpoint-7.shoal", held.meta | changed, held.tensors)
        for found in loaded(folder, fresh):
            assert isinstance(found, CheckpointCorrupt), changed
    for name, tensor in held.tensors.items():
        others = [None, tensor[:-1] if tensor.ndim else tensor[None], tensor.to(torch.int32)]
        if name == "faults":
            others = [None, tensor[:-1], torch.full_like(tensor, 91).expand(10**5, -1).flatten()[: 10**5]]
        if name == "rows":
            others = [None, tensor.flatten(), torch.full_like(tensor, math.nan), tensor[:, 1:]]
        for other in others:
            tensors = {k: v for k, v in held.tensors.items() if k != name} | ({} if other is None else {name: other})
            write(folder / "checkpoint-7.shoal", held.meta, tensors)
            for found in loaded(folder, fresh):
                assert isinstance(found, CheckpointCorrupt), name


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_fails_for_one_process_fails_for_all(two_sets, monkeypatch, victim):
    """ENOSPC in the share of one process, or in the manifest; the sets of before stay as they were."""
    folder, all_states = two_sets
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for name in (f"checkpoint-7.{victim}of2.shoal", "checkpoint-6.shoal"):
        index = int(name.split("-")[1].split(".")[0])

        def replace_(source, target, name=name):
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            os.rename(source, target)

        monkeypatch.setattr(container.os, "replace", replace_)
        done = Ranks(2).each(
            lambda c, i=index: Checkpoints(folder, "d", c).save(hosted(all_states[i], c), rows_until(i), [], TRAIL)
        )
        monkeypatch.undo()
        for error in done:
            assert isinstance(error, CheckpointWriteFailed)
            assert (error.errno, error.filename) == (errno.ENOSPC, str(folder / name))
        assert before.items() <= {p.name: p.read_bytes() for p in folder.iterdir()}.items()
        assert loaded(folder, all_states[0]) == [7, 7]


def test_a_full_disk_leaves_a_run_that_can_be_finished(tmp_path, monkeypatch):
    """The second checkpoint does not fit: one error with errno and path; from the first, the same bits."""
    problem, options = zoo.MIXED, {"rounds": ROUNDS, "out": tmp_path / "run", "resume": True}
    monkeypatch.setattr(checkpoint, "EVERY", -1.0)
    count = itertools.count()

    def replace_(source, target):
        if Path(target).suffix == ".shoal" and next(count) >= 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(container.os, "replace", replace_)
        with pytest.raises(CheckpointWriteFailed, match=r"checkpoint-4\.shoal could not be written: No space"):
            simulate(problem, "Diana(RandK(2))", **options)
    told: list[Row] = []
    run = simulate(problem, "Diana(RandK(2))", record=told.append, **options)
    assert told[0].round == 4
    assert run.sha256 == simulate(problem, "Diana(RandK(2))", rounds=ROUNDS).sha256


# ------------------------------------------------------------------------------------------------ one round for all
def test_all_processes_act_on_a_signal_at_one_round(monkeypatch):
    """Ranks whose clocks and signals differ: every one hears of rank 1's signal at the same round, and within about
    PERIOD; questions become rare where rounds are fast."""
    clock = [0.0] * 3
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[int(threading.current_thread().name)])
    asked_at, rounds_a_second = 300, 1000

    def run(channel):
        threading.current_thread().name = str(channel.rank)
        pulse, questions = Pulse(channel, 5), []
        for index in range(5, 10_000):
            clock[channel.rank] += (1 + 0.1 * channel.rank) / rounds_a_second
            asked = 15 if channel.rank == 1 and index >= asked_at else None
            number, due = pulse(index, asked, channel.rank == 2 and index == 5)
            if pulse.at > index:
                questions.append(index)
            if due:
                assert index == 5
            if number:
                return index, number, len([q for q in questions if q])
        raise AssertionError

    ended = Ranks(3).each(run)
    assert len(set(ended)) == 1
    index, number, _ = ended[0]
    assert number == 15
    assert asked_at <= index <= asked_at + 2 * PERIOD * rounds_a_second
