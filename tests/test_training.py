"""`shoal.ddp` and `shoal.optim`: in a world of one what they compute, on two ranks that all of them compute the same.

The world of one is a real gloo group over a file, so everything but a second rank's bytes is the real thing.
"""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal.ddp
import shoal.optim
from shoal.compressors import Correlated, PermK, RandK, TopK
from shoal.core import DENSE, Method
from shoal.descents import Step
from shoal.errors import ConfigError, DataError, NonFiniteError, ResumeMismatch
from shoal.messages import Round
from shoal.methods import EF21, Diana, VRMarina
from shoal.problems import Module
from shoal.runtimes import Local, rounds

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def world(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))


def batch(step: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 12, generator=made), torch.randint(3, (8,), generator=made)


def loss_of(model: nn.Module, step: int, rank: int = 0) -> torch.Tensor:
    inputs, targets = batch(step, rank)
    return nn.functional.cross_entropy(model(inputs), targets)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def flat_grads(model: nn.Module) -> torch.Tensor:
    return flat([p.grad for p in model.parameters()])


def local(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """This rank's own gradients, by parameter."""
    bare = copy.deepcopy(model)
    bare.zero_grad()
    loss_of(bare, step).backward()
    return {name: p.grad.reshape(-1) for name, p in bare.named_parameters()}


# ------------------------------------------------------------------------------------------------ ddp
def test_gradients_are_what_the_compressor_says_plus_what_was_left_out(world):
    """Bit for bit, over steps: TopK of gradient and memory together for large parameters, the gradient for small ones,
    all of it dense while warming up."""
    ddp, code = DistributedDataParallel(net()), TopK(0.1)
    memory: dict[str, torch.Tensor] = {}
    with shoal.ddp.attach(ddp, code, start=1, min_numel=100, seed=5) as handle:
        assert handle.error_feedback
        for step in range(4):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
            own = local(ddp.module, step)
            names = [p.name for p in next(reversed(handle._plans.values())).coded]
            if step == 0:
                assert names == []
                assert torch.equal(flat_grads(ddp), flat(own.values()))
                continue
            assert sorted(names) == ["0.weight", "2.weight"]
            u = torch.cat([own[k] + memory.get(k, torch.zeros_like(own[k])) for k in names])
            rnd = Round.full(step, 5, 1)
            expected = code.decode(code.encode(u[None], rnd), rnd)[0]
            for k, part, whole in zip(
                names, *(v.split([len(own[k]) for k in names]) for v in (expected, u)), strict=True
            ):
                own[k], memory[k] = part, whole - part
            assert torch.equal(flat_grads(ddp), flat(own.values()))
        kept = {k.split("rank0.")[1]: v for k, v in handle.state_dict().items() if k.startswith("memory")}
    assert kept.keys() == memory.keys()
    assert all(torch.equal(kept[k], memory[k]) for k in memory)


def test_randomness_is_that_of_the_step_and_of_the_bucket(world):
    ddp, code = DistributedDataParallel(net()), RandK(0.2)
    with shoal.ddp.attach(ddp, code, min_numel=1, seed=9) as handle:
        for step in range(2):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
            plan = next(reversed(handle._plans.values()))
            own = local(ddp.module, step)
            rnd = Round.full(step, 9, 1).fork(plan.stream)
            u = torch.cat([own[p.name] for p in plan.coded])
            expected = code.decode(code.encode(u[None], rnd), rnd)[0]
            found = dict(ddp.module.named_parameters())
            assert torch.equal(flat([found[p.name].grad for p in plan.coded]), expected)
        assert handle.stats().up == 2 * code.capacity(1, len(u))


def test_accumulated_gradients_are_compressed_once(world):
    ddp = DistributedDataParallel(net())
    with shoal.ddp.attach(ddp, "Dense()", min_numel=1) as handle:
        with ddp.no_sync():
            loss_of(ddp, 0).backward()
        assert handle.step == 0
        loss_of(ddp, 1).backward()
        assert handle.step == 1
    first, second = local(ddp.module, 0), local(ddp.module, 1)
    assert torch.equal(flat_grads(ddp), flat([first[k] + second[k] for k in first]))


def test_a_nan_is_an_error_of_its_step_and_poisons_nothing(world):
    ddp = DistributedDataParallel(net())
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100) as handle:
        loss_of(ddp, 0).backward()
        before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in handle.state_dict().items()}
        ddp.zero_grad()
        with pytest.raises(NonFiniteError, match="client 0, round 1"):
            (loss_of(ddp, 1) * float("nan")).backward()
        assert flat_grads(ddp).isnan().all(), "nobody takes them for gradients"
        after = handle.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))
        ddp.zero_grad()
        loss_of(ddp, 2).backward()
        assert flat_grads(ddp).isfinite().all()


