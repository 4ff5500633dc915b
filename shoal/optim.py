"""MARINA, DIANA and EF21 as `torch.optim.Optimizer`s: each rank is a client, and steps carry compressed messages.

    optimizer = shoal.optim.Marina(model.parameters(), lr=0.05, compressor="Correlated()")
    for inputs, targets in loader:          # this rank's own data
        def closure():
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss
        optimizer.step(closure)

The model is a bare module, not one in DistributedDataParallel: a method needs each rank's own gradient. It runs as
`shoal.simulate` runs it (the same `up`, `commit` and `estimate` of `shoal.methods`), and ends at the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shoal import methods
from shoal.core import Compressor, Method
from shoal.errors import ConfigError, ResumeMismatch
from shoal.experiments.expressions import compact, known_names, parse
from shoal.messages import Round, Rows, Vector
from shoal.rng import checked_seed
from shoal.runtimes.reduce import Link, Traffic, rehearse

__all__ = ["EF21", "Diana", "Marina"]

Closure = Callable[[], Any]
KEPT = ("round", "seed", "world", "method")  # of every parameter group: whose state this is


class Clients(torch.optim.Optimizer):
    """x+ = x - lr (g + weight_decay x), g being a method's estimate of grad f, f the mean of the ranks' losses.

    All parameters are one vector to the compressor; `lr` and `weight_decay` are each group's own. The theorems hold for
    one lr that is constant; groups and schedules are tuned, not proved. weight_decay is the gradient of
    (weight_decay/2)||x||^2, which every rank adds by itself: the theorem is then that of the sum, whose L_- counts.
    After a step the parameters' `grad` is their part of g. Collective: all ranks construct and step it.

    Raises ConfigError for what cannot work, before any work; from `step`: ConfigMismatch on the first where ranks
    differ in settings or in the parameters they start from, NonFiniteError on all ranks where one has a NaN or an
    infinity; parameters and states are then as before.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: Compressor,
        make: Callable[[int, int], Method],
        weight_decay: float,
        seed: int,
        channel: str,
        process_group: Any,
        timeout: float,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value!r}: a finite number, not negative.")
        checked_seed(seed)
        self.seed, self._built = seed, False
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"round": 0, "seed": seed, "world": 0, "method": ""})
        self._params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        _check_parameters(self._params)
        self.d = sum(p.numel() for p in self._params)
        self._link = Link(channel, over=process_group, timeout=timeout)
        try:
            self.method = make(self._link.world, self.d)
            self.method.check(self._link.world, self.d)
            rehearse(compressor, self._link.world, self.d if self.d < 2**16 else 2**16)
        except BaseException:
            self._link.close(wait=False)
            raise
        for group in self.param_groups:
            group["world"], group["method"] = self._link.world, compact(self.method)
        self._server, self._worker = self.method.init(self._read(), self._round())
        self._built, self._met = True, False
        self._show()

    # -------------------------------------------------------------------------------------------- a step
    def _round(self) -> Round:
        return self._link.round(self.param_groups[0]["round"], self.seed)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One round; the loss that the closure returns at the parameters as they are.

        The closure computes this rank's loss and its gradients (`backward`) on one batch, and is called with gradients
        cleared; by MARINA twice, at the new parameters and at those of the step before, on the same batch and with the
        same random numbers of torch's.
        """
        if closure is None:
            raise ConfigError(
                "step() without a closure: the method asks for gradients itself; pass step(closure). A GradScaler's "
                "step has none: use autocast with bfloat16, which needs no scaler."
            )
        if not self._built or self._link.closed:
            raise ConfigError("this optimizer is closed: construct it again.")
        x = self._read()
        if not self._met:
            self._meet(x)
        rnd, method, losses = self._round(), self.method, list[Any]()
        down, server = method.down(self._server, x, rnd)
        code = method.code(rnd)
        try:
            u, worker = method.up(self._worker, down, _Gradient(self, closure, losses), rnd)
        finally:
            self._write(x)
        done = self._link.reduce(code, u[0], rnd)
        worker = method.commit(worker, done.sent, done.rnd)
        g, server = method.estimate(server, done.mean, done.rnd)
        self._server, self._worker = server, worker
        self._descend(g)
        for group in self.param_groups:
            group["round"] += 1
        self._link.steps += 1
        self._show()
        return losses[0]

    def _descend(self, g: Vector) -> None:
        """Two roundings a coordinate, never fused, as `shoal.descents.Step`."""
        parts = iter(g.split([p.numel() for p in self._params]))
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = next(parts).view_as(p).to(p.device, copy=True)
                slope = p.grad if group["weight_decay"] == 0 else p.grad + group["weight_decay"] * p
                p.copy_(p - group["lr"] * slope)

    def _meet(self, x: Vector) -> None:
        """Before the first step, and the first after a state was loaded: do all ranks start from the same?"""
        facts = {k: self.param_groups[0][k] for k in KEPT}
        shapes = [tuple(p.shape) for p in self._params]
        self._link.meet(
            {"kind": "optim", **facts, "shapes": shapes, "parameters": hashlib.sha256(x.numpy().tobytes()).hexdigest()}
        )
        self._met = True

    def _read(self) -> Vector:
        """The parameters as one vector."""
        return torch.cat([p.detach().reshape(-1).to("cpu") for p in self._params])

    def _write(self, x: Vector) -> None:
        for p, part in zip(self._params, x.split([p.numel() for p in self._params]), strict=True):
            p.copy_(part.view_as(p))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks first."""
        raise ConfigError(
            f"shoal.optim.{type(self).__name__} with a GradScaler: scaled gradients of two points cannot be compared, "
            "and memories would be scaled too. Use autocast with bfloat16, which needs no scaler."
        )

    # -------------------------------------------------------------------------------------------- states
    def _fields(self) -> Iterable[tuple[str, str, Tensor]]:
        """(half, name, value) of the method's states; a value of one row is this rank's own."""
        for half, state in (("server", self._server), ("worker", self._worker)):
            for name, value in state._asdict().items():
                yield half, name, value

    def _key(self, half: str, name: str, value: Tensor) -> str:
        """torch.distributed.checkpoint keeps one copy of equal keys: what is a rank's own says so."""
        return f"rank{self._link.rank}.{name}" if value.ndim == 2 else f"{half}.{name}"

    def _show(self) -> None:
        """`state`, by parameter: views of the vectors that the method keeps."""
        sizes = [p.numel() for p in self._params]
        shown: dict[str, tuple[Tensor, ...]] = {}
        for half, name, value in self._fields():
            shown[self._key(half, name, value)] = value.reshape(-1).split(sizes)
        for i, p in enumerate(self._params):
            self.state[p] = {key: parts[i].view_as(p) for key, parts in shown.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for the state of the same rank of an equal group. Raises ResumeMismatch for any other.

        Load the model's parameters too: the method's states belong to them.
        """
        first = state_dict["param_groups"][0]
        for name in ("seed", "world", "method"):
            if first.get(name) != self.param_groups[0][name]:
                raise ResumeMismatch(
                    f"the state's {name} is {first.get(name)!r}, this optimizer's {self.param_groups[0][name]!r}: "
                    "construct it alike, on as many ranks."
                )
        wanted = {self._key(*field) for field in self._fields()}
        for number, held in state_dict["state"].items():
            if absent := sorted(wanted - held.keys()):
                raise ResumeMismatch(
                    f"parameter {number} has no {', '.join(absent)}: this is another rank's state. Each rank loads "
                    "what it saved."
                )
        super().load_state_dict(state_dict)
        found = {}
        for half, name, value in self._fields():
            key = self._key(half, name, value)
            whole = torch.cat([self.state[p][key].reshape(-1).to("cpu", torch.float32) for p in self._params])
            found[half, name] = whole.reshape(value.shape)
        self._server = self._server._replace(**{n: v for (half, n), v in found.items() if half == "server"})
        self._worker = self._worker._replace(**{n: v for (half, n), v in found.items() if half == "worker"})
        self._met = False
        self._show()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while constructing: all parameters are one vector, with states of its length."""
        if getattr(self, "_built", False):
            raise ConfigError("a parameter group cannot be added later: construct the optimizer with all groups.")
        super().add_param_group(param_group)

    def stats(self) -> Traffic:
        """What this rank has sent and spent; `stats().per_step()` by step."""
        return self._link.traffic()

    def close(self) -> None:
        """Destroy the group of its own, when all ranks have come here; a second call does nothing."""
        self._link.close()


class _Gradient:
    """What the method asks: this rank's gradient at a point, by the user's closure."""

    def __init__(self, optimizer: Clients, closure: Closure, losses: list[Any]) -> None:
        self.optimizer, self.closure, self.losses = optimizer, closure, losses
        self.devices = sorted({p.device.index for p in optimizer._params if p.is_cuda})
        self.random: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        params = self.optimizer._params
        if self.random is None:
            self.random = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self.devices]
        else:  # dropout and the like: the same masks at both points
            torch.set_rng_state(self.random[0])
            for i, state in zip(self.devices, self.random[1], strict=True):
                torch.cuda.set_rng_state(state, i)
        self.optimizer._write(x)
        for p in params:
            p.grad = None
        with torch.enable_grad():
            self.losses.append(self.closure())
        parts = [torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1).to("cpu") for p in params]
        return torch.cat(parts)[None]


