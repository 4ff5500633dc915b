"""What a run goes by before its first round: the method with its numbers, the step size, and the clients' data.

Over ranks the first one finds the constants, from everybody's data, and the others are told: they need to hold no more
than their own clients' data, and all ranks go by the same bits even where machines round differently. They send in
return what their clients look like at x^0, so that data which are not the same everywhere are an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shoal import errors, kernels, rng
from shoal.core import Channel, Method, Problem
from shoal.errors import ConfigError, ConfigMismatch, PeerLost, ShoalError
from shoal.experiments.expressions import compact
from shoal.kernels import Draw
from shoal.runtimes import chunks
from shoal.theory import Setting, Smoothness, StepSize

PULSE = 0.1  # seconds between two signs of life of ranks that wait for the first


def check_settings(
    problem: Problem,
    method: Method,
    *,
    rounds: int | None,
    bits: float | None,
    target: float | None,
    step: float | Literal["theory"],
    multiple: float,
) -> None:
    """Raises ConfigError for what is wrong whatever the constants are, which may take minutes to find."""
    if not isinstance(problem, Problem) or not isinstance(method, Method):
        raise ConfigError(f"{method!r} on {problem!r}: a run takes a Problem and a Method, such as Marina(PermK()).")
    if rounds is None and bits is None:
        raise ConfigError("a run needs a budget: rounds=..., bits=..., or both.")
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise ConfigError(f"rounds={rounds!r}: an integer, at least one.")
    for name, value in (("bits", bits), ("target", target), ("multiple", multiple)):
        if value is not None and not (isinstance(value, int | float) and value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r}: it must be a positive finite number.")
    if step != "theory" and not (isinstance(step, int | float) and step > 0 and math.isfinite(step)):
        raise ConfigError(f"step={step!r}: a step size is 'theory' or a positive finite number.")
    method.check(problem.n, problem.d)


def prepare(
    problem: Problem,
    method: Method,
    *,
    rounds: int | None,
    bits: float | None,
    target: float | None,
    step: float | Literal["theory"],
    multiple: float,
    pl: bool,
    need_theory: bool = True,
    smoothness: Smoothness | None = None,
) -> tuple[Method, StepSize, float]:
    """The method with numbers in every place, the theory's step size, and the step size to use.

    smoothness: default, what the problem says. Raises ConfigError, before anything runs, for whatever does not fit
    together.
    """
    check_settings(problem, method, rounds=rounds, bits=bits, target=target, step=step, multiple=multiple)
    smoothness = smoothness or problem.smoothness()
    if pl and smoothness.mu is None:
        raise ConfigError(f"pl=True: no PL constant is known for {problem.name}; leave pl out.")
    setting = Setting(problem.n, problem.d, smoothness, rounds, bits, pl)
    method = method.resolved(setting)
    theory = method.step_size(setting)
    if theory.evidence == "proved" and any(status == "estimate" for _, status in smoothness.facts().values()):
        theory = replace(
            theory, theorem=f"{theory.theorem}; L estimated, which no theorem covers", evidence="numerical"
        )
    if step == "theory" and need_theory and theory.evidence == "none":
        raise ConfigError(
            f"{compact(method)} has no step size from theory here ({theory.theorem}); give one: step=0.1."
        )
    return method, theory, multiple * (theory.gamma if step == "theory" else step)


class Start(NamedTuple):
    """Clients at x^0. numbers (3, m) float64: f_i, ||grad f_i||, and grad f_i along a direction of signs; facts: what
    tells one problem from another."""

    numbers: Tensor
    facts: dict[str, Any]


def at_start(problem: Problem, clients: Tensor, chunk: int | None = None) -> Start:
    """f, ||grad f||^2 and a digest of all values and gradients, of the mean over these clients at x^0."""
    x, hashed, numbers = problem.start(), hashlib.sha256(), list[Tensor]()
    total = torch.zeros(problem.d, dtype=torch.float64)
    coins = rng.below(Draw(rng.SHARED, 0, rng.stream_id("prepared.signs"), 0), problem.d, 2)[0]
    signs = 2.0 * coins.to(torch.float64) - 1.0
    for part in chunks(len(clients), problem.d, chunk):
        values, rows = problem.evaluate(x, clients[part])
        hashed.update(values.numpy().tobytes())
        hashed.update(rows.numpy().tobytes())
        wide = rows.to(torch.float64)
        numbers.append(torch.stack([values, torch.linalg.vector_norm(wide, dim=1), wide @ signs]))
        kernels.of(rows).add_rows(rows, total)
    found, m = torch.cat(numbers, dim=1), len(clients)
    norm = kernels.of(total).square_norm(total / m)
    facts = {"f": math.fsum(found[0].tolist()) / m, "grad_norm_sq": norm, "sha256": hashed.hexdigest()}
    return Start(found, facts)


def fingerprint(problem: Problem, chunk: int | None = None) -> dict[str, Any]:
    """What tells one problem from another, whatever it is called: f(x^0), ||grad f(x^0)||^2 and a digest of all
    clients' values and gradients there."""
    return at_start(problem, torch.arange(problem.n), chunk).facts