def train(ddp, handle, steps, scaler=None, overflow=()):
    """SGD over these steps, with a loss that overflows in some of them."""
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in steps:
        sgd.zero_grad()
        loss = loss_of(ddp, step) * (float("inf") if step in overflow else 1.0)
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(sgd)
            scaler.update()
        else:
            sgd.step()
    return flat(ddp.parameters())


def test_a_scaler_changes_nothing_but_the_steps_that_overflow(world):
    """Scales are powers of two: with memories of unscaled gradients the iterates are those without a scaler, bit for
    bit, though the scale changes on the way; an overflow skips the step, halves the scale and leaves the memories."""
    ddp = DistributedDataParallel(net())
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100) as handle:
        plain = train(ddp, handle, [0, 1, 2, 3, 4])
    ddp = DistributedDataParallel(net())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100, scaler=scaler) as handle:
        assert torch.equal(train(ddp, handle, [0, 1, 2, 3, 4], scaler), plain)
        assert scaler.get_scale() == 2.0**14
        memory = {k: v.clone() for k, v in handle.state_dict().items() if k.startswith("memory")}
        assert torch.equal(train(ddp, handle, [5], scaler, overflow=[5]), plain)
        assert scaler.get_scale() == 2.0**13
        assert all(torch.equal(handle.state_dict()[k], v) for k, v in memory.items())


def test_a_state_goes_on_to_the_same_bits_and_another_is_refused(world):
    ddp = DistributedDataParallel(net())
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100) as handle:
        train(ddp, handle, [0, 1, 2])
        stream = io.BytesIO()
        torch.save({"comm": handle.state_dict(), "model": ddp.module.state_dict()}, stream)
        whole = train(ddp, handle, [3, 4])
    stored = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    again = DistributedDataParallel(net(1))
    again.module.load_state_dict(stored["model"])
    with shoal.ddp.attach(again, "TopK(0.1)", min_numel=100) as handle:
        handle.load_state_dict(stored["comm"])
        assert torch.equal(train(again, handle, [3, 4]), whole)
        with pytest.raises(ResumeMismatch, match="the state's compressor is 'TopK"):
            handle.load_state_dict(stored["comm"] | {"compressor": "TopK(0.2)"})
        other = {k.replace("rank0", "rank1"): v for k, v in stored["comm"].items()}
        with pytest.raises(ResumeMismatch, match=r"no memory\.rank0\.0\.weight"):
            handle.load_state_dict(other)


WRAPPED = [{"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}]


@pytest.mark.parametrize("options", WRAPPED, ids=lambda o: next(iter(o)))
def test_however_the_module_is_wrapped(world, options):
    """Options of DDP change when hooks are called and where gradients lie, not what they are."""
    found = []
    for kept in ({}, options):
        ddp = DistributedDataParallel(net(), **kept)
        with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100) as handle:
            found.append(train(ddp, handle, range(4)))
            assert handle.stats().steps == 4
    assert torch.equal(*found)


def test_parameters_without_a_gradient_and_frozen_ones(world):
    """An unused layer's gradient stays absent; a frozen one has neither message nor memory."""
    model = net()
    model.add_module("spare", nn.Identity())
    model.spare.weight = nn.Parameter(torch.ones(200))
    model[0].weight.requires_grad_(False)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100) as handle:
        for step in range(2):
            ddp.zero_grad()
            loss_of(ddp, step).backward()
        assert [k for k in handle.state_dict() if k.startswith("memory")] == [
            "memory.rank0.2.weight",
            "memory.rank0.spare.weight",
        ]
    assert model.spare.weight.grad is None
    assert model[0].weight.grad is None


