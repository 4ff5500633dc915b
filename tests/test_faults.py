"""Faults: whatever differs between ranks is one typed error on all of them, whoever is lost is named, and a NaN leaves
every state as it was. The cases are data, in `faults`; ranks with faults are forked by `faults_worker`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from shoal.compressors import RandK
from shoal.descents import Step
from shoal.errors import (
    BadMagic,
    ChecksumError,
    ConfigError,
    LengthError,
    NonFiniteError,
    PeerDied,
    PeerLost,
    PeerTimeout,
    QuorumLost,
    RoundMismatch,
    WireError,
)
from shoal.experiments.run import simulate
from shoal.methods import DCGD, GD, Dasha, Marina, PPMarina, VRDiana
from shoal.runtimes import Local, meeting, rounds
from shoal.runtimes.group import checked_timeout
from shoal.runtimes.lines import Lines
from shoal.runtimes.meeting import meet
from shoal.runtimes.signals import ALL, BYE, FAULT, GATHER, LONGEST, SIZE, Signal, bounds, first, judge

TESTS = Path(__file__).resolve().parent


@cache
def worker(scenario: str) -> Any:
    """What `faults_worker` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "faults_worker.py"), scenario],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------------------ signals
MINE = Signal(ALL, 1, 3, number=7, round=5, nbytes=112, digest=b"8 bytes.", attempt=2, body=b"messages")


def test_a_signal_comes_back_whole_and_is_laid_out_as_said():
    """Byte for byte as the table says, and not before its last byte is there."""
    data = MINE.pack()
    numbers = [(1, 2), (1, 1), (ALL, 1), (2, 4), (5, 4), (1, 4), (3, 4), (7, 4), (8, 4), (112, 8)]
    assert data[:40] == b"SHOS" + b"".join(value.to_bytes(size, "little") for value, size in numbers)
    assert data[40:48] + data[52:] == b"8 bytes." + bytes(12) + b"messages"
    buffer = bytearray()
    for byte in data:
        assert first(buffer, 1) is None
        buffer.append(byte)
    assert first(buffer, 1) == MINE
    assert not buffer


def test_every_flipped_bit_of_a_signal_is_found_or_waited_for():
    """A flipped length may ask for bytes that never come; nothing else is ever taken for a signal."""
    data = MINE.pack()
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << (bit % 8)
        try:
            assert first(bad, 1) is None
            assert 28 <= bit // 8 < 32
        except (BadMagic, ChecksumError, LengthError):
            pass


@given(st.binary(max_size=200))
def test_noise_raises_wire_errors_only(noise):
    for data in (noise, MINE.pack()[:SIZE] + noise, b"SHOS" + noise):
        with suppress(WireError):
            first(bytearray(data), 1)


def test_a_body_beyond_the_longest_is_refused_before_it_is_waited_for():
    data = bytearray(MINE.pack())
    data[28:32] = (LONGEST + 1).to_bytes(4, "little")
    with pytest.raises(LengthError, match="longest"):
        first(data, 1)


def test_a_body_that_is_no_json_is_a_wire_error():
    for kind in (0, 4):
        with pytest.raises(LengthError, match="rank 0"):
            judge([Signal(kind, 0, 1, 0, body=b"[1")])
        for body in (b"[" * 200_000, b'{"a":' * 5000, b"[[1, 2]]", b"null", b"\xff"):
            with pytest.raises(LengthError, match="no object in JSON"):
                judge([Signal(kind, 0, 1, 0, body=body)])
    with pytest.raises(LengthError, match="all-to-all"):
        judge([Signal(2, 0, 1, 0, body=b"short")])
    with pytest.raises(LengthError, match="1 bounds"):
        judge([Signal(GATHER, 0, 1, 0, body=b"short")])


