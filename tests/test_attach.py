"""`shoal.ddp.attach`: what it refuses, before any traffic, and ranks that are lost while DDP exchanges by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal.ddp
from shoal.compressors import QSGD, Correlated, Rotated, Scaled
from shoal.errors import ConfigError, ResumeMismatch
from shoal.runtimes.reduce import feedback_of

WORKER = Path(__file__).resolve().parent / "attach_worker.py"


@pytest.fixture
def world(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(*sizes: int, **options: bool) -> DistributedDataParallel:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))), **options)


def stepped(model: DistributedDataParallel) -> None:
    model.zero_grad()
    model(torch.ones(2, model.module[0].in_features)).sum().backward()


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"error_feedback": "False"}, "error_feedback='False'"),
        ({"error_feedback": 1}, "error_feedback=1"),
        ({"scaler": 3}, "GradScaler"),
        ({"compressor": "Rotated(QSGD(3), shared='no')"}, "shared='no'"),
        ({"compressor": "TopK(5000)"}, "k must be in 1..1600"),
    ],
)
def test_what_cannot_be_meant_is_refused(world, asked, word):
    with pytest.raises(ConfigError, match=word):
        shoal.ddp.attach(wrapped(40, 40), **asked)


@pytest.mark.parametrize("code", [Rotated(Correlated()), QSGD(3)], ids=repr)
def test_the_mend_for_memories_is_one_that_works(code):
    with pytest.raises(ConfigError, match=r"such as (\S+)\.$") as caught:
        feedback_of(code, True, repr(code))
    mend = str(caught.value).rsplit("such as ", 1)[1][:-1]
    assert mend.startswith("Scaled") is isinstance(code, QSGD)
    assert hasattr(Scaled(code) if isinstance(code, QSGD) else shoal.TopK(0.01), "alpha")


def test_a_large_min_numel_compresses_nothing(world, monkeypatch):
    monkeypatch.setattr(shoal.ddp, "rehearse", lambda *args: pytest.fail("nothing will be compressed"))
    with shoal.ddp.attach(wrapped(4, 4), min_numel=10**9) as handle:
        assert handle.stats().steps == 0


def test_a_parameter_frozen_after_it_was_wrapped(world):
    model = wrapped(40, 40, 40, find_unused_parameters=True)
    model.module[1].weight.requires_grad_(False)
    with shoal.ddp.attach(model, "TopK(0.1)") as handle:
        for _ in range(2):
            stepped(model)
        assert [k for k in handle.state_dict() if k.startswith("memory")] == ["memory.rank0.0.weight"]


def test_a_state_of_other_settings_and_a_broken_one_are_refused_and_nothing_changes(world):
    model = wrapped(40, 40)
    with shoal.ddp.attach(model, "TopK(0.1)") as handle:
        stepped(model)
        state = handle.state_dict()
        for change in (
            {"step": "x"},
            {"step": -1},
            {"memory.rank0.0.weight": 3},
            {"start": 9},
            {"error_feedback": False},
        ):
            with pytest.raises(ResumeMismatch):
                handle.load_state_dict({**state, **change})
        with pytest.raises(ResumeMismatch):
            handle.load_state_dict({k: v for k, v in state.items() if k != "step"})
        assert handle.step == 1
        assert torch.equal(handle.state_dict()["memory.rank0.0.weight"], state["memory.rank0.0.weight"])
        handle.load_state_dict(state)


@pytest.mark.slow
def test_two_ranks_that_differ_and_one_that_is_lost_in_front_of_a_broadcast():
    """Batch normalization's buffers are DDP's own exchange: the lost rank is named there as well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1"}
    facts["PYTHONPATH"] = str(WORKER.parents[1])
    command = [sys.executable, str(WORKER)]
    ranks = [
        subprocess.Popen(command, env=os.environ | facts | {"RANK": f"{rank}"}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
    killed, found = (json.loads(lines[-1]) for lines in said)
    for each in (killed, found):
        assert each["channel"][0] == "ConfigMismatch"
        assert "channel: rank 0: auto; rank 1: sharded" in each["channel"][2]
        assert each["size"][0] == "ConfigError"
    assert found["lost"][:2] == found["again"][:2] == ["PeerDied", [0]]
    assert found["seconds"] < 10.0