def test_a_group_of_the_callers_is_used_and_left(world):
    group = dist.new_group([0], backend="gloo")
    ddp = DistributedDataParallel(net())
    with shoal.ddp.attach(ddp, "TopK(0.1)", process_group=group) as handle:
        assert handle._link.group is group
        loss_of(ddp, 0).backward()
        with pytest.raises(ConfigError, match="carries another exchange"):
            shoal.optim.EF21(net().parameters(), 0.1, "TopK(0.1)", process_group=group)
    dist.barrier(group=group)
    again = shoal.optim.EF21(net().parameters(), 0.1, "TopK(0.1)", process_group=group)
    again.close()


def test_closed_means_that_ddp_averages_itself(world):
    ddp = DistributedDataParallel(net())
    handle = shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=1)
    handle.close()
    handle.close()
    loss_of(ddp, 0).backward()
    assert torch.equal(flat_grads(ddp), flat(local(ddp.module, 0).values()))
    assert not handle._thread.is_alive()


def test_what_breaks_in_the_thread_comes_out_of_backward_and_again(world, monkeypatch):
    ddp = DistributedDataParallel(net())
    handle = shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=1)
    monkeypatch.setattr(handle._link, "reduce", lambda *a, **k: (_ for _ in ()).throw(OSError("the wire")))
    for _ in range(2):
        ddp.zero_grad()
        with pytest.raises(OSError, match="the wire"):
            loss_of(ddp, 0).backward()
    handle.close()


ATTACHED = [
    (dict(compressor="TopK(0.1)", start=-1), "start=-1: an integer, at least 0"),
    (dict(compressor="TopK(0.1)", min_numel=0), "min_numel=0: an integer, at least 1"),
    (dict(compressor="TopK(0.1)", seed=-1), "seed=-1"),
    (dict(compressor="TopK(0.1)", channel="pigeons"), "channel='pigeons': a channel is one of"),
    (dict(compressor="TopK(0.1)", timeout=0), "timeout=0: seconds that a rank waits"),
    (dict(compressor="RandK(0.1)", error_feedback=True), r"memories of a compressor without alpha.*Scaled\(RandK"),
    (dict(compressor="TopK(300)", min_numel=100), "the smallest may have d=240"),
    (dict(compressor="TopC(3)"), "unknown name 'TopC'"),
    (dict(compressor=7), "compressor=7: a compressor, or text"),
]


@pytest.mark.parametrize(("asked", "said"), ATTACHED, ids=lambda v: str(v)[:40])
def test_settings_that_cannot_work_are_refused_at_once(world, asked, said):
    with pytest.raises(ConfigError, match=said):
        shoal.ddp.attach(DistributedDataParallel(net()), **asked)


def test_modules_that_cannot_be_served_are_refused(world):
    with pytest.raises(ConfigError, match="takes a module in DistributedDataParallel, got Sequential"):
        shoal.ddp.attach(net(), "TopK(0.1)")
    with pytest.raises(ConfigError, match=r"0\.weight \(torch\.float64\).*Keep float32"):
        shoal.ddp.attach(DistributedDataParallel(net().double()), "TopK(0.1)")
    with pytest.raises(ConfigError, match="0: sparse gradients"):
        shoal.ddp.attach(DistributedDataParallel(nn.Sequential(nn.Embedding(9, 4, sparse=True))), "TopK(0.1)")
    ddp = DistributedDataParallel(net())
    with shoal.ddp.attach(ddp, "TopK(0.1)"), pytest.raises(ConfigError, match="has a communication hook already"):
        shoal.ddp.attach(ddp, "TopK(0.1)")


def test_without_a_process_group():
    with pytest.raises(ConfigError, match="init_process_group"):
        shoal.optim.EF21(net().parameters(), lr=0.1)


# ------------------------------------------------------------------------------------------------ optim
def closure_of(optimizer, model: nn.Module, step: int, rank: int = 0, factor: float = 1.0):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, step, rank) * factor
        loss.backward()
        return loss.detach()

    return closure


def same_each_round(n: int = 1) -> Module:
    """The nets' loss with client i's batch of step 0."""
    return Module(net(), [batch(0, i) for i in range(n)], nn.CrossEntropyLoss(reduction="none"))