def test_an_uneven_gather_is_judged_by_its_bounds():
    """Two ranks may bring 3 and 5 bytes, any number up to that; all hear of the one that brings more."""

    def said(sizes: list[int], most: tuple[list[int], list[int]] = ([3, 5], [3, 5])) -> None:
        judge([Signal(GATHER, r, 2, 0, nbytes=sizes[r], body=bounds(most[r], "x")) for r in range(2)])

    said([0, 5])
    said([3, 0])
    with pytest.raises(LengthError, match="rank 0 brings 4 bytes of at most 3"):
        said([4, 5])
    with pytest.raises(LengthError, match="rank 1 brings 6 bytes of at most 5"):
        said([3, 6])
    with pytest.raises(LengthError, match=r"rank 0: \[3, 5\]; rank 1: \[3, 6\]"):
        said([0, 0], ([3, 5], [3, 6]))


@pytest.mark.parametrize("clients", ["5", '["x"]', "[1e999]", "[[1]]", "[null, 1]", "{}"])
def test_a_fault_that_names_no_clients_is_a_fault_all_the_same(clients):
    with pytest.raises(NonFiniteError, match="no client") as caught:
        judge([Signal(FAULT, 0, 1, 0, body=b'{"said": "no client", "clients": %s}' % clients.encode())])
    assert caught.value.clients == ()


# ------------------------------------------------------------------------------------------------ lines
def linked(world: int, timeout: float = 5.0) -> list[Lines]:
    """Lines of all ranks in this process, over socket pairs."""
    lines = [Lines(rank, world, timeout) for rank in range(world)]
    for i in range(world):
        for j in range(i):
            here, there = socket.socketpair()
            lines[i].add(j, here)
            lines[j].add(i, there)
    return lines


