"""shoal run: one run, in the simulator or over ranks."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

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
from shoal.core import Method, OnNonFinite, Row
from shoal.errors import ConfigError
from shoal.experiments.checkpoint import tidy
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import make_folder, versions
from shoal.experiments.prepared import check_settings, prepare
from shoal.experiments.run import Run, load_result, simulate
from shoal.experiments.spec import ProblemSpec, RunSpec
from shoal.problems.secants import Seen
from shoal.runtimes import checked_policy, replicated, supervisor
from shoal.runtimes.attempts import Attempts
from shoal.runtimes.ranks import Make
from shoal.theory import Smoothness


@app.command()
def run(
    context: typer.Context,
    problem: Annotated[str, typer.Argument(help=PROBLEMS)] = "phishing",
    method: Annotated[str, typer.Argument(help="An expression: 'Marina(Correlated())', 'EF21(TopK(0.05))'.")] = "",
    clients: Clients = None,
    rounds: Rounds = None,
    bits: Bits = None,
    target: Target = None,
    seed: Annotated[int, typer.Option(help="Seed of the run's random numbers.")] = 0,
    step: Annotated[str, typer.Option(help="'theory' or a number.")] = "theory",
    multiple: Annotated[float, typer.Option(help="Times the step size.")] = 1.0,
    pl: PL = False,
    ranks: NumberOfRanks = 0,
    channel: ChannelKind = None,
    dim: Dim = None,
    noise: Noise = None,
    split: Split = None,
    alpha: Alpha = None,
    loss: Loss = None,
    lam: Lam = None,
    problem_seed: ProblemSeed = None,
    data: Data = None,
    rows: DataRows = None,
    similarity: Similarity = None,
    every: Annotated[int, typer.Option(help="Measure f and ‖∇f‖² every so many rounds.")] = 1,
    chunk: Annotated[int | None, typer.Option(help="Clients at a time (memory; the bits do not depend on it).")] = None,
    on_nonfinite: Annotated[
        OnNonFinite,
        typer.Option(help="A round in which a client has a NaN: raise ends the run, skip, drop the client."),
    ] = "raise",
    timeout: Timeout = None,
    with_file: With = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(help="Finish the run in this folder, to the identical iterate.")
    ] = None,
) -> None:
    """One run. Prints the step size with its theorem, the result, and the SHA-256 of the final iterate.

    [bold]shoal run phishing "Marina(Correlated())" --clients 20 --rounds 500[/bold]
    [bold]shoal run quadratics "EF21(TopK(10))" -n 6 -d 200 --noise 0.3 --lam 0.01 --rounds 300 --ranks 3[/bold]
    """
    if resume is not None:
        spec, out = RunSpec.of(**stored_spec(context, resume, "run", {"ranks", "channel", "timeout"})), resume
    else:
        if not method:
            raise ConfigError("which METHOD? For example: shoal run phishing 'Marina(Correlated())' --rounds 500")
        described = ProblemSpec.of(
            name=problem, clients=clients, dim=dim, noise=noise, lam=lam, loss=loss, split=split, alpha=alpha,
            seed=problem_seed, data=data, rows=rows, similarity=similarity,
        )  # fmt: skip
        spec = RunSpec.of(
            problem=described, method=method, rounds=1000 if rounds is None and bits is None else rounds, bits=bits,
            target=target, seed=seed, step=_step(step), multiple=multiple, pl=pl, every=every, chunk=chunk,
            on_nonfinite=on_nonfinite, files=tuple(with_file or ()),
        )  # fmt: skip
        out = out or new_folder("run", spec.problem.name)
    make, seconds, resuming = channel_given(channel, ranks), timeout_given(timeout, ranks), resume is not None
    if ranks and not replicated.started_by_torchrun():
        torch.set_num_threads(1)  # before anything computes: a fork has no threads but its own
        objects = [_check(spec, ranks, out, resuming)]
        status = supervisor.launch(ranks, lambda: spoken(lambda: _run(spec, objects, out, resuming, make, seconds)))
        if status:
            raise SystemExit(status)
        result = load_result(out) or {}
        if result:  # the first rank may have been killed behind its last word
            tidy(out)
        _judge(result, spec)
        return
    with err_console.status(f"reading {escape(spec.problem.name)}"):
        objects = [(*_objects(spec), None)]
    _run(spec, objects, out, resuming, make, seconds)


def _step(text: str) -> float | Literal["theory"]:
    if text == "theory":
        return "theory"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--step {text}: 'theory' or a number.") from None


def _objects(spec: RunSpec) -> tuple[Any, Method]:
    return spec.problem.build(spec.files), parse(spec.method, known_names(spec.files), Method)


Objects = tuple[Any, Method, Smoothness | None]  # the problem, the method, and constants where they are known


def _check(spec: RunSpec, ranks: int, out: Path, resuming: bool) -> Objects:
    """What can be wrong is said here, once, and not by every rank; the objects, loaded once for all of them."""
    problem, method = _objects(spec)
    checked_policy(spec.on_nonfinite, method)
    checked_ranks(ranks, problem.n)
    settings: dict[str, Any] = {
        "rounds": spec.rounds, "bits": spec.bits, "target": spec.target, "step": spec.step, "multiple": spec.multiple,
    }  # fmt: skip
    check_settings(problem, method, **settings)
    smoothness = problem.smoothness()
    prepare(problem, method, pl=spec.pl, smoothness=smoothness, **settings)
    if not resuming:
        make_folder(out)
    return problem, method, smoothness


def _run(spec: RunSpec, objects: list[Objects], out: Path, resuming: bool, make: Make, timeout: float) -> None:
    """The run of `objects`, which are taken out: on a rank of several nobody else may hold the others' data."""
    torch.set_num_threads(1)
    problem, method, smoothness = objects.pop()
    stored = json.loads(spec.model_dump_json())
    options: dict[str, Any] = {
        "rounds": spec.rounds, "bits": spec.bits, "target": spec.target, "seed": spec.seed, "step": spec.step,
        "multiple": spec.multiple, "pl": spec.pl, "every": spec.every, "chunk": spec.chunk, "facts": {"spec": stored},
        "on_nonfinite": spec.on_nonfinite, "smoothness": smoothness, "out": out, "resume": resuming,
    }  # fmt: skip
    if replicated.started_by_torchrun():
        config = stored | {"versions": versions()}
        connected = partial(replicated.connected, problem.n, config, make, timeout)
        with Attempts(connected, timeout) as attempts:
            first = attempts.channel.rank == 0
            if not first:  # here, as a call keeps what it was given until it returns
                problem = problem.only(attempts.channel.clients)
            try:
                run = simulate(problem, method, attempts=attempts, **options)
            except KeyboardInterrupt:
                if first:
                    _interrupted(out)
                raise SystemExit(130) from None
            meter, most = attempts.channel.meter, max(run.moved)
            words = (
                f"{len(run.moved)} ranks over gloo; moved {sum(run.moved):,} bytes, at most {most:,} by one; "
                f"payload up {meter.up:,}, framed {meter.up_framed:,}"
            )
        if not first:
            return
        _show(run, out, words)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[norm]}"))
    with Progress(*columns, TimeElapsedColumn(), console=err_console, transient=True) as bar:
        task = bar.add_task("finding constants, compiling where needed", total=1.0, norm="")
        try:
            run = simulate(problem, method, record=_follow(bar, task, spec), **options)
        except KeyboardInterrupt:
            bar.stop()
            _interrupted(out)
    _show(run, out, "")
    _judge(run.result(), spec)


