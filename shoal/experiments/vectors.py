"""The vectors whose mean is estimated: made in the usual families, or read from .npy and .safetensors files.

The families are those of the literature on mean estimation (Suresh et al., arXiv:2203.04925; Vargaftik et al.,
arXiv:2105.08339): dense and light-tailed, skewed, sparse, heavy-tailed, and vectors that agree more or less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ConfigError, DataError

DRAWN = {
    "gaussian": "independent standard normal entries",
    "lognormal": "entries exp(z), z standard normal",
    "onehot": "each vector one coordinate, drawn uniformly, of value 1",
    "cauchy": "independent standard Cauchy entries",
    "identical": "one normal vector, n times",
    "near-identical:S": "one normal vector, and S times a normal vector of its own for each client",
}


class Inputs(NamedTuple):
    """n vectors of d coordinates, made or read when they are asked for. `swept` is the value of what a sweep varies."""

    name: str
    n: int
    d: int
    vectors: Callable[[], Tensor]  # -> (n, d) float32
    swept: float | None = None


def checked_family(family: str) -> float:
    """The spread s of "near-identical:s", and 0 for the other families. Raises ConfigError for an unknown one."""
    name, colon, spread = family.partition(":")
    if name != "near-identical" or not colon:
        if family not in DRAWN or family == "near-identical:S":
            raise ConfigError(f"data {family!r}: {', '.join(DRAWN)} (S a number, as in near-identical:0.1).")
        return 0.0
    try:
        value = float(spread)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1e6:
        raise ConfigError(f"data {family!r}: the spread is a number from 0 to 1e6, as in near-identical:0.1.")
    return value


def make(family: str, n: int, d: int, seed: int = 0) -> Tensor:
    """(n, d) float32 of a family in `DRAWN`, from numpy's PCG64(seed): the same on every machine.

    Raises ConfigError for an unknown family and for n or d below 1.
    """
    spread = checked_family(family)
    if n < 1 or d < 1:
        raise ConfigError(f"{n} vectors of {d} coordinates: at least one of each.")
    rng = np.random.Generator(np.random.PCG64(seed))
    if family == "onehot":
        rows = np.zeros((n, d), np.float32)
        rows[np.arange(n), rng.integers(d, size=n)] = 1.0
    elif family == "lognormal":
        rows = np.exp(rng.standard_normal((n, d), np.float32))
    elif family == "cauchy":
        rows = rng.standard_cauchy((n, d)).astype(np.float32)
    elif family == "gaussian":
        rows = rng.standard_normal((n, d), np.float32)
    else:
        common = rng.standard_normal(d, np.float32)
        rows = np.repeat(common[None], n, 0)
        if spread > 0:
            rows = rows + np.float32(spread) * rng.standard_normal((n, d), np.float32)
    return torch.from_numpy(rows)


def made(family: str, n: int, d: int, seed: int = 0, swept: float | None = None) -> Inputs:
    """The family as `Inputs`. Raises ConfigError as `make` does, before anything is drawn."""
    checked_family(family)
    if n < 1 or d < 1:
        raise ConfigError(f"{n} vectors of {d} coordinates: at least one of each.")
    return Inputs(family, n, d, lambda: make(family, n, d, seed), swept)


def given(vectors: Any, name: str = "vectors", swept: float | None = None) -> Inputs:
    """(n, d) numbers that are here already. Raises DataError where they are not a finite matrix."""
    rows = _matrix(torch.as_tensor(vectors), name)
    return Inputs(name, len(rows), rows.shape[1], lambda: rows, swept)


def read(files: Sequence[str | Path]) -> Tensor:
    """(n, d) float32: the rows of all files, in their order.

    .npy: a matrix (a row a client) or one vector. .safetensors (extra [data]): tensors of two dimensions give a row a
    client where the file holds just one of them; otherwise every tensor, flattened, is one client's vector, in the
    order of their names. Raises DataError where a file is absent, malformed or not finite, or where lengths differ.
    """
    blocks = [_matrix(_read(Path(file).expanduser()), str(file)) for file in files]
    widths = sorted({block.shape[1] for block in blocks})
    if len(widths) != 1:
        raise DataError(f"vectors of {' and '.join(map(str, widths))} coordinates: all must have the same number.")
    return torch.cat(blocks)


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: {_line(error)}.") from None
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: {array.dtype} entries; vectors are real numbers.")
        return torch.from_numpy(np.ascontiguousarray(array.astype(np.float64)))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise DataError(f"{path}: vectors are read from .npy and .safetensors files.")


def _read_safetensors(path: Path) -> Tensor:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise DataError(
            f'{path}: reading it needs safetensors, which is not installed: pip install "shoal[data]"'
        ) from None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: {_line(error)}.") from None
    kept = [tensors[name] for name in sorted(tensors)]
    if len(kept) == 1:
        return kept[0]
    sizes = sorted({tensor.numel() for tensor in kept})
    if len(sizes) != 1:
        raise DataError(
            f"{path}: its {len(kept)} tensors have {', '.join(map(str, sizes[:4])) or 'no'} entries: "
            "either one matrix with a row a client, or tensors of equal size, one a client."
        )
    return torch.stack([tensor.reshape(-1).double() for tensor in kept])


def _matrix(rows: Tensor, name: str) -> Tensor:
    """(n, d) contiguous float32. Raises DataError where there is no such thing."""
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or 0 in rows.shape or rows.is_complex():
        raise DataError(f"{name}: shape {tuple(rows.shape)}, {rows.dtype}; a row of real numbers a client is needed.")
    rows = rows.detach().to("cpu", torch.float32).contiguous()
    bad = ~torch.isfinite(rows).all(1)
    if bool(bad.any()):
        raise DataError(f"{name}: vector {int(bad.nonzero()[0])} holds a number that is not finite in float32.")
    return rows


def _line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
