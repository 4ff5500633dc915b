"""A run's folder: config, rows while it runs, a checkpoint until it ends, a result and Parquet when it has ended.

Files appear whole: each is written beside its name and moved there. A checkpoint is an .npz without pickles; its
arrays carry zip's CRC-32 and are read back before anything is resumed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.core import Meter, Row, State
from shoal.errors import CheckpointCorrupt, ConfigError, ResumeMismatch
from shoal.wire import digest

CHECKPOINT_EVERY = 5.0  # seconds
LEFTOVER = re.compile(r"\.probe|\.(config|race)\.json\.\d+")  # of a process that was killed before it wrote anything


def versions() -> dict[str, str]:
    """Of everything that can change a bit of the results."""
    names = ("shoal", "torch", "numpy", "numba", "scipy")
    found = {"python": platform.python_version()}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> str:
    """The machine in a line."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    _replace(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def make_folder(path: Path) -> None:
    """An empty, writable folder. Raises ConfigError where there is something already, or it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(not LEFTOVER.fullmatch(there.name) for there in path.iterdir()):
            raise ConfigError(f"{path} is not empty: resume it with --resume {path}, or choose another folder.")
        (path / ".probe").touch()
        (path / ".probe").unlink()
    except OSError as error:
        raise ConfigError(f"cannot write in {path}: {error.strerror}.") from error


def _line(row: Row) -> str:
    return json.dumps(row._asdict()) + "\n"


class Folder:
    """The folder of one run. `config` identifies the run; a folder that exists must hold the same one to be resumed."""

    def __init__(
        self, path: Path, config: dict[str, Any], resume: bool = False, extra: dict[str, Any] | None = None
    ) -> None:
        self.path, self.digest = path, digest(config).hex()
        self.rows: list[Row] = []
        self.state: dict[str, np.ndarray] | None = None
        self._saved = self._flushed = time.monotonic()
        if resume and (path / "result.json").exists():
            raise ConfigError(f"{path}: this run has ended; read it with: shoal report {path}")
        if resume and (path / "config.json").exists():
            self._reopen(config)
        else:
            make_folder(path)
            facts = {
                "format": 1,
                "kind": "run",
                **config,
                **(extra or {}),
                "versions": versions(),
                "machine": machine(),
            }
            write_json(path / "config.json", facts)
        # The rows of the checkpoint are on disk before anything is appended: a second cut must not separate the two.
        _replace(path / "metrics.jsonl", "".join(map(_line, self.rows)).encode())
        self._metrics = (path / "metrics.jsonl").open("a")

    def _reopen(self, config: dict[str, Any]) -> None:
        try:
            held = dict(json.loads((self.path / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointCorrupt(
                f"{self.path}/config.json: {error}. Delete the folder to begin the run again."
            ) from None
        for name, value in json.loads(json.dumps(config)).items():
            if held.get(name) != value:
                raise ResumeMismatch(
                    f"{self.path}: its {name} is {held.get(name)!r}, not {value!r}; resume the same run."
                )
        before = {k: v for k, v in held.get("versions", {}).items() if versions().get(k) != v}
        if before:
            raise ResumeMismatch(f"{self.path} was begun with {before}, here are {versions()}: bits may differ.")
        if not (self.path / "checkpoint.npz").exists():
            return
        try:
            with (self.path / "checkpoint.npz").open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                self.state = {name: stored[name] for name in stored.files}
            meta = json.loads(bytes(self.state["meta"]).decode())
            lines = (self.path / "metrics.jsonl").read_text().splitlines()[: meta["rows"]]
            self.rows = [Row(**json.loads(line)) for line in lines]
            if len(self.rows) != meta["rows"] or meta["digest"] != self.digest:
                raise CheckpointCorrupt(f"{self.path}: the checkpoint and the rows beside it do not belong together.")
        # zipfile raises RuntimeError for what it takes for encryption or an unknown compression, and EOFError.
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            said = f"{type(error).__name__}: {error}"
            raise CheckpointCorrupt(f"{self.path}/checkpoint.npz: {said}. Delete it to begin the run again.") from error

    def forget(self) -> None:
        """Begin again from round 0, whatever was there."""
        self.state, self.rows = None, []
        self._metrics.close()
        _replace(self.path / "metrics.jsonl", b"")
        self._metrics = (self.path / "metrics.jsonl").open("a")

    def restore(self, fresh: State) -> State | None:
        """The checkpoint's state in the form of a fresh one; None where there is none."""
        if self.state is None:
            return None
        meta = json.loads(bytes(self.state["meta"]).decode())

        def fill(name: str, like: Any) -> Any:
            if like == ():
                return ()
            return type(like)(*(self._tensor(f"{name}.{f}", v) for f, v in zip(like._fields, like, strict=True)))

        parts = {name: fill(name, getattr(fresh, name)) for name in ("server", "workers", "descent")}
        return State(meta["index"], self._tensor("x", fresh.x), **parts, meter=Meter(**meta["meter"]))

    def _tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        assert self.state is not None
        if name not in self.state or tuple(like.shape) != self.state[name].shape:
            raise CheckpointCorrupt(f"{self.path}/checkpoint.npz: {name} is missing or has another shape.")
        return torch.from_numpy(self.state[name])

    def record(self, row: Row) -> None:
        """Append a row; it can be read from the file within a second."""
        self.rows.append(row)
        self._metrics.write(_line(row))
        if time.monotonic() - self._flushed > 1.0:
            self._metrics.flush()
            self._flushed = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved > CHECKPOINT_EVERY

    def checkpoint(self, state: State) -> None:
        """All that is needed to go on, beside the rows so far."""
        self._metrics.flush()
        meta = {"index": state.index, "rows": len(self.rows), "digest": self.digest, "meter": asdict(state.meter)}
        arrays = {"x": state.x.numpy(), "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
        for name in ("server", "workers", "descent"):
            part = getattr(state, name)
            arrays |= {f"{name}.{f}": v.numpy() for f, v in zip(getattr(part, "_fields", ()), part, strict=True)}
        beside = self.path / f".checkpoint.{os.getpid()}.npz"
        with beside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, self.path / "checkpoint.npz")
        self._saved = time.monotonic()

    def finish(self, result: dict[str, Any]) -> None:
        """Rows as Parquet where pyarrow is installed, the result, and no checkpoint any more."""
        self._metrics.close()
        write_parquet(self.path / "metrics.parquet", self.rows)
        write_json(self.path / "result.json", result)
        (self.path / "checkpoint.npz").unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the folder as it is: for a run that goes on another time."""
        self._metrics.close()


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """The rows as columns; skipped where the extra [report] is not installed (the JSON lines hold the same)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table({name: [getattr(r, name) for r in rows] for name in Row._fields}), beside)
    os.replace(beside, path)