def together(actions: list[Any]) -> list[Any]:
    """What each action, in a thread of its own, returned or raised."""
    found: list[Any] = [None] * len(actions)

    def act(i: int) -> None:
        try:
            found[i] = actions[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=act, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "an exchange hangs"
    return found


def say(lines: Lines, **change: Any) -> Any:
    mine = Signal(ALL, lines.rank, lines.world, lines.number)._replace(**change)
    return lambda: lines.exchange(mine)[0]


def test_all_ranks_hold_all_signals_and_long_ones_pass_too():
    """Bodies far beyond a socket's buffer, in both directions at once, and of one rank alone."""
    lines = linked(3)
    for bodies in ((b"a", b"bb", b""), (b"a" * LONGEST, b"b" * LONGEST, b""), (b"", b"", b"c")):
        found = together([say(line, body=body) for line, body in zip(lines, bodies, strict=True)])
        for signals in found:
            assert [s.body for s in signals] == list(bodies)
    for line in lines:
        line.close()


def test_who_is_silent_is_named_and_who_stops_waiting_says_so():
    """Rank 2 never comes: rank 0 gives up first and names it, and rank 1, told so, names rank 2 and not rank 0."""
    lines = linked(3, timeout=0.2)
    lines[1].timeout = 20.0
    found = together([say(lines[0]), say(lines[1])])
    for error in found:
        assert isinstance(error, PeerTimeout)
        assert error.ranks == (2,)
    late = together([say(lines[2])])[0]
    assert isinstance(late, PeerTimeout), "once it wakes, it learns what has happened"
    assert late.ranks == (2,)


def test_a_line_that_ends_without_a_word_is_a_death_and_with_a_word_is_that_word():
    lines = linked(3)
    lines[2].hang_up()
    assert [e.ranks for e in together([say(lines[0]), say(lines[1])]) if type(e) is PeerDied] == [(2,), (2,)]
    lines = linked(3)
    lines[1].close(ValueError("a wrong\n turn"))
    for error in together([say(lines[0]), say(lines[2])]):
        assert type(error) is PeerDied
        assert error.ranks == (1,)
        assert "stopped with ValueError: a wrong turn" in str(error)
    lines = linked(2)
    lines[0].close()
    with pytest.raises(PeerDied, match="rank 0 has ended its run"):
        say(lines[1])()
    with pytest.raises(PeerDied, match="rank 1 has left"):
        say(lines[1])()


@pytest.mark.parametrize("lost", ["5", '["x"]', "[1e999]", "[[1]]"])
def test_a_farewell_that_names_no_ranks_is_a_farewell_all_the_same(lost):
    lines = linked(2)
    body = b'{"error": "PeerDied", "said": "went away", "ranks": %s}' % lost.encode()
    lines[1]._sockets[0].send(Signal(BYE, 1, 2, 1, body=body).pack())
    with pytest.raises(PeerDied, match="went away"):
        say(lines[0])()


def test_bytes_that_are_no_signal_reach_every_rank_as_the_same_error():
    """Only rank 0 meets them: rank 2 hears of it in rank 0's farewell."""
    lines = linked(3)
    lines[1]._sockets[0].send(b"GET / HTTP/1.1" + bytes(SIZE))
    found = together([say(lines[0]), say(lines[2])])
    assert [type(e) for e in found] == [BadMagic, BadMagic]


def test_a_roll_call_names_the_silent_and_spares_the_living():
    """After a failed exchange: one rank asks, one is in front of its next exchange, one is silent."""
    lines = linked(3)
    found = together([lambda: lines[0].inquire("gloo"), say(lines[1])])
    assert [type(e) for e in found] == [PeerTimeout, PeerTimeout]
    assert [e.ranks for e in found] == [(2,), (2,)]
    lines = linked(2)
    found = together([lambda: lines[0].inquire("gloo said so"), say(lines[1])])
    assert {type(e) for e in found} == {PeerLost}
    assert all("gloo said so" in str(e) for e in found), "whoever is the first to give up"


def test_nobody_waits_for_strangers_at_the_door(monkeypatch):
    """Ranks of an earlier start, noise and dozens who say nothing: none is a rank, and the ranks meet beside them."""
    monkeypatch.setattr(meeting, "PATIENCE", 30.0)
    store, silent = HashStore(), []

    def pester() -> None:
        while not store.check(["lines/0"]):
            pass
        _, port, host = store.get("lines/0").decode().split()
        for noise in (b"", b"GET / HTTP/1.1\r\n\r\n..", bytes(16) + (1).to_bytes(4, "little")):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(noise)
        silent.extend(socket.create_connection((host, int(port))) for _ in range(10))

    one = threading.Thread(target=pester)
    one.start()
    zero: list[Any] = []
    other = threading.Thread(target=lambda: zero.append(meet(store, 0, 2, 10.0)))
    other.start()
    one.join(10)
    began = time.monotonic()
    lines = meet(store, 1, 2, 10.0)
    other.join(10)
    assert time.monotonic() - began < 5.0
    assert [len(signals) for signals in together([say(zero[0]), say(lines)])] == [2, 2]
    for line in (lines, zero[0], *silent):
        line.close()


def test_a_card_may_come_in_pieces_and_late_ones_are_sent_away(monkeypatch):
    with meeting.Door("127.0.0.1", 3) as door:
        word, port, host = door.address.split()
        card = bytes.fromhex(word) + (2).to_bytes(4, "little")
        with socket.create_connection((host, int(port))) as slow, socket.create_connection((host, int(port))) as twice:
            slow.sendall(card[:7])
            assert door.arrivals({1, 2}) == {}
            slow.sendall(card[7:])
            until_then = time.monotonic() + 5.0
            while not (met := door.arrivals({1, 2})) and time.monotonic() < until_then:
                pass
            assert list(met) == [2]
            met[2].close()
            monkeypatch.setattr(meeting, "PATIENCE", -1.0)
            with socket.create_connection((host, int(port))) as late:
                late.settimeout(5.0)
                while door.arrivals({1, 2}) == {} and not readable(late):
                    pass
                assert late.recv(1) == b"", "the door has hung up"
            twice.sendall(card)


def readable(line: socket.socket) -> bool:
    return bool(select.select([line], [], [], 0)[0])


def test_a_rank_that_runs_ahead_without_end_is_refused():
    """A rank sends one signal an exchange: it cannot have sent many that another has not used."""
    lines = linked(2, timeout=2.0)
    for number in range(40):
        lines[1]._post(Signal(ALL, 1, 2, number=number))
    with pytest.raises(LengthError, match="rank 1: more than 16 signals"):
        lines[0].watch(0.1)
    assert lines[0].closed


def test_who_does_not_come_is_named():
    store = HashStore()
    found = together([lambda: meet(store, 0, 3, 0.3), lambda: meet(store, 1, 3, 0.3)])
    assert all(isinstance(e, PeerTimeout) and e.ranks == (2,) for e in found), found


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 86401, "60", True])
def test_a_wrong_timeout_is_refused(seconds):
    with pytest.raises(ConfigError, match="timeout"):
        checked_timeout(seconds)


