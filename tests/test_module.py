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
from shoal.problems.curvature import Look


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


# ------------------------------------------------------------------------------------------------ minibatches
def drawn_rows(problem: Module, rnd: Round, i: int, batch: int) -> list[int]:
    """Which of client i's samples a batch takes, found by their inputs."""
    inputs, _, gain = problem._drawn(i, rnd.rows(torch.tensor([i])), batch)
    assert gain == len(problem._data[i][0]) / len(inputs)
    return [int((problem._data[i][0] == one).flatten(1).all(1).nonzero()[0, 0]) for one in inputs]


def test_a_batch_is_the_mean_of_its_samples_and_a_function_of_round_and_client():
    problem, rnd = CASES["frozen statistics"](), Round.full(4, 9, 4)
    x, whole = problem.start(), CASES["frozen statistics"]().grad(problem.start(), rnd, 3)
    chosen = [drawn_rows(problem, rnd, i, 3) for i in range(4)]
    for i, places in enumerate(chosen):
        assert len(set(places)) == 3, "drawn without replacement"
        mean = problem.sample_gradients(x, i, torch.tensor(places)).mean(0)
        assert torch.allclose(whole[i].double(), mean, rtol=1e-4, atol=1e-6)  # float32: some hundred roundings
    for ids in ([1, 3], [2]):  # other hosts, other slots, another point: the same samples
        some = torch.tensor(ids)
        cohort = Round(4, 9, 4, some, torch.arange(len(ids)), len(ids))
        assert torch.equal(problem.only(some).grad(x, cohort, 3), whole[some])
    for other in (Round.full(5, 9, 4), Round.full(4, 8, 4)):
        assert [drawn_rows(problem, other, i, 3) for i in range(4)] != chosen
    for batch in (9, 100):
        assert torch.equal(problem.grad(x, rnd, batch), problem.evaluate(x, rnd.clients)[1])


def test_batches_are_unbiased():
    """Every pair of 5 samples equally often: 400 rounds, within six standard errors (2e-9 each, 7 numbers)."""
    problem = Module(nn.Linear(6, 1), [(a, a[:, :1]) for a, _ in samples((5,))], squares)
    x = problem.start()
    found = torch.stack([problem.grad(x, Round.full(k, 3, 1), 2)[0] for k in range(400)])
    error = (found.mean(0) - problem.evaluate(x, torch.tensor([0]))[1][0]).abs()
    assert bool((error <= 6 * found.std(0) / 20 + 1e-6).all())


def test_where_samples_mix_a_batch_is_all_of_them():
    class Centered(nn.Module):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return u - u.mean(0)

    for case in (CASES["batch statistics"], lambda: Module(net(Centered()), samples(), cross)):
        problem, rnd = case(), Round.full(0, 0, 4)
        assert problem.mixes
        assert torch.equal(problem.grad(problem.start(), rnd, 2), problem.evaluate(problem.start(), rnd.clients)[1])
        L = problem.smoothness()
        assert (L.samples, L.most, L.sample, L.noise) == (1.0, 1.0, 0.0, 0.0)
    assert not CASES["frozen statistics"]().mixes


def test_dropout_and_batches_are_drawn_together():
    problem, rnd = CASES["dropout"](), Round.full(2, 0, 4)
    x, some = problem.start(), torch.tensor([1, 2])
    rows = problem.grad(x, rnd, 3)
    assert torch.equal(problem.grad(x, rnd, 3), rows)
    assert torch.equal(problem.only(some).grad(x, rnd.rows(some), 3), rows[some])
    assert not torch.equal(rows, CASES["dense"]().grad(x, rnd, 3))


@pytest.mark.parametrize("precise", [True, False])
def test_constants_of_samples_against_dense_hessians(precise):
    """Squared errors of a linear model: H_ij = 2 a a' n N_i / N, and the gradients are linear too."""
    data = [(a, torch.zeros(len(a), 1)) for a, _ in samples()]
    problem = Module(nn.Linear(6, 1, bias=False), data, squares, look=Look(12, samples=None, precise=precise))
    each = [2 * 4 * len(a) / 26 * a.double()[:, :, None] * a.double()[:, None, :] for a, _ in data]
    apart = sum(((H - H.mean(0)) @ (H - H.mean(0))).mean(0) for H in each) / 4
    L, x = problem.smoothness(), problem.start().double()
    close = 1e-5 if precise else 1e-3  # six digits are kept; a difference of float32 has about four
    assert L.sample == pytest.approx(float(torch.linalg.matrix_norm(apart, 2)) ** 0.5, rel=close)
    slopes = [H @ x for H in each]
    assert L.noise == pytest.approx(sum(float((g - g.mean(0)).square().sum(1).mean()) for g in slopes) / 4, rel=1e-5)
    assert (L.samples, L.most, L.sample.status, L.noise.status) == (6.5, 9.0, "estimate", "estimate")
    assert L.minus == pytest.approx(
        float(torch.linalg.matrix_norm(sum(H.mean(0) for H in each) / 4, 2)), rel=close
    )  # f_i's Hessian is its samples' mean


def test_a_look_at_some_clients():
    assert Look().at(7, None).tolist() == list(range(7))
    assert Look().at(7, 3).tolist() == [0, 2, 4]
    assert Look().at(2, 5).tolist() == [0, 1]
    problem = Module(net(), samples(), cross, look=Look(6, clients=2, samples=2))
    some, whole = problem.smoothness(), Module(net(), samples(), cross).smoothness()
    assert 0.2 < some.minus / whole.minus < 5  # of other clients, and yet of the same kind