def _check_parameters(params: list[Tensor]) -> None:
    wrong = {f"{p.dtype}" for p in params if p.dtype != torch.float32}
    if wrong:
        raise ConfigError(
            f"parameters of {', '.join(sorted(wrong))}: messages are of float32. Keep float32 parameters, use autocast."
        )


def _parsed(compressor: str | Compressor) -> Any:
    return parse(compressor, known_names(), Compressor) if isinstance(compressor, str) else compressor


class Marina(Clients):
    """VR-MARINA, online: compressed differences of a minibatch's gradients, now and then gradients themselves.

    With probability p, and in the first step: g = mean grad f_i(x; batch); else g += mean C_i(grad f_i(x; batch) -
    grad f_i(x-; batch)), x- being the parameters of the step before: two calls of the closure, on one batch.

    `full` says before a step whether it is one with probability p: theory wants a larger batch there, whose noise
    stays in g until the next. p=None: the share of bits |C| / (32 d), as in the paper. Any compressor with an AB
    inequality.

    References: arXiv:2102.07845, Algorithm 3; docs/derivations/sampling.md.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: str | Compressor = "Correlated()",
        p: float | None = None,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        channel: str = "auto",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        code = _parsed(compressor)
        method = methods.VRMarina(code, p, batch=1)  # how many samples there are is the closure's business

        def make(n: int, d: int) -> Method:
            return replace(method, p=min(1.0, code.predicted_bits(n, d) / (32.0 * d))) if p is None else method

        super().__init__(params, lr, code, make, weight_decay, seed, channel, process_group, timeout)

    @property
    def full(self) -> bool:
        """Whether the next step is one with gradients instead of differences."""
        assert isinstance(self.method, methods.VRMarina)
        return self.method._full(self._round())


class Diana(Clients):
    """DIANA on minibatches: compressed differences to shifts that learn the gradients.

    m_i = Q_i(grad f_i(x; batch) - h_i); g = h + mean m_i; h_i += shift m_i; h += shift mean m_i. One call of the
    closure. Any compressor with omega; shift=None: 1/(1+omega).

    References: arXiv:1901.09269; docs/derivations/methods.md (full gradients: with minibatches their noise stays).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: str | Compressor = "QSGD(7)",
        shift: float | None = None,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        channel: str = "auto",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        code = _parsed(compressor)
        method = methods.Diana(code, shift)
        super().__init__(
            params, lr, code, lambda n, d: method, weight_decay, seed, channel, process_group, timeout
        )  # fmt: skip


class EF21(Clients):
    """EF21 on minibatches: error feedback for biased compressors.

    g_i += C(grad f_i(x; batch) - g_i); g = mean g_i. One call of the closure. Any compressor with alpha.

    References: arXiv:2106.05203; docs/derivations/methods.md (full gradients: with minibatches their noise stays).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: str | Compressor = "TopK(0.01)",
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        channel: str = "auto",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        code = _parsed(compressor)
        method = methods.EF21(code)
        super().__init__(
            params, lr, code, lambda n, d: method, weight_decay, seed, channel, process_group, timeout
        )  # fmt: skip