def test_the_verdict_on_every_header_is_the_same_in_any_company():
    """The matrix's changed headers, judged without processes: as a rank among three, whichever it is."""
    cases = [case for case in faults.CASES if case.change and case.call == "barrier"]
    assert len(cases) == 3 * len(faults.HEADER)
    for case in cases:
        signals = [Signal(3, rank, 3, 7, 5) for rank in range(3)]
        signals[case.rank] = signals[case.rank]._replace(**case.change)
        with pytest.raises(case.error, match=case.names):
            judge(signals)
    changed = {name for change, *_ in faults.HEADER for name in change}
    assert changed | {"nbytes", "body"} == set(Signal._fields), "every field of the header is in the matrix"


@pytest.mark.slow
def test_every_mismatch_is_one_error_on_every_rank_and_the_group_goes_on():
    """All cases in one group of three ranks over gloo: the same words on each, and an exchange afterwards succeeds."""
    found = worker("matrix")
    assert len(faults.CASES) >= 60
    wrong, slow = [], []
    for i, case in enumerate(faults.CASES):
        cell = [rank[i] for rank in found]
        right = all(c["error"] == case.error.__name__ and case.names in c["said"] and c["goes on"] for c in cell)
        if not right or len({c["said"] for c in cell}) > 1:
            wrong.append((case, cell))
        slow += [c["seconds"] for c in cell if c["seconds"] >= 1.0]
    assert not wrong[:3]
    # The first cases load compiled kernels, and other tests may hold the cores: a few may be late, never all.
    assert len(slow) <= 9, slow


@pytest.mark.slow
def test_the_lost_rank_is_named_by_every_survivor():
    """Killed in front of an exchange, within it, at the start, two at once; its own error; its end ahead of time."""
    found = worker("deaths")
    for cell in found["deaths"]:
        survivors = [one for rank, one in enumerate(cell["reports"]) if rank not in cell["victims"]]
        if cell["place"] == "done":
            assert all(one["error"] == RoundMismatch.__name__ for one in survivors), cell
            continue
        assert all(one["error"] == "PeerDied" and one["ranks"] == cell["victims"] for one in survivors), cell
        if cell["place"] != "own error":
            assert cell["seconds"] < 1.0, cell
    absent = [one for one in found["absent"]["reports"] if one]
    assert [(one["error"], one["ranks"]) for one in absent] == [("PeerTimeout", [2])] * 2
    for victim, cell in zip((0, 2), found["stopped"], strict=True):
        for rank, one in enumerate(cell["reports"]):
            assert (one["error"], one["ranks"]) == ("PeerTimeout", [victim]), cell
            # At the limit of 1 s, plus the grace of a roll call; the victim learns of it when it goes on, after 3 s.
            assert 0.9 < cell["seconds"][rank] < (4.5 if rank == victim else 2.9), cell


# ------------------------------------------------------------------------------------------------ not finite
@pytest.mark.parametrize("name", faults.runs())
def test_rounds_that_go_on_do_not_depend_on_chunks(name):
    """Who was left out or which round was skipped, in the same words, and every iterate and count."""
    method, policy = next((m, p) for m in faults.SKIPPING for p in ("drop", "skip") if f"{m!r} {p}" == name)
    whole = faults.run(Local, method, policy)
    assert faults.run(Local, method, policy, chunk=2) == whole
    assert faults.run(Local, method, policy, chunk=1) == whole
    asked = [[k, list(clients)] for k, clients in faults.BAD.items()]
    if "clients=" not in name:
        assert [told[:2] for told in whole[2]] == asked or policy == "skip"
        assert [told[0] for told in whole[2]] == [k for k, _ in asked]


