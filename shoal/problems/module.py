"""Any `torch.nn.Module` and data as n clients' losses over one flat vector.

    f_i(x) = (n / N) sum over client i's N_i samples of loss(module_x(input), target),

x being the module's parameters that ask for gradients, flattened in the order of `named_parameters`. A run computes
each client by itself on one thread (`evaluate`, `grad`), which is what gives a row the same bits whatever rows stand
beside it; `together` computes many at once with torch.func and promises no bits.

Dropout: f is the loss with dropout off. What a method sees (`grad`) has dropout on, its masks drawn from the round, so
that one round has the same masks at two points, and any process draws them alike.
Batch normalization: with stored statistics it must be in evaluation mode, where they are constants; or it keeps none
(track_running_stats=False) and normalizes by the client's own data, all of which are one batch. Statistics that move
while training belong to no function of x: they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap

from shoal import rng
from shoal.core import Problem
from shoal.errors import ConfigError, DataError
from shoal.messages import Round, Rows, Vector
from shoal.problems import hosting
from shoal.problems.curvature import estimated
from shoal.theory import Smoothness

Samples = tuple[Tensor, Tensor]  # inputs and targets, one a row
Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> one loss a sample
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
RECURRENT = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Drawn(nn.Module):
    """In place of `nn.Dropout(p)`: the identity, or a mask out of the round that is under way."""

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.round: Round | None = None
        self.calls = 0

    def forward(self, u: Tensor) -> Tensor:
        """u / (1 - p) where the round's uniform numbers are at least p, else 0."""
        if self.round is None or self.p == 0.0:
            return u
        draw = self.round.fork(f"{self.layer}.{self.calls}").draw("Module.dropout")
        self.calls += 1  # a layer that is used twice has two masks
        kept = rng.uniform(draw, u.numel())[0].reshape(u.shape) >= self.p
        return torch.where(kept, u / (1.0 - self.p), 0.0) if self.p < 1.0 else torch.zeros_like(u)


class Module(Problem):
    """A torch module's loss on each client's data: data[i] = (inputs, targets) of client i.

    `loss` gives one number a sample, such as functional.cross_entropy(..., reduction="none"). The module is copied; x^0
    is its parameters. Constants are estimates at x^0 in float64. Raises ConfigError for parameters that are not float32
    or a module whose randomness or statistics would not be a function of x, and DataError for data that do not fit.

    References: docs/derivations/curvature.md (constants).
    """

    def __init__(self, module: nn.Module, data: Sequence[Samples], loss: Loss, name: str = "module") -> None:
        _check_data(data)
        self.name, self.n, self.loss = name, len(data), loss
        self.module = _without_dropout(deepcopy(module))
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
        with one_thread(), torch.enable_grad():
            for k, slot in enumerate(slots.tolist()):
                z = x.detach().clone().requires_grad_()
                value = self._value(z, *self._data[slot])
                (rows[k],) = torch.autograd.grad(value, z)
                values[k] = value.detach().double()
        return values, rows

    def grad(self, x: Vector, rnd: Round, batch: int | None = None) -> Rows:
        """As `evaluate`, with this round's dropout. f_i counts as one sample: a batch of any size is all of it."""
        if self.full_batch:
            return self.evaluate(x, rnd.clients)[1]
        layers = [part for part in self.module.modules() if isinstance(part, Drawn)]
        rows = []
        try:
            for k in range(len(rnd.clients)):
                for layer in layers:
                    layer.round, layer.calls = rnd.rows(slice(k, k + 1)), 0
                rows.append(self.evaluate(x, rnd.clients[k : k + 1])[1])
        finally:
            for layer in layers:
                layer.round = None
        return torch.cat(rows) if rows else torch.empty(0, self.d)

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
        """(m, d) float64: the Hessians of these f_i at x, times v (m, d) or v (d,); computed in float64."""
        slots, z = hosting.slots(self._table, clients), x.detach().double()
        rows = torch.empty(len(slots), self.d, dtype=torch.float64)
        module = deepcopy(self.module).double()
        with one_thread():
            for k, slot in enumerate(slots.tolist()):
                inputs, targets = (t.double() if t.is_floating_point() else t for t in self._data[slot])

                def slope(w: Tensor, a: Tensor = inputs, y: Tensor = targets) -> Tensor:
                    return torch.func.grad(self._value)(w, a, y, module)

                rows[k] = vjp(slope, z)[1](v if v.ndim == 1 else v[k])[0]  # a Hessian is symmetric
        return rows

    def smoothness(self) -> Smoothness:
        """Estimates at x^0 (`shoal.problems.curvature.estimated`), computed once; before `only`, if at all."""
        if self._smoothness is None:
            if len(self._data) < self.n:
                raise ConfigError(
                    f"smoothness of {len(self._data)} of n={self.n} clients: it needs every client's rows; "
                    "call smoothness() on the whole problem before only(...)."
                )
            self._smoothness = estimated(self, [self._start])
        return self._smoothness

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

    def _value(self, x: Tensor, inputs: Tensor, targets: Tensor, module: nn.Module | None = None) -> Tensor:
        """(n / N) sum of the losses."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), x.split(sizes), strict=True)
        outputs = functional_call(module or self.module, {k: p.reshape(s) for (k, s), p in parts}, (inputs,))
        each = self.loss(outputs, targets)
        if each.shape != (len(inputs),):
            raise ConfigError(
                f"the loss has shape {tuple(each.shape)} for {len(inputs)} samples: one number a sample; "
                'for torch\'s losses that is reduction="none".'
            )
        return each.sum() * (self.n / self.total_rows)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums inside torch are split by threads, so that their number would be part of the result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_dropout(module: nn.Module) -> nn.Module:
    """The module with `Drawn` in place of each active `nn.Dropout`; refuses what draws numbers of its own."""
    names = [(name, part) for name, part in module.named_modules() if part.training]
    for name, part in names:
        if isinstance(part, RECURRENT) and getattr(part, "dropout", None):
            who = name or type(part).__name__
            raise ConfigError(f"{who}: its dropout draws numbers of its own; set it to 0 or call eval().")
        if isinstance(part, DROPOUTS) and type(part) is not nn.Dropout:
            raise ConfigError(f"{name}: of torch's dropouts only nn.Dropout is drawn from the round; or call eval().")
    for name, part in names:
        if type(part) is nn.Dropout:
            drawn = Drawn(part.p, name)
            if not name:
                return drawn
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, drawn)
    return module


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
