"""What a rank keeps so that the run goes on where it was when another one dies: the last two rounds.

Ranks are at most one round apart, since a round needs all of them. Each keeps the states of its last two in memory (a
state is a value: keeping it is not copying it), and its own clients' rows of them in a journal, which its replacement
reads. The rest, which is the same everywhere, a survivor hands over. All go back to the last round that everyone has;
what is done again comes out at the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal import container
from shoal.core import Channel, Row, State
from shoal.experiments.checkpoint import Found, named, summary, understood
from shoal.problems.secants import Trail
from shoal.runtimes import crash
from shoal.runtimes.journal import Journal
from shoal.runtimes.replicated import Replicated

KEPT = 2


class Memory:
    """What one rank of `world` keeps, its journal in `folder`; `fresh` is a state before round 0."""

    def __init__(self, folder: Path, digest: bytes, channel: Channel, world: int, fresh: State) -> None:
        self.fresh, self.digest, self.rank = fresh, digest, channel.rank
        self.states: dict[int, State] = {}
        self.trails: dict[int, dict[str, Tensor]] = {}  # as they were before the round's own point
        path = folder / f"journal-{self.rank}of{world}"
        self.journal = Journal(path, self.rank, digest, list(named(fresh)[1].values()))

    def commit(self, state: State, trail: Trail) -> None:
        """This round is done: whoever dies now, everyone can stand here again."""
        if state.index in self.states:
            return
        crash.here("before-commit", self.rank, state.index)
        self.journal.write(state.index, list(named(state)[1].values()), state.meter.moved)
        self.states[state.index], self.trails[state.index] = state, trail.arrays()
        for index in sorted(self.states)[:-KEPT]:
            del self.states[index], self.trails[index]
        crash.here("after-commit", self.rank, state.index)

    def stand(self, channel: Replicated, rows: Sequence[Row], faults: Sequence[dict[str, Any]]) -> Found | None:
        """The last round that every rank has kept, with the rows and faults before it. Collective.

        None where there is none, as when all ranks died at once: then a checkpoint must do.
        """
        written = {} if self.states else self.journal.read()
        held = sorted(self.states or written, reverse=True)[:KEPT]
        told = channel.together(torch.tensor([*[*held, -1, -1][:KEPT], int(bool(self.states))]))
        common = set.intersection(*({int(k) for k in row[:KEPT] if k >= 0} for row in told))
        survivors = [bool(row[KEPT]) for row in told]
        if not common or not any(survivors):
            self.states.clear()
            self.trails.clear()
            return None
        index, source = max(common), survivors.index(True)
        self.states = {k: state for k, state in self.states.items() if k <= index}
        self.trails = {k: trail for k, trail in self.trails.items() if k <= index}
        said = b""
        if channel.rank == source:
            before = *_until(index, rows, faults), self.trails[index]
            meta, tensors = summary(self.states[index], *before, self.digest.hex())
            said = b"".join(container.pack(meta, tensors))
        heard = channel.hand(said, source, [not survivor for survivor in survivors])
        if not self.states:
            values, moved = written[index]
            hosted = dict(zip(named(self.fresh)[1], values, strict=True))
            name = f"what rank {source} handed over"
            found = understood(container.unpack(heard, name), name, self.fresh, hosted, moved)
            self.states[index], self.trails[index] = found.state, found.trail
            return found
        return Found(self.states[index], *_until(index, rows, faults), self.trails[index])

    def close(self, ended: bool) -> None:
        """The journal stays where the run does not end: it is not needed, and nobody has to be sure of that."""
        self.journal.close(remove=ended)


def _until(index: int, rows: Sequence[Row], faults: Sequence[dict[str, Any]]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of rounds before this one, which all ranks measure again, and the faults before it."""
    return [row for row in rows if row.round < index], [fault for fault in faults if fault["round"] < index]
