"""Keyed randomness: published Philox vectors, the frozen layout, distinct streams, uniform laws, replay.

False alarms: every statistical test here compares one p-value with 1e-6, on a fixed seed. About ten of them make the
chance that a correct generator fails somewhere 1e-5, once, when the seed is chosen; after that the result is fixed.
"""

from __future__ import annotations

import ast
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import shoal
from shoal import kernels, rng
from shoal.errors import ConfigError
from shoal.kernels import Draw, cpu, reference
from shoal.kernels.cpu.philox import philox
from shoal.messages import Round

ALARM = 1e-6
BOTH = pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])

# The three vectors of Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def uniform_law(counts: np.ndarray) -> float:
    """The p-value of equal probabilities, by Pearson's chi-square."""
    return float(stats.chisquare(counts).pvalue)


# ------------------------------------------------------------------------------------------------ the generator
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_published_vectors(counter, key, result):
    c, k = numbers(counter), numbers(key)
    assert reference.philox.philox(np.array(c, np.uint32), (k[0], k[1])).tolist() == numbers(result)
    assert [int(w) for w in philox(*(np.uint64(v) for v in c + k))] == numbers(result)


@BOTH
def test_published_zero_vector_through_the_layout(ops):
    """Words 0, 16, 32 and 48 of a row are the four words of counter 0."""
    w = ops.words(Draw(torch.tensor([0]), 0, 0, 0), 64)[0].tolist()
    assert [w[0], w[16], w[32], w[48]] == numbers(KNOWN[0][2])
    h = ops.halves(Draw(torch.tensor([0]), 0, 0, 0), 128)[0].tolist()
    assert [h[16 * i] | h[16 * i + 16] << 16 for i in (0, 2, 4, 6)] == numbers(KNOWN[0][2])


