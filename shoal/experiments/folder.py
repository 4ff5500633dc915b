"""A run's folder: config, rows while it runs, a result and Parquet when it has ended. Checkpoints stand beside them.

Files appear whole: each is written beside its name and moved there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from shoal.container import place
from shoal.core import Row
from shoal.errors import CheckpointCorrupt, CheckpointWriteFailed, ConfigError, ResumeMismatch

# Of a process that was killed before it wrote anything.
LEFTOVER = re.compile(r"\.probe|\.(config|race)\.json\.\d+|journal-\d+of\d+")


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
    place(path, [(json.dumps(value, indent=1, allow_nan=True) + "\n").encode()])


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
        self.path, self.rows = path, list[Row]()
        self._metrics: IO[str] | None = None
        self._flushed = time.monotonic()
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

    def begin(self, rows: Sequence[Row] = ()) -> None:
        """Go on behind these rows: they are on the disk, and nothing else is, before anything is appended."""
        self.rows = list(rows)
        place(self.path / "metrics.jsonl", ["".join(map(_line, self.rows)).encode()])
        self._metrics = (self.path / "metrics.jsonl").open("a")

    def record(self, row: Row) -> None:
        """Append a row; it can be read from the file within a second. Raises CheckpointWriteFailed."""
        assert self._metrics is not None
        self.rows.append(row)
        try:
            self._metrics.write(_line(row))
            if time.monotonic() - self._flushed > 1.0:
                self._metrics.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise CheckpointWriteFailed(error.errno, error.strerror, self._metrics.name) from error

    def finish(self, result: dict[str, Any]) -> None:
        """Rows as Parquet where pyarrow is installed, and the result: the run has ended when it is there."""
        place(self.path / "metrics.jsonl", ["".join(map(_line, self.rows)).encode()])
        self.close()
        write_parquet(self.path / "metrics.parquet", self.rows)
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Leave the folder as it is: for a run that goes on another time."""
        with suppress(OSError):  # a full disk: the rows stand in the checkpoint, too
            if self._metrics is not None:
                self._metrics.close()


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """The rows as columns; skipped where the extra [report] is not installed (the JSON lines hold the same)."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: [getattr(r, name) for r in rows] for name in Row._fields}), sink)
    place(path, [memoryview(sink.getvalue())])
