"""Modules as problems: the flat vector, one client and many, dropout, batch normalization, constants."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal import simulate
from shoal.errors import ConfigError, DataError
from shoal.messages import Round
from shoal.problems import Module


def cross(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def squares(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().sum(1)


def samples(sizes=(5, 9, 5, 7), shape=(6,), classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(k, *shape, generator=g), torch.randint(classes, (k,), generator=g)) for k in sizes]


def net(*middle: nn.Module, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *middle, nn.Linear(width, 3))


def conv() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


CASES = {
    "dense": lambda: Module(net(), samples(), cross),
    "batch statistics": lambda: Module(conv(), samples(shape=(1, 6, 6)), cross),
    "frozen statistics": lambda: Module(net(nn.BatchNorm1d(8).eval()), samples(), cross),
    "dropout": lambda: Module(net(nn.Dropout(0.4)), samples(), cross),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def reference(problem: Module, x: torch.Tensor, i: int) -> tuple[float, torch.Tensor]:
    """f_i and its gradient by plain backpropagation through the module's own parameters."""
    nn.utils.vector_to_parameters(x.clone(), problem.module.parameters())
    problem.module.zero_grad()
    inputs, targets = problem._data[i]
    value = problem.loss(problem.module(inputs), targets).sum() * problem.n / problem.total_rows
    value.backward()
    return float(value.detach()), torch.cat([p.grad.reshape(-1) for p in problem.module.parameters()])


@every
def test_one_many_and_plain_backpropagation_agree(case):
    problem = case()
    x, ids = problem.start(), torch.tensor([3, 0, 2, 1])
    values, rows = problem.evaluate(x, ids)
    for found, gradients in (problem.together(x, ids), problem.together(x, ids, chunk=1)):
        assert torch.allclose(found, values, rtol=1e-5)  # float32: a few hundred roundings
        assert torch.allclose(gradients, rows, rtol=1e-4, atol=1e-6)
    for k, i in enumerate(ids.tolist()):
        value, gradient = reference(problem, x, i)
        assert float(values[k]) == pytest.approx(value, rel=1e-5)
        assert torch.allclose(rows[k], gradient, rtol=1e-4, atol=1e-6)


@every
def test_rows_are_independent_bit_for_bit(case):
    problem = case()
    x, ids, before = problem.start(), torch.arange(4), torch.get_num_threads()
    rnd = Round.full(3, 1, 4)
    values, rows = problem.evaluate(x, ids)
    seen = problem.grad(x, rnd)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for i in range(4):
                one = problem.only(ids[i : i + 1])
                assert torch.equal(one.evaluate(x, ids[i : i + 1])[0], values[i : i + 1])
                assert torch.equal(one.evaluate(x, ids[i : i + 1])[1], rows[i : i + 1])
                assert torch.equal(one.grad(x, rnd.rows(slice(i, i + 1))), seen[i : i + 1])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    runs = [simulate(problem, "EF21(TopK(5))", rounds=5, step=0.1, chunk=c) for c in (None, 3)]
    assert runs[0].sha256 == runs[1].sha256
    assert runs[0].rows[-1].value < runs[0].rows[0].value


def test_dropout_is_drawn_from_the_round():
    problem, plain = CASES["dropout"](), CASES["dense"]()
    x, rnd = problem.start(), Round.full(0, 0, 4)
    assert not problem.full_batch
    assert torch.equal(problem.evaluate(x, rnd.clients)[1], plain.evaluate(x, rnd.clients)[1])  # f: dropout off
    first = problem.grad(x, rnd)
    assert torch.equal(problem.grad(x, rnd), first)
    assert not torch.equal(problem.grad(x, Round.full(1, 0, 4)), first)
    layer = problem.module[2]
    layer.round = rnd.rows(slice(0, 1))
    ones = torch.ones(100, 400)
    dropped = layer(ones)
    assert set(dropped.unique().tolist()) == {0.0, (torch.ones(1) / 0.6).item()}
    # 40000 coins with p = 0.4: 0.01 is 4 standard deviations (false alarm 6e-5, the seed is fixed)
    assert abs(float((dropped == 0).float().mean()) - 0.4) < 0.01
    assert not torch.equal(layer(ones), dropped)  # a second use in one pass has its own mask


def test_constants_against_a_dense_hessian():
    """A linear model with squared errors: the Hessians are constant and known."""
    torch.manual_seed(0)
    data = [(a, torch.zeros(len(a), 2)) for a, _ in samples()]
    problem = Module(nn.Linear(6, 2, bias=False), data, squares)
    H = torch.stack([2 * 4 / 26 * (a.double().T @ a.double()) for a, _ in data])
    norm = lambda M: float(torch.linalg.matrix_norm(M, 2))  # noqa: E731
    mean, square = H.mean(0), (H @ H).mean(0)
    L = problem.smoothness()
    assert L.minus == pytest.approx(norm(mean), rel=1e-5)
    assert L.plus == pytest.approx(norm(square) ** 0.5, rel=1e-5)
    assert L.pm == pytest.approx(norm(square - mean @ mean) ** 0.5, rel=1e-5)
    assert {L.facts()[name][1] for name in ("minus", "plus", "pm", "tilde", "max")} == {"estimate"}
    with pytest.raises(ConfigError, match="before only"):
        Module(nn.Linear(6, 2), data, squares).only(torch.tensor([1])).smoothness()


class Noisy(nn.Module):
    """Dropout that no round knows of."""

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return F.dropout(u, 0.5, training=True)


@pytest.mark.parametrize(
    ("module", "data", "loss", "error", "word"),
    [
        (net(nn.BatchNorm1d(8)), samples(), cross, ConfigError, r"call eval\(\)"),
        (net(Noisy()), samples(), cross, ConfigError, "two gradients at one x"),
        (net(nn.AlphaDropout(0.1)), samples(), cross, ConfigError, "only nn.Dropout"),
        (net().double(), samples(), cross, ConfigError, "float32 parameters"),
        (nn.Flatten(), samples(), cross, ConfigError, "none"),
        (net(), samples(), F.cross_entropy, ConfigError, 'reduction="none"'),
        (net(), [], cross, ConfigError, "no client"),
        (net(), samples(sizes=(3, 0)), cross, DataError, "client 1"),
        (net(), [(torch.full((1, 6), torch.inf), torch.zeros(1, dtype=torch.int64))], cross, DataError, "infinite"),
    ],
)
def test_modules_refuse_what_is_no_function_of_x(module, data, loss, error, word):
    with pytest.raises(error, match=word):
        Module(module, data, loss)
