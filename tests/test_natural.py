"""Networks on people's data: who the clients are, where they start, and that minibatches reach the methods."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_autoencoder import small_mnist
from torch.nn import functional

from shoal import mnist, simulate
from shoal import shakespeare as plays
from shoal.errors import ConfigError, DataError
from shoal.experiments.spec import ProblemSpec
from shoal.problems import mnist_cnn, natural, networks, resnet18, shakespeare


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """MNIST's folder in small: 60 images by 7 writers."""
    small_mnist(tmp_path, monkeypatch)
    wrote = (np.arange(60) ** 2 % 7 + 3).astype(np.uint16)
    np.savez(tmp_path / mnist.PICKED, train_writer=wrote)
    monkeypatch.setattr(mnist, "WRITERS", hashlib.sha256(wrote.astype("<u2").tobytes()).hexdigest())
    return tmp_path, wrote


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A text of three speakers, of whom two say enough."""
    said = {"ANNE": "abc def. " * 150, "BEN": "xyz!" * 400, "CAL": "no."}
    text = "\n\n".join(
        f"{who}:\n{words[at : at + 300]}" for who, words in said.items() for at in range(0, len(words), 300)
    )
    (tmp_path / plays.FILE).write_text(text)
    monkeypatch.setattr(plays, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    return tmp_path, text


def test_a_client_is_a_writer(digits):
    folder, wrote = digits
    problem = mnist_cnn(folder)
    people, counts = np.unique(wrote, return_counts=True)
    assert (problem.n, problem.d, problem.total_rows) == (len(people), 5386, 60)
    assert [len(inputs) for inputs, _ in problem._data] == counts.tolist()
    assert torch.equal(problem._data[1][1], torch.from_numpy(mnist.labels(folder)[wrote == people[1]].astype(np.int64)))
    few = ProblemSpec.of(name="mnist-cnn", data=str(folder), clients=2, rows=3, seed=1).build()
    assert (few.n, few.total_rows) == (2, 6)
    assert not torch.equal(few.start(), problem.start())
    for settings, word in (({"n": 9}, "4 writers"), ({"n": 0}, "4 writers"), ({"rows": 0}, "rows=0")):
        with pytest.raises(ConfigError, match=word):
            mnist_cnn(folder, **settings)


def test_a_client_is_a_speaker(lines):
    folder, text = lines
    problem = ProblemSpec.of(name="shakespeare", data=str(folder)).build()
    said = plays.speakers(text)
    assert list(said) == ["ANNE", "BEN", "CAL"]
    assert problem.n == 2
    letters = sorted(set(text))
    for who, (inputs, targets) in zip(("ANNE", "BEN"), problem._data, strict=True):
        flat = "".join(letters[k] for k in inputs.reshape(-1))
        assert said[who].startswith(flat)
        assert len(said[who]) - len(flat) <= natural.WINDOW
        assert torch.equal(inputs.reshape(-1)[1:], targets.reshape(-1)[:-1])
    assert ProblemSpec.of(name="shakespeare", data=str(folder), clients=1, rows=2).build().total_rows == 2
    with pytest.raises(DataError, match="SPEAKER"):
        plays.speakers("no name in front\nof this")


def test_characters_do_not_see_ahead():
    model = networks.character_model(9)
    before = torch.randint(9, (2, 30), generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[:, 20] = (after[:, 20] + 1) % 9
    moved = (model(before) != model(after)).any(1)
    assert not moved[:, :20].any()
    assert moved[:, 20:35].any(1).all()


def test_starts_are_functions_of_the_seed_and_of_nothing_else():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, again, other = (torch.nn.utils.parameters_to_vector(networks.small_cnn(s).parameters()) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "torch's hidden state is left alone"
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    conv = networks.small_cnn()[
        2
    ].weight  # 1152 numbers: 10 % is 4.8 of their deviation's own (1e-6, the seed is fixed)
    assert float(conv.detach().std()) == pytest.approx((2 / 72) ** 0.5, rel=0.1)


@pytest.mark.slow
def test_resnet_starts_where_it_can_move_and_zero_is_where_it_cannot(digits):
    """From zeros, ten of 11 million coordinates have a gradient, and they alone ever move."""
    problem = resnet18(digits[0], n=2, rows=4, split="label")
    assert (problem.n, problem.d, problem.total_rows, problem.mixes) == (2, 11_173_962, 4, False)
    assert problem._data[0][0].shape == (2, 3, 32, 32)
    x, ids = problem.start(), torch.arange(2)
    values, rows = problem.evaluate(x, ids)
    assert float(values.mean()) < 3.5, "scores that hardly differ: ln 10 is 2.3"
    assert float((rows == 0).all(0).float().mean()) < 0.05
    after = problem.evaluate(x - 0.03 * rows.mean(0), ids)[0]
    assert float(after.mean()) < float(values.mean())
    at_zero = problem.evaluate(torch.zeros_like(x), ids)[1].mean(0)
    assert int((at_zero != 0).sum()) <= 10
    further = problem.evaluate(-at_zero, ids)[1].mean(0)
    assert int((further != 0).sum()) <= 10


@pytest.mark.parametrize(
    "method",
    [
        "VRMarina(RandK(50), batch=2)",
        pytest.param("VRDiana(RandK(50), batch=2)", marks=pytest.mark.slow),
        pytest.param("Dasha(RandK(50), batch=2)", marks=pytest.mark.slow),
    ],
)
def test_minibatch_methods_run_on_writers(digits, method):
    problem = mnist_cnn(digits[0])
    problem.look = problem.look._replace(rounds=2, clients=2, samples=2)
    runs = [simulate(problem, method, rounds=12, step=0.02, chunk=chunk) for chunk in (None, 3)]
    assert runs[0].sha256 == runs[1].sha256
    assert runs[0].rows[-1].value < runs[0].rows[0].value


REAL = Path(os.environ.get("SHOAL_DATA", "."))


@pytest.mark.skipif(not (REAL / "mnist" / mnist.PICKED).is_file(), reason="SHOAL_DATA names no folder with mnist/")
def test_the_real_writers():
    problem = mnist_cnn(REAL / "mnist", rows=2)
    assert (problem.n, problem.total_rows) == (539, 1078)


@pytest.mark.skipif(not (REAL / plays.NAME).is_dir(), reason="SHOAL_DATA names no folder with tinyshakespeare/")
def test_the_real_speakers():
    said = plays.speakers(plays.text(REAL / plays.NAME))
    assert len(said) == 309
    problem = shakespeare(REAL / plays.NAME)
    assert (problem.n, problem.d) == (141, 9673)
    values, _ = problem.evaluate(problem.start(), torch.tensor([0]))
    assert functional.relu(values).item() > 0
