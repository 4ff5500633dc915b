"""Experiments: expressions, specs, runs, their folders, and what is left of a run that was cut.

The laws: whatever is wrong is one line that names it, before anything is written; a run that was interrupted, however
and as often as you like, ends at the bits of one that was not; a damaged file is never believed.
"""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import shoal
from shoal import report
from shoal.compressors import QSGD, Correlated, RandK, TopK
from shoal.core import Compressor, Method, Problem, Row
from shoal.errors import CheckpointCorrupt, ConfigError, DataError, ResumeMismatch
from shoal.experiments import checkpoint
from shoal.experiments import folder as folders
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import make_folder
from shoal.experiments.prepared import fingerprint
from shoal.experiments.race import TRY, Job, race
from shoal.experiments.run import Run, load_result, simulate
from shoal.experiments.spec import ProblemSpec, RaceSpec, RunSpec
from shoal.methods import EF21, GD, Diana, Marina
from shoal.problems import Quadratics

NAMES = known_names()
SMALL = Quadratics(n=3, d=8, noise=0.1, lam=0.1)


def said(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be one line and end as a sentence or with what was given."""
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------ expressions
fractions = st.floats(2**-20, 1, exclude_max=True)
unbiased = st.one_of(
    st.sampled_from([c for c in zoo.COMPRESSORS if zoo.has(c, "ab")]),
    st.builds(RandK, st.one_of(st.integers(1, 10**6), fractions)),
    st.builds(QSGD, st.integers(1, 100)),
    st.builds(Correlated, st.sampled_from(["shared", "own", "max"])),
)
parts = st.one_of(
    st.sampled_from([*zoo.COMPRESSORS, *zoo.METHODS]),
    st.builds(Marina, unbiased, st.one_of(st.none(), fractions)),
    st.builds(Diana, st.builds(RandK, st.integers(1, 50)), st.one_of(st.none(), fractions)),
    st.builds(EF21, st.builds(TopK, st.one_of(st.integers(1, 50), fractions))),
)


@given(part=parts)
def test_what_is_printed_can_be_parsed(part):
    """`compact` and `repr` are both expressions of an equal object, and `compact` is never the longer one."""
    kind = Method if isinstance(part, Method) else Compressor
    assert parse(compact(part), NAMES, kind) == part
    assert parse(repr(part), NAMES, kind) == part
    assert parse(f"  {compact(part)}\n", NAMES, kind) == part
    assert len(compact(part)) <= len(repr(part))


def test_problems_are_expressions_too():
    for problem in (SMALL, Quadratics(), Quadratics(n=2, d=1, seed=5)):
        assert parse(compact(problem), NAMES, Problem) == problem
    assert parse("GD", NAMES, Method) == GD(), "a name alone is a call without arguments"


HOSTILE = {
    "nothing": "",
    "spaces": "  ",
    "NUL": "\0",
    "not Python": "Marina(",
    "surrogate": "\ud800",
    "two lines": "GD()\nGD()",
    "statement": "import os",
    "literal": "3",
    "list": "[GD()]",
    "unknown name": "Marian(RandK(1))",
    "builtin": "__import__('os')",
    "attribute": "GD().check",
    "attribute of a class": "EF21(TopK(1)).__class__",
    "method call": "Marina(RandK.of(3))",
    "call of a call": "GD()()",
    "lambda": "lambda: 1",
    "lambda as argument": "RandK(lambda: 1)",
    "comprehension": "RandK([k for k in (1,)])",
    "conditional": "GD() if 1 else GD()",
    "walrus": "RandK(k:=3)",
    "f-string": "RandK(f'{1}')",
    "power": "RandK(9**9**9)",
    "long sum": "RandK(" + "+".join("1" * 3000) + ")",
    "star": "GD(*[1])",
    "double star": "Marina(**{'compressor': 1})",
    "twice": "Marina(RandK(3), p=0.1, p=0.2)",
    "subscript": "RandK([1][0])",
    "deep parentheses": "(" * 5000 + ")" * 5000,
    "deep calls": "Marina(" * 120 + ")" * 120,
    "deep not": "RandK(" + "not " * 900 + "1)",
    "deep minus": "RandK(" + "-" * 3000 + "1)",
    "deeper minus": "RandK(" + "-" * 200_000 + "1)",
    "deep lists": "RandK(" + "[" * 90 + "]" * 90 + ")",
    "huge integer": "RandK(" + "9" * 5000 + ")",
    "too many arguments": "RandK(1, 2)",
    "unknown argument": "RandK(j=1)",
    "missing argument": "Marina()",
    "a class as argument": "Marina(GD)",
    "not a compressor": "Marina(3)",
    "other failures of a constructor": "Classification(1, 2, 3)",
    "a problem": "Quadratics()",
    "a compressor": "RandK(3)",
    **{
        f"RandK({bad})": f"RandK({bad})"
        for bad in ("'a'", "[1]", "{}", "None", "1j", "b'x'", "0", "-1", "1e400", "...")
    },
    **{f"Marina(p={bad})": f"Marina(RandK(1), p={bad})" for bad in ("'x'", "[]", "0", "2", "1e400", "-1e400")},
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_expressions_are_one_line(text):
    with pytest.raises(ConfigError) as error:
        parse(text, NAMES, Method)
    said(error)


def test_an_expression_in_error_is_told_how_to_mend_it():
    for text, mend in (
        ("Marian(RandK(1))", "Did you mean Marina?"),
        ("ef21(TopK(1))", "Did you mean EF21?"),
        ("RandK(3)", "wrap it, e.g. 'Marina(RandK(3))'"),
        ("Marina(TopK(1))", "Use EF21"),
    ):
        with pytest.raises(ConfigError) as error:
            parse(text, NAMES, Method)
        assert mend in said(error)


# ------------------------------------------------------------------------------------------------ files of the user's
MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from shoal.core import Compressor, Method
from shoal.compressors import RandK
from shoal.methods import EF21, GD

@dataclass(frozen=True)
class Mine(GD):
    """Mine."""
    power: float = 1.0

@dataclass(frozen=True)
class Picky(GD):
    power: float = 1.0
    def __post_init__(self):
        raise OSError(f"no {self.power}\\nat all")
'''


def test_a_file_brings_its_own_classes_and_no_others(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    names = known_names([str(file)])
    assert names.keys() - NAMES.keys() == {"Mine", "Picky"}
    made = parse("Mine(power=2)", names, Method)
    assert compact(made) == "Mine(power=2)"
    assert made == parse("Mine(2)", known_names([str(file)]), Method), "loaded once: the classes are the same"
    with pytest.raises(ConfigError, match="no 2"):
        parse("Picky(2)", names, Method)
    with pytest.raises(ConfigError, match="unknown name 'Mine'"):
        parse("Mine()", NAMES, Method)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("x = 1 / 0", "it does not run: ZeroDivisionError: division by zero"),
        ("def", "it does not run: SyntaxError"),
        ("import nothing_of_this_name", "it does not run: ModuleNotFoundError"),
        ("", "defines no Compressor, Method or Problem"),
        ("from shoal.methods import GD", "defines no Compressor, Method or Problem"),
        (None, "not a Python file"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, complaint):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    for _ in range(2):  # nothing half-loaded is remembered
        with pytest.raises(ConfigError, match=complaint) as error:
            known_names([str(file)])
        assert "mine.py" in said(error)
    with pytest.raises(ConfigError, match="not a Python file"):
        known_names([str(tmp_path)])


# ------------------------------------------------------------------------------------------------ specs
RUN = {"method": "GD()"}
RACE = {"methods": ("GD()", "EF21(TopK(1))"), "target": 1e-3, "rounds": 10}
WRONG = {
    ProblemSpec: (
        {},
        {
            "name": [3],
            "clients": [0, -1, 2.5, "x"],
            "dim": [0, "x"],
            "noise": [-0.1, math.inf, math.nan],
            "lam": [-1, math.inf],
            "loss": ["hinge"],
            "split": ["random", ""],
            "alpha": [0, -1, math.nan],
            "seed": [-1, 0.5],
            "data": [3],
            "rows": [0, 1.5],
            "similarity": [-0.1, 1.1, math.nan],
        },
    ),
    RunSpec: (
        RUN,
        {
            "problem": ["phishing", 3],
            "method": [3],
            "rounds": [0, -1, 1.5],
            "bits": [0, -1, math.inf, math.nan],
            "target": [0, -1e-9, math.nan],
            "seed": [-1, 2**64, "x"],
            "step": ["tuned", "1x"],
            "multiple": [0, -1, math.inf],
            "pl": ["maybe"],
            "every": [0, "x"],
            "chunk": [0],
            "on_nonfinite": ["ignore", None],
            "files": [3],
        },
    ),
    RaceSpec: (
        RACE,
        {
            "title": [3],
            "problem": ["phishing"],
            "methods": [(), "GD()", ("GD()", "GD()"), (3,)],
            "steps": [("best",), ("theory", "theory")],
            "seeds": [(), (-1,), (2**64,), (0, 0)],
            "rounds": [0, None],  # None: no budget is left
            "bits": [0, math.inf],
            "target": [0, math.nan, None],
            "tune": [(3, 1), (0, 61), (-61, 0), (1,), ("a", "b")],
            "pl": ["maybe"],
            "every": [0],
            "files": [3],
        },
    ),
}
CASES = [(kind, base, name, bad) for kind, (base, table) in WRONG.items() for name, row in table.items() for bad in row]


@pytest.mark.parametrize(("kind", "base", "name", "bad"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_a_wrong_field_is_one_line_that_names_it(kind, base, name, bad):
    kind.of(**base)
    with pytest.raises(ConfigError) as error:
        kind.of(**base | {name: bad})
    assert name in said(error) or "budget" in said(error)


@pytest.mark.parametrize("kind", WRONG, ids=lambda k: k.__name__)
def test_specs_are_closed_frozen_and_survive_json(kind):
    base, table = WRONG[kind]
    assert table.keys() == kind.model_fields.keys(), "every field has its wrong values above"
    with pytest.raises(ConfigError, match="nonsense"):
        kind.of(**base, nonsense=1)
    spec = kind.of(**base)
    assert kind.of(**json.loads(spec.model_dump_json())) == spec
    with pytest.raises(ValueError, match="frozen"):
        setattr(spec, next(iter(table)), None)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"name": "quadratics", "loss": "logistic"}, "loss"),
        ({"name": "quadratics", "split": "iid", "alpha": 1.0}, "alpha, split"),
        ({"name": "phishing", "noise": 0.1}, "noise"),
        ({"name": "phishing", "dim": 3}, "dim"),
        ({"name": "phishing", "similarity": 0.5, "rows": 3}, "rows, similarity"),
        ({"name": "autoencoder", "data": ".", "dim": 3, "split": "iid"}, "dim, split"),
        ({"name": "Quadratics(n=3)", "clients": 4}, "clients"),
        ({"name": "Quadratics(n=3)", "seed": 0}, "seed"),
    ],
)
def test_a_problem_refuses_the_settings_of_others(settings, wrong):
    with pytest.raises(ConfigError, match=f"{wrong}: not a setting of") as error:
        ProblemSpec.of(**settings).build()
    said(error)


def test_a_described_problem_is_the_one_that_is_built(tmp_path):
    spec = ProblemSpec.of(name="quadratics", clients=3, dim=8, noise=0.1, lam=0.1)
    assert spec.build() == SMALL
    assert ProblemSpec.of(name=compact(SMALL)).build() == SMALL
    phishing = ProblemSpec.of(name="phishing", clients=7, lam=0.5).build()
    assert (phishing.n, phishing.name) == (7, "phishing")
    for name, kind in (("no such", ConfigError), (str(tmp_path), DataError), ("RandK(3)", ConfigError)):
        with pytest.raises(kind) as error:
            ProblemSpec.of(name=name).build()
        said(error)


# ------------------------------------------------------------------------------------------------ runs
def timeless(rows: list[Row]) -> list[Row]:
    """Rows without the one column that may differ between two runs."""
    return [row._replace(seconds=0.0) for row in rows]


def test_the_budget_in_bits_ends_after_the_round_that_exceeds_it():
    whole = simulate(SMALL, "GD()", rounds=20)
    a_round = whole.rows[1].up_bits
    assert a_round == 32 * SMALL.d
    for budget, rounds in ((1, 1), (a_round, 1), (a_round + 1, 2), (7 * a_round, 7)):
        run = simulate(SMALL, "GD()", bits=budget)
        assert (run.stopped, run.rows[-1].round) == ("bits", rounds)
        assert timeless(run.rows) == timeless(whole.rows[: rounds + 1])
    both = simulate(SMALL, "GD()", rounds=3, bits=1e9)
    assert (both.stopped, both.rows[-1].round) == ("rounds", 3)


def test_a_run_stops_where_the_target_is_first_met():
    whole = simulate(SMALL, "GD()", rounds=50)
    goal = whole.rows[30].grad_norm_sq
    run = simulate(SMALL, "GD()", rounds=50, target=goal)
    first = next(row for row in whole.rows if row.grad_norm_sq <= goal)
    assert (run.stopped, run.rows[-1].round) == ("target", first.round)
    assert timeless([run.to_target()]) == timeless([first]) == timeless([whole.to_target(goal)])
    assert whole.to_target() is None, "no target was set"
    assert simulate(SMALL, "GD()", rounds=3, target=goal).to_target() is None
    assert simulate(SMALL, "GD()", rounds=50, target=1e9).rows[-1].round == 0, "x^0 is good enough"


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_measuring_seldom_gives_the_same_rows_less_often(every):
    whole, run = simulate(SMALL, "Marina(RandK(2), p=0.3)", rounds=20), simulate(
        SMALL, "Marina(RandK(2), p=0.3)", rounds=20, every=every
    )  # fmt: skip
    assert [row.round for row in run.rows] == sorted({*range(0, 21, every), 20})
    assert timeless(run.rows) == [row for row in timeless(whole.rows) if row.round % every == 0 or row.round == 20]
    assert run.sha256 == whole.sha256


def test_every_row_is_told_as_it_comes():
    told: list[Row] = []
    run = simulate(SMALL, "GD()", rounds=10, every=2, record=told.append)
    assert told == run.rows
    assert run.columns()["seconds"] == sorted(run.columns()["seconds"])


@pytest.mark.filterwarnings("error")  # a warning of numpy's would reach the user's terminal
@pytest.mark.parametrize("step", [1e3, 1e20, 1e38, 1e41, 1e300])
@pytest.mark.parametrize("problem", [zoo.MIXED, *zoo.PROBLEMS[3:]], ids=repr)
@pytest.mark.parametrize("method", ["GD()", "Marina(Correlated(), p=0.3)", "EF21(TopK(2))"])
def test_a_step_that_is_too_large_is_a_result_and_no_accident(problem, method, step):
    """Far out the logistic loss is linear, so that its gradient stays small until x itself overflows."""
    run = simulate(problem, method, rounds=40, step=step)
    if step >= 1e41 or "logistic" not in repr(problem):
        assert run.stopped == "diverged"
        assert run.note
        assert run.rows[-1].round < 40
    assert all(math.isfinite(row.up_bits) for row in run.rows)
    result = json.loads(json.dumps(run.result()))
    assert result["stopped"] == run.stopped
    assert run.rows[0].grad_norm_sq < math.inf


def test_a_diverged_run_is_kept_and_reported(tmp_path):
    run = simulate(SMALL, "GD()", rounds=9, step=1e300, out=tmp_path / "run")
    assert (run.stopped, len(run.rows)) == ("diverged", 2)
    (record,) = report.load(tmp_path / "run").runs
    assert record.stopped == "diverged"
    assert math.isnan(record.columns["grad_norm_sq"][-1])
    assert math.isfinite(record.columns["grad_norm_sq"][0])
    report.write(tmp_path / "run")


WRONG_RUNS = {
    "no budget": ({"rounds": None}, "needs a budget"),
    "rounds": ({"rounds": 0}, "rounds=0"),
    "bits": ({"bits": -1.0}, "bits=-1.0"),
    "bits inf": ({"bits": math.inf}, "bits=inf"),
    "target": ({"target": 0.0}, "target=0.0"),
    "multiple": ({"multiple": math.nan}, "multiple=nan"),
    "step": ({"step": 0.0}, "step=0.0"),
    "step word": ({"step": "best"}, "step='best'"),
    "every": ({"every": 0}, "every=0"),
    "chunk": ({"chunk": 0}, "chunk=0"),
    "seed": ({"seed": -1}, "seed"),
    "method": ({"method": "Marian()"}, "unknown name"),
    "too many coordinates": ({"method": "EF21(TopK(9))"}, "TopK"),
    "no theorem": ({"method": "DCGD(TopK(1))"}, "no step size from theory"),
}


@pytest.mark.parametrize(("changed", "complaint"), WRONG_RUNS.values(), ids=WRONG_RUNS)
def test_a_wrong_run_is_one_line_and_leaves_nothing(tmp_path, changed, complaint):
    options = {"method": "GD()", "rounds": 5} | changed
    with pytest.raises(ConfigError, match=complaint) as error:
        simulate(SMALL, options.pop("method"), out=tmp_path / "new", **options)
    said(error)
    assert not list(tmp_path.iterdir())


def test_the_pl_step_needs_a_pl_constant():
    assert simulate(SMALL, "Diana(RandK(2))", rounds=2, pl=True).step.theorem.count("PL")
    with pytest.raises(ConfigError, match="pl=True: no PL constant is known for made"):
        simulate(zoo.PROBLEMS[3], "GD()", rounds=2, pl=True)


def test_a_run_as_table_plot_and_folder(tmp_path):
    run = simulate(SMALL, "Marina(RandK(2), p=0.3)", rounds=12, target=1e-30)
    assert run.table().to_pylist() == [row._asdict() for row in run.rows]
    assert run.columns()["up_bits"] == [row.up_bits for row in run.rows]
    (line,) = run.plot("down_bits").axes[0].lines
    assert line.get_xdata().tolist() == run.columns()["down_bits"]
    assert line.get_ydata().tolist() == run.columns()["grad_norm_sq"]
    with pytest.raises(ConfigError, match="plot\\(axis='bits'\\)"):
        run.plot("bits")
    loaded = report.load(run.save(tmp_path / "saved"))
    (record,) = loaded.runs
    for name in Row._fields:
        assert record.columns[name].tolist() == run.columns()[name]
    assert record.result == run.result()
    assert (loaded.target, record.label) == (1e-30, run.label)
    with pytest.raises(ConfigError, match="is not empty"):
        run.save(tmp_path / "saved")


# ------------------------------------------------------------------------------------------------ folders
def test_a_finished_folder_holds_the_run_four_times_over(tmp_path):
    run = simulate(SMALL, "EF21(TopK(2))", rounds=12, every=5, seed=3, out=tmp_path / "run", facts={"extra": 1})
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.json", "metrics.jsonl", "metrics.parquet", "result.json"
    ]  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [Row(**line) for line in lines] == run.rows
    assert pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist() == lines
    assert load_result(tmp_path / "run") == run.result()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem"] == {"name": "quadratics", "n": 3, "d": 8, "start": fingerprint(SMALL)}
    assert config["described"] == repr(SMALL)
    assert config["step"] == {"rule": "theory", "gamma": run.gamma, "multiple": 1.0}
    expected = {"format": 1, "kind": "run", "method": "EF21(TopK(2))", "seed": 3, "every": 5, "extra": 1, "bits": None}
    assert expected.items() <= config.items()
    assert config["smoothness"]["minus"] == [float(SMALL.smoothness().minus), "exact"]
    assert "torch" in config["versions"]


def test_a_folder_is_new_or_empty(tmp_path):
    simulate(SMALL, "GD()", rounds=1, out=tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="is not empty: resume it with") as error:
        simulate(SMALL, "GD()", rounds=1, out=tmp_path / "a" / "b")
    said(error)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot write in") as error:
            make_folder(path)
        said(error)
    left = tmp_path / "left"  # by a process that was killed while it wrote its first file
    left.mkdir()
    (left / ".config.json.123").touch()
    make_folder(left)
    (left / "config.json.123").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        make_folder(left)


# ------------------------------------------------------------------------------------------------ cut and resumed
METHODS = ["Marina(Correlated(), p=0.3)", "EF21(TopK(2))", "Diana(RandK(2))", "GD()"]
ROUNDS = 40


def signaled(at: int, number: int = signal.SIGINT):
    """A recorder that gets the signal at this round, as from a terminal."""
    return lambda row: signal.raise_signal(number) if row.round == at else None


class Cut(Exception):
    """The power has failed."""


def cut(at: int):
    """A recorder after which nothing is written any more."""

    def tell(row: Row) -> None:
        if row.round == at:
            raise Cut

    return tell


def whole(method: str) -> Run:
    return simulate(SMALL, method, rounds=ROUNDS, seed=4)


def resumed(folder: Path, method: str = METHODS[0], record=None, **changed) -> Run:
    options = {"rounds": ROUNDS, "seed": 4, "out": folder, "resume": True, "record": record}
    return simulate(SMALL, method, **options | changed)


def same(run: Run, folder: Path, method: str) -> None:
    """The run, its folder and an uninterrupted run agree in everything but the time."""
    expected = whole(method)
    assert run.sha256 == expected.sha256
    assert timeless(run.rows) == timeless(expected.rows)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [Row(**json.loads(line)) for line in lines] == run.rows
    assert pq.read_table(folder / "metrics.parquet").to_pylist() == [row._asdict() for row in run.rows]
    assert load_result(folder) == run.result()
    assert not list(folder.glob("*checkpoint*"))
    assert run.columns()["seconds"] == sorted(run.columns()["seconds"])


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_runs_end_at_the_bits_of_uninterrupted_ones(tmp_path, method):
    """Three cuts at rounds that the method's name draws; a row that was written stays what it was."""
    rounds = sorted(np.random.default_rng(len(method)).choice(np.arange(1, ROUNDS), 3, replace=False).tolist())
    for at in rounds:
        with pytest.raises(KeyboardInterrupt):
            resumed(tmp_path / "run", method, signaled(at))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == list(range(at + 1))
        assert load_result(tmp_path / "run") is None
        assert report.load(tmp_path / "run").status == "interrupted"
    told: list[Row] = []
    run = resumed(tmp_path / "run", method, told.append)
    assert [row.round for row in told] == list(range(rounds[-1] + 1, ROUNDS + 1)), "nothing is done twice"
    same(run, tmp_path / "run", method)


def test_sigterm_is_an_interrupt_with_its_own_status(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        resumed(tmp_path / "run", record=signaled(7, signal.SIGTERM))
    assert error.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before, "the handlers are put back"
    same(resumed(tmp_path / "run"), tmp_path / "run", METHODS[0])


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_run_that_was_cut_between_checkpoints_goes_on_from_the_last(tmp_path, monkeypatch, method):
    """A checkpoint every round but the last; the cut leaves rows, and half a row, that it knows nothing of."""
    monkeypatch.setattr(checkpoint, "EVERY", -1.0)
    with pytest.raises(Cut):
        resumed(tmp_path / "run", method, cut(17))
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == [
        "checkpoint-15.0of1.shoal", "checkpoint-15.shoal", "checkpoint-16.0of1.shoal", "checkpoint-16.shoal"
    ]  # fmt: skip
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 16, "val')
    told: list[Row] = []
    run = resumed(tmp_path / "run", method, told.append)
    assert told[0].round == 17
    same(run, tmp_path / "run", method)


def test_a_run_that_was_cut_before_its_first_checkpoint_begins_again(tmp_path):
    with pytest.raises(Cut):
        resumed(tmp_path / "run", record=cut(17))
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    same(resumed(tmp_path / "run"), tmp_path / "run", METHODS[0])


def test_rows_and_checkpoint_belong_together_at_every_moment(tmp_path):
    """A resumed run that is cut at once must find the rows of its checkpoint on the disk, not in a buffer."""
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "run", record=signaled(9))

    def look(row: Row) -> None:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines][:10] == list(range(10))
        raise Cut

    with pytest.raises(Cut):
        resumed(tmp_path / "run", record=look)
    same(resumed(tmp_path / "run"), tmp_path / "run", METHODS[0])


