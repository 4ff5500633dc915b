"""Checkpoints of a run: the last two, each of them a set of shares that a manifest, written last, makes whole.

    checkpoint-12.1of3.shoal    round 12, process 1 of 3: the rows of its clients in the workers' state
    checkpoint-12.shoal         the manifest: x, the server's half, what all workers share, the descent's memory, the
                                rows of results, the meter, and the SHA-256 of every share

A simulator is process 0 of 1. Rows belong to clients and not to processes, so that any number of processes goes on
from any set, at the same bits. A share's bytes are a function of the run and the round: writing one again, which a
resumed run may do, never takes a set apart. All files are `shoal.container`s.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.container import DIGEST, Contents, read, write
from shoal.core import Channel, Meter, Row, State
from shoal.errors import CheckpointCorrupt, CheckpointWarning, CheckpointWriteFailed
from shoal.problems.secants import Trail
from shoal.runtimes import crash, row_fields

KEPT = 2
EVERY = 5.0  # seconds
MANIFEST = re.compile(r"checkpoint-(\d{1,15})\.shoal")
ANY = re.compile(r"\.?checkpoint-(\d{1,15})\.(\d+of\d+\.)?shoal(\.\d+)?")  # a killed process leaves hidden ones
STRAY = re.compile(r"journal-\d+of\d+|\.(metrics|config|result)\.(json|jsonl|parquet)\.\d+")
PARTS = ("server", "workers", "descent")


class Found(NamedTuple):
    """Where a run goes on: with the rows until then, the rounds that went wrong, and the trail (`Trail.arrays`)."""

    state: State
    rows: list[Row]
    faults: list[dict[str, Any]]
    trail: dict[str, Tensor]


def named(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what is the same in all processes, what has a row a hosted client), by "part.field"."""
    shared, hosted = {"x": state.x}, dict[str, Tensor]()
    for part in PARTS:
        value = getattr(state, part)
        if value == ():
            continue
        rows = row_fields(type(value)) if part == "workers" else ()  # type: ignore[arg-type]
        for name, tensor in zip(value._fields, value, strict=True):
            (hosted if name in rows else shared)[f"{part}.{name}"] = tensor
    return shared, hosted


def _filled(fresh: State, index: int, tensors: dict[str, Tensor], meter: Meter) -> State:
    """A state in the form of a fresh one."""

    def part(name: str) -> Any:
        like = getattr(fresh, name)
        return like if like == () else type(like)(*(tensors[f"{name}.{f}"] for f in like._fields))

    return State(index, tensors["x"], part("server"), part("workers"), part("descent"), meter)


