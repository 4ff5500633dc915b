"""The one driver: a generator of rounds, the same in every runtime.

    server half              channel                  workers' half (rows of the m clients hosted here)
    x --down()--> Messages --scatter--> up() -> u (m, d) -> [prepare -> agree] -> encode -> commit()
    x <--descent-- g <--estimate()-- mean (d,) <--mean, over all rows in slot order-- Messages (m rows)

Clients are taken in chunks so that temporaries stay small. A scale that all clients share is agreed on before any
chunk is encoded: this is why a worker's half is `up` (what to send) and `commit` (what the sent message changes), with
the encoding between them the driver's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import torch

from shoal import kernels
from shoal.core import Channel, Compressor, Descent, Event, Method, OnNonFinite, Problem, State
from shoal.errors import ConfigError, NonFiniteError, QuorumLost
from shoal.messages import Messages, Round, Rows, Vector
from shoal.problems.secants import Trail
from shoal.runtimes.states import After, Hosted, Joined, row_fields, take

TEMPORARY = 2**20  # coordinates of a chunk of clients: 4 MiB a float32 temporary, which stays in a cache
SKIPS = 100  # rounds skipped in a row, after which nothing will mend itself
REMEMBERED = 2**25  # coordinates of gradients kept between measuring a point and using it: 128 MiB


def chunks(m: int, d: int, chunk: int | None = None) -> list[slice]:
    """Slices of the hosted rows, at most `chunk` clients each (default: what keeps a temporary at 4 MiB)."""
    size = chunk or max(1, TEMPORARY // d)
    return [slice(lo, min(lo + size, m)) for lo in range(0, m, size)]


class Watch:
    """Measures f and grad f, and hands the very rows it computed to the round that follows at the same point.

    The rows at neighboring points are also what the smoothness constants are seen by, where a trail asks for them.
    """

    def __init__(self, problem: Problem, channel: Channel, chunk: int | None, trail: Trail | None = None) -> None:
        self.problem, self.channel, self.chunk, self.trail = problem, channel, chunk, trail
        self.parts = chunks(len(channel.clients), problem.d, chunk)
        self._x: Vector | None = None
        self._rows: Rows | None = None
        self._all: Rows | None = None  # of all clients, where they are hosted by several processes

    def evaluate(self, x: Vector) -> tuple[float, float]:
        """(f(x), ||(1/n) sum grad f_i(x)||^2) over all n clients, added in id order in float64."""
        ids, n, ops, trail = self.channel.clients, self.channel.n, kernels.of(x), self.trail
        total = torch.zeros(len(x) + 1, dtype=torch.float64)  # the gradient's sum, then the values'
        secant = trail.secant(x) if trail else None
        asked = trail is not None and trail.due(trail.count + 1)  # by the next point
        keep = (self.problem.full_batch or asked) and len(ids) * len(x) <= REMEMBERED
        if secant is None:
            self._x, self._rows = None, None  # before the next ones need memory
        held, kept = [], Joined(len(ids))
        for part in self.parts:
            values, rows = self.problem.evaluate(x, ids[part])
            if len(ids) < n:
                held.append((values, rows))
            if keep:
                kept.put(rows)
            if len(ids) == n:  # streamed: nothing of size n d is ever held
                ops.add_rows(rows, total[:-1])
                ops.add_rows(values[:, None], total[-1:])
                if secant is not None:
                    secant.add(self._before(part), rows)
        self._x, self._rows = None, None
        if keep:
            self._x, self._rows = x, kept.rows
        if len(ids) < n:
            values, rows = self.channel.collect(torch.cat([v for v, _ in held]), torch.cat([r for _, r in held]))
            ops.add_rows(rows, total[:-1])
            ops.add_rows(values[:, None], total[-1:])
            if secant is not None:
                secant.add(self._everyones() if self._all is None else self._all, rows)
            self._all = rows if asked else None
        if trail is not None:
            trail.reach(x, secant)
        total /= n
        return float(total[-1]), ops.square_norm(total[:-1])

    def _everyones(self) -> Rows:
        """All clients' gradients at the last measured point, for a process that was not there. Collective."""
        assert self.trail is not None
        found = [self.problem.evaluate(self.trail.x, self.channel.clients[part]) for part in self.parts]
        return self.channel.collect(torch.cat([v for v, _ in found]), torch.cat([r for _, r in found]))[1]

    def _before(self, part: slice) -> Rows:
        """The gradients at the last measured point: remembered, or computed again."""
        if self._rows is not None:
            return self._rows[part]
        assert self.trail is not None
        return self.problem.evaluate(self.trail.x, self.channel.clients[part])[1]

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        """The method's view of the gradients: remembered rows where they are the same thing, else computed."""
        if len(rnd.clients) == 0:
            return x.new_zeros(0, len(x))
        if batch is not None:
            return self.problem.grad(x, rnd, batch)
        if not self.problem.full_batch:
            return self.problem.grad(x, rnd)
        if self._rows is not None and self._x is not None and torch.equal(x, self._x):
            at = int(torch.searchsorted(self.channel.clients, rnd.clients[:1]))
            if torch.equal(self.channel.clients[at : at + len(rnd.clients)], rnd.clients):
                return self._rows[at : at + len(rnd.clients)]
            return self._rows[torch.searchsorted(self.channel.clients, rnd.clients)]
        return self.problem.grad(x, rnd)

    def share(self, rnd: Round) -> list[tuple[slice, Hosted]]:
        """The round's rows in chunks, each with the places of its clients among those hosted here."""
        if rnd.members is None:
            return [(part, part) for part in self.parts]
        places = torch.searchsorted(self.channel.clients, rnd.clients)
        parts = chunks(len(rnd.clients), self.problem.d, self.chunk) or [slice(0, 0)]
        return [(part, places[part]) for part in parts]