METHODS: dict[str, Method] = {
    "marina": VRMarina(Correlated(), p=0.3, batch=1),
    "permk": VRMarina(PermK(), p=0.3, batch=1),
    "diana": Diana(RandK(0.2)),
    "ef21": EF21(TopK(0.1)),
}
NAMES = list(METHODS)


def make(name: str, model: nn.Module, lr: float = 0.25, **more):
    """The optimizer of that method."""
    method = METHODS[name]
    if isinstance(method, VRMarina):
        return shoal.optim.Marina(model.parameters(), lr, method.compressor, p=method.p, **more)
    kind = shoal.optim.Diana if isinstance(method, Diana) else shoal.optim.EF21
    return kind(model.parameters(), lr, method.compressor, **more)


def simulated(method: Method, n: int, steps: int, lr: float = 0.25, seed: int = 0) -> torch.Tensor:
    """x after so many rounds in the simulator."""
    if isinstance(method, VRMarina):
        method = replace(method, batch=4096)  # all of a client's samples, as a closure takes them
    events = rounds(method, Step(lr), same_each_round(n), Local(n), seed)
    return next(itertools.islice(events, steps, None)).state.x


@pytest.mark.parametrize("name", NAMES)
def test_iterates_are_the_simulators(world, name):
    """A cross entropy's mean and Module's sum over N round alike where N is a power of two."""
    model = net()
    optimizer = make(name, model, seed=3)
    for _ in range(6):
        optimizer.step(closure_of(optimizer, model, 0))
    assert torch.equal(flat(model.parameters()), simulated(METHODS[name], 1, 6, seed=3))
    optimizer.close()


def wrong_states(optimizer, model: nn.Module, state: dict) -> None:
    """Each is refused before anything has changed: the next step is the one that it would have been."""
    before, (group,) = copy.deepcopy(optimizer.state_dict()), state["param_groups"]
    shorter = {i: {k: v[:1] for k, v in held.items()} for i, held in state["state"].items()}
    for wrong, said in (
        (None, "no param_groups"),
        ({}, "no param_groups"),
        ({"state": {}, "param_groups": []}, "no param_groups"),
        ({"state": {}, "param_groups": [group]}, r"parameter 0 has no server\.g of shape \(20, 12\)"),
        ({"param_groups": [group]}, r"parameter 0 has no server\.g"),
        (state | {"state": shorter}, r"parameter 0 has no server\.g of shape"),
        (state | {"param_groups": [group, group]}, r"groups have \[6, 6\] parameters, this optimizer's \[6\]"),
        (state | {"param_groups": [{k: v for k, v in group.items() if k != "round"}]}, "round is None"),
        (state | {"param_groups": [group | {"round": -1}]}, "round is -1"),
        (state | {"param_groups": [group | {"lr": float("nan")}]}, "the state's lr=nan"),
    ):
        with pytest.raises(ResumeMismatch, match=said):
            optimizer.load_state_dict(wrong)
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    assert all(torch.equal(now["state"][i][k], v) for i in before["state"] for k, v in before["state"][i].items())
    optimizer.step(closure_of(optimizer, model, 6))


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizers_state_goes_on_to_the_same_bits(world, name):
    model = net()
    optimizer = make(name, model)
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, step))
    stream = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, stream)
    for step in range(3, 6):
        optimizer.step(closure_of(optimizer, model, step))
    stored = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    other = net(1)
    again = make(name, other)
    other.load_state_dict(stored["model"])
    again.load_state_dict(stored["optimizer"])
    for step in range(3, 6):
        again.step(closure_of(again, other, step))
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    if name == "ef21":
        wrong_states(again, other, stored["optimizer"])
    with pytest.raises(ResumeMismatch, match="the state's seed is 0, this optimizer's 1"):
        make(name, net(), seed=1).load_state_dict(stored["optimizer"])
    if name in ("diana", "ef21"):
        for values in stored["optimizer"]["state"].values():
            values.pop("rank0.h", None)
            values.pop("rank0.g", None)
        with pytest.raises(ResumeMismatch, match="this is another rank's state"):
            make(name, net()).load_state_dict(stored["optimizer"])