def _interrupted(out: Path) -> NoReturn:
    if any(out.glob("checkpoint-*.shoal")):
        fail(f"interrupted; go on with: shoal run --resume {shlex.quote(str(out))}", 130)
    fail("interrupted.", 130)


def _judge(result: dict[str, Any], spec: RunSpec) -> None:
    """Exit status 3 for a result that is not what was asked for."""
    k, norm = result["rounds"], result["grad_norm_sq"]
    if result["stopped"] == "diverged":
        fail(f"the run diverged at round {k} ({result['note']}); take a smaller step.", UNREACHED)
    if spec.target is not None and result["stopped"] != "target":
        fail(f"the target ‖∇f‖² <= {spec.target:g} was not reached: {norm:.3g} after {k} rounds; "
             "raise the budget, or try --multiple 4.", UNREACHED)  # fmt: skip


def _follow(bar: Progress, task: TaskID, spec: RunSpec) -> Callable[[Row], None]:
    last = 0.0

    def tell(row: Row) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            share = max(row.round / spec.rounds if spec.rounds else 0.0, row.up_bits / spec.bits if spec.bits else 0.0)
            bar.update(
                task, completed=min(share, 1.0), description=escape(spec.method), norm=f"‖∇f‖² {row.grad_norm_sq:.2e}"
            )

    return tell


def _show(run: Run, out: Path, place: str) -> None:
    last, table = run.rows[-1], Table(show_header=False, box=None, pad_edge=False)
    used = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in run.step.constants.items()}
    lines = {
        "method": compact(run.method),
        "step size": f"{run.gamma:.6g}, theory {run.step.gamma:.6g}: {run.step.theorem}",
        "constants": ", ".join(f"{k} = {v}" for k, v in used.items() if k != "source" and v),
        "L_-, L_+, L_±": _curvature(run),
        "stopped": f"{run.stopped} after {last.round} rounds, {last.seconds:.2f} s {run.note}",
        "f": f"{last.value:.9g}",
        "‖∇f‖²": f"{last.grad_norm_sq:.6g}",
        "bits a client": f"up {last.up_bits:,.0f} (framed {last.up_framed_bits:,.0f}), down {last.down_bits:,.0f} "
        f"(framed {last.down_framed_bits:,.0f})",
        "sha256(x)": run.sha256,
        "folder": str(out),
    }  # fmt: skip
    if run.faults:
        said = run.faults[0]["said"]
        lines["faults"] = (
            f"{len(run.faults)} rounds with something that is not finite, {run.faults[0]['policy']}: {said}"
        )
    if place:
        lines["place"] = place
    for name, value in lines.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    Console(width=max(out_console.width, 110) if not out_console.is_terminal else None).print(table)


def _curvature(run: Run) -> str:
    """The three constants as stated, and as seen between recorded points."""
    assert run.smoothness is not None
    stated = [getattr(run.smoothness, name) for name in Seen._fields]
    said = ", ".join(f"{value:.4g} ({value.status})" for value in stated)
    return f"{said}; seen along the run: {', '.join(f'{value:.4g}' for value in run.seen)}"