def test_another_run_is_not_resumed(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path / "run", record=signaled(9))
    changes = {"seed": 5, "rounds": 41, "target": 1e-9, "bits": 1e9, "multiple": 2.0, "step": 0.1, "every": 2}
    for name, value in changes.items():
        with pytest.raises(ResumeMismatch, match=f"its {'step' if name == 'multiple' else name} is") as error:
            resumed(tmp_path / "run", **{name: value})
        said(error)
    with pytest.raises(ResumeMismatch, match="its method is"):
        resumed(tmp_path / "run", "GD()")
    with pytest.raises(ResumeMismatch, match="its problem is"):
        simulate(Quadratics(n=3, d=8, noise=0.1, lam=0.2), METHODS[0], rounds=ROUNDS, out=tmp_path / "run", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "versions", lambda: {"torch": "0.1"})
        with pytest.raises(ResumeMismatch, match="bits may differ"):
            resumed(tmp_path / "run")
    same(resumed(tmp_path / "run"), tmp_path / "run", METHODS[0])  # none of it has touched the folder


def test_a_damaged_folder_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        resumed(folder, record=signaled(9))
    config = (folder / "config.json").read_bytes()
    for damaged in (b"", b"{", b"3", b'"x"', b"\xff"):
        (folder / "config.json").write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt, match="Delete the folder") as error:
            resumed(folder)
        said(error)
    (folder / "config.json").write_bytes(config)
    (folder / "metrics.jsonl").write_bytes(b"\xff{")  # its rows stand in the checkpoint
    same(resumed(folder), folder, METHODS[0])