def test_groups_schedules_hooks_and_weight_decay_are_torchs(world):
    """EF21 with Dense() is SGD: two groups, a schedule, decay in one of them, and a hook that counts."""
    mine, theirs, counted = net(), net(), []

    def groups(model):
        weights = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim == 1]
        return [{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 0.05}]

    ours, sgd = shoal.optim.EF21(groups(mine), 0.2, DENSE), torch.optim.SGD(groups(theirs), 0.2)
    ours.register_step_post_hook(lambda *a: counted.append(1))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (ours, sgd)]
    for step in range(5):
        ours.step(closure_of(ours, mine, step))
        sgd.step(closure_of(sgd, theirs, step))
        for schedule in schedules:
            schedule.step()
    # EF21 adds differences to its estimate: float32 rounding at every step, on numbers of size one.
    torch.testing.assert_close(flat(mine.parameters()), flat(theirs.parameters()), rtol=1e-5, atol=1e-6)
    assert len(counted) == 5
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in sgd.param_groups] == [0.05, 0.0125]
    assert ours.stats().dense == 5 * 4 * ours.d == ours.stats().up


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_alone(world, name):
    """They are no part of the vector: neither moved nor decayed, without a gradient and without a state."""
    model = net()
    for p in model[0].parameters():
        p.requires_grad_(False)
    frozen = [p.clone() for p in model[0].parameters()]
    optimizer = make(name, model, weight_decay=0.1)
    assert optimizer.d == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for step in range(3):
        optimizer.step(closure_of(optimizer, model, step))
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), frozen, strict=True))
    assert all(p.grad is None and p not in optimizer.state for p in model[0].parameters())
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    with pytest.raises(ResumeMismatch, match="parameter 0 was trained, and is frozen here"):
        optimizer.load_state_dict(state | {"state": state["state"] | {0: state["state"][2]}})
    model[0].bias.requires_grad_(True)
    with pytest.raises(ConfigError, match="requires_grad of a parameter has changed"):
        optimizer.step(closure_of(optimizer, model, 3))


def test_a_parameter_without_a_gradient_has_the_gradient_zero(world):
    """Unlike torch's SGD, which leaves it as it is: all ranks would have to ask each other."""
    model, unused = net(), nn.Parameter(torch.ones(3))
    optimizer = shoal.optim.EF21([*model.parameters(), unused], 0.5, DENSE, weight_decay=0.25)
    optimizer.step(closure_of(optimizer, model, 0))
    assert torch.equal(unused.detach(), torch.full((3,), 1 - 0.5 * 0.25))
    assert torch.equal(unused.grad, torch.zeros(3))


def test_both_calls_of_the_closure_meet_the_same_random_numbers(world):
    model, drawn = net(), []
    optimizer = shoal.optim.Marina(model.parameters(), 0.1, "RandK(0.5)", p=0.01)

    def closure():
        drawn.append(float(torch.rand(1)))
        return closure_of(optimizer, model, 0)()

    full = []
    for _ in range(3):
        full.append(optimizer.full)
        optimizer.step(closure)
    assert full == [True, False, False], "p = 0.01 and this seed: heads in the first round only"
    assert len(drawn) == 5
    assert (drawn[1], drawn[3]) == (drawn[2], drawn[4])
    assert len(set(drawn)) == 3


def test_the_loss_is_that_of_the_new_point_and_grad_is_the_estimate(world):
    model = net()
    optimizer = shoal.optim.Marina(model.parameters(), 0.5, "RandK(0.5)", p=0.01)
    optimizer.step(closure_of(optimizer, model, 0))
    x, expected = flat(model.parameters()), float(loss_of(model, 0).detach())
    assert float(optimizer.step(closure_of(optimizer, model, 0))) == expected
    assert torch.equal(flat(model.parameters()), x - 0.5 * flat_grads(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_leaves_parameters_and_states_as_they_were(world, name):
    model = net()
    optimizer = make(name, model)
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, step))
    x, state = flat(model.parameters()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NonFiniteError, match="client 0, round 2"):
        optimizer.step(closure_of(optimizer, model, 2, factor=float("nan")))
    assert torch.equal(flat(model.parameters()), x)
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert all(torch.equal(now["state"][i][k], v) for i in now["state"] for k, v in state["state"][i].items())
    optimizer.step(closure_of(optimizer, model, 2))


