"""The command line: what each command prints, its exit status, what is wrong in one line, and races that are killed.

Most of it calls `shoal.cli.main` in this process; signals, process groups and torchrun need processes of their own.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from test_experiments import choice, outcomes

from shoal import compressors, methods, problems
from shoal.cli import app, main
from shoal.experiments.run import load_result
from shoal.experiments.spec import RaceSpec

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["-n", "3", "-d", "8", "--noise", "0.1", "--lam", "0.1"]


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on standard error that says anything."""
        (line,) = [line for line in self.err.splitlines() if line.strip()]
        assert line.startswith("error: ")
        return line


@pytest.fixture
def shoal(tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., Done]]:
    """Calls the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["shoal", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(int(end.value.code or 0), *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(*words: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """The command in a process group of its own, which is also its session."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "160"} | environment
    command, pipe = [sys.executable, "-m", "shoal", *words], subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def ended(process: subprocess.Popen, timeout: float = 480) -> Done:
    """What the process said; it is killed with its group if it does not end."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Done(process.returncode, out, err)


def alive(group: int) -> list[str]:
    """The command lines of the group's processes that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has just ended
    return found


def until(condition: Callable[[], object], seconds: float = 180.0) -> bool:
    """Whether it comes true in time."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------ help and list
def test_every_option_explains_itself():
    """Commands, arguments and options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands.keys() == {"advise", "race", "run", "report", "list", "mean", "bench", "plan", "sweep", "reproduce"}
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


@pytest.mark.parametrize(
    "words", [["--help"], ["race", "--help"], ["run", "--help"], ["report", "--help"], ["list", "--help"]]
)
def test_help(shoal, words):
    done = shoal(*words)
    assert done.status == 0
    assert "Usage: " in done.out
    assert done.err == ""


def test_version_and_no_command(shoal):
    assert re.fullmatch(r"shoal \S+\n", shoal("--version").out)
    done = shoal()
    assert done.status == 2
    assert "Usage: " in done.out + done.err


def test_list_names_everything(shoal, tmp_path):
    out = shoal("list").out
    for module in (methods, compressors, problems):
        for name in module.__all__:
            assert name in out or not isinstance(getattr(module, name), type)
    assert "mushrooms" in out
    assert "2102.07845" in out
    (tmp_path / "mine.py").write_text("from shoal.methods import GD\nclass Mine(GD):\n    'What is mine.'\n")
    assert "What is mine." in shoal("list", "--with", "mine.py").out
    assert "What is mine." not in out


def test_the_default_race_can_be_copied(shoal):
    spec = RaceSpec.of(**tomllib.loads(shoal("list", "--race").out))
    assert len(spec.methods) == 9
    assert spec.problem.name == "phishing"


# ------------------------------------------------------------------------------------------------ run and report
def test_a_run_prints_its_result_and_a_report_reads_it(shoal, tmp_path):
    words = ["run", "quadratics", "Marina(Correlated(), p=0.5)", *SMALL, "--rounds", "30", "--out", "out"]
    done = shoal(*words)
    assert done.status == 0
    assert done.err.strip() == ""
    result = load_result(tmp_path / "out")
    assert result is not None
    for fact in (
        result["sha256"],
        "Marina(Correlated(), p=0.5)",
        f"{result['gamma']:.6g}",
        f"{result['up_bits']:,.0f}",
    ):
        assert fact in done.out
    assert shoal(*words[:-1], "again").out.count(result["sha256"]) == 1
    other = shoal(*words[:-1], "seeded", "--seed", "1")
    assert result["sha256"] not in other.out
    page = shoal("report", "out")
    assert page.status == 0
    assert str(tmp_path / "out" / "report.html") in page.out
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_status_3_where_the_target_was_not_reached(shoal):
    words = ["run", "quadratics", "GD()", *SMALL, "--rounds", "3"]
    assert "was not reached" in (done := shoal(*words, "--target", "1e-30", "--out", "a")).error
    assert done.status == 3
    assert "sha256" in done.out, "the result is there all the same"
    assert "diverged" in (done := shoal(*words, "--step", "1e300", "--out", "b")).error
    assert done.status == 3
    assert shoal(*words, "--target", "1e9", "--out", "c").status == 0