def summary(
    state: State, rows: Sequence[Row], faults: Sequence[dict[str, Any]], trail: Mapping[str, Tensor], digest: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a container holds of all that is the same in all processes."""
    meta = {"index": state.index, "digest": digest, "meter": asdict(state.meter)}
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(Row._fields))
    said = torch.tensor(list(json.dumps(list(faults)).encode()), dtype=torch.uint8)
    walked = {f"trail.{name}": tensor for name, tensor in trail.items()}
    return meta, {**named(state)[0], **walked, "rows": table, "faults": said}


def understood(held: Contents, name: str, fresh: State, hosted: dict[str, Tensor], moved: int) -> Found:
    """A summary with this process's rows. Raises CheckpointCorrupt where it does not fit."""
    try:
        meter = Meter(**{f.name: _count(held.meta["meter"][f.name]) for f in fields(Meter)})
        rows = [Row(int(row[0]), *row[1:]) for row in held.tensors["rows"].tolist()]
        faults = [dict(fault) for fault in json.loads(bytes(held.tensors["faults"].tolist()))]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointCorrupt(f"{name}: it is no manifest ({error}).") from None
    tensors = {field: _like(held, field, like, name) for field, like in named(fresh)[0].items()}
    seen = _like(held, "trail.seen", Trail().arrays()["seen"], name)
    told = _like(held, "trail.x", fresh.x if seen[0] > 0 else fresh.x[:0], name)
    state = _filled(fresh, held.meta["index"], tensors | hosted, replace(meter, moved=moved))
    return Found(state, rows, faults, {"x": told, "seen": seen})


def _remove(paths: Iterable[Path]) -> None:
    """Manifests first: what is left of a set, if this is cut, must not look like one."""
    for path in sorted(paths, key=lambda p: MANIFEST.fullmatch(p.name) is None):
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what only a run under way needs: checkpoints, journals, and what killed processes were writing."""
    _remove(path for path in folder.iterdir() if ANY.fullmatch(path.name))
    _remove(path for path in folder.iterdir() if STRAY.fullmatch(path.name))


class Checkpoints:
    """The checkpoints in a run's folder, for one of its processes. `save`, `load` and `discard` are collective.

    digest: of the run's config, in hexadecimal. Raises CheckpointWriteFailed in every process where one of them cannot
    write, and CheckpointCorrupt where files are there and none can be used.
    """

    def __init__(self, path: Path, digest: str, channel: Channel) -> None:
        self.path, self.digest, self.channel = path, digest, channel
        self.world, self._saved = len(channel.together(torch.zeros(1))), time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved > EVERY

    def _manifest(self, index: int) -> Path:
        return self.path / f"checkpoint-{index}.shoal"

    def _share(self, index: int, rank: int, world: int) -> Path:
        return self.path / f"checkpoint-{index}.{rank}of{world}.shoal"

    # -------------------------------------------------------------------------------------------- writing
    def save(self, state: State, rows: Sequence[Row], faults: Sequence[dict[str, Any]], trail: Trail) -> None:
        """Every process writes its share; when all are on the disk, the first one writes the manifest."""
        _, hosted = named(state)
        ids, index = self.channel.clients, state.index
        path = self._share(index, self.channel.rank, self.world)
        sha, failure = self._written(path, {"index": index, "digest": self.digest}, {"clients": ids, **hosted})
        if self.channel.rank:
            crash.here("mid-checkpoint", self.channel.rank, index)
        facts = torch.tensor([_number(failure), state.meter.moved, int(ids[0]), int(ids[-1]) + 1])
        mine = torch.cat([facts.view(torch.uint8), torch.tensor(list(sha), dtype=torch.uint8)])
        everyone = self.channel.together(mine)
        told = [(row[:-DIGEST].clone().view(torch.int64).tolist(), row[-DIGEST:]) for row in everyone]
        self._raise(failure, {self._share(index, r, self.world): fact[0] for r, (fact, _) in enumerate(told)})
        if self.channel.rank == 0:
            crash.here("mid-checkpoint", 0, index)
            meta, tensors = summary(state, rows, faults, trail.arrays(), self.digest)
            meta["moved"] = [moved for (_, moved, _, _), _ in told]
            meta["shares"] = [[lo, hi, bytes(sha.tolist()).hex()] for (_, _, lo, hi), sha in told]
            _, failure = self._written(self._manifest(index), meta, tensors)
            if failure is None:
                self._prune(index)
        ended = self.channel.together(torch.tensor([_number(failure)]))[0]
        self._raise(failure, {self._manifest(index): int(ended)})
        self._saved = time.monotonic()

    def _written(
        self, path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[bytes, CheckpointWriteFailed | None]:
        """The file's SHA-256, or why there is none: the others must hear of it before it is raised."""
        try:
            return write(path, meta, tensors), None
        except CheckpointWriteFailed as error:
            return bytes(DIGEST), error

    def _raise(self, own: CheckpointWriteFailed | None, numbers: dict[Path, int]) -> None:
        """The failure of whichever process had one, in all of them."""
        if own is not None:
            raise own
        for path, number in numbers.items():
            if number:
                raise CheckpointWriteFailed(number, os.strerror(number), str(path))

    def _files(self) -> dict[Path, int]:
        """Every file of a checkpoint, whole or not, and its round."""
        matched = ((path, ANY.fullmatch(path.name)) for path in self.path.iterdir())
        return {path: int(match[1]) for path, match in matched if match}

    def _prune(self, index: int) -> None:
        """Nothing is left but this round's checkpoint and the last one before it."""
        files = self._files()
        whole = {k for path, k in files.items() if MANIFEST.fullmatch(path.name) and k <= index}
        kept = sorted(whole, reverse=True)[:KEPT]
        _remove(path for path, k in files.items() if k not in kept or path.name.startswith("."))

    def discard(self) -> None:
        """The run has ended."""
        if self.channel.rank == 0:
            tidy(self.path)

    # -------------------------------------------------------------------------------------------- reading
    def load(self, fresh: State) -> Found | None:
        """The newest set that is whole for every process, in the form of `fresh`, with the rows until then; None where
        there is none. A damaged set is passed over, with a CheckpointWarning."""
        newest = sorted((k for p, k in self._files().items() if MANIFEST.fullmatch(p.name)), reverse=True)
        ours = self.channel.together(torch.tensor([*newest[:KEPT], -1, -1][:KEPT]))[0]  # the first process's listing
        failed: list[CheckpointCorrupt] = []
        for index in (int(k) for k in ours if k >= 0):
            found, error = None, CheckpointCorrupt(f"{self._manifest(index)}: another process cannot read its share.")
            try:
                found = self._read(index, fresh)
            except CheckpointCorrupt as damage:
                error = damage
            if min(int(flag) for flag in self.channel.together(torch.tensor([int(found is not None)]))):
                if failed and self.channel.rank == 0:
                    warnings.warn(f"{failed[0]} Going on from round {index}.", CheckpointWarning, stacklevel=2)
                return found
            failed.append(error)
        if failed:
            raise CheckpointCorrupt(f"{failed[0]} Delete {self.path}/checkpoint-* to begin the run again.")
        return None

    def _read(self, index: int, fresh: State) -> Found:
        path = self._manifest(index)
        held = self._opened(path, index)
        try:
            moved = [_count(number) for number in held.meta["moved"]]
            shares = [(_count(lo), _count(hi), bytes.fromhex(sha)) for lo, hi, sha in held.meta["shares"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointCorrupt(f"{path}: it is no manifest ({error}).") from None
        if [lo for lo, _, _ in shares] != [0, *(hi for _, hi, _ in shares[:-1])] or shares[-1][1] != self.channel.n:
            raise CheckpointCorrupt(f"{path}: its shares do not make {self.channel.n} clients.")
        hosted = self._rows(index, shares, named(fresh)[1])
        moved_here = moved[self.channel.rank] if len(moved) == self.world else 0
        return understood(held, str(path), fresh, hosted, moved_here)

    def _opened(self, path: Path, index: int) -> Contents:
        held = read(path)
        if held.meta.get("digest") != self.digest or held.meta.get("index") != index:
            raise CheckpointCorrupt(f"{path}: it belongs to another run or round.")
        return held

    def _rows(self, index: int, shares: list[tuple[int, int, bytes]], hosted: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of the clients hosted here, from every share that has some."""
        first, end = int(self.channel.clients[0]), int(self.channel.clients[-1]) + 1
        pieces: dict[str, list[Tensor]] = {name: [] for name in hosted}
        for rank, (lo, hi, sha) in enumerate(shares):
            part = slice(max(first, lo) - lo, min(end, hi) - lo)
            if part.start >= part.stop:
                continue
            path = self._share(index, rank, len(shares))
            held = self._opened(path, index)
            if held.sha256 != sha or held.tensors.get("clients", torch.zeros(0)).tolist() != list(range(lo, hi)):
                raise CheckpointCorrupt(f"{path}: it is not the share that the manifest names.")
            for name, like in hosted.items():
                pieces[name].append(_like(held, name, like.new_zeros(hi - lo, *like.shape[1:]), str(path))[part])
        return {name: torch.cat(rows) for name, rows in pieces.items()}


def _number(failure: CheckpointWriteFailed | None) -> int:
    return 0 if failure is None else failure.errno or errno.EIO


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.30} is not a count")
    return value


def _like(held: Contents, name: str, like: Tensor, name_of_file: str) -> Tensor:
    found = held.tensors.get(name)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        raise CheckpointCorrupt(f"{name_of_file}: {name} is missing or has another shape.")
    return found
