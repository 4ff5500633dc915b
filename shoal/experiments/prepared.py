"""What a run goes by before its first round: the method with its numbers, the step size, and the clients' data.

Over ranks the first one finds the constants, from everybody's data, and the others are told, bit for bit: they need to
hold no more than their own clients' data. They say in return what their clients look like at x^0, so that data which
are not the same everywhere are an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

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
    """Clients at x^0. numbers (3, m) float64: f_i, ||grad f_i||, and the sum of grad f_i's entries, each with a sign;
    facts: what tells one problem from another."""

    numbers: Tensor
    facts: dict[str, Any]


def at_start(problem: Problem, clients: Tensor, chunk: int | None = None) -> Start:
    """f, ||grad f||^2 and a digest of all values and gradients, of the mean over these clients at x^0."""
    x, hashed, numbers = problem.start(), hashlib.sha256(), list[Tensor]()
    total = torch.zeros(problem.d, dtype=torch.float64)
    coins = rng.below(Draw(rng.SHARED, 0, rng.stream_id("prepared.signs"), 0), problem.d, 2)[0]
    signs = (2 * coins - 1).to(torch.float32)
    for part in chunks(len(clients), problem.d, chunk):
        values, rows = problem.evaluate(x, clients[part])
        hashed.update(values.numpy().tobytes())
        hashed.update(rows.numpy().tobytes())
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        numbers.append(torch.stack([values, norms, (rows @ signs).to(torch.float64)]))
        kernels.of(rows).add_rows(rows, total)
    found, m = torch.cat(numbers, dim=1), len(clients)
    norm = kernels.of(total).square_norm(total / m)
    facts = {"f": math.fsum(found[0].tolist()) / m, "grad_norm_sq": norm, "sha256": hashed.hexdigest()}
    return Start(found, facts)


def fingerprint(problem: Problem, chunk: int | None = None) -> dict[str, Any]:
    """What tells one problem from another, whatever it is called: f(x^0), ||grad f(x^0)||^2 and a digest of all
    clients' values and gradients there."""
    return at_start(problem, torch.arange(problem.n), chunk).facts


_SEARCHES: WeakSet[Thread] = WeakSet()


def searching() -> bool:
    """Whether a thread of a `Survey` is at work: the interpreter cannot end under it, but by `os._exit`."""
    return any(thread.is_alive() for thread in _SEARCHES)


class Survey:
    """What one of several processes works out before the first round, and what it hears from the others.

    The first finds the constants (those `given`, or its problem's) and, if it is to `look`, what all clients are like
    at x^0; the others what theirs are, for a comparison. Threads do it, as it may take longer than ranks wait for each
    other: meanwhile all give signs of life. It is done once, whatever attempts come and go.

    problem: all clients' data at the first process, elsewhere those that are hosted there.
    """

    def __init__(
        self, problem: Problem, given: Smoothness | None, channel: Channel, look: bool = True, chunk: int | None = None
    ) -> None:
        self.problem, self.given, self.look, self.chunk = problem, given, look, chunk
        self.clients = torch.arange(problem.n) if channel.rank == 0 else channel.clients
        self.start: Start | None = None
        self._said: bytes | None = None
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def _begin(self, first: bool, look: bool) -> None:
        threads = torch.get_num_threads()

        def work() -> None:
            torch.set_num_threads(threads)  # else a new thread's sums are cut into as many parts as there are cores
            try:
                known = (self.given or self.problem.smoothness()).packed() if first else b""
                if look:
                    self.start = at_start(self.problem, self.clients, self.chunk)
                self._said = b"\0" + known
            except ShoalError as error:
                self._said = b"\1" + json.dumps([type(error).__name__, str(error)]).encode()
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=work, daemon=True)
        _SEARCHES.add(self._thread)
        self._thread.start()

    def share(self, channel: Channel, compare: bool = True, heed: Callable[[], None] = lambda: None) -> Smoothness:
        """The first's constants, in every process. Collective.

        A ShoalError of the first's search is raised by all. compare: raises ConfigMismatch in every process where data
        differ. heed: called while all wait, and raises what makes this one leave.
        """
        first = channel.rank == 0
        if self._thread is None and (first or compare):
            self._begin(first, compare or self.look)
        while True:
            if self._thread is not None:
                self._thread.join(PULSE)
            if self._error is not None:
                raise self._error
            heed()
            mine = 1 if self._thread is None else len(self._said or b"")
            try:
                sizes = [int(size) for size in channel.together(torch.tensor([mine]))]
            except PeerLost:
                heed()  # a Ctrl-C is everybody's, and another rank may have been faster
                raise
            if all(sizes):
                break
        said = self._said if first and self._said else bytes(sizes[0])
        heard = channel.together(torch.frombuffer(bytearray(said), dtype=torch.uint8))[0].numpy().tobytes()
        for one in (heard, self._said or b""):
            if one[:1] == b"\1":
                kind, text = json.loads(one[1:])
                raise getattr(errors, kind, ShoalError)(text)
        if compare:
            assert self.start is not None
            _compare(self.start.numbers, self.clients, channel)
        return Smoothness.unpacked(heard[1:])


def _compare(numbers: Tensor, clients: Tensor, channel: Channel) -> None:
    """Raises ConfigMismatch in every process unless each client has, where it is hosted, the data that it has at the
    first process, which gives all clients' numbers. Collective.

    To three digits: gradients may differ in their last bits where machines do.
    """
    mine = torch.zeros(4, channel.n, dtype=torch.float64)
    mine[:3, clients], mine[3, clients] = numbers, 1.0
    known, *others = channel.together(mine)
    here = known[:3]
    size = here.abs()[[0, 1, 1]]  # of a sum of gradients' entries the gradients' norms
    allowed = 1e-3 * size + 1e-6 * size.nan_to_num(0.0, 0.0, 0.0).amax(1, keepdim=True) + 1e-12
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