def test_a_closure_that_fails_leaves_the_parameters(world):
    """At the old point, which is the second call of a round with differences."""
    model = net()
    optimizer = shoal.optim.Marina(model.parameters(), 0.1, "RandK(0.5)", p=0.01)
    optimizer.step(closure_of(optimizer, model, 0))
    x, calls = flat(model.parameters()), []

    def closure():
        calls.append(flat(model.parameters()))
        if len(calls) == 2:
            raise KeyError("batch")
        return closure_of(optimizer, model, 1)()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert torch.equal(calls[0], x)
    assert not torch.equal(calls[1], x)
    assert torch.equal(flat(model.parameters()), x)


def test_a_scaler_is_refused_by_name(world):
    model = net()
    optimizer, scaler = make("ef21", model), torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ConfigError, match=r"EF21 with a GradScaler.*bfloat16"):
        scaler.step(optimizer)


BUILT = [
    (lambda p: shoal.optim.EF21(p, -0.1), "lr=-0.1: a finite number"),
    (lambda p: shoal.optim.EF21(p, 0.1, weight_decay=float("inf")), "weight_decay=inf"),
    (lambda p: shoal.optim.EF21(p, 0.1, "RandK(3)"), "EF21 needs a compressor with alpha"),
    (lambda p: shoal.optim.Diana(p, 0.1, "TopK(3)"), "Diana needs a compressor with omega"),
    (lambda p: shoal.optim.Diana(p, 0.1, "RandK(0.5)", shift=0.9), "it must be at most"),
    (lambda p: shoal.optim.Marina(p, 0.1, "TopK(3)"), "Marina needs a compressor with ab"),
    (lambda p: shoal.optim.Marina(p, 0.1, p=0.0), "probability of a full round"),
    (lambda p: shoal.optim.EF21(net().double().parameters(), 0.1), "parameters of torch.float64"),
    (lambda p: shoal.optim.EF21([{"params": p, "lr": -1}], 0.1), "parameter group 0: lr=-1: a finite number"),
    (
        lambda p: shoal.optim.EF21([{"params": p[:1]}, {"params": p[1:], "weight_decay": float("nan")}], 0.1),
        "parameter group 1: weight_decay=nan",
    ),
    (lambda p: shoal.optim.EF21([q.requires_grad_(False) for q in p], 0.1), "no parameter requires a gradient"),
    (lambda p: shoal.optim.Diana(p, 0.1, shift="x"), "shift='x'"),
    (lambda p: shoal.optim.EF21(p, 0.1).step(), "step.. without a closure.*bfloat16"),
    (lambda p: shoal.optim.EF21(p, 0.1).add_param_group({"params": p}), "cannot be added later"),
]


@pytest.mark.parametrize(("build", "said"), BUILT, ids=[said for _, said in BUILT])
def test_optimizers_that_cannot_work_are_refused(world, build, said):
    with pytest.raises(ConfigError, match=said):
        build(list(net().parameters()))


def test_methods_are_those_of_the_library(world):
    assert [make(name, net()).method for name in NAMES] == list(METHODS.values())
    bits = shoal.optim.Marina(net().parameters(), 0.1, "RandK(0.25)").method
    assert bits.p == pytest.approx(0.25, rel=0.01), "the share of the bits"


# ------------------------------------------------------------------------------------------------ the example
@pytest.fixture
def example(monkeypatch):
    """examples/train.py as a module."""
    monkeypatch.syspath_prepend(TESTS.parent / "examples")
    monkeypatch.setenv("RANK", "0")
    yield importlib.import_module("train")
    del sys.modules["train"]


