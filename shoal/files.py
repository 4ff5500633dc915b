"""The files of a data set: found in a folder, or fetched once, checked, and kept.

A data set goes by a path or by its name. A name is looked for in $SHOAL_DATA/<name>, then in the cache ($XDG_CACHE_HOME
or ~/.cache, shoal/<name>), and is downloaded there where neither has all of its files. What is downloaded must pass
its check before it gets its name; files may lie compressed (.xz, .gz, .bz2), and checks are of what they hold.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.data import OPENERS
from shoal.errors import DataError

CHUNK = 1 << 16
PATIENCE = 30  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """A file at an address that may be a .gz of it. `check(raw, where)` raises DataError for any other bytes."""

    name: str
    url: str
    size: int  # bytes of the file itself
    check: Callable[[bytes, str], None]


def find(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, plain or compressed."""
    return next((p for s in ("", *OPENERS) if (p := folder / (name + s)).is_file()), None)


def read(path: Path) -> bytes:
    """What the file holds, decompressed. Raises DataError."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as stream:
            return bytes(stream.read())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as broken:
        raise DataError(f"{path}: the file cannot be read ({broken}).") from broken


def check_sum(raw: bytes, sha256: str, where: str, whose: str) -> None:
    """Raise DataError unless these bytes have this SHA-256."""
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise DataError(
            f"{where}: SHA-256 {found[:12]}... and not {sha256[:12]}...: these are not {whose} bytes; "
            "docs/problems.md says where they come from."
        )


def places(name: str) -> list[Path]:
    """Where a data set of this name may lie: in SHOAL_DATA where that is set, and in the cache, which comes last."""
    shared = os.environ.get("SHOAL_DATA")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [*([Path(shared).expanduser() / name] if shared else []), cache / "shoal" / name]


def folder(given: str | Path, name: str, complete: Callable[[Path], bool], remotes: Sequence[Remote]) -> Path:
    """The folder of a data set that was given by its path, or by its name: then the files are there, or are fetched.

    A name wins over a folder that is called so; write ./name for that. Raises DataError where a fetch fails.
    """
    if str(given) != name:
        return Path(given).expanduser()
    known = places(name)
    held = next((place for place in known if complete(place)), None)
    if held is None:
        held = known[-1]
        fetch(held, remotes)
    return held


def fetch(there: str | Path, remotes: Sequence[Remote]) -> list[Path]:
    """Download what is missing into a folder, which is made if need be; the paths that were written.

    A file appears under its name only when it is whole and checked. Raises DataError, in one line that says what to
    put where, without a network, for other bytes, and where the folder cannot be written.
    """
    target = Path(there).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        return [_one(target, remote) for remote in remotes if find(target, remote.name) is None]
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error}): give another folder for the data.") from None


def _one(target: Path, remote: Remote) -> Path:
    packed, suffix = _download(remote, target), _suffix(remote)
    remote.check(_unpacked(packed, remote) if suffix else packed, remote.url)
    final = target / (remote.name + suffix)
    # A name of its own, so that two processes may fetch at once: whoever is last writes the same bytes.
    handle, part = tempfile.mkstemp(prefix=f".{remote.name}.", suffix=".part", dir=target)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(packed)
        Path(part).chmod(0o644)
        Path(part).replace(final)
    finally:
        with suppress(FileNotFoundError):
            Path(part).unlink()
    return final


def _suffix(remote: Remote) -> str:
    return ".gz" if remote.url.endswith(".gz") else ""


def _download(remote: Remote, target: Path) -> bytes:
    """The bytes at the address, with a bar on a terminal; no more of them than the file and a little can be."""
    most, parts, seen = remote.size + CHUNK, [], 0
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with (
            urllib.request.urlopen(remote.url, timeout=PATIENCE) as stream,
            Progress(*columns, console=Console(stderr=True, emoji=False), transient=True) as bar,
        ):
            length = stream.headers.get("Content-Length", "")
            task = bar.add_task(remote.name, total=int(length) if length.isdecimal() else None)
            while seen <= most and (part := stream.read(CHUNK)):
                parts.append(part)
                seen += len(part)
                bar.update(task, completed=seen)
    except (OSError, HTTPException, ValueError) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise DataError(
            f"{remote.url} cannot be had ({reason}): without a network, put that file into {target} "
            f"as {remote.name}{_suffix(remote)}."
        ) from None
    if seen > most:
        raise DataError(f"{remote.url}: more than {most} bytes, and {remote.name} has {remote.size}: not that file.")
    return b"".join(parts)


def _unpacked(packed: bytes, remote: Remote) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    try:
        raw = stream.decompress(packed, remote.size + 1)
    except zlib.error as error:
        raise DataError(f"{remote.url}: no gzip archive ({error}); it may be a page that stands in its way.") from None
    if not stream.eof and len(raw) < remote.size:
        raise DataError(f"{remote.url}: the archive is cut off after {len(packed)} bytes; try again.")
    return raw