# ------------------------------------------------------------------------------------------------ races
def outcomes(out: Path) -> dict[str, dict]:
    """folder -> config's place in the race, result, and how many rounds were allowed."""
    found = {}
    for path in sorted((out / "runs").iterdir()):
        config = json.loads((path / "config.json").read_text())
        found[path.name] = config["race"] | {"result": load_result(path), "rounds": config["rounds"]}
    return found


def choice(tries: list[dict]) -> float:
    """The rule of tuning, said again: fewest bits to the target, ties to the smaller; else the smallest gradient."""
    reached = [t for t in tries if t["result"]["stopped"] == "target"]
    key = "up_bits" if reached else "grad_norm_sq"
    best = min(t["result"][key] for t in reached or tries if not math.isnan(t["result"][key]))
    return min(t["multiple"] for t in reached or tries if t["result"][key] == best)


def spec(**changed) -> RaceSpec:
    described = ProblemSpec.of(name="quadratics", clients=3, dim=8, noise=0.1, lam=0.1)
    return RaceSpec.of(**{"problem": described, "methods": ("GD()",), "rounds": 81, "target": 1e-3} | changed)


def tuning(race: RaceSpec, out) -> Job:
    """The first method's, with tuned steps."""
    problem = race.problem.build()
    return Job(race, 0, "tuned", out, problem, problem.smoothness())


