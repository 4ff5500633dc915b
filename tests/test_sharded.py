"""The sharded channel: what it sends, whom it believes, and when it gathers whole.

Ranks are threads here, which exchange bytes through a list; `test_runtimes` runs the zoo over processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from zoo import inputs, round_of

from shoal import rng
from shoal.compressors import QSGD, Correlated, Dense, PermK, RandK, Rotated
from shoal.core import Compressor
from shoal.errors import ChecksumError, ConfigError, ConfigMismatch, LengthError, PayloadError, RoundMismatch, WireError
from shoal.experiments.run import load_result
from shoal.messages import Messages, Round, Vector
from shoal.runtimes import Local
from shoal.runtimes.ranks import Ranks, channel_of
from shoal.runtimes.sharded import Sharded
from shoal.wire import HEADER, MEAN, SLICE, Stamp, frame

DIGEST = b"sharded."
Spoil = Callable[[str, int, Tensor], Tensor]  # (which exchange, whose bytes, the bytes) -> what arrives


class Table:
    """Where the threads of all ranks lay down what they send; nobody waits for longer than kernels take to compile."""

    def __init__(self, world: int) -> None:
        self.world, self.laid, self.all_here = world, [None] * world, threading.Barrier(world, timeout=60)

    def exchange(self, rank: int, mine: object) -> list:
        self.laid[rank] = mine
        self.all_here.wait()
        found = list(self.laid)
        self.all_here.wait()
        return found


class Seat:
    """`Peers` for one thread: the same methods, the same counting."""

    def __init__(self, table: Table, rank: int, spoil: Spoil | None = None) -> None:
        self.table, self.world, self.rank, self.moved, self.spoil = table, table.world, rank, 0, spoil
        self.digest, self.round, self.group = DIGEST, 0, None

    def _heard(self, kind: str, pieces: Sequence[Tensor]) -> list[Tensor]:
        if self.spoil is None:
            return list(pieces)
        return [p if r == self.rank else self.spoil(kind, r, p.clone()) for r, p in enumerate(pieces)]

    def all(self, mine: Tensor, what: str = "") -> list[Tensor]:
        self.moved += mine.numel() * mine.element_size() * (self.world - 1)
        return self._heard("all", self.table.exchange(self.rank, mine))

    def gather(self, mine: Tensor, most: Sequence[int], what: str = "") -> list[Tensor]:
        self.moved += len(mine) * (self.world - 1)
        heard = self.table.exchange(self.rank, (mine, list(most)))
        assert all(bounds == list(most) for _, bounds in heard), "all know how many bytes there may be"
        assert all(len(piece) <= bound for (piece, _), bound in zip(heard, most, strict=True))
        return self._heard("gather", [piece for piece, _ in heard])

    def swap(self, mine: Sequence[Tensor], sizes: Sequence[int], what: str = "") -> list[Tensor]:
        self.moved += sum(len(piece) for rank, piece in enumerate(mine) if rank != self.rank)
        heard = [pieces[self.rank] for pieces in self.table.exchange(self.rank, list(mine))]
        assert [len(piece) for piece in heard] == list(sizes), "both ends know the sizes"
        return self._heard("swap", heard)


def seated(world: int, work: Callable[[Seat], object], spoil: Spoil | None = None) -> list:
    """What every rank returns, or the error that it raises. Only rank 0 hears spoiled bytes."""
    table, found = Table(world), [None] * world

    def one(rank: int) -> None:
        try:
            found[rank] = work(Seat(table, rank, spoil if rank == 0 else None))
        except Exception as error:
            found[rank] = error
            table.all_here.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return found


def held(u: Tensor, code: Compressor, members: Tensor | None = None) -> tuple[Messages, Round]:
    """All messages of a round, and the round as one sees it who hosts everybody."""
    if members is None:
        rnd = round_of(code, u, index=4)
        return code.encode(u, rnd), rnd
    rnd = replace(Round.full(4, 0, 9).among(members), slots=torch.arange(len(members)))
    rnd = replace(rnd, agreed=float(u.abs().max()))
    return code.encode(u, rnd), rnd


def meet(
    u: Tensor, code: Compressor, world: int, cut: str = "always", members: Tensor | None = None, n: int | None = None
) -> tuple[list[tuple[Vector, Sharded]], Vector, Local]:
    """(mean and channel) of every rank; what the simulator says, and its channel."""
    msgs, rnd = held(u, code, members)
    local = Local(n or len(u))

    def work(seat: Seat) -> tuple[Vector, Sharded]:
        channel = Sharded(n or len(u), DIGEST, seat, cut=cut)  # type: ignore[arg-type]
        ids = rnd.clients
        mine = torch.isin(ids, channel.clients).nonzero()[:, 0]
        part = Messages(msgs.payload[mine], msgs.nbytes[mine], msgs.slots[mine], msgs.d)
        return channel.mean(part, code, replace(rnd, clients=ids[mine], slots=msgs.slots[mine])), channel

    return seated(world, work), local.mean(msgs, code, rnd), local


# ------------------------------------------------------------------------------------------------ what is said
@pytest.mark.parametrize(
    "code", [Dense(), QSGD(3), Correlated(), Correlated("own"), Rotated(Correlated()), PermK()], ids=repr
)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_rank_has_the_simulators_mean_and_counts(code, world):
    """n = 6 shared out unevenly; d = 130 leaves a grain cut short, and d = 9 ranks that serve nothing."""
    for d in (130, 9):
        found, mean, local = meet(inputs("gaussian", 6, d), code, world)
        for said, channel in found:
            assert said.numpy().tobytes() == mean.numpy().tobytes()
            assert replace(channel.meter, moved=0) == local.meter


def test_ranks_without_members_send_no_slice():
    """Of nine clients on four ranks 1, 2 and 8 take part: ranks 1 and 2 host none of them, and serve."""
    members = torch.tensor([1, 2, 8])
    found, mean, local = meet(inputs("gaussian", 3, 64), Correlated(), 4, members=members, n=9)
    back = 3 * (HEADER + 1 + 4)  # four means of 16 coordinates, 4 sums, four digits a byte
    for (said, channel), count in zip(found, (2, 0, 0, 1), strict=True):
        assert torch.equal(said, mean)
        assert channel.meter.moved == (3 * (HEADER + 2 * count) if count else 0) + back
        assert channel.meter.up == local.meter.up


def test_moved_bytes_by_hand():
    """W = 4, one client each, d = 800: three slices of 25 bytes up, 200 sums in 0..4 down to three, as digits:
    with 63 bytes of lengths, a code of so few is no shorter."""
    found, _, _ = meet(inputs("gaussian", 4, 800), Correlated(), 4)
    groups, rest = divmod(200, 24)
    mean = 1 + 7 * groups + (5**rest - 1).bit_length() // 8 + 1
    assert [channel.meter.moved for _, channel in found] == [3 * (HEADER + 25) + 3 * (HEADER + mean)] * 4
    assert [channel.meter.up_framed for _, channel in found] == [4 * (100 + HEADER)] * 4


@pytest.mark.parametrize(
    ("code", "world", "d", "cuts"),
    [
        (Correlated(), 2, 10_000, False),  # half a bit up and 0.8 down against one
        (Correlated(), 4, 10_000, True),
        (Correlated(), 4, 100, False),  # headers outweigh what is saved
        (QSGD(3), 8, 10_000, False),  # a float32 comes back
        (QSGD(3), 16, 10_000, True),
        (Dense(), 3, 10_000, True),
        (RandK(5), 16, 10_000, False),  # cannot be cut
    ],
    ids=str,
)  # fmt: skip
def test_it_is_gathered_whole_where_fewer_bytes_move_then(code, world, d, cuts):
    """By default the cheaper way is taken: never more bytes than either of the others."""
    u = inputs("gaussian", world, d)
    moved = {}
    for cut in ("cheaper", "always"):
        found, mean, _ = meet(u, code, world, cut)
        assert all(torch.equal(said, mean) for said, _ in found)
        moved[cut] = max(channel.meter.moved for _, channel in found)
    whole = (world - 1) * (HEADER + code.capacity(world, d))
    assert moved["cheaper"] == min(whole, moved["always"])
    assert (moved["cheaper"] < whole) is cuts


# ------------------------------------------------------------------------------------------------ whom it believes
def stamped(kind: int, cohort: int, **other: object) -> Stamp:
    return Stamp(rng.LAYOUT, kind, 4, cohort, 96, DIGEST)._replace(**other)  # type: ignore[arg-type]


def one_frame(size: int, slot: int, stamp: Stamp, byte: int = 0) -> Tensor:
    """(HEADER + size,): bytes of one value in a frame of their own."""
    payload = torch.full((1, size), byte, dtype=torch.uint8)
    return frame(payload, torch.tensor([size]), torch.tensor([slot]), stamp, size)[0]


def slice_of(slot: int = 1, kind: int = SLICE, byte: int = 0, **other: object) -> Callable[[Tensor], Tensor]:
    """In place of a slice: a scale and 32 coordinates of one bit."""
    return lambda p: one_frame(8, slot, stamped(kind, 3, **other), byte)


def mean_of(slot: int, byte: int = 0) -> Callable[[Tensor], Tensor]:
    """In place of the mean of a slice: 32 coordinates."""
    return lambda p: one_frame(128, slot, stamped(MEAN, 3), byte)


def turned(p: Tensor) -> Tensor:
    """The first byte behind the header is another one."""
    p.view(-1)[HEADER] ^= 1
    return p


LIES: dict[str, tuple[str, Callable[[Tensor], Tensor], type[WireError], str]] = {
    "a bit turns over in a slice": ("swap", turned, ChecksumError, "slot 1"),
    "a bit turns over in a mean": ("gather", turned, ChecksumError, "slot 1"),
    "another config": ("swap", slice_of(digest=b"another."), ConfigMismatch, b"another.".hex()),
    "another round": ("swap", slice_of(round=5), RoundMismatch, "round 5"),
    "a message in place of a slice": ("swap", slice_of(kind=1), RoundMismatch, "kind 1"),
    "another client's slice": ("swap", slice_of(2), RoundMismatch, "a frame of slot 1 was due"),
    "a scale that is none": ("swap", slice_of(byte=255), PayloadError, "scale"),
    "the mean of another slice": ("gather", mean_of(0), RoundMismatch, "a frame of slot 1 was due"),
    "a mean of no bytes": ("gather", lambda p: p[:0], LengthError, "a header alone has 64"),
    "a mean that is cut off": ("gather", lambda p: p[:-1], LengthError, "at most 127 were agreed"),
    "a shorter mean": ("gather", lambda p: one_frame(124, 1, stamped(MEAN, 3)), LengthError, "124 bytes of a mean"),
    "a mean that is none": ("gather", mean_of(1, 255), PayloadError, "not finite"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_rank_1_makes_up_is_refused(lie):
    """Rank 0 hears it, of own scales over three ranks; every kind of mismatch has its own error, and nothing else."""
    exchange, change, error, said = LIES[lie]

    def spoil(kind: str, rank: int, piece: Tensor) -> Tensor:
        return change(piece) if (kind, rank) == (exchange, 1) else piece

    code = Correlated("own")
    msgs, rnd = held(inputs("gaussian", 3, 96), code)

    def work(seat: Seat) -> Vector:
        channel = Sharded(3, DIGEST, seat, cut="always")  # type: ignore[arg-type]
        mine = channel.clients
        return channel.mean(
            Messages(msgs.payload[mine], msgs.nbytes[mine], mine, 96), code, replace(rnd, clients=mine, slots=mine)
        )

    first = seated(3, work, spoil)[0]
    assert type(first) is error, first
    assert said in str(first)


def test_a_frame_of_another_length_is_refused():
    from shoal.runtimes.sharded import _unframed

    stamp = stamped(MEAN, 3)
    with pytest.raises(LengthError, match="slot 1, round 4: 5 bytes where 8 were agreed"):
        _unframed(torch.cat([one_frame(5, 1, stamp), torch.zeros(3, dtype=torch.uint8)]), stamp, 1, 8)


# ------------------------------------------------------------------------------------------------ ranks
def test_there_is_no_other_channel():
    with pytest.raises(ConfigError, match="channel='tube': a channel is one of auto, sharded, replicated"):
        channel_of("tube")


def test_the_first_rank_is_heard():
    for text in (b"", b"null", "ω".encode() * 500):
        words = [text if rank == 0 else b"" for rank in range(3)]
        assert seated(3, lambda seat, w=words: Ranks(seat, Sharded).hear(w[seat.rank])) == [text] * 3  # type: ignore[arg-type]


@pytest.mark.slow
def test_moved_bytes_are_those_of_the_interface():
    """On an interface where nothing else runs: what ranks count, and 3% at most for TCP and IP."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    words = ["--worlds", "3", "--dim", "1200000", "--seconds", "0.5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ranks", *words], cwd=Path(__file__).resolve().parents[1],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["kind"]: SimpleNamespace(**row) for row in json.loads(done.stdout)}
    for kind in ("auto", "sharded", "replicated"):
        moved = sum(rows[kind].moved)
        assert moved <= rows[kind].interface <= 1.03 * moved + 20_000, kind
    # Two exchanges, each behind a signal to two others; sums that would take 100,000 bytes as digits.
    means = sum(rows["sharded"].moved) / 6 - 2 * HEADER - 50_000
    assert 30_000 < means < 60_000
    assert 12 * sum(rows["auto"].moved) < rows["all-reduce"].interface


@pytest.mark.slow
def test_a_race_over_ranks_ends_at_the_same_bits(tmp_path):
    """Tuning included: the same runs in the same folders, whoever computed them."""
    words = [sys.executable, "-m", "shoal", "race", "quadratics", "Marina(Correlated(), p=0.5)"]
    words += ["-n", "3", "-d", "8", "--noise", "0.1", "--lam", "0.1", "--rounds", "40", "--target", "1e-2"]
    words += ["--seeds", "1", "--tune", "0:2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def shoal(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*words, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    one, two = shoal("--workers", "1", "--out", "one"), shoal("--ranks", "2", "--channel", "sharded", "--out", "two")
    assert one.returncode == two.returncode, two.stderr
    results = [
        {p.parent.name: load_result(p.parent) for p in (tmp_path / x / "runs").glob("*/result.json")}
        for x in ("one", "two")
    ]
    assert results[0].keys() == results[1].keys()
    for name, alone in results[0].items():
        there = results[1][name]
        assert len(there["moved_bytes"]) == 2
        assert {**alone, "seconds": 0} == {**there, "seconds": 0, "moved_bytes": []}
    assert two.stdout.count("runs in") == 1, "one rank speaks"
