"""A run or a race as a value: validated once, stored in config.json, and enough to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal import data, heart
from shoal.core import OnNonFinite, Problem
from shoal.errors import ConfigError
from shoal.experiments.expressions import known_names, parse
from shoal.problems import Autoencoder, Classification, Quadratics

Positive = Field(default=None, gt=0, allow_inf_nan=False)


class Spec(BaseModel):
    """Frozen, and closed: an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The validated value; raises ConfigError, in one line, naming the field."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            said = f"{where}={first['input']!r}: " if where else ""
            raise ConfigError(said + first["msg"].removeprefix("Value error, ")) from None


class ProblemSpec(Spec):
    """name: quadratics, autoencoder, heart, a bundled data set, a LIBSVM file, or an expression: "Quadratics(n=3)".

    A field that does not apply to the problem must be left out. None stands for the problem's default.
    """

    name: str = "phishing"
    clients: int | None = Field(default=None, ge=1)
    dim: int | None = Field(default=None, ge=1)
    noise: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    lam: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    loss: Literal["logistic", "nonconvex"] | None = None
    split: Literal["iid", "contiguous", "label", "dirichlet"] | None = None
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0)
    data: str | None = None
    rows: int | None = Field(default=None, ge=1)
    similarity: float | None = Field(default=None, ge=0, le=1)

    def _given(self) -> dict[str, Any]:
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}

    def _refuse(self, kind: str, allowed: set[str]) -> None:
        wrong = sorted(self._given().keys() - allowed)
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)}: not a setting of {kind}, which takes {', '.join(sorted(allowed)) or 'none'}."
            )

    def build(self, files: Sequence[str] = ()) -> Problem:
        """The problem. Raises ConfigError or DataError."""
        given = self._given()
        if self.name == "quadratics":
            self._refuse("quadratics", {"clients", "dim", "noise", "lam", "seed"})
            names = {"clients": "n", "dim": "d"}
            return Quadratics(**{names.get(k, k): v for k, v in given.items()})
        if self.name == "autoencoder":
            self._refuse("autoencoder", {"clients", "data", "lam", "rows", "seed", "similarity"})
            if "data" not in given:
                raise ConfigError(
                    "the autoencoder needs MNIST: --data FOLDER; shoal.mnist.fetch(folder) downloads its files there."
                )
            return Autoencoder.load(given.pop("data"), **{"n" if k == "clients" else k: v for k, v in given.items()})
        if self.name == "heart":
            self._refuse("heart", {"data", "lam", "loss"})
            if "data" not in given:
                raise ConfigError("heart needs --data FOLDER, with the four files processed.<hospital>.data.")
            return Classification(*heart.load(given.pop("data")), **given, name="heart")
        known = self.name in data.BUNDLED or Path(self.name).expanduser().exists()
        if not known and "(" not in self.name:
            there = ", ".join(("quadratics", "autoencoder", "heart", *data.BUNDLED))
            raise ConfigError(
                f"no problem or file {self.name!r}: give {there}, the path of a LIBSVM file, or an expression."
            )
        if known:
            self._refuse(self.name, {"clients", "lam", "loss", "split", "alpha", "seed"})
            clients = {"n": given.pop("clients")} if "clients" in given else {}
            return Classification.load(self.name, **clients, **given)
        self._refuse("an expression", set())
        return parse(self.name, known_names(files), Problem)


class RunSpec(Spec):
    """One run, as `shoal run` takes it."""

    problem: ProblemSpec = ProblemSpec()
    method: str
    rounds: int | None = Field(default=None, ge=1)
    bits: float | None = Positive
    target: float | None = Positive
    seed: int = Field(default=0, ge=0, lt=2**64)
    step: Literal["theory"] | float = "theory"
    multiple: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    pl: bool = False
    every: int = Field(default=1, ge=1)
    chunk: int | None = Field(default=None, ge=1)
    on_nonfinite: OnNonFinite = "raise"
    files: tuple[str, ...] = ()


class RaceSpec(Spec):
    """A race, as `shoal race` and the files in shoal/races take it.

    steps: "theory", "tuned", or both. Tuning tries the multiples 2^tune[0]..2^tune[1] of the theory's step size (of
    1/L_- where no theorem gives one, over 2^-8..2^4), each on the first seed and a quarter of the budget.
    """

    title: str = "A race of compressed methods"
    problem: ProblemSpec = ProblemSpec()
    methods: tuple[str, ...] = Field(min_length=1)
    steps: tuple[Literal["theory", "tuned"], ...] = ("theory", "tuned")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    rounds: int | None = Field(default=None, ge=1)
    bits: float | None = Positive
    target: float = Field(gt=0, allow_inf_nan=False)
    tune: tuple[int, int] = (0, 19)
    pl: bool = False
    every: int = Field(default=1, ge=1)
    files: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rounds is None and self.bits is None:
            raise ValueError("a race needs a budget: rounds, bits, or both.")
        for name in ("methods", "steps", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values!r}: each at most once.")
        if self.tune[0] > self.tune[1] or max(map(abs, self.tune)) > 60:
            raise ValueError(f"tune={self.tune}: exponents LOW <= HIGH within -60..60.")
        if any(not 0 <= s < 2**64 for s in self.seeds):
            raise ValueError(f"seeds={self.seeds}: integers in 0..2^64-1.")
        return self