def _cohort(method: Method, workers: Any, rnd: Round) -> Round:
    """The round of those who take part. Raises ConfigError where a row of state would be moved twice in it."""
    members = method.cohort(rnd)
    if members is None:
        return rnd
    rnd = rnd.among(members)
    rows = workers != () and row_fields(type(workers))  # type: ignore[arg-type]
    if rows and bool((members.diff() == 0).any()):
        raise ConfigError(
            f"{method!r}, round {rnd.index}: cohort {members.tolist()} names a client twice, and its workers have rows "
            "of state; draw clients without replacement."
        )
    return rnd


class _Faults:
    """What is not finite in any chunk is every process's error, before any state has changed."""

    def __init__(self, channel: Channel, rnd: Round) -> None:
        self.channel, self.rnd = channel, rnd
        self.errors: list[NonFiniteError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """The other chunks are looked at all the same: which clients are named does not depend on `chunk`."""
        try:
            yield
        except NonFiniteError as error:
            self.errors.append(error)

    def tell(self) -> None:
        """Raises, here and elsewhere, if there was any."""
        if self.errors:
            known = all(error.clients for error in self.errors)
            clients = {i for error in self.errors for i in error.clients} if known else set()
            self.channel.fail(NonFiniteError(str(self.errors[0]), sorted(clients)), self.rnd)


def _uplink(
    method: Method, workers: Any, down: Messages, watch: Watch, channel: Channel, rnd: Round
) -> tuple[Messages, Any, Round]:
    """Every hosted client's message and new state, and the round with what was agreed in it."""
    code, parts, d = method.code(rnd), watch.share(rnd), watch.problem.d
    width = code.capacity(rnd.cohort, d)
    whole: Messages | None = None
    after = After(workers, len(channel.clients), rnd.members is not None)

    def send(u: Rows, part: slice, at: Hosted, rnd: Round, moved: Any) -> None:
        nonlocal whole
        sent = code.encode(u, rnd.rows(part))
        after.put(at, method.commit(moved, sent, rnd.rows(part)))
        if len(parts) == 1:
            whole = sent
            return
        if whole is None:
            whole = Messages(torch.zeros(len(rnd.slots), width, dtype=torch.uint8), rnd.slots.clone(), rnd.slots, d)
        whole.payload[part, : sent.payload.shape[1]] = sent.payload
        whole.nbytes[part] = sent.nbytes

    held: deque[tuple[Rows, slice, Hosted, Any]] = deque()
    scalars, faults = [torch.zeros(0)], _Faults(channel, rnd)
    for part, at in parts:
        with faults.noted():
            u, new = method.up(take(workers, at), down.rows(part), watch.grad, rnd.rows(part))
            if len(u) and code.agrees:
                held.append((u, part, at, new))
                scalars.append(code.prepare(u, rnd.rows(part)))
            elif len(u):
                send(u, part, at, rnd, new)
            else:
                after.put(at, new)
    faults.tell()
    if code.agrees:
        rnd = replace(rnd, agreed=channel.agree(torch.cat(scalars), rnd))
        while held:
            u, part, at, new = held.popleft()
            with faults.noted():
                send(u, part, at, rnd, new)
        faults.tell()
    if whole is None:  # this process hosts none of the cohort
        whole = Messages(torch.zeros(0, width, dtype=torch.uint8), rnd.slots, rnd.slots, d)
    return whole, after.state, rnd


def _without(rnd: Round, clients: tuple[int, ...], code: Compressor, d: int) -> Round:
    """The same round among those who have something finite to send. Raises QuorumLost where nobody has."""
    members = torch.arange(rnd.n) if rnd.members is None else rnd.members
    left = members[~torch.isin(members, torch.tensor(clients))]
    if not len(left):
        raise QuorumLost(f"round {rnd.index}: none of {len(members)} clients has a finite vector; take a smaller step.")
    code.check(len(left), d)
    return rnd.among(left)


def _mean(
    method: Method, workers: Any, down: Messages, watch: Watch, channel: Channel, rnd: Round, drop: bool
) -> tuple[Vector, Any, Round, NonFiniteError | None]:
    """The messages' mean, the workers' new state, the round as it was held, and whom it was held without."""
    without: NonFiniteError | None = None
    counted = replace(channel.meter)
    while True:
        try:
            sent, after, held = _uplink(method, workers, down, watch, channel, rnd)
            return channel.mean(sent, method.code(held), held), after, held, without
        except NonFiniteError as error:
            # What was tried in vain is not counted: how often depends on who finds out first.
            for name in ("up", "down", "up_framed", "down_framed"):
                setattr(channel.meter, name, getattr(counted, name))
            if not drop or not error.clients:
                raise
            known = without or error
            without = NonFiniteError(str(known), sorted({*known.clients, *error.clients}))
            rnd = _without(rnd, error.clients, method.code(rnd), watch.problem.d)


def checked_policy(on_nonfinite: str, method: Method) -> None:
    """Raises ConfigError for a policy that there is not, or that this method cannot follow."""
    if on_nonfinite not in get_args(OnNonFinite):
        raise ConfigError(f"on_nonfinite={on_nonfinite!r}: one of {', '.join(get_args(OnNonFinite))}.")
    if on_nonfinite == "drop" and not method.spares:
        raise ConfigError(
            f"on_nonfinite='drop': {type(method).__name__}'s server and clients would remember different things once a "
            "client is left out of a round; take 'skip', or a method that spares them: GD, DCGD, Diana, EF21."
        )


def rounds(
    method: Method,
    descent: Descent,
    problem: Problem,
    channel: Channel,
    seed: int,
    state: State | None = None,
    chunk: int | None = None,
    on_nonfinite: OnNonFinite = "raise",
    trail: Trail | None = None,
) -> Iterator[Event]:
    """Yields x^0 (or the resumed state), x^1, ...; the caller stops when it has seen enough.

    The bits do not depend on `chunk`, on the channel, or on where a run was resumed. Where the method has a cohort,
    only its members compute and send. Where a client's vector cannot be compressed, `on_nonfinite` says what becomes of
    the round, in all processes alike, before any state has changed:
    "raise": NonFiniteError;  "skip": the round passes and leaves every state as it was (not round 0, on which estimates
    stand, nor more than 100 rounds in a row: NonFiniteError);  "drop": it is held among the others, whose mean it then
    is (QuorumLost if there are none; ConfigError at once where the method cannot spare anybody).

    A trail is told each point that is measured.
    """
    checked_policy(on_nonfinite, method)
    watch, n = Watch(problem, channel, chunk, trail), channel.n
    fault: NonFiniteError | None = None
    skipped = 0
    if state is None:
        x = problem.start()
        server, workers = method.init(x, Round.full(0, seed, n, channel.clients))
        state = State(0, x, server, workers, descent.init(x))
    while True:
        yield Event(replace(state, meter=replace(channel.meter)), watch.evaluate, fault)
        rnd = Round.full(state.index, seed, n, channel.clients)
        rnd = _cohort(method, state.workers, rnd)
        down, server = method.down(state.server, state.x, rnd) if channel.serves else (None, state.server)
        heard = channel.scatter(down, rnd)
        try:
            mean, workers, rnd, fault = _mean(method, state.workers, heard, watch, channel, rnd, on_nonfinite == "drop")
        except NonFiniteError as error:
            skipped += 1
            if on_nonfinite != "skip" or state.index == 0 or skipped > SKIPS:
                raise
            state, fault = replace(state, index=state.index + 1), error
            continue
        skipped = 0
        g, server = method.estimate(server, mean, rnd)
        x, memory = descent.step(state.x, g, state.descent)
        state = State(state.index + 1, x, server, workers, memory)