def test_a_round_is_held_among_the_others():
    """GD without client 3 in round 0: the step is that of the four others' mean, and 4 of 5 messages are counted."""
    problem, channel = faults.broken({0: (3,)}), Local(5)
    before, after = (e.state for e in islice(rounds(GD(), Step(0.125), problem, channel, 0, on_nonfinite="drop"), 2))
    rows = faults.broken({}).evaluate(before.x, torch.tensor([0, 1, 2, 4]))[1]
    torch.testing.assert_close(after.x, before.x - 0.125 * rows.double().mean(0).float())
    assert after.meter.up == 4 * 48
    assert after.meter.up_framed == 4 * (48 + 64)


def test_nothing_is_skipped_at_the_start_nor_for_ever():
    problem = faults.broken({0: (3,)})
    events = rounds(Marina(RandK(3), p=0.3), Step(0.125), problem, Local(5), 0, on_nonfinite="skip")
    next(events)
    with pytest.raises(NonFiniteError, match="client 3, round 0"):
        next(events)
    problem = faults.broken(dict.fromkeys(range(1, 300), (3,)))
    events = rounds(GD(), Step(0.125), problem, Local(5), 0, on_nonfinite="skip")
    with pytest.raises(NonFiniteError, match="client 3, round 101"):
        for _ in events:
            pass


def test_nobody_left_is_no_quorum():
    events = rounds(GD(), Step(0.125), faults.broken({1: (0, 1, 2, 3, 4)}), Local(5), 0, on_nonfinite="drop")
    with pytest.raises(QuorumLost, match="none of 5 clients"):
        for _ in events:
            pass


@pytest.mark.parametrize(
    "method",
    [Marina(RandK(3), p=0.3), PPMarina(RandK(3), p=0.3, clients=2), Dasha(RandK(3)), VRDiana(RandK(3), batch=1, p=0.5)],
    ids=repr,
)
def test_methods_that_cannot_spare_a_client_say_so_first(method):
    with pytest.raises(ConfigError, match="server and clients would remember"):
        next(rounds(method, Step(0.1), faults.broken({}), Local(5), 0, on_nonfinite="drop"))


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="'ignore': one of raise, skip, drop"):
        simulate(faults.broken({}), "GD()", rounds=1, on_nonfinite="ignore")  # type: ignore[arg-type]


def test_a_run_keeps_a_list_of_its_faults():
    run = simulate(faults.broken(faults.BAD), DCGD(RandK(3)), rounds=8, step=0.1, on_nonfinite="drop")
    assert [(f["round"], tuple(f["clients"]), f["policy"]) for f in run.result()["faults"]] == [
        (k, clients, "drop") for k, clients in faults.BAD.items()
    ]
    assert run.stopped == "rounds"
    assert simulate(faults.broken(faults.BAD), DCGD(RandK(3)), rounds=8, step=0.1).stopped == "diverged"


@pytest.mark.slow
def test_ranks_treat_what_is_not_finite_as_the_simulator_does():
    """Every method and policy; 8 clients x 50 rounds, each named in its round on all four ranks, every state as it was;
    and where nothing may go on, the same error everywhere, with the rank."""
    found = worker("nan")
    expected = json.loads(json.dumps({name: run(Local) for name, run in faults.runs().items()}))
    grid = json.loads(json.dumps([faults.grid_row(Local, client) for client in range(8)]))
    assert grid == [[[k, [(client + k) % 8], True] for k in range(1, 51)] for client in range(8)]
    for rank in found:
        assert "error" not in rank, rank
        different = [name for name, seen in rank["runs"].items() if seen != expected[name]]
        assert not different
        assert rank["grid"] == grid
        where = {"client 1": 0, "client 4": 3}  # five clients on four ranks: 0, 1 | 2 | 3 | 4
        expected_words = [said.replace(". ", f". (rank {where[said[:8]]}) ") for said in faults.raised(Local)]
        assert rank["raised"] == expected_words
