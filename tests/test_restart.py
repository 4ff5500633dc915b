"""A rank of `examples/train.py` is killed under torchrun: the restarted run ends at the model of an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train.py"
OPTIONS = ["--batch", "4", "--steps", "120", "--every", "20", "--timeout", "30", "--checkpoint"]
FORKED = """
import os, sys, train
os.environ["RANK"] = str(int(os.fork() == 0))
os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]  # as where one agent of two has counted a restart
sys.exit(train.main())
"""


def started(words: list[str], folder: Path, log: Path, **more: str) -> subprocess.Popen[bytes]:
    """Two ranks; what they say goes to the log."""
    path = os.pathsep.join([str(EXAMPLE.parent), str(EXAMPLE.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "COLUMNS": "200", "PYTHONPATH": path}
    with log.open("wb") as stream:
        command = [sys.executable, *words, *OPTIONS, str(folder)]
        return subprocess.Popen(command, env=os.environ | env | more, stdout=stream, stderr=stream)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return str(door.getsockname()[1])


def worker(agent: int, rank: int) -> int:
    """The process id of that rank among torchrun's children."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


def finished(process: subprocess.Popen[bytes], log: Path) -> str:
    """What it said, once it has ended well."""
    try:
        status = process.wait(120)
    finally:
        process.terminate()
        process.wait(60)
    said = log.read_text()
    assert status == 0, said[-3000:]
    return said


def digest(said: str) -> str:
    (found,) = re.findall(r"SHA-256 of the model: ([0-9a-f]{64})", said)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ranks are found through /proc")
def test_a_killed_rank_changes_nothing(tmp_path):
    """SIGKILL behind the second checkpoint, in the middle of compressed steps: all ranks start again, under a store
    that holds the dead attempt's addresses, and go on from the newest step that both have saved."""
    log, end = tmp_path / "cut.log", time.monotonic() + 60
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = started([*agent, str(EXAMPLE)], tmp_path / "cut", log)
    while not (tmp_path / "cut" / "step00000040.rank1.shoal").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    said = finished(process, log)
    assert re.search(r"going on from step (20|40|60|80|100)\b", said), said[-3000:]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    whole = started(["-c", FORKED], tmp_path / "whole", tmp_path / "whole.log", **names)
    assert digest(said) == digest(finished(whole, tmp_path / "whole.log"))