@pytest.mark.parametrize(
    ("method", "tune", "target"),
    [("GD()", (-2, 4), 1e-3), ("EF21(TopK(2))", (-1, 6), 1e-3), ("EF21(TopK(2))", (-3, 0), 1e-12)],
)
def test_tuning_takes_the_fewest_bits(tmp_path, method, tune, target):
    """Every try, on the first seed and a quarter of the rounds; the choice, on every seed and all of them."""
    tuning(spec(methods=(method,), tune=tune, target=target, seeds=(5, 6)), tmp_path).run()
    runs = list(outcomes(tmp_path).values())
    tries, finals = [r for r in runs if r["trial"]], [r for r in runs if not r["trial"]]
    assert sorted(t["multiple"] for t in tries) == [2.0**e for e in range(tune[0], tune[1] + 1)]
    assert {t["seed"] for t in tries} == {5}
    assert {t["rounds"] for t in tries} == {math.ceil(TRY * 81)} == {21}
    assert all(t["result"]["rounds"] <= 21 for t in tries)
    assert sorted(f["seed"] for f in finals) == [5, 6]
    assert {f["rounds"] for f in finals} == {81}
    assert {f["multiple"] for f in finals} == {choice(tries)}


def test_ties_go_to_the_smaller_step(tmp_path):
    """On f = x^2/2 a step gamma divides the squared gradient by (1 - gamma)^-2: at 1/2 and at 1 one round is enough."""
    one = ProblemSpec.of(name="quadratics", clients=1, dim=1, lam=1.0)
    goal = 0.3 * simulate(one.build(), "GD()", rounds=1).rows[0].grad_norm_sq
    tuning(spec(problem=one, tune=(-2, 1), target=goal, seeds=(0,)), tmp_path).run()
    bits = {r["multiple"]: (r["result"]["up_bits"], r["result"]["stopped"]) for r in outcomes(tmp_path).values()}
    assert bits == {0.25: (96.0, "target"), 0.5: (32.0, "target"), 1.0: (32.0, "target"), 2.0: (32.0, "bits")}
    (final,) = [r for r in outcomes(tmp_path).values() if not r["trial"]]
    assert final["multiple"] == 0.5