def test_a_folder_of_its_own_unless_one_is_named(shoal, tmp_path):
    assert shoal("run", "quadratics", "GD()", *SMALL, "--rounds", "1").status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-quadratics", folder.name)


WRONG = {
    "no method": (["run", "quadratics"], "which METHOD?"),
    "unknown problem": (["run", "nosuch", "GD()"], "no problem or file 'nosuch'"),
    "unknown method": (["run", "quadratics", "Marian()"], "Did you mean Marina?"),
    "a compressor": (["run", "quadratics", "RandK(3)"], "wrap it"),
    "code": (["run", "quadratics", "__import__('os').system('touch x')"], "only names, calls"),
    "deep nest": (["run", "quadratics", "RandK(" + "not " * 900 + "1)"], "neither a literal nor"),
    "too many coordinates": (["run", "quadratics", "EF21(TopK(99))", *SMALL], "TopK"),
    "rounds": (["run", "quadratics", "GD()", "--rounds", "0"], "rounds=0"),
    "bits": (["run", "quadratics", "GD()", "--bits", "-5"], "bits=-5"),
    "target": (["run", "quadratics", "GD()", "--target", "nan"], "target=nan"),
    "seed": (["run", "quadratics", "GD()", "--seed", "-1"], "seed=-1"),
    "step": (["run", "quadratics", "GD()", "--step", "big"], "--step big"),
    "step 0": (["run", "quadratics", "GD()", *SMALL, "--step", "0"], "step=0.0"),
    "no theorem": (["run", "quadratics", "DCGD(TopK(1))", *SMALL], "no step size from theory"),
    "multiple": (["run", "quadratics", "GD()", "--multiple", "inf"], "multiple=inf"),
    "every": (["run", "quadratics", "GD()", "--every", "0"], "every=0"),
    "chunk": (["run", "quadratics", "GD()", "--chunk", "0"], "chunk=0"),
    "PL": (["run", "phishing", "GD()", "--pl"], "no PL constant"),
    "other's setting": (["run", "quadratics", "GD()", "--split", "iid"], "split: not a setting of quadratics"),
    "dim of data": (["run", "phishing", "GD()", "-d", "3"], "dim: not a setting of phishing"),
    "alpha": (["run", "phishing", "GD()", "--split", "iid", "--alpha", "1"], "alpha"),
    "too many clients": (["run", "phishing", "GD()", "-n", "100000"], "100000"),
    "no clients": (["run", "quadratics", "GD()", "-n", "0"], "clients=0"),
    "with": (["run", "quadratics", "GD()", "--with", "nosuch.py"], "--with nosuch.py: not a Python file"),
    "with raises": (["run", "quadratics", "GD()", "--with", "raises.py"], "ZeroDivisionError"),
    "with raises lines": (["run", "quadratics", "GD()", "--with", "lines.py"], "two lines"),
    "no data": (["run", "empty.svm", "GD()"], "no rows"),
    "out is a file": (["run", "quadratics", "GD()", *SMALL, "--out", "empty.svm"], "cannot write in"),
    "out is full": (["run", "quadratics", "GD()", *SMALL, "--out", "full"], "not empty: resume it with --resume full"),
    "ranks": (["run", "quadratics", "GD()", *SMALL, "--ranks", "4"], "--ranks 4 for n=3"),
    "a channel for nobody": (
        ["run", "quadratics", "GD()", *SMALL, "--channel", "auto"],
        "--channel auto without ranks",
    ),
    "no such channel": (["run", "quadratics", "GD()", *SMALL, "--ranks", "2", "--channel", "tube"], "channel='tube'"),
    "race: ranks": (["race", "quadratics", "GD()", *SMALL, "--ranks", "4"], "--ranks 4 for n=3"),
    "race: channel": (["race", "quadratics", "GD()", *SMALL, "--channel", "sharded"], "without ranks: add --ranks 2"),
    "race: ranks, workers": (
        ["race", "quadratics", "GD()", *SMALL, "--ranks", "2", "--workers", "2"],
        "--workers 2 over",
    ),
    "negative ranks": (["run", "quadratics", "GD()", *SMALL, "--ranks", "-1"], "--ranks -1"),
    "timeout": (["run", "quadratics", "GD()", *SMALL, "--ranks", "2", "--timeout", "0"], "timeout=0.0: seconds"),
    "a timeout for nobody": (["run", "quadratics", "GD()", *SMALL, "--timeout", "5"], "--timeout 5 without ranks"),
    "race: timeout": (
        ["race", "quadratics", "GD()", *SMALL, "--ranks", "2", "--timeout", "-1"],
        "timeout=-1.0: seconds that a rank waits",
    ),
    "race: a timeout for nobody": (
        ["race", "quadratics", "GD()", *SMALL, "--timeout", "5"],
        "--timeout 5 without ranks",
    ),
    "drop": (["run", "quadratics", "Marina(RandK(2))", *SMALL, "--on-nonfinite", "drop"], "take 'skip', or a method"),
    "resume nothing": (["run", "--resume", "nosuch"], "there is no config.json"),
    "resume and more": (["run", "--resume", "full", "--rounds", "3"], "leave out rounds"),
    "resume Python's": (["run", "--resume", "full"], "resume it from Python"),
    "resume damage": (["run", "--resume", "damaged"], "is damaged"),
    "resume half": (["run", "--resume", "half"], "config.json"),
    "resume a number": (["run", "--resume", "number"], "is damaged"),
    "report nothing": (["report", "nosuch"], "is not a folder"),
    "report no results": (["report", "."], "neither race.json nor config.json"),
    "report damage": (["report", "damaged"], "not JSON"),
    "race: problem": (["race", "nosuch", "GD()"], "no problem or file 'nosuch'"),
    "race: method": (["race", "quadratics", "GD()", "Marian()"], "Did you mean Marina?"),
    "race: twice": (["race", "quadratics", "GD()", "GD( )", *SMALL], "each at most once"),
    "race: steps": (["race", "--steps", "best"], "steps.0='best'"),
    "race: seeds": (["race", "--seeds", "0"], "--seeds 0"),
    "race: workers": (["race", "--workers", "0"], "--workers 0"),
    "race: tune": (["race", "--tune", "a:b:"], "--tune a:b:: two exponents"),
    "race: tune order": (["race", "--tune", "3:1"], "LOW <= HIGH"),
    "race: target": (["race", "--target", "0"], "target=0"),
    "race: config": (["race", "--config", "nosuch.toml"], "No such file"),
    "race: config lines": (["race", "--config", "lines.py"], "--config lines.py"),
    "race: config bytes": (["race", "--config", "bytes.toml"], "--config bytes.toml"),
    "race: config field": (["race", "--config", "field.toml"], "color"),
    "race: config problem": (["race", "--config", "problem.toml"], "problem='phishing'"),
    "race: no theorem": (["race", "quadratics", "DCGD(TopK(1))", *SMALL, "--steps", "theory"], "add --steps tuned"),
    "race: resume": (["race", "--resume", "full"], "holds no race"),
    "race: resume and more": (["race", "--resume", "full", "--seeds", "2"], "leave out seeds"),
    "race: out is full": (["race", "quadratics", "GD()", *SMALL, "--out", "full"], "is not empty"),
}