def from_first(work: Callable[[], bytes], channel: Channel, heed: Callable[[], None] = lambda: None) -> bytes:
    """What the first process works out, in every process. Collective.

    It may take longer than ranks wait for each other: a thread does it, and meanwhile all give signs of life, and
    `heed` what makes them leave. A ShoalError of it is raised by every process.
    """
    done, failed, threads = list[bytes](), list[BaseException](), torch.get_num_threads()

    def act() -> None:
        torch.set_num_threads(threads)  # a new thread's sums would be cut into as many parts as there are cores
        try:
            done.append(b"\0" + work())
        except ShoalError as error:
            done.append(b"\1" + json.dumps([type(error).__name__, str(error)]).encode())
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=act, daemon=True)
    if channel.rank == 0:
        thread.start()
    while True:
        if channel.rank == 0:
            thread.join(PULSE)
        if failed:
            raise failed[0]
        heed()
        try:
            size = int(channel.together(torch.tensor([len(done[0]) if done else 0]))[0])
        except PeerLost:
            heed()  # a Ctrl-C is everybody's, and another rank may have been faster
            raise
        if size:
            break
    said = torch.frombuffer(bytearray(done[0]) if done else bytearray(size), dtype=torch.uint8)
    heard = channel.together(said)[0].numpy().tobytes()
    if heard[0]:
        kind, text = json.loads(heard[1:])
        raise getattr(errors, kind, ShoalError)(text)
    return heard[1:]


def check_data(problem: Problem, whole: Start | None, channel: Channel, chunk: int | None = None) -> None:
    """Raises ConfigMismatch in every process unless each client has, where it is hosted, the data that it has at the
    first process, which gives what the `whole` is. Collective.

    To three digits: gradients may differ in their last bits where machines do.
    """
    mine = torch.zeros(4, channel.n, dtype=torch.float64)
    clients = channel.clients if whole is None else torch.arange(channel.n)
    mine[:3, clients] = (whole or at_start(problem, clients, chunk)).numbers
    mine[3, clients] = 1.0
    known, *others = channel.together(mine)
    here = known[:3]
    size = here.abs()[[0, 1, 1]]  # along a direction a gradient may be anything up to its norm
    allowed = 1e-3 * size + 1e-6 * size.nan_to_num(0.0, 0.0, 0.0).amax(1, keepdim=True)
    for rank, told in enumerate(others, 1):
        there = told[:3]
        same = here.isfinite() & ((there - here).abs() <= allowed)
        same |= (there == here) | (there.isnan() & here.isnan())
        wrong = torch.nonzero(told[3].bool() & ~same.all(0))[:, 0].tolist()
        if wrong:
            i = wrong[0]
            theirs, ours = (", ".join(f"{v:.6g}" for v in one[:3, i].tolist()) for one in (told, known))
            raise ConfigMismatch(
                f"rank {rank} has other data than rank 0 for {len(wrong)} of its clients: f_{i}, ||grad f_{i}|| and "
                f"grad f_{i} along one direction are {theirs} at x^0 there, {ours} at rank 0; give all ranks the same "
                "files."
            )


def settle(
    problem: Problem,
    whole: Problem,
    smoothness: Smoothness | None,
    channel: Channel,
    fresh: bool = True,
    chunk: int | None = None,
    heed: Callable[[], None] = lambda: None,
) -> tuple[Smoothness, Start | None]:
    """The constants (those given, or the problem's), in every process those of the first, bit for bit; and there, where
    this is a `fresh` start, what the whole problem looks like. Collective, for several processes.

    whole: all clients' data at the first process. heed: see `from_first`. Raises ConfigMismatch where data differ, at a
    fresh start.
    """
    looked: list[Start] = []

    def work() -> bytes:
        known = smoothness or whole.smoothness()
        if fresh:
            looked.append(at_start(whole, torch.arange(whole.n), chunk))
        return known.packed()

    known, start = Smoothness.unpacked(from_first(work, channel, heed)), looked[0] if looked else None
    if fresh:
        check_data(problem, start, channel, chunk)
    return known, start
