"""Recovery: ranks that are killed are replaced, and the run ends at the iterate of one without faults; signals end it
within seconds, resumable, with nothing left running.

Runs over real processes are slow tests; the journal and the agreement on a round are not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from test_checkpoint import Ranks, equal, hosted, rows_until, states
from test_cli import SLOW, ended, start, until

from shoal.compressors import TopK
from shoal.errors import ConfigError
from shoal.experiments.recovery import Memory
from shoal.experiments.run import load_result, simulate
from shoal.methods import EF21
from shoal.problems.secants import Trail
from shoal.runtimes import crash
from shoal.runtimes.journal import HEADER, Journal

KILLS = Path(__file__).resolve().parents[1] / "scripts" / "kills.py"
DIGEST = b"a config"


# ------------------------------------------------------------------------------------------------ the journal
FIELDS = [torch.arange(6.0).reshape(2, 3), torch.zeros(0, 4), torch.tensor([[2**60], [-1]])]


def journal(path: Path, digest: bytes = DIGEST, like=FIELDS) -> Journal:
    return Journal(path / "journal", 0, digest, like)


def test_a_journal_has_the_last_two_rounds(tmp_path):
    for index in range(5):
        journal(tmp_path).write(index, [part + index for part in FIELDS], 100 * index)
        held = journal(tmp_path).read()
        assert sorted(held) == [max(0, index - 1), index] if index else [0]
        for k, (rows, moved) in held.items():
            assert moved == 100 * k
            assert all(torch.equal(a, b + k) and a.dtype == b.dtype for a, b in zip(rows, FIELDS, strict=True))
    assert journal(tmp_path, b"another!").read() == {}
    assert journal(tmp_path, like=FIELDS[:2]).read() == {}
    journal(tmp_path).close(remove=True)
    assert journal(tmp_path).read() == {}


def test_no_flipped_bit_and_no_torn_slot_of_a_journal_is_believed(tmp_path):
    """Every bit of it, and every length: the other round is still there, and the right one."""
    for index in (6, 7):
        journal(tmp_path).write(index, [part + index for part in FIELDS], 0)
    path = tmp_path / "journal"
    content = path.read_bytes()
    size = len(content) // 2
    assert size == HEADER + 24 + 16
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert set(journal(tmp_path).read()) == ({7} if place < 8 * size else {6})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert set(journal(tmp_path).read()) == ({6} if length >= size else set())
    path.write_bytes(content + b"\0")
    assert journal(tmp_path).read() == {}


def test_a_crash_point_is_checked_before_it_is_used(monkeypatch):
    for wrong in ("nowhere:0:0", "joining", "joining:0", "joining:x:0", "joining:0:-1", ":::"):
        monkeypatch.setenv("SHOAL_CRASH", wrong)
        with pytest.raises(ConfigError, match="PLACE:RANK:ROUND"):
            crash.arm()
    monkeypatch.setenv("SHOAL_CRASH", "joining:1:2")
    crash.arm()
    assert crash.armed("joining", 1, 2)
    assert not crash.armed("joining", 2, 1)
    monkeypatch.setenv("SHOAL_CRASH", "")
    crash.arm()
    crash.here("joining", 1, 2)


# ------------------------------------------------------------------------------------------------ the agreement
class Peered(Ranks):
    """Ranks that can also hand each other bytes."""

    def channel(self, rank: int):
        channel = super().channel(rank)

        def hand(mine: bytes, source: int, wanting):
            given = self.meet(rank, mine)
            return given[source] if wanting[rank] else b""

        channel.hand = hand
        return channel


@pytest.mark.parametrize("lost", [[0], [1], [2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("ahead", [[], [0], [1, 2]])
def test_all_go_back_to_the_last_round_that_everyone_has(tmp_path, lost, ahead):
    """Three ranks at round 5, those in `ahead` one further; the lost have nothing but their journals."""
    fresh, *before = states(EF21(TopK(3)), 8)
    rows, faults = rows_until(7), [{"round": 4, "clients": [], "said": "", "policy": "skip"}]
    ranks = Peered(3)

    def stand(channel):
        mine = Memory(tmp_path, DIGEST, channel, 3, hosted(fresh, channel))
        last, trail = 6 if channel.rank in ahead else 5, Trail()
        for state in before[: last + 1]:
            if state.index <= last:
                moved = replace(hosted(state, channel), meter=replace(state.meter, moved=channel.rank))
                mine.commit(moved, trail)
                trail.reach(state.x, None)
        if channel.rank in lost:
            mine = Memory(tmp_path, DIGEST, channel, 3, hosted(fresh, channel))
            return mine.stand(channel, [], [])
        return mine.stand(channel, rows[: last + 1], faults)

    found = ranks.each(stand)
    if len(lost) == 3:
        assert found == [None] * 3, "nobody is left to say what x was"
        return
    for rank, (state, until_then, wrong, trail) in enumerate(found):
        assert trail["seen"][0] == 4, "its own point is yet to be told"
        assert torch.equal(trail["x"], before[3].x)
        assert equal(state, hosted(before[4], ranks.channel(rank)))
        assert state.meter.moved == rank
        assert repr(until_then) == repr(rows[:5])
        assert wrong == faults


def test_without_a_journal_no_round_is_common(tmp_path):
    fresh, *before = states(EF21(TopK(3)), 4)

    def stand(channel):
        mine = Memory(tmp_path, DIGEST, channel, 3, hosted(fresh, channel))
        if channel.rank != 1:
            mine.commit(hosted(before[2], channel), Trail())
        return mine.stand(channel, [], [])

    assert Peered(3).each(stand) == [None] * 3


# ------------------------------------------------------------------------------------------------ killed
def kills(*words: str) -> str:
    """What scripts/kills.py prints; it fails where a run did not end at the identical iterate."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(KILLS.parents[1])}
    done = subprocess.run(
        [sys.executable, str(KILLS), *words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_rank_that_is_killed_at_any_place_is_not_missed():
    """The eight places on each of four ranks; which method it meets goes round."""
    assert len(crash.POINTS) == 8
    assert "32 of 32 runs ended at the identical iterate" in kills("--points")


@pytest.mark.slow
def test_a_rank_that_is_killed_at_any_time_is_not_missed():
    """Random ranks at random moments, from the fork of the ranks on; the seed draws both."""
    assert "20 of 20 runs ended at the identical iterate" in kills("--kills", "20", "--seed", "1")


@pytest.mark.slow
@pytest.mark.parametrize("many", [2, 4])
def test_several_ranks_that_are_killed_at_once_are_not_missed(many):
    """Two of four: journals and survivors serve. All four: the last checkpoint does, or the start."""
    assert "6 of 6 runs ended at the identical iterate" in kills("--kills", "6", "--at-once", f"{many}", "--seed", "1")


# ------------------------------------------------------------------------------------------------ interrupted
RANKS = ["run", "Slow(n=5, d=8, noise=0.1, lam=0.1)", "EF21(TopK(2))", "--with", "slow.py", "--rounds", "150"]


def family(pid: int) -> list[int]:
    """The launcher's children: ranks, and the keeper of the store."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "status"),
    [("launcher", signal.SIGINT, 130), ("rank", signal.SIGTERM, 143), ("launcher", signal.SIGKILL, -9)],
)
def test_a_signal_to_anyone_leaves_a_run_that_any_number_of_ranks_finishes(tmp_path, whom, number, status):
    """Every process has gone within five seconds, and two ranks, or the simulator, go on where three stood."""
    (tmp_path / "slow.py").write_text(SLOW)
    process = start(*RANKS, "--ranks", "3", "--out", "out", cwd=tmp_path, SLOW="0.02")
    rows = tmp_path / "out" / "metrics.jsonl"
    assert until(lambda: rows.exists() and rows.stat().st_size > 0)
    children = family(process.pid)
    assert len(children) == 4
    began = time.monotonic()
    os.kill(process.pid if whom == "launcher" else children[-1], number)
    done = ended(process)
    assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert time.monotonic() - began < 5.0
    assert done.status == status
    if number == signal.SIGINT:
        assert done.error == "error: interrupted; go on with: shoal run --resume out"
    elsewhere = ["--ranks", "2"] if whom == "launcher" else []
    assert ended(start("run", "--resume", "out", *elsewhere, cwd=tmp_path)).status == 0
    whole = simulate(zoo.Quadratics(n=5, d=8, noise=0.1, lam=0.1), "EF21(TopK(2))", rounds=150)
    assert load_result(tmp_path / "out")["sha256"] == whole.sha256
    assert [json.loads(line)["round"] for line in rows.read_text().splitlines()] == list(range(151))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "metrics.jsonl", "metrics.parquet", "result.json"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_hangs_is_replaced(tmp_path):
    """SIGSTOP: the others wait for --timeout, say who it was, and the supervisor ends and replaces it."""
    (tmp_path / "slow.py").write_text(SLOW)
    process = start(*RANKS, "--ranks", "3", "--timeout", "2", "--out", "out", cwd=tmp_path, SLOW="0.02")
    rows = tmp_path / "out" / "metrics.jsonl"
    assert until(lambda: rows.exists() and rows.stat().st_size > 0)
    os.kill(family(process.pid)[-1], signal.SIGSTOP)
    assert ended(process).status == 0
    whole = simulate(zoo.Quadratics(n=5, d=8, noise=0.1, lam=0.1), "EF21(TopK(2))", rounds=150)
    assert load_result(tmp_path / "out")["sha256"] == whole.sha256
