"""The command line: race, run, report, list. Thin: what a command does stands in experiments and report."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import tomllib
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoal import __version__, compressors, data, methods, problems, report
from shoal.core import Method, Row
from shoal.errors import ConfigError, ShoalError
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import digest
from shoal.experiments.race import News
from shoal.experiments.race import race as run_race
from shoal.experiments.run import Run, simulate
from shoal.experiments.spec import ProblemSpec, RaceSpec, RunSpec
from shoal.runtimes import replicated

UNREACHED = 3  # exit status of a race whose target no method reached, and of a run with a target that did not
app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Distributed nonconvex optimization with compressed messages: compare methods and compressors by the bits they "
    "really send. Start with [bold]shoal race[/bold], or [bold]shoal list[/bold] for what there is.",
)  # fmt: skip
out_console, err_console = Console(), Console(stderr=True)

ProblemName = Annotated[
    str, typer.Argument(help="quadratics, phishing, mushrooms, a LIBSVM file, or an expression of a --with problem.")
]
Clients = Annotated[int | None, typer.Option("--clients", "-n", help="Number of clients n.")]
Split = Annotated[str | None, typer.Option(help="How rows are shared out: iid, label, dirichlet, contiguous.")]
Alpha = Annotated[float | None, typer.Option(help="Dirichlet parameter of --split dirichlet; smaller is more uneven.")]
Loss = Annotated[
    str | None,
    typer.Option(help="logistic (with the regularizer lam sum x²/(1+x²)) or nonconvex (the MARINA paper's (1-s(yz))²)."),
]
Lam = Annotated[float | None, typer.Option(help="Weight of the regularizer (quadratics: strong convexity of f).")]
Dim = Annotated[int | None, typer.Option("--dim", "-d", help="quadratics: number of coordinates d.")]
Noise = Annotated[float | None, typer.Option(help="quadratics: how much clients differ; L_± is about this.")]
ProblemSeed = Annotated[int | None, typer.Option(help="Seed of the split or of the quadratics.")]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="FILE", help="A Python file with your own Method, Compressor or Problem classes. It is run: trust it."),
]
Rounds = Annotated[int | None, typer.Option(help="Budget in rounds.")]
Bits = Annotated[float | None, typer.Option(help="Budget in uplink payload bits a client.")]
Target = Annotated[float | None, typer.Option(help="Stop at ‖∇f‖² <= this.")]
Out = Annotated[Path | None, typer.Option(help="Folder of results; must be empty or new.")]
PL = Annotated[bool, typer.Option("--pl", help="Step sizes of the PL theorems (needs a known PL constant).")]
Every = Annotated[int, typer.Option(help="Measure f and ‖∇f‖² every so many rounds.")]


def fail(error: Exception | str, status: int = 1) -> NoReturn:
    """One clear line on standard error, and out."""
    err_console.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
    raise SystemExit(status)


def _folder(kind: str, name: str) -> Path:
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-").lower() or "problem"
    return Path(f"{kind}s") / f"{datetime.now():%Y%m%d-%H%M%S}-{stem}"


def _command(words: list[str]) -> str:
    return "shoal " + shlex.join(words)


# ------------------------------------------------------------------------------------------------ run
@app.command()
def run(
    problem: ProblemName = "phishing",
    method: Annotated[str, typer.Argument(help="An expression such as 'Marina(Correlated())' or 'EF21(TopK(0.05))'.")] = "",
    clients: Clients = None,
    rounds: Rounds = None,
    bits: Bits = None,
    target: Target = None,
    seed: Annotated[int, typer.Option(help="Seed of the run's random numbers.")] = 0,
    step: Annotated[str, typer.Option(help="'theory' or a number.")] = "theory",
    multiple: Annotated[float, typer.Option(help="Times the step size.")] = 1.0,
    pl: PL = False,
    ranks: Annotated[int, typer.Option(help="Processes under torchrun with gloo on this machine; 0: the simulator.")] = 0,
    dim: Dim = None, noise: Noise = None, split: Split = None, alpha: Alpha = None, loss: Loss = None, lam: Lam = None,
    problem_seed: ProblemSeed = None,
    every: Every = 1,
    chunk: Annotated[int | None, typer.Option(help="Clients at a time (memory; the bits do not depend on it).")] = None,
    with_file: With = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Finish the run in this folder, to the identical iterate.")] = None,
    context: typer.Context = None,  # type: ignore[assignment]
) -> None:  # fmt: skip
    """One run. Prints the step size with its theorem, the result, and the SHA-256 of the final iterate.

    [bold]shoal run phishing "Marina(Correlated())" --clients 20 --rounds 500[/bold]
    [bold]shoal run quadratics "EF21(TopK(10))" -n 6 -d 200 --noise 0.3 --lam 0.01 --rounds 300 --ranks 3[/bold]
    """
    if resume is not None:
        _alone(context, {"ranks"})
        spec, out = RunSpec.of(**_stored(resume, "run")), resume
    else:
        if not method:
            raise ConfigError("which METHOD? For example: shoal run phishing 'Marina(Correlated())' --rounds 500")
        described = _problem(problem, clients, dim, noise, lam, loss, split, alpha, problem_seed)
        spec = RunSpec.of(
            problem=described, method=method, rounds=1000 if rounds is None and bits is None else rounds, bits=bits,
            target=target, seed=seed, step=_number_or(step, "theory"), multiple=multiple, pl=pl, every=every, chunk=chunk,
            files=tuple(with_file or ()),
        )  # fmt: skip
        out = out or _folder("run", spec.problem.name)
    if ranks and not replicated.started_by_torchrun():
        if ranks < 0:
            raise ConfigError(f"--ranks {ranks}: a number of processes, or 0 for the simulator.")
        _check_run(spec, ranks)
        arguments = [*sys.argv[1:], *([] if "--out" in sys.argv or resume else ["--out", str(out)])]
        raise SystemExit(replicated.launch(ranks, arguments))
    _run(spec, out, resuming=resume is not None)


def _alone(context: typer.Context, beside: set[str]) -> None:
    """Refuse what --resume would have to ignore: the folder says all of it."""
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    extra = sorted(set(given) - beside - {"resume"})
    if extra:
        raise ConfigError(f"--resume takes its settings from the folder: leave out {', '.join(extra).replace('_', '-')}.")


def _check_run(spec: RunSpec, ranks: int) -> None:
    """What can be wrong is said here, once, and not by every rank."""
    problem = spec.problem.build(spec.files)
    parse(spec.method, known_names(spec.files), Method).check(problem.n, problem.d)
    if ranks > problem.n:
        raise ConfigError(f"--ranks {ranks} for n={problem.n} clients: a rank hosts at least one.")


def _stored(folder: Path, kind: str) -> dict[str, Any]:
    name = "config.json" if kind == "run" else "race.json"
    file = folder / name
    if not file.is_file():
        raise ConfigError(f"{folder} holds no {kind}: there is no {name}.")
    try:
        held = json.loads(file.read_text())
        if "spec" not in held:
            raise ConfigError(f"{file} was not written by `shoal {kind}`: it cannot be resumed from the command line.")
        return held["spec"]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}.") from None


def _number_or(text: str, word: str) -> float | str:
    if text == word:
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--step {text}: 'theory' or a number.") from None


def _problem(
    name: str, clients: int | None, dim: int | None, noise: float | None, lam: float | None, loss: str | None,
    split: str | None, alpha: float | None, seed: int | None,
) -> ProblemSpec:  # fmt: skip
    return ProblemSpec.of(
        name=name, clients=clients, dim=dim, noise=noise, lam=lam, loss=loss, split=split, alpha=alpha, seed=seed
    )


def _run(spec: RunSpec, out: Path, resuming: bool) -> None:
    torch.set_num_threads(1)
    problem, names = spec.problem.build(spec.files), known_names(spec.files)
    method = parse(spec.method, names, Method)
    stored = json.loads(spec.model_dump_json())
    options: dict[str, Any] = {
        "rounds": spec.rounds, "bits": spec.bits, "target": spec.target, "seed": spec.seed, "step": spec.step,
        "multiple": spec.multiple, "pl": spec.pl, "every": spec.every, "chunk": spec.chunk, "facts": {"spec": stored},
    }  # fmt: skip
    if replicated.started_by_torchrun():
        problem.smoothness()
        with replicated.connected(problem.n, digest(stored)) as channel:
            first = channel.rank == 0
            place = {"out": out, "resume": resuming} if first else {}
            run = simulate(problem, method, channel=channel, **place, **options)
            moved = channel.meter.moved
        if first:
            _show(run, out, f"{len(channel.shares)} ranks over gloo; this rank moved {moved:,} bytes")
    else:
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[norm]}"),
            TimeElapsedColumn(), console=err_console, transient=True,
        ) as bar:  # fmt: skip
            task = bar.add_task("compiling kernels where needed", total=1.0, norm="")
            run = simulate(problem, method, out=out, resume=resuming, record=_follow(bar, task, spec), **options)
        _show(run, out, "")
    if run.stopped == "diverged":
        fail(f"the run diverged at round {run.rows[-1].round} ({run.note}); take a smaller step.", UNREACHED)
    if spec.target is not None and run.stopped != "target":
        fail(f"the target ‖∇f‖² <= {spec.target:g} was not reached: {run.rows[-1].grad_norm_sq:.3g} after "
             f"{run.rows[-1].round} rounds; raise the budget, or try --multiple 4.", UNREACHED)  # fmt: skip


def _follow(bar: Progress, task: TaskID, spec: RunSpec) -> Any:
    last = 0.0

    def tell(row: Row) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            share = max(row.round / spec.rounds if spec.rounds else 0.0, row.up_bits / spec.bits if spec.bits else 0.0)
            bar.update(task, completed=min(share, 1.0), description=spec.method, norm=f"‖∇f‖² {row.grad_norm_sq:.2e}")

    return tell


def _show(run: Run, out: Path, place: str) -> None:
    last, table = run.rows[-1], Table(show_header=False, box=None, pad_edge=False)
    used = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in run.step.constants.items()}
    lines = {
        "method": compact(run.method),
        "step size": f"{run.gamma:.6g}, theory {run.step.gamma:.6g}: {run.step.theorem}",
        "constants": ", ".join(f"{k} = {v}" for k, v in used.items() if k != "source" and v),
        "stopped": f"{run.stopped} after {last.round} rounds, {last.seconds:.2f} s" + (f" ({run.note})" if run.note else ""),
        "f": f"{last.value:.9g}",
        "‖∇f‖²": f"{last.grad_norm_sq:.6g}",
        "bits a client": f"up {last.up_bits:,.0f} (framed {last.up_framed_bits:,.0f}), down {last.down_bits:,.0f} "
        f"(framed {last.down_framed_bits:,.0f})",
        "sha256(x)": run.sha256,
        "folder": str(out),
    }  # fmt: skip
    if place:
        lines["place"] = place
    for name, value in lines.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    Console(width=max(out_console.width, 110) if not out_console.is_terminal else None).print(table)


# ------------------------------------------------------------------------------------------------ race
@app.command()
def race(
    problem: Annotated[str | None, typer.Argument(help="As for `shoal run`; left out: the default race's.")] = None,
    methods_: Annotated[
        list[str] | None, typer.Argument(metavar="METHODS...", help="Expressions such as 'Marina(PermK())'. Left out: the default race's.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file such as the default race's (`shoal list --race`).")] = None,
    clients: Clients = None, split: Split = None, alpha: Alpha = None, loss: Loss = None, lam: Lam = None,
    dim: Dim = None, noise: Noise = None, problem_seed: ProblemSeed = None,
    rounds: Rounds = None,
    bits: Bits = None,
    target: Target = None,
    steps: Annotated[str | None, typer.Option(help="theory, tuned, or theory,tuned.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds: 0, 1, ...")] = None,
    tune: Annotated[str | None, typer.Option(metavar="LOW:HIGH", help="Tuning tries 2^LOW..2^HIGH times the theory's step.")] = None,
    pl: PL = False,
    every: Annotated[int | None, typer.Option(help="Measure f and ‖∇f‖² every so many rounds.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes (default: one a core).")] = None,
    with_file: With = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option(help="Finish the race in this folder; finished runs are not repeated.")] = None,
    context: typer.Context = None,  # type: ignore[assignment]
) -> None:  # fmt: skip
    """Several methods on one problem: who gets to the target on the fewest bits, and why one can believe it.

    Alone, it runs the default race on phishing. Anything given replaces that setting:
    [bold]shoal race[/bold]
    [bold]shoal race mushrooms "Marina(PermK())" "EF21(TopK(5))" "GD()" --clients 10 --rounds 2000 --target 1e-6[/bold]
    """
    if resume is not None:
        _alone(context, {"workers"})
        spec, folder = RaceSpec.of(**_stored(resume, "race")), resume
    else:
        base = _toml(config) if config else tomllib.loads(default_race())
        same = problem is None or problem == base.get("problem", {}).get("name")
        given = {"clients": clients, "dim": dim, "noise": noise, "lam": lam, "loss": loss, "split": split, "alpha": alpha,
                 "seed": problem_seed}  # fmt: skip
        described = (base.get("problem", {}) if same else {"name": problem}) | {k: v for k, v in given.items() if v is not None}
        if seeds is not None and seeds < 1:
            raise ConfigError(f"--seeds {seeds}: at least one.")
        changed = {
            "methods": tuple(methods_) if methods_ else None, "rounds": rounds, "bits": bits, "target": target,
            "steps": tuple(steps.split(",")) if steps else None, "every": every, "pl": pl or None,
            "seeds": tuple(range(seeds)) if seeds is not None else None, "tune": _range(tune) if tune else None,
            "files": tuple(with_file) if with_file else None,
        }  # fmt: skip
        if not same or methods_:
            base.pop("title", None)
        if bits is not None and rounds is None:
            base.pop("rounds", None)  # the budget that was asked for replaces the default's
        values = base | {k: v for k, v in changed.items() if v is not None} | {"problem": ProblemSpec.of(**described)}
        spec = RaceSpec.of(**values)
        folder = out or _folder("race", spec.problem.name)
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: at least one process.")
    _race(spec, folder, resume is not None, workers)


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


def _race(spec: RaceSpec, folder: Path, resuming: bool, workers: int | None) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may start background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    began, words = time.monotonic(), sys.argv[1:]
    if spec.files:
        err_console.print(f"running code from {', '.join(spec.files)}: trusted, not sandboxed", highlight=False)
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
            run_race(spec, folder, _command(words), resuming, workers, on_news, on_job, on_step)
        except KeyboardInterrupt:
            progress.stop()
            if (folder / "race.json").exists():
                fail(f"interrupted; go on with: shoal race --resume {shlex.quote(str(folder))}", 130)
            raise
    _close_race(folder, spec, time.monotonic() - began)


def _close_race(folder: Path, spec: RaceSpec, seconds: float) -> None:
    result = report.load(folder)
    report.print_leaderboard(result, out_console)
    page = _written(folder)
    out_console.print(f"\n{len(result.runs)} runs in {seconds:.0f} s; all of it: {folder}", highlight=False, soft_wrap=True)
    if page:
        out_console.print(f"[bold]report:[/bold] {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)
    if not any(run.stopped == "target" for run in result.runs):
        best = min(result.runs, key=lambda r: r.final("grad_norm_sq") if math.isfinite(r.final("grad_norm_sq")) else math.inf)
        fail(f"no method reached the target ‖∇f‖² <= {spec.target:g}; the nearest was {best.label} at "
             f"{best.final('grad_norm_sq'):.3g}. Raise --rounds or --bits, or --target.", UNREACHED)  # fmt: skip


def _written(folder: Path) -> Path | None:
    try:
        return report.write(folder)
    except ConfigError as error:  # the extra is missing: the leaderboard stands, the page does not
        err_console.print(f"[yellow]no report.html:[/yellow] {escape(str(error))}", highlight=False, soft_wrap=True)
        return None


# ------------------------------------------------------------------------------------------------ report, list
@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="The folder of a race or of a run, finished or interrupted.")],
) -> None:
    """Read a folder of results again: the leaderboard, report.html, and the figures."""
    result = report.load(folder)
    report.print_leaderboard(result, out_console)
    page = report.write(folder)
    out_console.print(f"[bold]report:[/bold] {escape(str(page.resolve()))}", highlight=False, soft_wrap=True)


@app.command("list")
def list_command(
    race: Annotated[bool, typer.Option("--race", help="Print the default race's file instead, to copy and change.")] = False,
    with_file: With = None,
) -> None:
    """Methods, compressors and problems: a line each, with the paper."""
    if race:
        out_console.print(default_race(), markup=False, highlight=False)
        return
    table = Table("name", "what it is", "source", title="Use them in expressions such as 'Marina(RandK(k=10), p=0.1)'.")
    for kind, module in (("methods", methods), ("compressors", compressors), ("problems", problems)):
        table.add_section()
        table.add_row(f"[bold]{kind}[/bold]", "", "")
        for name in module.__all__:
            entry = getattr(module, name)
            if inspect.isclass(entry):
                table.add_row(_signature(entry), *map(escape, _described(entry)))
    for name, origin in data.BUNDLED.items():
        table.add_row(name, "bundled data for Classification", escape(origin))
    for name, entry in known_names(with_file or ()).items():
        if name not in {n for m in (methods, compressors, problems) for n in m.__all__}:
            table.add_row(_signature(entry), *map(escape, _described(entry)))
    Console(width=max(out_console.width, 120) if not out_console.is_terminal else None).print(table)


def _signature(entry: type) -> str:
    names = [p.name for p in inspect.signature(entry).parameters.values() if p.name not in ("hosted", "args", "kwargs")]
    return escape(f"{entry.__name__}({', '.join(names)})")


def _described(entry: type) -> tuple[str, str]:
    """(first line of the docstring, arXiv ids of the class, else of its module)."""
    module = inspect.getmodule(entry)
    first = inspect.cleandoc(entry.__doc__ or "").split("\n")[0]
    for text in (entry.__doc__ or "", (module.__doc__ or "") if module else ""):
        papers = list(dict.fromkeys(re.findall(r"arXiv:\d{4}\.\d{5}", text)))
        if papers:
            return first, ", ".join(papers)
    return first, "textbook"


def _version(value: bool) -> None:
    if value:
        out_console.print(f"shoal {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; every error that can be expected is one line and a non-zero exit."""
    try:
        app()
    except ShoalError as error:
        if os.environ.get("RANK", "0") == "0":
            fail(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        fail("interrupted.", 130)
    except BrokenPipeError:
        raise SystemExit(0) from None
