"""One rank of `test_training`: DDP with a hook and the optimizers over gloo; rank 0 prints what both ranks found.

Start it as `python -m torch.distributed.run --standalone --nproc-per-node 2 tests/training_worker.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import test_training as single  # noqa: E402
from test_training import METHODS, NAMES, closure_of, flat, flat_grads, loss_of, make, net, simulated  # noqa: E402

import shoal.ddp  # noqa: E402
import shoal.optim  # noqa: E402
from shoal.errors import PeerDied, ShoalError  # noqa: E402
from shoal.optim import clients  # noqa: E402

CODES = ["Correlated()", "TopK(0.1)", "PermK()", "Coded(QSGD(1))", "Sign()", "Rotated(Correlated(scale='max'))"]


def sha(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def said(work) -> str:
    """The error that came of it, without what a rank says of itself."""
    try:
        work()
    except ShoalError as error:
        return f"{type(error).__name__}: {str(error).split(' (')[0]}"
    return "nothing"


def wide() -> nn.Sequential:
    """Parameters enough for several buckets."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 90), nn.Tanh(), nn.Linear(90, 90), nn.Tanh(), nn.Linear(90, 3))


def ddp_run(code: str, rank: int, facts: dict) -> str:
    """Parameters after warm-up, rebuilt buckets, accumulation, and steps with a scheduler of torch's."""
    ddp = DistributedDataParallel(wide(), bucket_cap_mb=0.01)
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    with shoal.ddp.attach(ddp, code, start=1, min_numel=100) as handle:
        for step in range(5):
            sgd.zero_grad()
            if step == 3:
                with ddp.no_sync():
                    loss_of(ddp, 99, rank).backward()
            loss_of(ddp, step, rank).backward()
            sgd.step()
        facts["buckets"] = len(handle._plans) - 1
        assert handle.stats().moved > handle.stats().up > 0
    return sha(flat(ddp.parameters()))


def means(rank: int) -> bool:
    """Dense() gives (g_0 + g_1) / 2, added in float64 in the order of ranks."""
    ddp, own = DistributedDataParallel(net()), []
    with shoal.ddp.attach(ddp, "Dense()", min_numel=1):
        loss_of(ddp, 7, rank).backward()
    for other in range(2):
        bare = net()
        loss_of(bare, 7, other).backward()
        own.append(flat_grads(bare).double())
    return torch.equal(flat_grads(ddp), ((own[0] + own[1]) / 2).float())


def ddp_nan(rank: int) -> str:
    ddp = DistributedDataParallel(wide(), bucket_cap_mb=0.01)
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100) as handle:
        for step in range(2):
            ddp.zero_grad()
            loss_of(ddp, step, rank).backward()
        before = {k: v.clone() for k, v in handle.state_dict().items() if k.startswith("memory")}
        factor = float("nan") if rank == 1 else 1.0
        out = said(lambda: (loss_of(ddp, 2, rank) * factor).backward())
        assert all(torch.equal(handle.state_dict()[k], v) for k, v in before.items())
        ddp.zero_grad()
        loss_of(ddp, 3, rank).backward()
        assert flat_grads(ddp).isfinite().all()
    return out


def scale(rank: int) -> float:
    """Rank 1 overflows in step 1: the scale of both is halved, and both keep their parameters."""
    ddp, scaler = DistributedDataParallel(net()), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100, scaler=scaler) as handle:
        x = single.train(ddp, handle, [0], scaler)
        assert torch.equal(single.train(ddp, handle, [1], scaler, overflow=[1] if rank == 1 else []), x)
    return scaler.get_scale()


def optim_run(name: str, rank: int) -> str:
    model = net()
    optimizer = make(name, model)
    for _ in range(6):
        optimizer.step(closure_of(optimizer, model, 0, rank))
    optimizer.close()
    return sha(flat(model.parameters()))


def optim_nan(rank: int) -> str:
    model = net()
    optimizer = make("marina", model)
    optimizer.step(closure_of(optimizer, model, 0, rank))
    x = flat(model.parameters())
    factor = float("nan") if rank == 1 else 1.0
    out = said(lambda: optimizer.step(closure_of(optimizer, model, 1, rank, factor)))
    assert torch.equal(flat(model.parameters()), x)
    optimizer.step(closure_of(optimizer, model, 1, rank))
    optimizer.close()
    return out


def optim_start(rank: int) -> str:
    model = net(rank)
    optimizer = make("ef21", model)
    out = said(lambda: optimizer.step(closure_of(optimizer, model, 0, rank)))
    optimizer.close()
    return out


