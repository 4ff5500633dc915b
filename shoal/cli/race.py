"""shoal race: several methods on one problem, a leaderboard and a report."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import time
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from shoal import report
from shoal.cli.options import (
    PL,
    PROBLEMS,
    UNREACHED,
    Alpha,
    Bits,
    ChannelKind,
    Clients,
    Data,
    DataRows,
    Dim,
    Lam,
    Loss,
    Noise,
    NumberOfRanks,
    Out,
    ProblemSeed,
    Rounds,
    Similarity,
    Split,
    Target,
    Timeout,
    With,
    again,
    app,
    channel_given,
    checked_ranks,
    err_console,
    fail,
    new_folder,
    out_console,
    spoken,
    stored_spec,
    timeout_given,
)  # fmt: skip
from shoal.core import Problem
from shoal.errors import ConfigError
from shoal.experiments.folder import make_folder, versions
from shoal.experiments.race import Course, News, check
from shoal.experiments.race import race as run_race
from shoal.experiments.spec import ProblemSpec, RaceSpec
from shoal.runtimes import supervisor
from shoal.runtimes.ranks import Make, Ranks
from shoal.runtimes.replicated import connected, started_by_torchrun
from shoal.theory import Smoothness

Steps = Annotated[str | None, typer.Option(help="theory, tuned, or theory,tuned.")]
Tune = Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="Tuning tries 2^LOW..2^HIGH times theory's step.")]


@app.command()
def race(
    context: typer.Context,
    problem: Annotated[str | None, typer.Argument(help=PROBLEMS + " Left out: the default race's.")] = None,
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="METHODS...", help="Expressions such as 'Marina(PermK())'.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file such as `shoal list --race` prints.")] = None,
    clients: Clients = None,
    split: Split = None,
    alpha: Alpha = None,
    loss: Loss = None,
    lam: Lam = None,
    dim: Dim = None,
    noise: Noise = None,
    problem_seed: ProblemSeed = None,
    data: Data = None,
    rows: DataRows = None,
    similarity: Similarity = None,
    rounds: Rounds = None,
    bits: Bits = None,
    target: Target = None,
    steps: Steps = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds: 0, 1, ...")] = None,
    tune: Tune = None,
    pl: PL = False,
    every: Annotated[int | None, typer.Option(help="Measure f and ‖∇f‖² every so many rounds.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core).")] = None,
    ranks: NumberOfRanks = 0,
    channel: ChannelKind = None,
    timeout: Timeout = None,
    with_file: With = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Finish the race in this folder; what is done stays.")] = None,
) -> None:
    """Several methods on one problem: who gets to the target on the fewest bits, and why one can believe it.

    Alone, it runs the default race on phishing. Anything given replaces that setting:
    [bold]shoal race[/bold]
    [bold]shoal race mushrooms "Marina(PermK())" "EF21(TopK(5))" "GD()" --clients 10 --rounds 2000 --target 1e-6[/bold]
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: at least one process.")
    if workers is not None and (ranks or started_by_torchrun()):
        raise ConfigError(f"--workers {workers} over ranks: these do one run after the other together; leave it out.")
    make, seconds = channel_given(channel, ranks), timeout_given(timeout, ranks)
    if resume is not None:
        spec, folder = (
            RaceSpec.of(**stored_spec(context, resume, "race", {"workers", "ranks", "channel", "timeout"})),
            resume,
        )
    else:
        if seeds is not None and seeds < 1:
            raise ConfigError(f"--seeds {seeds}: at least one.")
        described = {
            "clients": clients, "dim": dim, "noise": noise, "lam": lam, "loss": loss, "split": split, "alpha": alpha,
            "seed": problem_seed, "data": data, "rows": rows, "similarity": similarity,
        }  # fmt: skip
        changed = {
            "methods": tuple(methods) if methods else None, "rounds": rounds, "bits": bits, "target": target,
            "steps": tuple(steps.split(",")) if steps else None, "every": every, "pl": pl or None,
            "seeds": tuple(range(seeds)) if seeds is not None else None, "tune": _range(tune) if tune else None,
            "files": tuple(with_file) if with_file else None,
        }  # fmt: skip
        spec = _spec(_toml(config) if config else tomllib.loads(default_race()), problem, described, changed)
        folder = out or new_folder("race", spec.problem.name)
    resuming = resume is not None
    if started_by_torchrun():
        _along(spec, [spec.problem.build(spec.files)], None, folder, resuming, make, seconds)
        return
    if ranks:
        torch.set_num_threads(1)  # before anything computes: a fork has no threads but its own
        course = check(spec)  # once, for all ranks
        held, known = [course.problem], course.smoothness
        del course
        checked_ranks(ranks, held[0].n)
        if not resuming:
            make_folder(folder)
        # Run follows run, each over a channel of its own: who is killed between them has no round to stand at again.
        work = partial(spoken, partial(_along, spec, held, known, folder, resuming, make, seconds))
        if status := supervisor.launch(ranks, work, restarts=0):
            raise SystemExit(status)
    else:
        _race(spec, folder, resuming, workers, lambda: check(spec))
    _judge(report.load(folder), spec)


