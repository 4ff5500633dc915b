"""The public face: names are pinned, every public class is in the zoo and says where it comes from, examples run."""

from __future__ import annotations

import doctest
import inspect

import pytest
import zoo

import shoal
from shoal import compressors, errors, methods, problems
from shoal.core import Compressor, Method, Problem
from shoal.kernels import reference

NAMES = {
    shoal: [
        "DCGD", "EF21", "GD", "QSGD", "Autoencoder", "Bernoulli", "Classification", "Coded", "Composed", "Correlated",
        "CorrelatedOffset", "Dasha", "Dense", "Diana", "Drive", "Eden", "Grid", "Independent", "LowRank", "Marina",
        "MarinaP", "MeanEstimate", "Module", "Natural", "NaturalDithering", "PPMarina", "PerLayer", "PermK",
        "Quadratics", "RandK", "Rotated", "Run", "Scaled", "ShoalError", "Sign", "Ternary", "TopK", "TwoWayEF21",
        "TwoWayMarina", "VRDiana", "VRMarina", "connect", "mean_estimation", "simulate",
    ],
    compressors: [
        "QSGD", "Bernoulli", "Coded", "Composed", "Correlated", "CorrelatedOffset", "Dense", "Drive", "Eden", "Grid",
        "Independent", "LowRank", "Natural", "NaturalDithering", "PerLayer", "PermK", "RandK", "Rotated", "Scaled",
        "Sign", "Ternary", "TopK",
    ],
    methods: [
        "DCGD", "EF21", "GD", "Dasha", "Diana", "Marina", "MarinaP", "PPMarina", "TwoWayEF21", "TwoWayMarina",
        "VRDiana", "VRMarina",
    ],
    problems: [
        "Autoencoder", "Classification", "Module", "Quadratics", "estimated", "measured_pm", "mnist_cnn", "resnet18",
        "shakespeare",
    ],
    errors: [
        "BadMagic", "CheckpointCorrupt", "CheckpointError", "CheckpointWarning", "CheckpointWriteFailed",
        "ChecksumError", "ConfigError", "ConfigMismatch", "DataError", "LengthError", "NonFiniteError", "PayloadError",
        "PeerDied", "PeerLost", "PeerTimeout", "QuorumLost", "ResumeMismatch", "RoundMismatch", "ShoalError",
        "VersionMismatch", "WireError",
    ],
}  # fmt: skip
KINDS = [(compressors, Compressor, zoo.COMPRESSORS), (methods, Method, zoo.METHODS), (problems, Problem, zoo.PROBLEMS)]
PARTS = [
    (name, getattr(module, name), kind, members)
    for module, kind, members in KINDS
    for name in module.__all__
    if isinstance(getattr(module, name), type)
]
parts = pytest.mark.parametrize(("name", "part", "kind", "members"), PARTS, ids=[p[0] for p in PARTS])


@pytest.mark.parametrize("module", NAMES, ids=lambda m: m.__name__)
def test_names_are_pinned(module):
    """Adding a name is a decision, and removing one breaks somebody."""
    assert sorted(module.__all__) == sorted(NAMES[module])
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(reference.__all__)) == len(reference.__all__)


def test_the_top_level_has_every_part():
    assert {name for name, *_ in PARTS} <= set(shoal.__all__)


@parts
def test_every_part_is_in_the_zoo(name, part, kind, members):
    assert issubclass(part, kind)
    assert any(type(member) is part for member in members), f"{name} is missing in tests/zoo.py"


@parts
def test_every_part_says_where_it_comes_from(name, part, kind, members):
    """A paper's number, a DOI, or the page with the proof, in the docstring of the class itself."""
    text = inspect.getdoc(part) or ""
    assert any(mark in text for mark in ("arXiv:", "doi.org/", "DOI", "docs/derivations/")), f"{name}: no reference"


@parts
def test_parts_are_values(name, part, kind, members):
    """Equal parameters make equal, hashable objects, and the repr names the class: a configuration can hold them."""
    if kind is not Problem:
        for member in members:
            if type(member) is part:
                twin = eval(repr(member), {n: getattr(shoal, n) for n in shoal.__all__})
                assert twin == member
                assert hash(twin) == hash(member)


def test_errors_are_one_tree():
    for name in errors.__all__:
        warning = name.endswith("Warning")
        assert issubclass(getattr(errors, name), UserWarning if warning else errors.ShoalError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.WireError, ValueError)


def test_examples_in_docstrings():
    """`shoal.simulate` shows how it is used, and what it shows is true."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(shoal.simulate, "simulate", globs={})
    assert len(example.examples) >= 3
    assert runner.run(example).failed == 0
