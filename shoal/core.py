"""START HERE. The types everything else is written in; they compute next to nothing.

1. A process hosts m of the n clients. Code is written on rows: tensors (m, d) beside the ids of the m clients.
2. A method is an estimator of grad f in two halves of pure functions: the workers' (`up`, `commit`) and the server's
   (`down`, `estimate`). What is done with the estimate is a `Descent`.
3. A compressor is the joint law of C_1..C_n and its wire format: rows in, bytes out. It has no state.
4. Every random number is a pure function of (seed, stream, round, slot, coordinate): see `Round` in
   `shoal.messages`, where rows, messages and their checks stand.
5. A runtime provides a channel: these bytes down, these bytes up, in slot order.

One letter, one meaning: n clients in all, m hosted here, d coordinates, k kept coordinates, x iterate, g estimate,
h shift, u what is being compressed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from shoal import kernels
from shoal.errors import ConfigError, NonFiniteError
from shoal.messages import Messages, Round, Rows, Vector, as_bytes, checked_rows, finite_floats
from shoal.slices import Slices
from shoal.theory import AB, Setting, Smoothness, StepSize, independent


# ------------------------------------------------------------------------------------------------ compressors
class Compressor(ABC):
    """The joint law of C_1..C_n and its wire format. Stateless: memory belongs to methods.

    Beside these, a compressor states its constants, each with its theorem, as far as it has them:
    `omega(d)`: E C(u) = u, E||C(u) - u||^2 <= omega ||u||^2, errors of different clients uncorrelated or negatively
    correlated (DIANA's theorem needs that);  `alpha(d)`: E||C(u) - u||^2 <= (1 - alpha) ||u||^2;
    `ab(n, d)`: the AB inequality of the n compressors together;  `homogeneous(n, d)`: a better one for equal inputs;
    `present(n, d, m)`: that of the mean over m arrived messages of n expected;  `alone(n, d)`: each client's own omega,
    however the errors of different clients depend on each other (where it is not `omega`).
    """

    agrees = False  # whether `prepare` returns scalars whose maximum all clients must know before `encode`
    fixed_length = False  # whether every message is exactly `capacity` bytes long

    @property
    def evidence(self) -> Literal["proved", "numerical"]:
        """How well omega and alpha are known: what is inside decides, where something is. (`ab` has its own word.)"""
        inside = getattr(self, "inner", None)
        return inside.evidence if isinstance(inside, Compressor) else "proved"

    def check(self, n: int, d: int) -> None:  # noqa: B027
        """Raise ConfigError if these n clients cannot compress d coordinates; called before anything runs."""

    @abstractmethod
    def capacity(self, n: int, d: int) -> int:
        """Bytes: an upper bound of a message's length, known without the data."""

    def predicted_bits(self, n: int, d: int) -> float:
        """Uplink bits a client a round, agreement included: what p and horizons are chosen by, never what is counted.

        8 times the capacity; a code of variable length states its mean, or a lower bound of it.
        """
        return 8.0 * self.capacity(n, d) + (32.0 if self.agrees else 0.0)

    def peeled(self, u: Rows, rnd: Round) -> tuple[Compressor, Rows, Round]:
        """(Q, v, its round): what `prepare` and `encode` do with u is what those of Q do with v.

        For whoever calls both, and need not make v twice.
        """
        return self, u, rnd

    def prepare(self, u: Rows, rnd: Round) -> Tensor:
        """(m,) float32: what each client brings to the agreement (only where `agrees`)."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, u: Rows, rnd: Round) -> Messages:
        """The m clients' messages. Row i depends on u[i], the round and row i's slot alone."""

    @abstractmethod
    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        """(m, d) float32: C_i(u_i), from the bytes and the round alone."""

    def aggregate(self, msgs: Messages, rnd: Round) -> Vector:
        """(d,) float32: (1/cohort) sum_i C_i(u_i) over the given messages, added in slot order in float64.

        A client of the cohort whose message is missing counts as zero: the mean over m present is cohort/m times this.
        """
        return kernels.of(msgs.payload).mean_rows(self.decode(msgs, rnd), rnd.cohort)

    def slices(self, d: int, rnd: Round) -> Slices | None:
        """How the round's messages are cut by coordinates, for channels that have several processes add up a slice
        each; None where they cannot be cut.

        Only for messages that all have one length. Slices of all messages say the bits of `aggregate`.
        """
        return None


class Unbiased(Compressor):
    """Independent unbiased compressors: `omega` is stated, A = omega / n and B = 0 follow."""

    @abstractmethod
    def omega(self, d: int) -> float:
        """E||C(u) - u||^2 <= omega ||u||^2."""

    def ab(self, n: int, d: int) -> AB:
        """A = omega / n, B = 0: the errors are independent and have mean zero."""
        return independent(self.omega(d), n, f"independent, omega = {self.omega(d):.6g}")

    def present(self, n: int, d: int, m: int) -> AB:
        """A = omega / m, B = 0, of the mean over the m of n clients that arrived."""
        return independent(self.omega(d), m, f"independent, omega = {self.omega(d):.6g}")


def require(compressor: Compressor, constant: str, method: str, mend: str) -> None:
    """Raise ConfigError unless the compressor states this constant (`omega`, `alpha` or `ab`)."""
    if not isinstance(compressor, Compressor):
        raise ConfigError(f"{method} needs a compressor, e.g. {method}(RandK(10)); got {compressor!r}.")
    if not hasattr(compressor, constant):
        has = [c for c in ("omega", "alpha", "ab") if hasattr(compressor, c)]
        if constant != "alpha" and not has and getattr(compressor, "numerical", None) is False:
            mend = "Its constants were measured, not proved: numerical=True states them, where there are any."
        raise ConfigError(
            f"{method} needs a compressor with {constant}; {compressor!r} has {' and '.join(has) or 'none'}. {mend}"
        )


def check_share(method: str, name: str, value: float | None, what: str, most: str = "1") -> None:
    """Raise ConfigError unless a share or a probability is None or a number in (0, 1]; `most` says the rule's end."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0.0 < value <= 1.0):
        raise ConfigError(
            f"{method}({name}={value!r}): {what} is a number in (0, {most}]; give one, or leave {name} out."
        )


def ab_for_inputs(compressor: Compressor, setting: Setting, equal: bool) -> AB:
    """The compressor's AB inequality, with the others that hold beside it; where all inputs are `equal`, also the
    one that it states for those (`homogeneous`).

    Raises ConfigError where it is stated for equal inputs only and what the method compresses is not `equal`.
    """
    ab: AB = compressor.ab(setting.n, setting.d)  # type: ignore[attr-defined]
    if ab.evidence == "homogeneous" and not equal:
        raise ConfigError(
            f"{compressor!r} states an AB inequality for equal inputs only ({ab.source}), and the clients' differ "
            f"here (L_± = {setting.smoothness.pm!r}): take a compressor whose inequality holds for all inputs."
        )
    if equal and hasattr(compressor, "homogeneous"):
        ab = replace(compressor.homogeneous(setting.n, setting.d), other=ab)
    return ab


# ------------------------------------------------------------------------------------------------ methods
class Gradient(Protocol):
    """What a worker may ask: `Problem.grad` of its clients. Pure: samples are drawn from the round."""

    def __call__(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows: ...


def gradients_at(points: Rows, grad: Gradient, rnd: Round) -> Rows:
    """(m, d): grad f_i at client i's own point, row i of `points`. One client at a time: rows are independent."""
    rows = [grad(point, rnd.rows(slice(i, i + 1))) for i, point in enumerate(points)]
    return torch.cat(rows) if rows else torch.zeros_like(points)


class Dense(Compressor):
    """Everything, uncompressed: d little-endian float32.

    omega = 0, alpha = 1, A = B = 0 (docs/derivations/compressors.md).

    It lives here, not in `shoal.compressors` (which exports it), because it is what every method sends down and what
    MARINA sends on heads.
    """

    fixed_length = True

    def __repr__(self) -> str:
        return "Dense()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dense)

    def __hash__(self) -> int:
        return hash(Dense)

    def capacity(self, n: int, d: int) -> int:
        """4 d bytes."""
        return 4 * d

    def encode(self, u: Rows, rnd: Round) -> Messages:
        return Messages.of(as_bytes(checked_rows(u, rnd)), rnd, u.shape[1])

    def decode(self, msgs: Messages, rnd: Round) -> Rows:
        return finite_floats(msgs.checked(4 * msgs.d))

    def slices(self, d: int, rnd: Round) -> Slices:
        """Four bytes a coordinate."""
        return Slices(lambda part, lo: self.aggregate(part, rnd), d, rnd.cohort, grain=1, size=4)

    def omega(self, d: int) -> float:
        """0: nothing is lost."""
        return 0.0

    def alpha(self, d: int) -> float:
        """1: nothing is lost."""
        return 1.0

    def ab(self, n: int, d: int) -> AB:
        """A = B = 0: nothing is lost."""
        return AB(0.0, 0.0, source="identity")


DENSE = Dense()


class Method(ABC):
    """A gradient estimator: init -> (down -> up -> commit -> estimate)*, all of them pure.

    States are NamedTuples of tensors (or `()`); a worker field annotated `Rows` holds a row a hosted client, any other
    field one value that all hosted workers share.
    """

    spares = False  # whether server and workers stay in step where a client of the cohort sends nothing in a round

    def check(self, n: int, d: int) -> None:  # noqa: B027
        """Raise ConfigError if the method cannot run at this n and d; called before anything runs."""

    def resolved(self, setting: Setting) -> Method:
        """The method with a number in place of every parameter left open (p, the shift's step, ...)."""
        return self

    @abstractmethod
    def step_size(self, setting: Setting) -> StepSize:
        """The theorem's step size, with the constants that went in. `evidence` is "none" where no theorem applies."""

    @abstractmethod
    def init(self, x0: Vector, rnd: Round) -> tuple[Any, Any]:
        """(server state, workers' state) before round 0."""

    def cohort(self, rnd: Round) -> Tensor | None:
        """The clients that take part in this round, as `Round.among` has them; None for all n of them.

        Everyone derives the same, from shared draws. The other clients hear what the server sends, and send nothing:
        their rows of the workers' state stay as they are. What all workers share moves in `up`, which every process
        calls every round, with no rows if it hosts none of the cohort. A method whose workers have rows of state has
        no client twice in a cohort.
        """
        return None

    def down(self, server: Any, x: Vector, rnd: Round) -> tuple[Messages, Any]:
        """What the server sends: by default the model, uncompressed, one row (of `rnd.server()`) that all n hear.

        Or a row for each who takes part (of `rnd.everyone()`, in slot order), which that client alone hears.
        """
        return DENSE.encode(x[None], rnd.server()), server

    def model(self, down: Messages, rnd: Round) -> Vector:
        """The x that a worker reads from the default `down`."""
        return DENSE.decode(down, rnd.server())[0]

    @abstractmethod
    def code(self, rnd: Round) -> Compressor:
        """The compressor of this round's uplink; everyone derives the same."""

    @abstractmethod
    def up(self, worker: Any, down: Messages, grad: Gradient, rnd: Round) -> tuple[Rows, Any]:
        """What each hosted client compresses and sends, and its state. `down` is what these clients heard."""

    def commit(self, worker: Any, sent: Messages, rnd: Round) -> Any:
        """The state once the client knows its own message (DIANA and EF21 move their shifts by it)."""
        return worker

    @abstractmethod
    def estimate(self, server: Any, mean: Vector, rnd: Round) -> tuple[Vector, Any]:
        """The estimate g of grad f from the mean of what all messages say (`Compressor.aggregate`), and the server's
        state."""


class Descent(Protocol):
    """What is done with the estimate."""

    def init(self, x0: Vector) -> Any: ...

    def step(self, x: Vector, g: Vector, state: Any) -> tuple[Vector, Any]: ...


# ------------------------------------------------------------------------------------------------ problems
class Problem(ABC):
    """n local functions over x in R^d. f = (1/n) sum f_i: any weights sit inside the f_i.

    Law: row i of what `evaluate` and `grad` return has the same bits whatever rows stand beside it.
    """

    name: str
    n: int
    d: int
    full_batch = True  # `grad` returns the rows of `evaluate`

    @abstractmethod
    def start(self) -> Vector:
        """x^0."""

    @abstractmethod
    def evaluate(self, x: Vector, clients: Tensor) -> tuple[Tensor, Rows]:
        """(values (m,) float64, gradients (m, d) float32) of these clients' f_i at x, on all their data."""

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        """What a method's worker sees of grad f_i: on all its data, or on `batch` of its samples.

        Which samples is a pure function of (seed, round, client): two points in one round meet the same ones, drawn
        uniformly without replacement, all of them where a client has no more. An f_i that is not a mean of samples is
        a mean of one, as here. A stochastic problem draws from the round in any case.
        """
        return self.evaluate(x, rnd.clients)[1]

    @abstractmethod
    def smoothness(self) -> Smoothness:
        """The constants, each exact, a valid bound or an estimate."""

    @abstractmethod
    def only(self, clients: Tensor) -> Problem:
        """The same problem holding just these clients' data: what a rank loads."""


# ------------------------------------------------------------------------------------------------ runtimes
OnNonFinite = Literal["raise", "skip", "drop"]  # what becomes of a round in which a client has a NaN or an infinity


@dataclass
class Meter:
    """Bytes since round 0, over all clients: payload, the same in frames, and what a real network moved."""

    up: int = 0
    down: int = 0
    up_framed: int = 0
    down_framed: int = 0
    moved: int = 0

    def bits(self, n: int) -> dict[str, float]:
        """Cumulative bits a client, as a row of results has them."""
        names = {"up_bits": self.up, "down_bits": self.down}
        names |= {"up_framed_bits": self.up_framed, "down_framed_bits": self.down_framed}
        return {name: 8.0 * count / n for name, count in names.items()}


class Channel(Protocol):
    """What a runtime provides. All of it is collective: every process calls it in the same order."""

    n: int
    clients: Tensor  # (m,) the clients hosted here
    rank: int  # of this process
    serves: bool  # whether the server's half runs here
    meter: Meter

    def open(self, config: dict[str, Any]) -> None:
        """Before the first round: raises ConfigMismatch in every process unless all have this config."""
        ...

    def scatter(self, down: Messages | None, rnd: Round) -> Messages:
        """Server to workers: the one row for all, or the rows of the clients hosted here."""
        ...

    def mean(self, up: Messages, code: Compressor, rnd: Round) -> Vector:
        """Workers to server: `code.aggregate` of every message of the round, in slot order."""
        ...

    def agree(self, values: Tensor, rnd: Round) -> float:
        """The maximum of one float32 scalar a client, over all clients."""
        ...

    def fail(self, error: NonFiniteError, rnd: Round) -> NoReturn:
        """Instead of the next of these calls, where a hosted client has nothing finite to send: every process raises
        one NonFiniteError that names all such clients."""
        ...

    def collect(self, values: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """All clients' values and rows, in id order: for measuring, never counted."""
        ...

    def moved(self) -> list[int]:
        """Bytes that each process has really sent to others, in the order of their ranks; empty in a simulator."""
        ...

    def together(self, mine: Tensor) -> list[Tensor]:
        """Every process's tensor, all of one shape and type, in rank order: for keeping house, never counted."""
        ...


class Row(NamedTuple):
    """One line of results, at x^round: f, ||grad f||^2 of the exact mean gradient, bits a client spent so far."""

    round: int
    value: float
    grad_norm_sq: float
    up_bits: float
    down_bits: float
    up_framed_bits: float
    down_framed_bits: float
    seconds: float


Recorder = Callable[[Row], None]


@dataclass(frozen=True)
class State:
    """All that a round needs from the rounds before it: what a checkpoint holds."""

    index: int
    x: Vector
    server: Any
    workers: Any
    descent: Any
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class Event:
    """x^index, before round `index` runs. `measured` evaluates f and grad f there, once, when asked.

    `fault` is what the round before went without: it was skipped, or clients were left out of it.
    """

    state: State
    evaluate: Callable[[Vector], tuple[float, float]]
    fault: NonFiniteError | None = None

    @cached_property
    def measured(self) -> tuple[float, float]:
        """(f(x), ||grad f(x)||^2), exact."""
        return self.evaluate(self.state.x)
