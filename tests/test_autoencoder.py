"""The linear autoencoder, its constants, its data: each against a plain second computation."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit
from torch import nn

from shoal import mnist, simulate, splits
from shoal.data import load
from shoal.errors import ConfigError, DataError
from shoal.experiments.spec import ProblemSpec
from shoal.kernels.cpu.combinations import BLOCK, columns_two, gathered, gathered_two, padded, squared, times, turned
from shoal.problems import Autoencoder, Module, estimated

WIDTH = 5  # the kernels are compiled for each width: one is enough, if it is no multiple of 4


def made(n: int = 6, p: int = 11, rows: int = 40, lam: float = 0.3, similarity: float = 0.4, scale: float = 1.0):
    """(problem, its dense rows a client): sparse rows, some columns and one row empty."""
    rng = np.random.default_rng(0)
    A = (rng.normal(size=(rows, p)) * (rng.random((rows, p)) < 0.4) * scale).astype(np.float32)
    A[:, 3 % p], A[7] = 0, 0
    parts = splits.similar(rows, n, similarity, seed=1)
    return Autoencoder(A, parts, WIDTH, lam, seed=2), [torch.from_numpy(A[part]).double() for part in parts]


def plain(problem: Autoencoder, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """f_i as it is written, in float64."""
    D, E = x[: problem.d // 2].reshape(problem.p, WIDTH), x[problem.d // 2 :].reshape(WIDTH, problem.p)
    data = (rows @ E.T @ D.T - rows).square().sum() * problem.n / problem.total_rows
    return data + problem.lam / 2 * (D @ E - torch.eye(problem.p)).square().sum()


@pytest.mark.parametrize(
    "setting", [{}, {"lam": 0.0}, {"p": 1}, {"p": 31}, {"p": 36}, {"similarity": 1.0}, {"n": 1}, {"scale": 1e6}]
)
def test_values_gradients_and_products_against_autograd(setting):
    problem, data = made(**setting)
    x, ids = problem.start() * 3, torch.arange(problem.n)
    values, gradients = problem.evaluate(x, ids)
    v = torch.from_numpy(np.random.default_rng(3).normal(size=(problem.n, problem.d)))
    products, together = problem.products(x, v, ids), problem.products(x, v[0], ids)
    for i, rows in enumerate(data):
        z = x.double().requires_grad_()
        value = plain(problem, z, rows)
        (g,) = torch.autograd.grad(value, z, create_graph=True)
        for w, found in ((v[i], products[i]), (v[0], together[i])):
            (h,) = torch.autograd.grad(g @ w, z, retain_graph=True)
            # float64 throughout: a few hundred roundings
            assert (found - h).norm() <= 1e-12 * max(1.0, float(h.norm()))
        assert float(values[i]) == pytest.approx(float(value.detach()), rel=1e-12)
        # rounded to float32 once: half a unit in the last place, and float64's errors
        assert ((gradients[i].double() - g).abs() <= 2.0**-24 * g.abs() + 1e-12 * g.abs().max()).all()


@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_combinations_of_rows_are_summed_in_order_in_float64(r, kind):
    """Bit for bit: terms one after the other, and in a product with a square the odd ones beside the even ones."""
    rng = np.random.default_rng(r)
    table, square = rng.normal(size=(9, 2 * r)).astype(kind), rng.normal(size=(r, r))
    values, index = rng.normal(size=7).astype(np.float32), rng.integers(0, 9, 7).astype(np.int32)
    unit = (0,) * r

    @njit
    def gather(lo, hi, out):
        gathered(values, index, lo, hi, table, out, unit)

    @njit
    def multiply(at, out):
        times(table[2], at, square, out, unit)

    for lo, hi in ((0, 7), (2, 5), (4, 4)):
        out, expected = np.full(2 * r, np.nan), np.zeros(2 * r)
        gather(lo, hi, out)
        for k in range(lo, hi):
            expected += np.float64(values[k]) * table[index[k]].astype(np.float64)
        assert out.tobytes() == expected.tobytes()
    for at in (0, r):
        out, parts = np.full(r, np.nan), np.zeros((2, r))
        multiply(at, out)
        for a in range(r):
            parts[a % 2] += np.float64(table[2, at + a]) * square[a]
        assert out.tobytes() == (parts[0] + parts[1]).tobytes()


@pytest.mark.parametrize("r", [5, 17])
def test_columns_come_in_pairs_and_are_transposed_in_blocks(r):
    """Bit for bit, as the same sums one at a time and rounded to float32 last; nothing else is written."""
    rng = np.random.default_rng(r)
    table, rows, square = rng.normal(size=(9, 2 * r)), rng.normal(size=(2, r)), rng.normal(size=(r, r))
    values, index = rng.normal(size=14).astype(np.float32), rng.integers(0, 9, 7).astype(np.int32)
    shared, unit = rng.normal(size=(2, 2 * r)), (0,) * r

    @njit
    def together(lo, hi, lines, out, side):
        gathered_two(values, index, lo, hi, table, lines, unit)
        columns_two(values, index, lo, hi, table, rows, square, 0.3, shared, out, 1, side, unit)

    @njit
    def plain(q, lo, hi, line, product):
        gathered(values[q::2].copy(), index, lo, hi, table, line, unit)
        times(rows[q], 0, square, product, unit)

    @njit
    def turn(block, out, stride):
        turned(block, out, 2, stride, unit)

    @njit
    def add(row, total):
        squared(row, total, unit)

    for lo, hi in ((0, 7), (2, 5), (4, 4)):
        lines, line, product = np.full((2, 2 * r), np.nan), np.empty(2 * r), np.empty(r)
        out, side = np.full(2 * r + 2, 7, np.float32), np.full((2, padded(r)), 7, np.float32)
        together(lo, hi, lines, out, side)
        for q in range(2):
            plain(q, lo, hi, line, product)
            assert lines[q].tobytes() == line.tobytes()
            first = 0.3 * (product - line[:r]) + shared[q, :r]
            assert out[1 + q * r : 1 + q * r + r].tobytes() == first.astype(np.float32).tobytes()
            assert side[q, :r].tobytes() == (0.3 * line[r:] + shared[q, r:]).astype(np.float32).tobytes()
        assert out[0] == out[-1] == 7
        assert (side[:, r:] == 7).all()
    block, stride = rng.normal(size=(BLOCK, padded(r))).astype(np.float32), BLOCK + 3
    out = np.full(r * stride + 2, 7, np.float32)
    turn(block, out, stride)
    expected = np.full((r, stride), 7, np.float32)
    expected[:, :BLOCK] = block[:, :r].T
    assert out.tobytes() == np.concatenate([[7, 7], expected.ravel()]).astype(np.float32).tobytes()
    total = square.copy()
    add(table[3], total)
    assert total.tobytes() == (square + table[3, :r, None] * table[3, None, :r]).tobytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_independent_whatever_the_threads(threads, monkeypatch):
    problem, _ = made(n=9, p=23, rows=200)
    monkeypatch.setattr("shoal.problems.autoencoder.LEAST", 1)  # so that even this is shared out
    x, ids, before = problem.start(), torch.tensor([7, 2, 2, 0, 8, 5]), torch.get_num_threads()
    v = torch.from_numpy(np.random.default_rng(1).normal(size=(6, problem.d)))
    torch.set_num_threads(threads)
    try:
        values, rows = problem.evaluate(x, ids)
        products = problem.products(x, v, ids)
        for k, i in enumerate(ids.tolist()):
            part = problem.only(torch.tensor([i, 1]))
            one = torch.tensor([i])
            assert torch.equal(part.evaluate(x, one)[0], values[k : k + 1])
            assert torch.equal(part.evaluate(x, one)[1], rows[k : k + 1])
            assert torch.equal(part.products(x, v[k], one), products[k : k + 1])
    finally:
        torch.set_num_threads(before)


def test_start_is_xaviers_and_a_function_of_the_seed():
    big = Autoencoder(np.ones((2, 400), np.float32), [np.array([0]), np.array([1])], WIDTH)
    x = big.start()
    # 4000 numbers: the standard deviation's own is 1.1 %, so 5 % is 4.5 of them (false alarm 1e-5, the seed is fixed)
    assert float(x.std()) == pytest.approx((2 / 405) ** 0.5, rel=0.05)
    assert torch.equal(x, big.start())
    assert not torch.equal(x, Autoencoder(np.ones((2, 400), np.float32), [np.array([0, 1])], WIDTH, seed=1).start())


# ------------------------------------------------------------------------------------------------ constants
@pytest.mark.parametrize("similarity", [0.0, 0.6, 1.0])
def test_estimates_against_dense_hessians(similarity):
    """With as many products as coordinates Lanczos is exact, up to the end it starts from; with few it stays below."""
    problem, _ = made(n=4, p=4, rows=30, similarity=similarity)
    x, eye = problem.start(), torch.eye(problem.d, dtype=torch.float64)
    H = torch.stack([torch.stack([problem.products(x, e, torch.tensor([i]))[0] for e in eye]) for i in range(4)])
    norm = lambda M: float(torch.linalg.matrix_norm(M, 2))  # noqa: E731
    mean, square = H.mean(0), (H @ H).mean(0)
    each = [norm(h) for h in H]
    true = {"minus": norm(mean), "plus": norm(square) ** 0.5, "pm": norm(square - mean @ mean) ** 0.5}
    true |= {"tilde": np.mean(np.square(each)) ** 0.5, "max": max(each)}
    if similarity == 1.0:
        true["pm"] = 0.0
    few, many = estimated(problem, [x], 3), estimated(problem, [x], 60)
    for name, value in true.items():
        assert getattr(few, name) <= value * (1 + 1e-5) + 1e-12  # six digits are kept
        assert getattr(many, name) == pytest.approx(value, rel=2e-3 if name in ("tilde", "max") else 1e-5, abs=1e-9)
        assert getattr(many, name).status == "estimate"
    further = estimated(problem, [x, 3 * x], 60)
    assert further.minus >= many.minus
    assert further.max > many.max


def test_estimates_are_known_before_a_problem_is_parted():
    problem, _ = made()
    with pytest.raises(ConfigError, match="before only"):
        problem.only(torch.tensor([0])).smoothness()
    known = problem.smoothness()
    assert problem.only(torch.tensor([0])).smoothness() == known
    assert (known.f_inf, known.f_inf.status, known.mu) == (0.0, "bound", None)
    with pytest.raises(ConfigError, match="at least one of each"):
        estimated(problem, [])
    with pytest.raises(ConfigError, match="not finite"):
        estimated(problem, [torch.full((problem.d,), 3e38) * 10])


def test_a_run_goes_down_and_does_not_depend_on_chunks():
    problem, _ = made(n=5, lam=0.01)
    runs = [simulate(problem, "Marina(PermK(), p=0.3)", rounds=60, chunk=chunk) for chunk in (None, 2)]
    assert runs[0].sha256 == runs[1].sha256
    assert runs[0].rows[-1].value < 0.9 * runs[0].rows[0].value
    assert "no theorem covers" in runs[0].step.theorem  # the constants are estimates, and the run says so
    assert runs[0].step.evidence == "numerical"


# ------------------------------------------------------------------------------------------------ splits, data
def test_similar_parts_share_what_they_are_told_to():
    disjoint, same = splits.similar(103, 5, 0.0), splits.similar(103, 5, 1.0)
    assert len(set(np.concatenate(disjoint).tolist())) == 5 * 17
    assert all(np.array_equal(part, same[0]) for part in same)
    assert not set(same[0].tolist()) & set(np.concatenate(disjoint).tolist())
    half = splits.similar(40_000, 3, 0.3, seed=4)
    shared = set(splits.similar(40_000, 3, 1.0, seed=4)[0].tolist())
    for part in half:
        found = np.mean([row in shared for row in part.tolist()])
        assert abs(found - 0.3) < 0.02  # 10^4 coins: 4.4 standard deviations, 1e-5
    for arguments, word in (
        ((5, 5, 0.0), "6|n \\+ 1"),
        ((9, 0, 0.0), "n=0"),
        ((9, 2, 1.5), "similarity"),
        ((9, 2, 0.5, -1), "seed"),
    ):
        with pytest.raises(ConfigError, match=word):
            splits.similar(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"width": 0}, ConfigError, "width=0"),
        ({"lam": -1.0}, ConfigError, "lam=-1"),
        ({"parts": [np.array([0]), np.array([], np.int64)]}, ConfigError, r"clients without rows: \[1\]"),
        ({"parts": []}, ConfigError, "without rows"),
        ({"parts": [np.array([0, 9])]}, ConfigError, r"rows \[9\]"),
        ({"A": np.full((3, 2), np.nan)}, DataError, "NaN"),
        ({"A": np.full((3, 2), 1e39)}, DataError, "more than float32"),
        ({"seed": -1}, ConfigError, "seed=-1"),
    ],
)
def test_autoencoder_refuses_what_it_cannot_use(change, error, word):
    with pytest.raises(error, match=word), np.errstate(over="ignore"):
        Autoencoder(**{"A": np.ones((3, 2)), "parts": [np.arange(3)], **change})


def small_mnist(folder: Path, monkeypatch, suffix: str = "", opener=open, rows: int = 60) -> None:
    """A folder like MNIST's with a few made images, and their sums in place of the true ones."""
    rng = np.random.default_rng(0)
    contents = {"train-images-idx3-ubyte": (rows, 28, 28), "train-labels-idx1-ubyte": (rows,)}
    for name, shape in contents.items():
        header = bytes([0, 0, 8, len(shape)]) + b"".join(k.to_bytes(4, "big") for k in shape)
        raw = header + rng.integers(0, 10, shape).astype(np.uint8).tobytes()
        with opener(folder / (name + suffix), "wb") as stream:
            stream.write(raw)
        monkeypatch.setitem(mnist.SHA256, name, hashlib.sha256(raw).hexdigest())


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_a_small_copy_is_read(tmp_path, monkeypatch, suffix, opener):
    small_mnist(tmp_path, monkeypatch, suffix, opener)
    assert mnist.images(tmp_path).shape == (60, 28, 28)
    assert mnist.labels(tmp_path).shape == (60,)
    spec = ProblemSpec.of(name="autoencoder", data=str(tmp_path), clients=3, rows=20, similarity=0.5, lam=0.1, seed=1)
    built = spec.build()
    assert isinstance(built, Autoencoder)
    assert (built.n, built.d, built.total_rows, built.lam, built.seed) == (3, 25088, 15, 0.1, 1)
    for settings, word in (({}, "--data FOLDER"), ({"data": str(tmp_path), "noise": 1.0}, "noise: not a setting")):
        with pytest.raises(ConfigError, match=word):
            ProblemSpec.of(name="autoencoder", **settings).build()
    with pytest.raises(ConfigError, match="rows=61: MNIST has 60 images; take 1 to 60"):
        Autoencoder.load(tmp_path, rows=61)


