"""Sweeps: grids, keys, the pool, and what is left of a sweep that was cut or whose points fail.

The laws: a point is run once, whatever grid it is in and however its method is spelled; a sweep that was interrupted
ends at the bits of one that was not; what fails is told, and stops nothing else.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cli import ended, shoal, start, until  # noqa: F401  (shoal is a fixture)

from shoal.errors import CheckpointCorrupt, ConfigError, ResumeMismatch
from shoal.experiments import grid, pool
from shoal.experiments.grid import Grid, SweepSpec, key
from shoal.experiments.run import simulate
from shoal.experiments.spec import RunSpec
from shoal.experiments.sweep import Progress, load_spec, sweep, table

TINY = {"problem.name": "quadratics", "problem.clients": 3, "problem.dim": 8, "problem.lam": 0.1, "rounds": 20}
BOTH = {"method": ("Marina(PermK())", "EF21(TopK(2))"), "seed": (0, 1)}


def spec(over: dict, **run) -> SweepSpec:
    return SweepSpec.of(title="test", grids=(Grid.of(run=TINY | run, over=over),))


# ------------------------------------------------------------------------------------------------ grids
def test_a_grid_is_a_product():
    """The last field varies fastest; nested and dotted names are the same; a point of two grids is one point."""
    one = spec({"problem.noise": (0, 0.5), "seed": (0, 1)}, method="GD()")
    assert [(p.problem.noise, p.seed) for p in one.points().values()] == [(0, 0), (0, 1), (0.5, 0), (0.5, 1)]
    nested = {
        "run": {"problem": {"name": "quadratics"}, "method": "GD()", "rounds": 3},
        "over": {"problem": {"noise": [0, 1]}},
    }
    assert [p.problem.noise for p in SweepSpec.read(nested).points().values()] == [0.0, 1.0]
    assert SweepSpec.read(json.loads(one.model_dump_json())) == one
    twice = SweepSpec.of(grids=(*one.grids, *spec({"seed": (1, 2)}, method="GD()", **{"problem.noise": 0}).grids))
    assert len(twice.points()) == 5


def test_words_become_values():
    assert grid.values("problem.noise=0, 0.1") == ("problem.noise", ("0", "0.1"))
    assert grid.values("method=Marina(RandK(3), p=0.1),GD()") == ("method", ("Marina(RandK(3), p=0.1)", "GD()"))
    assert grid.values("method=EF21(TopK(3));GD()")[1] == ("EF21(TopK(3))", "GD()")
    words = spec({"seed": ("0", "1"), "problem.noise": ("0.5",), "step": ("0.1", "theory")}, method="GD()")
    numbers = spec({"seed": (0, 1), "problem.noise": (0.5,), "step": (0.1, "theory")}, method="GD()")
    assert list(words.points()) == list(numbers.points())
    for wrong in ("seed", "seed=", "=1", "seed=1,,2"):
        with pytest.raises(ConfigError, match="FIELD=VALUE"):
            grid.values(wrong)


def test_a_key_is_of_what_is_run(tmp_path):
    """Not of the spelling; of the contents of files, and of every setting."""
    base = RunSpec(method="Marina(RandK(3), p=0.5)", rounds=5)
    assert key(base) == key(RunSpec(method=" Marina( RandK(k=3),p=0.5 )", rounds=5))
    others = [{"rounds": 6}, {"seed": 1}, {"multiple": 2.0}, {"step": 0.1}, {"every": 2}, {"bits": 9.0}, {"pl": True}]
    assert len({key(base), *(key(base.model_copy(update=change)) for change in others)}) == len(others) + 1
    keys, file = set(), tmp_path / "folder" / "data.txt"
    file.parent.mkdir()
    for text in ("1 1:1\n-1 2:1\n", "1 1:1\n-1 2:3\n"):
        file.write_text(text)
        for problem in ({"name": str(file)}, {"name": "autoencoder", "data": str(file.parent)}):
            keys.add(key(RunSpec.model_validate({"problem": problem, "method": "GD()", "rounds": 5})))
        grid._digest.cache_clear()
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"run": {"method": "GD()", "rounds": 3, "noise": 1}}, "'noise' is not a field"),
        ({"run": {"rounds": 3}}, "which method"),
        ({"run": {"method": "GD()"}}, "budget"),
        ({"run": {"method": "GD()", "seed": 1, "rounds": 3}, "over": {"seed": [1]}}, "fixed and varied"),
        ({"run": {"method": "GD()", "rounds": 3}, "over": {"seed": []}}, "at least one value"),
        ({"run": {"method": "GD()", "rounds": 3}, "over": {"seed": 3}}, "over"),
        ({"run": {"method": "GD()", "rounds": 3}, "over": {"seed": [-1]}}, "seed"),
        ({"run": {"method": "GD()", "rounds": 3}, "grids": []}, "not both"),
        ({"grids": []}, "grids"),
        ({"grids": [3]}, "grids"),
        ({"naem": "x"}, "naem"),
        ({"run": {"rounds": 3}, "over": {"method": ["GD()", "Marina(RandK(1000))"]}}, "RandK"),
        ({"run": {"rounds": 3, "method": "DCGD(RandK(1))", "problem": {"name": "quadratics", "noise": 1}}}, "step"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_said_first(facts, named, tmp_path):
    """In one line, and before a folder is made."""
    from shoal.experiments.sweep import check

    with pytest.raises(ConfigError, match=named) as error:
        check(SweepSpec.read(facts))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ running
def test_time_left():
    """From the shares of the guessed work; unknown at first, zero at the end."""
    points = spec(BOTH).points()
    progress = Progress(points, set())
    assert progress.left is None
    progress.began -= 10.0
    first, *rest = points
    progress.at(first, 0.5)
    assert progress.left == pytest.approx(70.0, rel=0.01)
    progress.end(first, None)
    assert progress.left == pytest.approx(30.0, rel=0.01)
    for other in rest:
        progress.end(other, "error")
    assert (progress.done, progress.failed, progress.left) == (4, 3, 0.0)


def crash(task: str, tell) -> None:
    """What a pool is given in the test below."""
    tell(0.5)
    if task == "raise":
        raise ValueError("two\nlines")
    if task == "die":
        import os

        os._exit(7)


@pytest.mark.slow
def test_a_task_that_dies_stops_no_other():
    heard, ends = [], {}
    tasks = ["a", "raise", "die", "b", "c"]
    pool.run(crash, tasks, 1, lambda task, at: heard.append((task, at)), ends.__setitem__)
    assert ends == {t: None for t in "abc"} | {
        "raise": "ValueError: two lines",
        "die": "its process ended with status 7",
    }
    assert heard == [(task, 0.5) for task in tasks]


def test_a_sweep_runs_each_point_once(tmp_path):
    """A table with a row a point, in Parquet as well; what has a result is not run again; another sweep is refused."""
    out = tmp_path / "sweep"
    rows = sweep(spec(BOTH), out, "a command", workers=0)
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in BOTH["method"] for s in BOTH["seed"]]
    assert all(row["status"] == "done" and row["last_round"] == 20 for row in rows)
    assert rows == table(out)
    stored = pq.read_table(out / "results.parquet").to_pylist()
    assert [r["sha256"] for r in stored] == [r["sha256"] for r in rows]
    assert load_spec(out) == spec(BOTH)
    first = out / "points" / rows[0]["key"]
    told = json.loads((first / "result.json").read_text()) | {"note": "kept"}
    (first / "result.json").write_text(json.dumps(told))
    again = sweep(spec(BOTH), out, resume=True, workers=0)
    assert [row["note"] for row in again] == ["kept", "", "", ""]
    with pytest.raises(ResumeMismatch):
        sweep(spec({"seed": (5,)}, method="GD()"), out, resume=True)
    with pytest.raises(ConfigError, match="not empty"):
        sweep(spec(BOTH), out)
    (out / "sweep.json").write_text("{}")
    with pytest.raises(CheckpointCorrupt):
        table(out)


FAULTY = """
import os, time
from shoal.problems import Quadratics

