"""Any `torch.nn.Module` and data as n clients' losses over one flat vector.

    f_i(x) = (n / N) sum over client i's N_i samples of loss(module_x(input), target),

x being the module's parameters that ask for gradients, flattened in the order of `named_parameters`. A run computes
each client by itself on one thread (`evaluate`, `grad`), which is what gives a row the same bits whatever rows stand
beside it; `together` computes many at once with torch.func and promises no bits.

A batch (`grad(..., batch)`) is so many of the client's samples, drawn from the round without replacement.
Dropout: f is the loss with dropout off. What a method sees (`grad`) has dropout on, its masks drawn from the round, so
that one round has the same masks at two points, and any process draws them alike.
Batch normalization: with stored statistics it must be in evaluation mode, where they are constants; or it keeps none
(track_running_stats=False) and normalizes by the client's own data, all of which are one batch: f_i is then one sample,
as it is no mean of losses of samples by themselves. Statistics that move while training belong to no function of x:
they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from shoal import rng
from shoal.core import Problem
from shoal.errors import ConfigError, DataError
from shoal.messages import Round, Rows, Vector
from shoal.problems import hosting
from shoal.problems.curvature import Look, estimated, of_samples
from shoal.problems.dropout import Drawn, without_dropout
from shoal.theory import ONE, ZERO, Constant, Smoothness

Samples = tuple[Tensor, Tensor]  # inputs and targets, one a row
Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> one loss a sample


class Module(Problem):
    """A torch module's loss on each client's data: data[i] = (inputs, targets) of client i.

    `loss` gives one number a sample, such as functional.cross_entropy(..., reduction="none"). The module is copied; x^0
    is its parameters. Constants are estimates at x^0, from what `look` says. Raises ConfigError for parameters that are
    not float32 or a module whose randomness or statistics would not be a function of x, and DataError for data that do
    not fit.

    References: docs/derivations/curvature.md (constants).
    """

    def __init__(
        self,
        module: nn.Module,
        data: Sequence[Samples],
        loss: Loss,
        name: str = "module",
        look: Look = Look(),  # noqa: B008 (a tuple)
    ) -> None:
        _check_data(data)
        self.name, self.n, self.loss, self.look = name, len(data), loss, look
        self.module = without_dropout(deepcopy(module))
        _check_module(self.module)
        held = {k: p.detach().contiguous() for k, p in self.module.named_parameters() if p.requires_grad}
        wrong = [k for k, p in held.items() if p.dtype != torch.float32 or p.device.type != "cpu"]
        if not held or wrong:
            raise ConfigError(f"parameters {wrong[:3] or 'none'}: x is made of float32 parameters on the CPU.")
        self.shapes = {k: p.shape for k, p in held.items()}
        self.d = sum(p.numel() for p in held.values())
        self._start = torch.cat([p.reshape(-1) for p in held.values()])
        self.total_rows = sum(len(inputs) for inputs, _ in data)
        self.full_batch = not any(isinstance(part, Drawn) and part.p > 0 for part in self.module.modules())
        self._hold(np.arange(self.n), list(data))
        self._smoothness: Smoothness | None = None
        # What does not fit together is said here, and so is a loss that is not the same twice.
        once, again = (self.evaluate(self._start, torch.tensor([0]))[1] for _ in range(2))
        if not torch.equal(once, again):
            raise ConfigError(
                "the module gives two gradients at one x: it draws numbers of its own or remembers; use nn.Dropout for "
                "dropout, or call eval()."
            )
        self.mixes = self._mixes()

    def __repr__(self) -> str:
        return f"Module({self.name!r}, n={self.n}, d={self.d}, rows={self.total_rows})"

    def start(self) -> Vector:
        """The parameters that the module came with."""
        return self._start.clone()

    def evaluate(self, x: Vector, clients: Tensor) -> tuple[Tensor, Rows]:
        """f_i(x) and grad f_i(x), dropout off; one client after the other, on one thread."""
        slots = hosting.slots(self._table, clients)
        hosting.point(x, self.d)
        values, rows = torch.empty(len(slots), dtype=torch.float64), torch.empty(len(slots), self.d)
        for k, slot in enumerate(slots.tolist()):
            values[k], rows[k] = self._slope(x, *self._data[slot])
        return values, rows

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        """As `evaluate`, with this round's dropout, and over `batch` of each client's samples: f_ij = n N_i/N loss_j.

        Where samples mix (batch statistics) f_i counts as one sample: a batch of any size is all of it.
        """
        if self.full_batch and (batch is None or self.mixes):
            return self.evaluate(x, rnd.clients)[1]
        slots = hosting.slots(self._table, rnd.clients)
        hosting.point(x, self.d)
        layers = [part for part in self.module.modules() if isinstance(part, Drawn)]
        rows = torch.empty(len(slots), self.d)
        try:
            for k, slot in enumerate(slots.tolist()):
                own = rnd.rows(slice(k, k + 1))
                for layer in layers:
                    layer.round, layer.calls = own, 0
                rows[k] = self._slope(x, *self._drawn(slot, own, batch))[1]
        finally:
            for layer in layers:
                layer.round = None
        return rows

    def _drawn(self, slot: int, rnd: Round, batch: int | None) -> tuple[Tensor, Tensor, float]:
        """The samples of the one client of this round, and N_i over their number."""
        inputs, targets = self._data[slot]
        if batch is None or batch >= len(inputs) or self.mixes:
            return inputs, targets, 1.0
        chosen = rng.support(rnd.draw("Module.batch", rnd.clients), len(inputs), batch)[0]
        return inputs[chosen], targets[chosen], len(inputs) / batch

    def _slope(self, x: Vector, inputs: Tensor, targets: Tensor, gain: float = 1.0) -> tuple[Tensor, Vector]:
        """`_value` and its gradient, on one thread."""
        with one_thread(), torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            value = self._value(z, inputs, targets, gain=gain)
            (slope,) = torch.autograd.grad(value, z)
        return value.detach().double(), slope

    def together(self, x: Vector, clients: Tensor, chunk: int = 64) -> tuple[Tensor, Rows]:
        """What `evaluate` returns, up to rounding: clients with equally many samples at once, `chunk` at a time.

        For exploring, not for runs: in a batched product a row's last bits may depend on the rows beside it.
        """
        slots = hosting.slots(self._table, clients)
        values, rows = torch.empty(len(slots), dtype=torch.float64), torch.empty(len(slots), self.d)
        alike: dict[int, list[int]] = {}
        for k, slot in enumerate(slots.tolist()):
            alike.setdefault(len(self._data[slot][0]), []).append(k)
        many = vmap(grad_and_value(self._value), in_dims=(None, 0, 0))
        for places in alike.values():
            for part in torch.tensor(places).split(chunk):
                inputs, targets = zip(*(self._data[int(slots[k])] for k in part), strict=True)
                rows[part], found = many(x.detach(), torch.stack(inputs), torch.stack(targets))
                values[part] = found.double()
        return values, rows

    def products(self, x: Vector, v: Tensor, clients: Tensor) -> Tensor:
        """(m, d) float64: the Hessians of these f_i at x, times v (m, d) or v (d,)."""
        return self._curved(x, v, ((*self._data[slot], 1.0) for slot in hosting.slots(self._table, clients)))

    def sample_products(self, x: Vector, v: Tensor, client: int, samples: Tensor) -> Tensor:
        """(k, d) float64: the Hessians at x of f_ij = n N_i/N loss_j of these samples, times v (k, d) or v (d,)."""
        return self._curved(x, v, self._single(client, samples))

    def sample_gradients(self, x: Vector, client: int, samples: Tensor) -> Tensor:
        """(k, d) float64: grad f_ij(x) of these samples."""
        return torch.stack([self._slope(x, *part)[1].double() for part in self._single(client, samples)])

    def _single(self, client: int, samples: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        (slot,) = hosting.slots(self._table, torch.tensor([client]))
        inputs, targets = self._data[slot]
        return ((inputs[j : j + 1], targets[j : j + 1], float(len(inputs))) for j in samples.tolist())

    def _curved(self, x: Vector, v: Tensor, parts: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
        """The Hessian of each part's `_value`, times v or its row of v."""
        ways = (v if v.ndim == 1 else v[k] for k in count())
        if not self.look.precise:
            rows = [self._difference(x, way, part) for part, way in zip(parts, ways, strict=False)]
            return torch.stack(rows) if rows else torch.empty(0, self.d, dtype=torch.float64)
        rows, z, module = [], x.detach().double(), deepcopy(self.module).double()
        with one_thread():
            for (inputs, targets, gain), way in zip(parts, ways, strict=False):
                a, y = (t.double() if t.is_floating_point() else t for t in (inputs, targets))

                def slope(w: Tensor, a: Tensor = a, y: Tensor = y, gain: float = gain) -> Tensor:
                    return torch.func.grad(self._value)(w, a, y, module, gain)

                rows.append(vjp(slope, z)[1](way)[0])  # a Hessian is symmetric
        return torch.stack(rows) if rows else torch.empty(0, self.d, dtype=torch.float64)

    def _difference(self, x: Vector, way: Tensor, part: tuple[Tensor, Tensor, float]) -> Tensor:
        """(grad(x + t v) - grad(x - t v)) / (2 t), with t ||v|| small beside x and large beside float32's rounding."""
        length = float(way.norm())
        if length == 0.0:
            return torch.zeros(self.d, dtype=torch.float64)
        t = 1e-4 * (1.0 + float(x.norm())) / length
        ahead, behind = (self._slope((x.double() + s * way).float(), *part)[1] for s in (t, -t))
        return (ahead.double() - behind.double()) / (2.0 * t)

    def smoothness(self) -> Smoothness:
        """Estimates at x^0 (`shoal.problems.curvature.estimated`), computed once; before `only`, if at all."""
        if self._smoothness is None:
            if len(self._data) < self.n:
                raise ConfigError(
                    f"smoothness of {len(self._data)} of n={self.n} clients: it needs every client's rows; "
                    "call smoothness() on the whole problem before only(...)."
                )
            few = self.look.at(self.n, self.look.clients)
            known = estimated(self, [self._start], self.look.rounds, few)
            samples, most, sample, noise = self._of_samples()
            self._smoothness = replace(known, samples=samples, most=most, sample=sample, noise=noise)
        return self._smoothness

    def _of_samples(self) -> tuple[Constant, Constant, Constant, Constant]:
        sizes = [1 if self.mixes else len(inputs) for inputs, _ in self._data]
        if max(sizes) == 1:
            return ONE, ONE, ZERO, ZERO
        half = self.look._replace(rounds=max(1, self.look.rounds // 2))
        sample, noise = of_samples(self, self._start, sizes, half)
        return Constant(sum(sizes) / self.n, "exact"), Constant(float(max(sizes)), "exact"), sample, noise

    def _mixes(self) -> bool:
        """Whether a sample's loss depends on the samples beside it, so that f_i is no mean of losses of samples."""
        if any(isinstance(part, _BatchNorm) and part.running_mean is None for part in self.module.modules()):
            return True
        inputs, targets = max(self._data, key=lambda data: len(data[0]))
        with one_thread(), torch.no_grad():
            whole = float(self._value(self._start, inputs[:2], targets[:2]))
            try:
                alone = [
                    float(self._value(self._start, *one))
                    for one in zip(inputs[:2].split(1), targets[:2].split(1), strict=True)
                ]
            except (ConfigError, ValueError, RuntimeError):  # it cannot take a sample by itself
                return True
        return not abs(whole - sum(alone)) <= 1e-3 * sum(map(abs, alone)) + 1e-6  # rounding apart

    def only(self, clients: Tensor) -> Module:
        """The same f_i under the same ids, holding just these clients' data (and the constants, if already known)."""
        slots = np.unique(hosting.slots(self._table, clients))
        other = copy(self)
        other.module = deepcopy(self.module)  # it holds the round under way
        other._hold(self.clients[slots], [self._data[s] for s in slots])
        return other

    def _hold(self, clients: Any, data: list[Samples]) -> None:
        self.clients, self._data = clients, data
        self._table = hosting.slot_table(self.n, clients)

    def _value(
        self, x: Tensor, inputs: Tensor, targets: Tensor, module: nn.Module | None = None, gain: float = 1.0
    ) -> Tensor:
        """gain (n / N) sum of the losses."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), x.split(sizes), strict=True)
        outputs = functional_call(module or self.module, {k: p.reshape(s) for (k, s), p in parts}, (inputs,))
        each = self.loss(outputs, targets)
        if each.shape != (len(inputs),):
            raise ConfigError(
                f"the loss has shape {tuple(each.shape)} for {len(inputs)} samples: one number a sample; "
                'for torch\'s losses that is reduction="none".'
            )
        return each.sum() * (gain * self.n / self.total_rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums inside torch are split by threads, so that their number would be part of the result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_module(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if getattr(part, "track_running_stats", False) and part.training:
            raise ConfigError(
                f"{name or type(part).__name__}: running statistics move while training and are no function of x; "
                "call eval() on it (they become constants), "
                "or give it track_running_stats=False (the client's data are one batch)."
            )


def _check_data(data: Sequence[Samples]) -> None:
    if not len(data):
        raise ConfigError("data of no client: give a list with (inputs, targets) for each.")
    for i, (inputs, targets) in enumerate(data):
        if len(inputs) != len(targets) or not len(inputs):
            raise DataError(f"client {i}: {len(inputs)} inputs and {len(targets)} targets; as many of both, and not 0.")
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise DataError(f"client {i}: an input is NaN or infinite; every value must be finite.")