def run_example(example, monkeypatch, *options) -> str:
    """What it says on rank 0."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    console = Console(file=io.StringIO(), width=200)
    example.run(example.parsed(), 0, 1, console)
    return console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "way"), [("cnn", "ddp"), ("gru", "marina")])
def test_the_example_trains_and_resumes_to_the_same_bits(world, example, monkeypatch, tmp_path, kind, way):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    options = ["--model", kind, "--optimizer", way, "--text", text, "--batch", 4, "--every", 2, "--checkpoint"]
    said = run_example(example, monkeypatch, *options, tmp_path / "whole", "--steps", 9)
    assert "9/9" in said
    assert "times less than float32" in said
    run_example(example, monkeypatch, *options, tmp_path / "cut", "--steps", 7)
    (tmp_path / "cut" / "step00000007.rank0.shoal").write_bytes(b"torn")
    again = run_example(example, monkeypatch, *options, tmp_path / "cut", "--steps", 9)
    assert "going on from step 6" in again, "behind the dense steps of DDP, where a bucket is one message"
    assert again.split("SHA-256")[1] == said.split("SHA-256")[1]
    with pytest.raises(ResumeMismatch, match="was saved with seed 0, now it is 1"):
        run_example(example, monkeypatch, *options, tmp_path / "cut", "--seed", 1)


def test_the_example_says_what_is_wrong(world, example, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"--text .*nowhere"):
        run_example(example, monkeypatch, "--model", "gru", "--text", tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--checkpoint .*file/runs: Not a directory"):
        run_example(example, monkeypatch, "--checkpoint", tmp_path / "file" / "runs", "--optimizer", "ef21")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lr", "-1"], "--lr -1: a finite number, not negative"),
        (["--lr", "nan", "--optimizer", "ef21"], "--lr nan"),
        (["--steps", "0"], "--steps 0: at least 1"),
        (["--seed", "-1"], "seed=-1"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_options_of_the_example_that_cannot_work_are_one_line(example, monkeypatch, capsys, options, said):
    """Before ranks meet."""
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    assert example.main() == 2
    assert capsys.readouterr().err.startswith(f"rank 0: error: {said}")


# ------------------------------------------------------------------------------------------------ two ranks
@pytest.mark.slow
def test_two_ranks():
    """Everything in one launch; `training_worker.py` says what each entry is."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(TESTS / "training_worker.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for name, (first, second) in found["alike"].items():
        assert first == second, name
    assert found["alike"].keys() >= {"ddp Correlated()", "ddp TopK(0.1)", "optim marina", "optim ef21"}
    for name in NAMES:
        assert found["alike"][f"optim {name}"][0] == found["simulated"][name], name
    assert found["buckets"] > 1, "rebuilt, and more than one"
    for first, second in found["said"].values():
        assert first == second
    assert "NonFiniteError: client 1, round 2" in found["said"]["ddp nan"][0]
    assert "NonFiniteError: client 1, round 1" in found["said"]["optim nan"][0]
    assert "seed: rank 0: 0; rank 1: 1" in found["said"]["ddp seed"][0]
    assert "parameters: rank 0: " in found["said"]["optim start"][0]
    assert "channel: rank 0: replicated; rank 1: sharded" in found["said"]["optim versions"][0]
    assert "versions.torch: rank 0: 2.0; rank 1: 2.1" in found["said"]["optim versions"][0]
    begun, *steps, _ = found["said"]["optim rates"][0]
    assert "groups.0.lr: rank 0: 0.25; rank 1: 0.5 | groups.0.weight_decay: rank 0: 0.0; rank 1: 0.5" in begun
    assert steps[:2] == ["nothing"] * 2
    assert steps[3] == "nothing", "the group goes on once the rates are mended"
    assert "ConfigMismatch: the ranks do not run the same. groups.0.lr: rank 0: 0.25; rank 1: 0.125." in steps[2]
    *refused, last = found["said"]["optim alike"][0]
    assert [one.split(":")[0] for one in refused] == ["ConfigError"] * 3
    assert last == "nothing"
    for heard, own in zip(*found["broken"], strict=True):
        assert own == "LookupError: no such batch"
        assert heard.startswith("PeerDied: rank 1 stopped with LookupError: no such batch")
    assert found["said"]["scale"] == [2.0**11] * 2, "both skipped"
    assert found["means"] == [True, True], "the float64 mean of both ranks' gradients, bit for bit"
    error, seconds, again = found["lost"]
    assert error == "PeerDied"
    assert (seconds < 5.0, again < 0.5) == (True, True)