class Faulty(Quadratics):
    def evaluate(self, x, clients):
        if self.seed == 1:
            raise RuntimeError("no luck")
        if self.seed == 2:
            os._exit(9)
        if self.seed == 3:
            time.sleep(0.02)
        return super().evaluate(x, clients)
"""


def faulty(tmp_path: Path, seeds: str, rounds: int, out: str) -> list[str]:
    (tmp_path / "faulty.py").write_text(FAULTY)
    names = ";".join(f"Faulty(n=3, d=8, lam=0.1, noise=0.1, seed={seed})" for seed in seeds)
    (tmp_path / "grid.toml").write_text(
        f'title = "faults"\n[run]\nmethod = "Marina(PermK(), p=0.3)"\nrounds = {rounds}\nfiles = ["faulty.py"]\n'
    )
    return ["sweep", "grid.toml", "--over", f"problem.name={names}", "--workers", "1", "--out", out]


@pytest.mark.slow
def test_failures_are_told_and_tried_again(tmp_path):
    """One raises, one takes its process down; the third is done, and the exit status says that not all are."""
    done = ended(start(*faulty(tmp_path, "120", 5, "out"), cwd=tmp_path))
    assert done.status == 3
    assert "RuntimeError: no luck" in done.err
    assert "its process ended with status 9" in done.err
    assert "2 of 3 points have no result" in done.err
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "failed", "done"]
    assert rows[0]["sha256"] is None
    shown = ended(start("report", "out", cwd=tmp_path))
    assert shown.status == 0
    assert "1 of 3 points done" in shown.out


@pytest.mark.slow
def test_an_interrupted_sweep_ends_at_the_same_bits(tmp_path, monkeypatch):
    """Ctrl-C in the middle of a point: one line that says how to go on, no process left, and the whole sweep's bits."""
    process = start(*faulty(tmp_path, "3", 150, "out"), cwd=tmp_path)
    assert until(lambda: any(f.stat().st_size > 500 for f in (tmp_path / "out").glob("points/*/metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    cut = ended(process)
    assert cut.status == 130
    assert "shoal sweep --resume out" in cut.err
    assert [row["status"] for row in table(tmp_path / "out")] == ["open"]
    assert list((tmp_path / "out").glob("points/*/checkpoint-*.shoal")), "the worker had time for a checkpoint"
    monkeypatch.chdir(tmp_path)
    (resumed,) = sweep(load_spec(Path("out")), Path("out"), resume=True, workers=0)
    (point,) = load_spec(Path("out")).points().values()
    whole = simulate(point.problem.build(point.files), point.method, rounds=150)
    assert resumed["sha256"] == whole.sha256


def test_wrong_words(shoal, tmp_path):  # noqa: F811
    """Each in one line."""
    for words, named in (
        (["--over", "seed"], "FIELD=VALUE"),
        (["--set", "rounds"], "FIELD=VALUE"),
        (["--over", "seed=1", "--over", "seed=2"], "at most once"),
        (["absent.toml"], "absent.toml"),
        (["--table", "absent"], "no sweep"),
        (["--resume", "absent", "--over", "seed=1"], "leave out over"),
        (["--workers", "0"], "at least one"),
    ):
        done = shoal("sweep", *words)
        assert done.status == 1
        assert named in done.error
    assert not list(tmp_path.iterdir())
    (tmp_path / "bad.toml").write_text("[run")
    assert "bad.toml" in shoal("sweep", "bad.toml").error
