"""Grids of runs: every combination of values of any fields of a run, each point known by the hash of its config."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field

from shoal import data
from shoal.core import Method
from shoal.errors import ConfigError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.spec import ProblemSpec, RunSpec, Spec

FIELDS = (
    *(f"problem.{name}" for name in ProblemSpec.model_fields),
    *(name for name in RunSpec.model_fields if name != "problem"),
)


class Grid(Spec):
    """run: what all points share; over: for each field that varies its values. Fields are a run's, `problem.noise`
    and the like among them."""

    run: dict[str, Any] = Field(default_factory=dict)
    over: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    def points(self) -> Iterator[RunSpec]:
        """The product of the values, the last field varying fastest. Raises ConfigError for a field that is none."""
        fixed, axes = _flat(self.run), _flat(self.over)
        for name in (*fixed, *axes):
            if name not in FIELDS:
                raise ConfigError(f"{name!r} is not a field of a run: give one of {', '.join(FIELDS)}.")
        both = sorted(fixed.keys() & axes.keys())
        if both:
            raise ConfigError(f"{', '.join(both)}: fixed and varied at once; leave out one of the two.")
        empty = [name for name, values in axes.items() if not isinstance(values, list | tuple) or not values]
        if empty:
            raise ConfigError(f"over {empty[0]}={axes[empty[0]]!r}: a list of at least one value.")
        for chosen in itertools.product(*axes.values()):
            yield _point(fixed | dict(zip(axes, chosen, strict=True)))

    def changed(self, run: Mapping[str, Any], over: Mapping[str, Any]) -> Grid:
        """The grid with these fields instead, whether it fixed them or varied them."""
        fixed = {name: value for name, value in _flat(self.run).items() if name not in over} | dict(run)
        varied = {name: value for name, value in _flat(self.over).items() if name not in run} | dict(over)
        return Grid.of(run=fixed, over=varied)


class SweepSpec(Spec):
    """A sweep, as `shoal sweep` and its files take it: the points of one grid or of several."""

    title: str = "A sweep"
    grids: tuple[Grid, ...] = Field(min_length=1)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> SweepSpec:
        """From a file's table: `grids`, or `run` and `over` of a single one beside `title`."""
        facts = dict(facts)
        alone = {name: facts.pop(name) for name in ("run", "over") if name in facts}
        if alone and "grids" in facts:
            raise ConfigError("a sweep has [[grids]], or [run] and [over] of a single one; not both.")
        grids = facts.pop("grids", [alone])
        if not isinstance(grids, list | tuple) or not all(isinstance(g, Mapping) for g in grids):
            raise ConfigError(f"grids={grids!r}: in a sweep's file they are tables, [[grids]].")
        made = []
        for grid in grids:  # TOML nests `problem.noise`, whose values are then not a list
            over = grid.get("over", {})
            made.append(Grid.of(**{**grid, "over": _flat(over) if isinstance(over, Mapping) else over}))
        return cls.of(**facts, grids=tuple(made))

    def points(self) -> dict[str, RunSpec]:
        """Key -> run, in the grids' order; a point of two grids is one point."""
        return {key(point): point for grid in self.grids for point in grid.points()}


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """{"problem": {"noise": 0}} and {"problem.noise": 0} are the same."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _point(fields: Mapping[str, Any]) -> RunSpec:
    head = "problem."
    problem = {name.removeprefix(head): value for name, value in fields.items() if name.startswith(head)}
    rest = {name: value for name, value in fields.items() if not name.startswith(head)}
    if "method" not in rest:
        raise ConfigError('which method? Give one, or several: --over "method=Marina(PermK());Marina(RandK(10))".')
    return RunSpec.of(**rest, problem=ProblemSpec.of(**problem))


def key(spec: RunSpec) -> str:
    """16 hexadecimal digits that tell one run from another: of its settings, of its method however it is spelled, and
    of the contents of the files it reads."""
    # Without defaults: a setting that a later version adds leaves the keys of what was run before.
    facts = spec.model_dump(mode="json", exclude_defaults=True)
    facts["method"] = compact(parse(spec.method, known_names(spec.files), Method))
    source = [] if spec.problem.name in data.BUNDLED else [spec.problem.name]
    folder = sorted(Path(spec.problem.data).expanduser().glob("*")) if spec.problem.data else []
    paths = [*(Path(name).expanduser() for name in (*spec.files, *source)), *folder]
    facts["contents"] = [_digest(path, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache
def _digest(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def values(text: str) -> tuple[str, tuple[str, ...]]:
    """("problem.noise", ("0", "0.1")) of "problem.noise=0,0.1". Values stand between semicolons, or, where there are
    none, between the commas that no bracket encloses. Raises ConfigError where a value or the field is missing."""
    name, equals, listed = text.partition("=")
    parts = [part.strip() for part in (listed.split(";") if ";" in listed else _commas(listed))]
    if not equals or not name.strip() or not all(parts):
        raise ConfigError(f"--over {text!r}: FIELD=VALUE,VALUE,..., for instance problem.noise=0,0.05,0.1.")
    return name.strip(), tuple(parts)


def _commas(text: str) -> Iterator[str]:
    depth, begin = 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            yield text[begin:at]
            begin = at + 1
    yield text[begin:]