@pytest.fixture
def troubles(tmp_path) -> None:
    """Files and folders for the table above."""
    texts = {
        "empty.svm": "# nothing\n",
        "raises.py": "1 / 0\n",
        "lines.py": "raise ValueError('''two\nlines''')\n",
        "field.toml": 'color = "red"\n',
        "problem.toml": 'problem = "phishing"\n',
        "full/config.json": '{"format": 1, "kind": "run", "method": "GD()"}',
        "damaged/config.json": "{",
        "half/config.json": '{"spec": {"method": "GD()"}}',
        "number/config.json": '{"spec": {"problem": 3}}',
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(("words", "complaint"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("troubles")
def test_what_is_wrong_is_one_line_and_leaves_nothing(shoal, tmp_path, words, complaint):
    def there() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    before, folders = there(), {p for p in tmp_path.rglob("*") if p.is_dir()}
    done = shoal(*words)
    assert done.status == 1
    assert complaint in done.error
    assert "Traceback" not in done.err
    assert there() == before
    assert {p for p in tmp_path.rglob("*") if p.is_dir() and p.name != "__pycache__"} == folders


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["run", "quadratics", "GD()", "--nope"],
        ["run", "quadratics", "GD()", "--rounds", "many"],
        ["report"],
    ],
)
def test_what_is_no_command_has_status_2(shoal, tmp_path, words):
    """Words that cannot be read are Typer's to refuse: its usage message, nothing on standard output."""
    done = shoal(*words)
    assert done.status == 2
    assert "Usage: " in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not list(tmp_path.iterdir())


def test_a_finished_run_can_be_run_again_to_the_same_end(shoal, tmp_path):
    assert shoal("run", "quadratics", "GD()", *SMALL, "--rounds", "9", "--out", "a").status == 0
    (tmp_path / "a" / "result.json").rename(tmp_path / "before.json")
    assert shoal("run", "--resume", "a").status == 0
    first = json.loads((tmp_path / "before.json").read_text())
    again = load_result(tmp_path / "a")
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


# ------------------------------------------------------------------------------------------------ signals
SLOW = '''
"""Quadratics that take their time where the environment says so."""
import os, time
from shoal.problems import Quadratics

class Slow(Quadratics):
    def evaluate(self, x, clients):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().evaluate(x, clients)
'''
SLOWLY = ["run", "Slow(n=3, d=8, noise=0.1, lam=0.1)", "Marina(Correlated(), p=0.3)", "--with", "slow.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_can_be_finished(shoal, tmp_path, number):
    (tmp_path / "slow.py").write_text(SLOW)
    process = start(*SLOWLY, "--rounds", "200", "--out", "a b", cwd=tmp_path, SLOW="0.05")
    assert until(lambda: (tmp_path / "a b" / "metrics.jsonl").exists())
    assert until(lambda: (tmp_path / "a b" / "metrics.jsonl").stat().st_size)
    os.killpg(process.pid, number)
    done = ended(process)
    if number == signal.SIGINT:
        assert done.status == 130
        assert done.error == "error: interrupted; go on with: shoal run --resume 'a b'"
    else:
        assert done.status == 143
    assert len(list((tmp_path / "a b").glob("checkpoint-*.shoal"))) == 2
    assert alive(process.pid) == []
    assert shoal("run", "--resume", "a b").status == 0
    assert shoal(*SLOWLY, "--rounds", "200", "--out", "whole").status == 0
    one, two = load_result(tmp_path / "a b"), load_result(tmp_path / "whole")
    assert one["sha256"] == two["sha256"]
    assert one["up_bits"] == two["up_bits"]


# ------------------------------------------------------------------------------------------------ races
RACE = ["race", "quadratics", "Marina(RandK(2))", "GD()", *SMALL, "--rounds", "60", "--target", "1e-2"]
RACE += ["--seeds", "2", "--tune=-1:2", "--workers", "2"]


@pytest.fixture(scope="module")
def raced(tmp_path_factory) -> tuple[Done, Path]:
    """A small race, run once for this file."""
    folder = tmp_path_factory.mktemp("race")
    return ended(start(*RACE, "--out", "out", cwd=folder)), folder / "out"


def test_a_race_ends_with_a_leaderboard_and_a_report(raced):
    done, folder = raced
    assert done.status == 0, done.err
    assert str(folder / "report.html") in done.out
    for name in ("report.html", "figure.png", "figure.pdf", "results.parquet", "leaderboard.json", "race.json"):
        assert (folder / name).stat().st_size > 0
    facts = json.loads((folder / "race.json").read_text())
    assert facts["status"] == "done"
    assert facts["methods"] == ["Marina(RandK(2))", "GD()"]
    assert facts["command"] == "shoal " + " ".join(RACE).replace("Marina(RandK(2))", "'Marina(RandK(2))'").replace(
        "GD()", "'GD()'"
    )
    for run in (folder / "runs").iterdir():
        result = load_result(run)
        for name, (value, status) in result["seen"].items():
            assert 0 < value <= result["smoothness"][name][0] * (1 + 1e-6)
            assert status == "estimate"
    assert "; seen along the runs: L_- " in done.out
    assert done.err.count("done: ") == 4, "two methods under two step rules"


def test_a_race_tunes_by_its_rule_and_the_leaderboard_says_what_the_runs_say(raced):
    """The entry's multiple is the choice among the tries, its bits the median over the final runs."""
    _, folder = raced
    runs = list(outcomes(folder).values())
    entries = json.loads((folder / "leaderboard.json").read_text())["entries"]
    assert {(e["label"], e["step"]) for e in entries} == {
        (m, s) for m in (RACE[2], RACE[3]) for s in ("theory", "tuned")
    }
    for entry in entries:
        mine = [r for r in runs if (r["label"], r["step"]) == (entry["label"], entry["step"])]
        finals, tries = [r for r in mine if not r["trial"]], [r for r in mine if r["trial"]]
        assert sorted(f["seed"] for f in finals) == [0, 1]
        assert {f["multiple"] for f in finals} == {entry["multiple"]} == {choice(tries) if tries else 1.0}
        assert len(tries) == (4 if entry["step"] == "tuned" else 0)
        assert all((t["seed"], t["rounds"]) == (0, 15) for t in tries), "a quarter of the budget"
        spent = sorted(f["result"]["up_bits"] for f in finals if f["result"]["stopped"] == "target")
        assert entry["reached"] == len(spent)
        if len(spent) == 2:
            assert entry["bits"] == {"median": sum(spent) / 2, "low": spent[0], "high": spent[1]}
        assert {f["result"]["gamma"] for f in finals} == {entry["gamma"]}


def test_a_run_of_a_race_is_the_run_of_its_settings(raced, shoal):
    """The same bits as `shoal run` gives alone."""
    words = ["run", "quadratics", "Marina(RandK(2))", *SMALL, "--rounds", "60", "--target", "1e-2", "--seed", "1"]
    out = shoal(*words, "--out", "alone").out
    assert outcomes(raced[1])["00-marina-randk-2__theory-theory__s1"]["result"]["sha256"] in out


@pytest.mark.slow
def test_a_finished_race_is_resumed_without_running_anything(raced):
    _, folder = raced
    written = {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")}
    process = start("race", "--resume", str(folder), cwd=folder.parent)
    assert ended(process).status == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("result.json")} == written
    assert len(written) == 16, "two theory runs, four tries and two final runs a method"


LONG = ["race", "quadratics", "Marina(RandK(2))", "GD()", "-n", "3", "-d", "8", "--lam", "1e-4", "--rounds", "2000"]
LONG += ["--target", "1e-30", "--seeds", "1", "--tune", "0:1", "--workers", "2"]


@pytest.fixture(scope="module")
def long_race(tmp_path_factory) -> dict[str, str]:
    """SHA-256 of every run of the race that nobody interrupts; it does not reach its target."""
    folder = tmp_path_factory.mktemp("long")
    done = ended(start(*LONG, "--out", "out", cwd=folder))
    assert done.status == 3
    assert "no method reached the target" in done.err
    return shas(folder / "out")


def shas(folder: Path) -> dict[str, str]:
    """Name of a run -> the SHA-256 of its last iterate."""
    return {name: run["result"]["sha256"] for name, run in outcomes(folder).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "moment"),
    [
        ("INT to the group", "workers start"),
        ("INT to the race", "runs begin"),
        ("KILL to the group", "runs begin"),
        ("KILL to the race", "workers start"),  # they are still importing, and do not know yet whom to miss
        ("KILL to the race", "a run is done"),
    ],
)
def test_a_killed_race_leaves_no_process_and_ends_at_the_same_bits(tmp_path, long_race, moment, blow):
    process, out = start(*LONG, "--out", "out", cwd=tmp_path), tmp_path / "out"
    moments = {
        "workers start": lambda: sum("spawn_main" in line for line in alive(process.pid)) >= 2,
        "runs begin": lambda: list(out.glob("runs/*/metrics.jsonl")),
        "a run is done": lambda: list(out.glob("runs/*/result.json")),
    }
    assert until(moments[moment])
    number = getattr(signal, f"SIG{blow.split()[0]}")
    if blow.endswith("group"):
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    done = ended(process)
    if number == signal.SIGINT:
        assert done.status == 130
        assert "error: interrupted; go on with: shoal race --resume out" in done.err
        assert json.loads((out / "race.json").read_text())["status"] == "interrupted"
    assert until(lambda: not alive(process.pid), 60), alive(process.pid)
    again = ended(start("race", "--resume", "out", cwd=tmp_path))
    assert again.status == 3, again.err
    assert shas(out) == long_race
    assert json.loads((out / "race.json").read_text())["status"] == "done"


# ------------------------------------------------------------------------------------------------ ranks
@pytest.mark.slow
def test_ranks_print_what_the_simulator_prints(shoal, tmp_path):
    words = ["run", "quadratics", "Marina(Correlated(), p=0.5)", *SMALL, "--rounds", "30"]
    alone = shoal(*words, "--out", "alone")
    there = ended(start(*words, "--ranks", "2", "--out", "ranks", cwd=tmp_path))
    assert there.status == 0, there.err
    one, two = load_result(tmp_path / "alone"), load_result(tmp_path / "ranks")
    assert one["moved_bytes"] == []
    assert len(two["moved_bytes"]) == 2
    assert {**one, "seconds": 0} == {**two, "seconds": 0, "moved_bytes": []}
    assert one["sha256"] in alone.out
    assert one["sha256"] in there.out
    assert f"seen along the run: {one['seen']['minus'][0]:.4g}, " in there.out
    assert there.out.count("sha256(x)") == 1, "one rank speaks"
    moved, payload = sum(two["moved_bytes"]), round(two["up_bits"] / 8 * 3)
    said = " ".join(there.out.split())
    assert f"2 ranks over gloo; moved {moved:,} bytes, at most {max(two['moved_bytes']):,} by one" in said
    assert f"payload up {payload:,}, framed" in said
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("alone", "ranks")]
    for a, b in zip(*lines, strict=True):
        assert {**json.loads(a), "seconds": 0} == {**json.loads(b), "seconds": 0}


@pytest.mark.slow
def test_ranks_have_the_simulators_exit_status(tmp_path):
    words = ["run", "quadratics", "GD()", *SMALL, "--rounds", "3", "--ranks", "2", "--target", "1e-30", "--out", "out"]
    done = ended(start(*words, cwd=tmp_path))
    assert done.status == 3
    assert "error: the target" in done.err
    assert "Traceback" not in done.err
    assert math.isfinite(load_result(tmp_path / "out")["grad_norm_sq"])