def _spec(base: dict[str, Any], problem: str | None, described: dict[str, Any], changed: dict[str, Any]) -> RaceSpec:
    """The file's race with what was given in place of what it says."""
    held = base.get("problem", {})
    if not isinstance(held, dict):
        raise ConfigError(f"problem={held!r}: in a race's file it is a table, [problem] with name = ... below it.")
    same = problem is None or problem == held.get("name")
    facts = (held if same else {"name": problem}) | {k: v for k, v in described.items() if v is not None}
    changed = {k: v for k, v in changed.items() if v is not None}
    if not same or "methods" in changed:
        base.pop("title", None)  # it spoke of another race
    if "bits" in changed and "rounds" not in changed:
        base.pop("rounds", None)  # the budget that was asked for replaces the file's
    return RaceSpec.of(**base | changed | {"problem": ProblemSpec.of(**facts)})


def default_race() -> str:
    """The text of the default race's file."""
    return (files("shoal") / "races" / "default.toml").read_text()


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: {error}.") from None


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(-?\d+):(-?\d+)", text)
    if not found:
        raise ConfigError(f"--tune {text}: two exponents, e.g. --tune 0:19.")
    return int(found[1]), int(found[2])


def _along(
    spec: RaceSpec,
    held: list[Problem],
    known: Smoothness | None,
    folder: Path,
    resuming: bool,
    make: Make,
    timeout: float,
) -> None:
    """One rank's part of a race on the problem that is `held`, and taken out; `known`: its constants."""
    shared = json.loads(spec.model_dump_json()) | {"versions": versions()}
    with connected(held[0].n, shared, make, timeout) as lines:
        ranks = Ranks(lines.peers, make)
        _race(spec, folder, resuming, None, lambda: check(spec, ranks, held, known), ranks)


def _race(
    spec: RaceSpec,
    folder: Path,
    resuming: bool,
    workers: int | None,
    checked: Callable[[], Course],
    ranks: Ranks | None = None,
) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may start background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    if ranks is not None and not ranks.first:
        try:
            run_race(spec, folder, again(), ranks=ranks, course=checked())
        except KeyboardInterrupt:  # the first rank says so for all
            raise SystemExit(130) from None
        return
    began = time.monotonic()
    if spec.files:
        err_console.print(f"running code from {escape(', '.join(spec.files))}: trusted, not sandboxed", highlight=False)
    with err_console.status("reading the data, finding constants"):
        course = checked()  # a wrong race is one line, before anything is drawn
    if not resuming:
        make_folder(folder)
    bars: dict[str, TaskID] = {}
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(), console=err_console,
    ) as progress:  # fmt: skip
        step = progress.add_task("checking", total=1.0, news="")

        def on_step(text: str) -> None:
            progress.update(step, description=escape(text))

        def on_job(job: str, fraction: float) -> None:
            progress.update(step, description="racing", completed=1.0)
            if fraction == 0.0:
                bars[job] = progress.add_task(escape(job), total=1.0, news="waiting", start=False)
            else:
                progress.update(bars[job], completed=1.0, news="done")
                progress.stop_task(bars[job])
                if not err_console.is_terminal:
                    err_console.print(f"done: {escape(job)} ({time.monotonic() - began:.0f} s)", highlight=False)

        def on_news(news: News) -> None:
            progress.start_task(bars[news.job])
            norm = f"{news.grad_norm_sq:.1e}" if math.isfinite(news.grad_norm_sq) else "diverged"
            progress.update(bars[news.job], completed=news.fraction, news=f"{news.what}: ‖∇f‖² {norm}")

        try:
            run_race(spec, folder, again(), resuming, workers, on_news, on_job, on_step, ranks, course)
        except KeyboardInterrupt:
            progress.stop()
            if (folder / "race.json").exists():
                fail(f"interrupted; go on with: shoal race --resume {shlex.quote(str(folder))}", 130)
            raise
    _show(folder, time.monotonic() - began)


def _show(folder: Path, seconds: float) -> None:
    result = report.load(folder)
    report.print_leaderboard(result, out_console)
    page = _written(folder)
    out_console.print(
        f"\n{len(result.runs)} runs in {seconds:.0f} s; all of it: {escape(str(folder))}",
        highlight=False,
        soft_wrap=True,
    )
    if page:
        out_console.print(f"[bold]report:[/bold] {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


def _judge(result: report.Race, spec: RaceSpec) -> None:
    """Exit status 3 where nobody got there."""
    entries = report.leaderboard(result)
    if not any(entry.reached for entry in entries):
        best = min(entries, key=lambda e: e.grad_norm_sq if math.isfinite(e.grad_norm_sq) else math.inf)
        fail(f"no method reached the target ‖∇f‖² <= {spec.target:g}; the nearest was {best.label} ({best.step} steps) "
             f"at {best.grad_norm_sq:.3g}. Raise --rounds or --bits, or --target.", UNREACHED)  # fmt: skip


def _written(folder: Path) -> Path | None:
    try:
        return report.write(folder)
    except ConfigError as error:  # the extra is missing: the leaderboard stands, the page does not
        err_console.print(f"[yellow]no report.html:[/yellow] {escape(str(error))}", highlight=False, soft_wrap=True)
        return None