def optim_versions(rank: int) -> str:
    """Another channel, and another version of torch."""
    model = net()
    optimizer, true = make("ef21", model, channel=["replicated", "sharded"][rank]), clients.versions
    clients.versions = lambda: true() | {"torch": f"2.{rank}"}
    try:
        return said(lambda: optimizer.step(closure_of(optimizer, model, 0, rank)))
    finally:
        clients.versions = true
        optimizer.close()


def optim_rates(rank: int) -> list[str]:
    """Ranks that begin with other rates, and ranks whose schedules part in step 2; what was wrong is mended then."""
    model = net()
    optimizer = make("marina", model, lr=0.25 + 0.25 * rank, weight_decay=0.5 * rank)
    out = [said(lambda: optimizer.step(closure_of(optimizer, model, 0, rank)))]
    group = optimizer.param_groups[0]
    group["weight_decay"] = 0.0
    for step in range(4):
        group["lr"] = 0.25 if rank == 0 or step != 2 else 0.125
        x = flat(model.parameters())
        out.append(said(lambda: optimizer.step(closure_of(optimizer, model, step, rank))))  # noqa: B023
        assert torch.equal(flat(model.parameters()), x) == (step == 2)
    optimizer.close()
    return [*out, sha(flat(model.parameters()))]


def optim_alike(rank: int) -> list[str]:
    """Both ranks ask for what cannot work: both say why, and the next is constructed as if nothing had been."""
    params = list(net().parameters())
    return [
        said(lambda: shoal.optim.EF21(params, 0.1, "TopK(100000)")),
        said(lambda: shoal.optim.Diana(params, 0.1, "RandK(0.5)", shift=0.9)),
        said(lambda: shoal.optim.Marina(params, 0.1, "Correlated(blocks=50)")),
        said(lambda: shoal.optim.EF21(params, 0.1).close()),
    ]


def optim_broken(rank: int, within: bool) -> str:
    """Rank 1's closure raises: rank 0 is told what, whether rank 1 leaves the optimizer's context or calls close. If it
    is slow, already while it waits for the end of the exchange before."""
    model = net()
    optimizer, calls = make("ef21", model), []

    def closure():
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise LookupError("no such batch")
        return closure_of(optimizer, model, 1, rank)()

    def train():
        for _ in range(3):
            optimizer.step(closure)

    try:
        if within:
            with optimizer:
                train()
        else:
            try:
                train()
            finally:
                optimizer.close()
    except (LookupError, PeerDied) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def lost(rank: int) -> tuple[str, float, float]:
    """Rank 1 ends without a word; rank 0 learns it in backward, and at once in the next."""
    ddp = DistributedDataParallel(net())
    handle = shoal.ddp.attach(ddp, "TopK(0.1)", min_numel=100, timeout=15)
    for step in range(2):  # DDP's own last exchange is in the second forward, where it rebuilds its buckets
        loss_of(ddp, step, rank).backward()
    if rank == 1:
        sys.stdout.flush()
        os._exit(0)
    out, seconds = [], []
    for step in range(2, 4):
        began = time.monotonic()
        try:
            loss_of(ddp, step).backward()
            out.append("nothing")
        except (RuntimeError, ShoalError) as error:
            out.append(type(error).__name__)
        seconds.append(time.monotonic() - began)
    assert handle._broken is not None
    handle.close()
    assert out[0] == out[1]
    return out[0], *seconds


def main() -> None:
    """Every entry as a list over the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, facts = dist.get_rank(), {}
    mine = {
        "alike": {f"ddp {code}": ddp_run(code, rank, facts) for code in CODES}
        | {f"optim {name}": optim_run(name, rank) for name in NAMES},
        "said": {
            "ddp nan": ddp_nan(rank),
            "ddp seed": said(lambda: shoal.ddp.attach(DistributedDataParallel(net()), "TopK(0.1)", seed=rank)),
            "optim nan": optim_nan(rank),
            "optim start": optim_start(rank),
            "optim versions": optim_versions(rank),
            "optim rates": optim_rates(rank),
            "optim alike": optim_alike(rank),
            "scale": scale(rank),
        },
        "means": means(rank),
        "broken": [optim_broken(rank, within) for within in (True, False)],
    }
    both: list = [None, None]
    dist.all_gather_object(both, mine)
    gone = lost(rank)
    out: dict = {part: {name: [each[part][name] for each in both] for name in mine[part]} for part in ("alike", "said")}
    out |= {part: [each[part] for each in both] for part in ("means", "broken")}
    out |= {"lost": gone, **facts}
    out["simulated"] = {name: sha(simulated(METHODS[name], 2, 6)) for name in NAMES}
    print(json.dumps(out), flush=True)
    os._exit(0)  # the other rank is gone: nothing can be taken down together


if __name__ == "__main__":
    main()