def test_the_rows_of_a_bundled_data_set():
    problem = ProblemSpec.of(name="autoencoder", data="mushrooms", clients=4, rows=25, similarity=1.0).build()
    assert (problem.n, problem.p, problem.total_rows) == (4, 112, 20)
    values, rows = problem.evaluate(problem.start(), torch.arange(4))
    assert bool((rows == rows[0]).all()), "all clients have the same rows, those of the part that is left over"
    A = load("mushrooms").A[:25]
    part = splits.similar(25, 4, 1.0)[0]
    alone = Autoencoder(A[part], [np.arange(5)])
    assert torch.equal(values[:1], alone.evaluate(problem.start(), torch.arange(1))[0])
    with pytest.raises(ConfigError, match="rows=9000: mushrooms has 8124 rows; take 1 to 8124"):
        Autoencoder.load("mushrooms", n=4, rows=9000)


def test_files_that_are_not_mnist_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"holds no train-images.*shoal\.mnist\.fetch"):
        mnist.images(tmp_path)
    small_mnist(tmp_path, monkeypatch)
    raw = (tmp_path / "train-labels-idx1-ubyte").read_bytes()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(raw[:-1] + b"\xff")
    with pytest.raises(DataError, match="not MNIST's bytes"):
        mnist.labels(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read"):
        mnist.labels(tmp_path)
    with pytest.raises(DataError, match="part='test'"):
        mnist.labels(tmp_path, "test")
    for broken, word in (
        (b"", "nothing"),
        (raw[:-1], "cut off"),
        (raw + b"0", "longer"),
        (b"\0\0\x0d\x01" + raw[4:], "not an"),
    ):
        with pytest.raises(DataError, match=word):
            mnist.idx(broken)
    assert mnist.idx(bytes([0, 0, 12, 1, 0, 0, 0, 1, 0, 0, 1, 2])).tolist() == [258]


def test_a_download_is_checked_and_says_so_offline(tmp_path, monkeypatch):
    """From file:// addresses: nothing here reads a network."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    small_mnist(there, monkeypatch, ".gz", gzip.open)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        monkeypatch.delitem(mnist.SHA256, name)
    written = mnist.fetch(here, f"{there.as_uri()}/")
    assert [path.name for path in written] == [f"{name}.gz" for name in mnist.SHA256]
    assert mnist.fetch(here, "file:///nowhere/") == []  # what is there is not fetched again
    assert np.array_equal(mnist.images(here), mnist.images(there))
    with pytest.raises(DataError, match="without a network, put"):
        mnist.fetch(tmp_path / "other", "file:///nowhere/")
    monkeypatch.setitem(mnist.SHA256, "train-images-idx3-ubyte", "0" * 64)
    with pytest.raises(DataError, match="not MNIST's bytes"):
        mnist.fetch(tmp_path / "other", f"{there.as_uri()}/")
    assert not list((tmp_path / "other").iterdir())


def test_writers_are_natural_clients(tmp_path, monkeypatch):
    small_mnist(tmp_path, monkeypatch)
    digits = mnist.labels(tmp_path)
    table = np.zeros((60, 8), ">i4")
    table[:, 0], table[:, 2] = digits, np.arange(60) % 7 + 3000
    head = bytes([0, 0, 12, 2]) + (60).to_bytes(4, "big") + (8).to_bytes(4, "big")
    with pytest.raises(DataError, match="holds no qmnist"):
        mnist.writers(tmp_path)
    with gzip.open(tmp_path / "qmnist-train-labels-idx2-int.gz", "wb") as stream:
        stream.write(head + table.tobytes())
    with pytest.raises(DataError, match="not the writers' bytes"):
        mnist.writers(tmp_path)
    monkeypatch.setattr(mnist, "WRITERS", hashlib.sha256(table[:, 2].astype("<u2").tobytes()).hexdigest())
    parts = splits.by_key(mnist.writers(tmp_path))
    assert [part.tolist() for part in parts] == [list(range(k, 60, 7)) for k in range(7)]
    images = torch.from_numpy(mnist.images(tmp_path).copy()).float()[:, None] / 255
    targets = torch.from_numpy(digits.astype(np.int64))
    small = nn.Sequential(nn.Conv2d(1, 2, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    cross = partial(nn.functional.cross_entropy, reduction="none")
    problem = Module(small, [(images[part], targets[part]) for part in parts], cross, "digits by writer")
    run = simulate(problem, "EF21(TopK(20))", rounds=10, step=0.2)
    assert run.rows[-1].value < run.rows[0].value
    table[0, 0] += 1
    with gzip.open(tmp_path / "qmnist-train-labels-idx2-int.gz", "wb") as stream:
        stream.write(head + table.tobytes())
    with pytest.raises(DataError, match="other images"):
        mnist.writers(tmp_path)


@pytest.mark.slow
def test_mnist_itself():
    folder = Path(os.environ.get("SHOAL_DATA", "")) / "mnist"
    if "SHOAL_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("SHOAL_DATA names no folder with mnist/")
    assert np.bincount(mnist.labels(folder)).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.images(folder, "t10k").shape == (10_000, 28, 28)
    problem = Autoencoder.load(folder, n=20, rows=1050, similarity=0.75, lam=1e-3)
    assert problem.d == 25088
    known = problem.smoothness()
    assert 0 < known.pm < 0.3 * known.plus
    run = simulate(problem, "GD()", rounds=20)
    values = [row.value for row in run.rows]
    assert values == sorted(values, reverse=True)