def test_a_try_may_not_spend_more_than_the_best_before_it_or_a_quarter(tmp_path):
    tuning(spec(tune=(0, 4), rounds=None, bits=100_000.0, seeds=(0,)), tmp_path).run()
    best = 25_000.0
    for run in (r for r in outcomes(tmp_path).values() if r["trial"]):
        assert run["result"]["up_bits"] < best + 32 * 8
        if run["result"]["stopped"] == "target":
            best = run["result"]["up_bits"]
    assert best < 25_000.0


def test_a_job_reads_what_is_done_and_does_the_rest(tmp_path):
    job = tuning(spec(tune=(0, 3), seeds=(0, 1)), tmp_path)
    job.run()
    before = outcomes(tmp_path)
    shas = {name: run["result"]["sha256"] for name, run in before.items()}
    kept, *lost = sorted(before)
    for name in lost:
        (tmp_path / "runs" / name / "result.json").unlink()
    written = (tmp_path / "runs" / kept / "result.json").stat().st_mtime_ns
    tuning(spec(tune=(0, 3), seeds=(0, 1)), tmp_path).run()
    assert {name: run["result"]["sha256"] for name, run in outcomes(tmp_path).items()} == shas
    assert (tmp_path / "runs" / kept / "result.json").stat().st_mtime_ns == written
    (tmp_path / "runs" / kept / "result.json").write_text("{")
    with pytest.raises(CheckpointCorrupt, match="Delete"):
        job.run()