@BOTH
def test_layout_of_words_and_halves(ops):
    """Spelled out coordinate by coordinate, as the docstrings of `reference` have it; a change here changes results."""
    slots, index, stream, seed, d = torch.tensor([0, 3, 0xFFFFFFFF]), 2**32 + 731, 0xDEADBEEF, 2**64 - 5, 389
    words, halves = ops.words(Draw(slots, index, stream, seed), d), ops.halves(Draw(slots, index, stream, seed), d)
    for i, slot in enumerate(slots.tolist()):
        for j in range(d):
            counter = [16 * (j // 64) + j % 16, slot, 731, stream]
            word = reference.philox.philox(np.array(counter, np.uint32), (seed & 0xFFFFFFFF, seed >> 32))[j % 64 // 16]
            assert int(words[i, j]) == int(word)
            counter[0], half = 16 * (j // 128) + j % 16, j % 128 // 16
            word = int(
                reference.philox.philox(np.array(counter, np.uint32), (seed & 0xFFFFFFFF, seed >> 32))[half // 2]
            )
            assert int(halves[i, j]) == (word >> 16 if half % 2 else word & 0xFFFF)
    assert rng.LAYOUT == 1


@BOTH
def test_shifts_by_hand(ops):
    """floor((h 2^32 + w) n / 2^48) in Python's integers, w = word 2^33 + j, whose call is 2^31 + 16 (j // 64) + j % 16;
    for n = 100 some words carry, for powers of two none is looked at. `below` beyond 128, and longer rows go on."""
    draw, d = Draw(torch.tensor([0xFFFFFFFF]), 731, 0xDEADBEEF, 2**64 - 5), 100_003
    j = np.arange(d)
    counter = np.stack([2**31 + 16 * (j // 64) + j % 16, *(np.full(d, v) for v in (0xFFFFFFFF, 731, 0xDEADBEEF))], 1)
    words = reference.philox.philox(counter.astype(np.uint32), (2**32 - 5, 2**32 - 1))[j, j % 64 // 16]
    h, w = ops.halves(draw, d)[0].numpy().astype(int).astype(object), words.astype(object)
    for n in (1, 2, 3, 7, 16, 100, 127, 128):
        shifts, looked = ops.shifts(draw, d, n)[0].numpy(), h * n % 2**16 + n > 2**16
        assert np.array_equal(shifts, (h * 2**32 + w) * n // 2**48)
        carried = shifts != h * n // 2**16
        assert not (carried & ~looked).any()
        assert n & (n - 1) or not looked.any()
        assert n != 100 or 0 < carried.sum() < looked.sum()
        for short in (1, 63, 127, 129, 257, 4097):
            assert np.array_equal(ops.shifts(draw, short, n)[0].numpy(), shifts[:short])
    for n in (129, 1000):
        assert torch.equal(ops.shifts(draw, d, n), ops.below(draw, d, n))


@BOTH
def test_golden_permutation_and_support(ops):
    """By hand from the words: Fisher-Yates from the top, and Floyd's subsets."""
    draw, d, k = Draw(torch.tensor([4, 9]), 12, 34, 56), 11, 5
    w = ops.words(draw, d).numpy().astype(object)
    order = list(range(d))
    for t in range(d - 1, 0, -1):
        j = int(w[0, t]) * (t + 1) // 2**32
        order[t], order[j] = order[j], order[t]
    assert ops.permutation(draw, d).tolist() == order
    for i in range(2):
        chosen = set()
        for c, t in enumerate(range(d - k, d)):
            j = int(w[i, c]) * (t + 1) // 2**32
            chosen.add(t if j in chosen else j)
        assert ops.support(draw, d, k)[i].tolist() == sorted(chosen)


# ------------------------------------------------------------------------------------------------ streams
DRAWING = {"draw", "shared", "uniform", "coin", "permutation"}
STREAMS = {
    "Correlated.bits", "Correlated.blocks", "Correlated.places", "Correlated.shifts", "Correlated.ties",
    "Grid.levels", "Grid.ties", "Independent.bits", "Independent.ties", "LowRank.start", "Marina.coin",
    "Module.batch", "networks.started", "PermK.coordinates", "goals.bits", "goals.shifts", "goals.ties",
    "PermK.owners", "PermK.shifts", "QSGD.levels", "QSGD.ties", "RandK.support", "Rotation.signs",
}  # fmt: skip
STREAMS |= {f"CorrelatedOffset.{name}" for name in ("bits", "offsets", "places", "shifts", "ties")}
STREAMS |= {"Bernoulli.coin", "Natural.bits", "NaturalDithering.levels", "Ternary.levels", "Ternary.ties"}
STREAMS |= {"Classification.batch", "Dasha.coin", "EF21.clients", "PPMarina.clients", "VRDiana.coin"}
STREAMS |= {"Autoencoder.start", "MarinaP.coin", "Module.dropout", "curvature.start"}


def strings(nodes: list[ast.expr]) -> Iterator[ast.expr]:
    """The arguments that are string literals or f-strings."""
    for node in nodes:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield node


def streams_in_source() -> list[str]:
    """Every stream that the package draws from. An f-string stands for one stream a caller: f"{name}.bits" for each
    literal that is passed to the function around it."""
    trees = [ast.parse(file.read_text()) for file in Path(shoal.__file__).parent.rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = []
    for function in (f for tree in trees for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)):
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DRAWING):
                continue
            for argument in strings([*node.args, *(k.value for k in node.keywords)]):
                if isinstance(argument, ast.Constant):
                    names.append(argument.value)
                    continue
                tail = "".join(part.value for part in argument.values if isinstance(part, ast.Constant))
                users = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == function.name]
                heads = [s.value for c in users for s in strings(c.args) if isinstance(s, ast.Constant)]
                assert heads, f"{function.name} draws from an f-string and nobody names it"
                names += [head + tail for head in heads]
    return names


def test_streams_are_distinct_and_frozen():
    """A renamed stream is another set of results; two names with one crc32 would be one stream."""
    names = streams_in_source()
    assert set(names) == STREAMS
    assert len(names) == len(STREAMS), "a stream is drawn in two places"
    ids = {rng.stream_id(name) for name in names}
    assert len(ids) == len(STREAMS)
    assert ids == {zlib.crc32(name.encode()) for name in STREAMS}


def test_every_part_of_the_key_matters():
    base = Draw(torch.tensor([1]), 2, 3, 4)
    others = [
        base._replace(slots=torch.tensor([2])), base._replace(round=3), base._replace(stream=4), base._replace(seed=5),
        base._replace(seed=4 + 2**32), base._replace(slots=rng.SHARED), base._replace(slots=rng.SERVER),
    ]  # fmt: skip
    rows = [rng.words(draw, 64)[0].numpy().tobytes() for draw in [base, *others]]
    assert len(set(rows)) == len(rows)


def test_shared_and_server_slots():
    """Shared randomness is the same wherever it is derived, and belongs to no client; so is the server's own."""
    here, there = Round.full(5, 9, 6, torch.tensor([0, 1])), Round.full(5, 9, 6, torch.tensor([4]))
    assert torch.equal(here.permutation(50, "a"), there.permutation(50, "a"))
    assert [here.coin(0.5, f"c{i}") for i in range(40)] == [there.coin(0.5, f"c{i}") for i in range(40)]
    assert int(here.server().slots) == 0xFFFFFFFE
    assert int(here.shared("a").slots) == 0xFFFFFFFF
    rows = [here.server().uniform(30, "a"), there.uniform(30, "a"), rng.uniform(here.shared("a"), 30)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))


def test_fork_is_a_second_stream():
    rnd = Round.full(0, 0, 4)
    forks = [rnd, rnd.fork("down"), rnd.fork("up"), rnd.fork("down").fork("up")]
    draws = [f.uniform(20, "x").numpy().tobytes() for f in forks]
    assert len(set(draws)) == 4
    assert torch.equal(rnd.fork("down").uniform(20, "x"), rnd.uniform(20, "down/x"))


def test_any_row_alone_has_the_bits_it_has_in_the_batch():
    """Round 731 replayed for client 17 alone, and for the clients in another order."""
    whole = Round.full(731, 42, 40)
    alone, other = Round.full(731, 42, 40, torch.tensor([17])), torch.randperm(40, generator=torch.Generator())
    for d in (1, 63, 64, 65, 1000, 1025):
        batch = whole.uniform(d, "x")
        assert torch.equal(alone.uniform(d, "x")[0], batch[17])
        assert torch.equal(whole.rows(other).uniform(d, "x"), batch[other])
        assert torch.equal(whole.uniform(2000, "x")[:, :d], batch), "a longer row begins with the shorter one"
    batch = rng.support(whole.draw("s"), 30, 7)
    assert torch.equal(rng.support(alone.draw("s"), 30, 7)[0], batch[17])


def test_seeds():
    assert rng.checked_seed(2**64 - 1) == 2**64 - 1
    for bad in (-1, 2**64, 1.5, True, "0"):
        with pytest.raises(ConfigError, match="seed"):
            rng.checked_seed(bad)


# ------------------------------------------------------------------------------------------------ laws
def test_uniform_law():
    """2^18 numbers in 256 cells; multiples of 2^-24 in [0, 1); the lowest bits are fair too."""
    u = Round.full(0, 1, 64).uniform(4096, "x").double().numpy()
    assert u.min() >= 0.0
    assert u.max() < 1.0
    scaled = u * 2.0**24
    assert np.array_equal(scaled, np.floor(scaled))
    assert uniform_law(np.bincount((u * 256).astype(int).ravel(), minlength=256)) > ALARM
    assert uniform_law(np.bincount(scaled.astype(int).ravel() & 255, minlength=256)) > ALARM


def test_halves_are_uniform():
    h = kernels.of(torch.zeros(1)).halves(Draw(torch.arange(64), 3, 4, 5), 4096).numpy().astype(int).ravel()
    assert uniform_law(np.bincount(h >> 8, minlength=256)) > ALARM
    assert uniform_law(np.bincount(h & 255, minlength=256)) > ALARM


@pytest.mark.parametrize("p", [0.003, 0.3, 0.5, 0.999])
def test_coin_frequency(p):
    heads = sum(Round.full(k, 2, 3).coin(p, "coin") for k in range(4000))
    assert stats.binomtest(heads, 4000, p).pvalue > ALARM


def test_sure_coins():
    assert all(Round.full(k, 2, 3).coin(1.0, "coin") for k in range(1000))


def test_permutation_law():
    """All 24 orders of 4, over 6000 rounds."""
    seen: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(4)), 0)
    for k in range(6000):
        seen[tuple(Round.full(k, 3, 2).permutation(4, "x").tolist())] += 1
    assert uniform_law(np.array(list(seen.values()))) > ALARM


@pytest.mark.parametrize(("d", "k"), [(6, 2), (6, 4), (5, 1), (60, 2)])
def test_support_law(d, k):
    """All k-subsets of d: (60, 2) is the kernels' sorted case, the others their dense one."""
    index = {s: i for i, s in enumerate(itertools.combinations(range(d), k))}
    rows = rng.support(Draw(torch.arange(30 * len(index)), 0, 1, 2), d, k).tolist()
    counts = np.bincount([index[tuple(row)] for row in rows], minlength=len(index))
    assert uniform_law(counts) > ALARM


@pytest.mark.parametrize("name", ["below", "shifts"])
@pytest.mark.parametrize("n", [2, 5, 16, 127, 1000])
def test_below_law(n, name):
    places = getattr(cpu, name)(Round.full(0, 4, 20).draw("x"), 4000, n).numpy()
    assert places.min() >= 0
    assert places.max() < n
    assert uniform_law(np.bincount(places.ravel(), minlength=n)) > ALARM


def test_rows_and_streams_are_uncorrelated():
    """The 120 correlations between 16 rows of 20,000 numbers: the largest |z| against the normal law."""
    u = np.concatenate([Round.full(k, 5, 4).uniform(20000, s).double().numpy() for k in (0, 1) for s in ("a", "b")])
    c = np.corrcoef(u)[np.triu_indices(16, 1)] * np.sqrt(20000)
    assert 120 * 2 * stats.norm.sf(np.abs(c).max()) > ALARM
