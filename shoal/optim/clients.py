"""What all optimizers of shoal's share: a method on the parameters as one vector, one client a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from shoal.core import Compressor, Method
from shoal.errors import ConfigError, ConfigMismatch
from shoal.experiments.expressions import compact
from shoal.experiments.folder import versions
from shoal.messages import Round, Rows, Vector
from shoal.optim.checks import RATES, check_groups, check_parameters, check_rates, check_values
from shoal.rng import checked_seed
from shoal.runtimes.reduce import Link, Reduced, Traffic, rehearse, world_of
from shoal.wire import digest

Closure = Callable[[], Any]
KEPT = ("round", "seed", "world", "method")  # of every parameter group: whose state this is


class Clients(torch.optim.Optimizer):
    """x+ = x - lr (g + weight_decay x), g being a method's estimate of grad f, f the mean of the ranks' losses.

    All parameters that require a gradient when it is constructed are one vector to the compressor; the others are never
    touched. `lr` and `weight_decay` are each group's own. The theorems hold for one lr that is constant; groups and
    schedules are tuned, not proved. weight_decay is the gradient of (weight_decay/2)||x||^2, which every rank adds by
    itself: the theorem is then that of the sum, whose L_- counts. After a step the parameters' `grad` is their part of
    g. Collective: all ranks construct and step it. A context manager: leaving it closes it.

    Raises ConfigError for what cannot work, before any work. From `step`, on all ranks: ConfigMismatch where they
    differ in settings or in the parameters they start from, and later in lr or weight_decay; NonFiniteError where one
    has a NaN or an infinity; parameters and states are then as before.
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
        check_rates({"lr": lr, "weight_decay": weight_decay}, "")
        self.seed, self._built = checked_seed(seed), False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._wanted = self._flags()
        self._groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        self._params: list[Tensor] = [p for group in self._groups for p in group]
        check_parameters(self._params)
        self.d, n = sum(p.numel() for p in self._params), world_of(process_group)
        if n < 1:
            raise ConfigError("this rank is not in process_group: construct the optimizer on the ranks that are.")
        # Before there is a link: ranks that are wrong alike all say why, and none that another has left.
        compressor.check(n, self.d)
        self.method = make(n, self.d)
        self.method.check(n, self.d)
        rehearse(compressor, n, self.d if self.d < 2**16 else 2**16)
        for group in self.param_groups:
            group |= {"round": 0, "seed": seed, "world": n, "method": compact(self.method)}
        self._link, self._channel = Link(channel, over=process_group, timeout=timeout), channel
        self._server, self._worker = self.method.init(self._read(), self._round())
        self._agreed: bytes | None = None  # the digest of what the ranks compared when they met
        self._failed: BaseException | None = None  # of this rank alone: what the others are told
        self._built = True
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
        if self._wanted != self._flags():
            raise ConfigError("requires_grad of a parameter has changed: construct the optimizer again.")
        x = self._read()
        if self._agreed is None:
            self._meet(x)
        self._failed, rnd, method, losses = None, self._round(), self.method, list[Any]()
        down, server = method.down(self._server, x, rnd)
        code = method.code(rnd)
        try:
            u, worker = method.up(self._worker, down, _Gradient(self, closure, losses), rnd)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            self._write(x)
        done = self._reduce(code, u[0], rnd)
        worker = method.commit(worker, done.sent, done.rnd)
        g, server = method.estimate(server, done.mean, done.rnd)
        self._server, self._worker = server, worker
        self._descend(g)
        for group in self.param_groups:
            group["round"] += 1
        self._link.steps += 1
        self._show()
        return losses[0]

    def _reduce(self, code: Compressor, u: Vector, rnd: Round) -> Reduced:
        """The mean. In front of every exchange stands the digest of lr and weight_decay as they are now: ranks whose
        schedules have drifted apart raise ConfigMismatch before a parameter moves."""
        peers, agreed = self._link.peers, self._agreed
        assert agreed is not None
        peers.digest = digest({"agreed": agreed.hex(), "groups": self._rates()})
        try:
            return self._link.reduce(code, u, rnd)
        except ConfigMismatch:  # on every rank: so all may ask in words who has what
            peers.digest = agreed
            if not peers.lines.closed:
                peers.handshake({"kind": "optim", "groups": self._rates()})
            raise
        finally:
            peers.digest = agreed

    def _flags(self) -> list[bool]:
        return [p.requires_grad for group in self.param_groups for p in group["params"]]

    def _rates(self) -> dict[str, dict[str, float]]:
        """Every group's lr and weight_decay."""
        return {str(i): {k: float(group[k]) for k in RATES} for i, group in enumerate(self.param_groups)}

    def _descend(self, g: Vector) -> None:
        """Two roundings a coordinate, never fused, as `shoal.descents.Step`."""
        parts = iter(g.split([p.numel() for p in self._params]))
        for group, params in zip(self.param_groups, self._groups, strict=True):
            for p in params:
                p.grad = next(parts).view_as(p).to(p.device, copy=True)
                slope = p.grad if group["weight_decay"] == 0 else p.grad + float(group["weight_decay"]) * p
                p.copy_(p - float(group["lr"]) * slope)

    def _meet(self, x: Vector) -> None:
        """Before the first step, and the first after a state was loaded: do all ranks start from the same?"""
        groups: dict[str, dict[str, Any]] = {k: dict(v) for k, v in self._rates().items()}
        for held, params in zip(groups.values(), self._groups, strict=True):
            held["shapes"] = [tuple(p.shape) for p in params]
        self._link.meet({
            "kind": "optim", **{k: self.param_groups[0][k] for k in KEPT}, "groups": groups, "channel": self._channel,
            "parameters": hashlib.sha256(x.numpy().tobytes()).hexdigest(), "versions": versions(),
        })  # fmt: skip
        self._agreed = self._link.peers.digest

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
        """As torch's, for the state of the same rank of an equal group. Raises ResumeMismatch for any other, and has
        changed nothing then.

        Load the model's parameters too: the method's states belong to them.
        """
        check_groups(state_dict, self.param_groups)
        keys = [self._key(*field) for field in self._fields()]
        check_values(state_dict, self.param_groups, self._wanted, keys)
        super().load_state_dict(state_dict)
        found = {}
        for half, name, value in self._fields():
            key = self._key(half, name, value)
            whole = torch.cat([self.state[p][key].reshape(-1).to("cpu", torch.float32) for p in self._params])
            found[half, name] = whole.reshape(value.shape)
        self._server = self._server._replace(**{n: v for (half, n), v in found.items() if half == "server"})
        self._worker = self._worker._replace(**{n: v for (half, n), v in found.items() if half == "worker"})
        self._agreed = None
        self._show()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while constructing: all parameters are one vector, with states of its length."""
        if getattr(self, "_built", False):
            raise ConfigError("a parameter group cannot be added later: construct the optimizer with all groups.")
        if isinstance(param_group, dict):
            check_rates(self.defaults | param_group, f"parameter group {len(self.param_groups)}: ")
        super().add_param_group(param_group)

    def stats(self) -> Traffic:
        """What this rank has sent and spent; `stats().per_step()` by step."""
        return self._link.traffic()

    def close(self) -> None:
        """Destroy the group of its own, when all ranks have come here; a second call does nothing.

        Where the last `step` failed on this rank alone, as by its closure, the others are told why and not waited for.
        """
        self._link.close(wait=self._failed is None, error=self._failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._failed = self._failed or error
        self.close()


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