def test_a_race_resumes_itself_alone(tmp_path):
    """Refused before any process is started."""
    (tmp_path / "race.json").write_text(json.dumps({"spec": json.loads(spec().model_dump_json())}))
    with pytest.raises(ResumeMismatch, match="holds another race"):
        race(spec(rounds=80), tmp_path, "", resume=True)
    with pytest.raises(ConfigError, match="is not empty"):
        race(spec(), tmp_path, "")
    with pytest.raises(ConfigError, match="each at most once"):
        race(spec(methods=("GD()", "GD( )")), tmp_path / "new", "")
    with pytest.raises(ConfigError, match="add --steps tuned"):
        race(spec(methods=("DCGD(TopK(1))",), steps=("theory",)), tmp_path / "new", "")
    assert not (tmp_path / "new").exists()


def test_the_bits_do_not_depend_on_the_machinery_around_them(tmp_path):
    """A folder, a chunk, a recorder, an environment: none of it moves the iterate."""
    runs = [
        shoal.simulate(SMALL, Marina(Correlated(), p=0.3), rounds=15),
        shoal.simulate(SMALL, "Marina(Correlated(), p=0.3)", rounds=15, chunk=1, every=4, out=tmp_path / "run"),
        shoal.simulate(SMALL, "Marina(Correlated(), p=0.3)", bits=runs_bits(15), record=lambda row: None),
    ]
    assert len({run.sha256 for run in runs}) == 1
    assert torch.equal(runs[0].x, runs[1].x)
    assert os.listdir(tmp_path) == ["run"]


def runs_bits(rounds: int) -> float:
    """What so many rounds cost."""
    return simulate(SMALL, "Marina(Correlated(), p=0.3)", rounds=rounds).rows[-1].up_bits
