"""shoal plan: which method, compressor and parameters, ranked by predicted bits; and what runs say of that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoal.cli.options import (
    PL,
    PROBLEMS,
    Alpha,
    Clients,
    Lam,
    Loss,
    Noise,
    ProblemSeed,
    Split,
    app,
    err_console,
    given,
    out_console,
)  # fmt: skip
from shoal.core import Problem
from shoal.errors import ConfigError
from shoal.experiments.candidates import candidates
from shoal.experiments.plan import DEEP, Plan, Start, known_smoothness, measured_start
from shoal.experiments.plan import plan as make_plan
from shoal.experiments.spec import ProblemSpec
from shoal.experiments.trial import Trial, Verdict, check
from shoal.theory import Setting

CONSTANTS = ("minus", "plus", "pm", "most", "mu", "spread0")  # what a problem brings itself
SETTINGS = ("noise", "lam", "loss", "split", "alpha", "problem_seed", "check_count")  # what only a problem has
OPTION = {"minus": "L-minus", "plus": "L-plus", "pm": "L-pm", "most": "L-max", "check_count": "check"}
AIM = 1.2  # the plan's choice should be within 20 % of the best


@app.command()
def plan(
    context: typer.Context,
    problem: Annotated[
        str | None, typer.Argument(help=f"{PROBLEMS} Left out: the constants are given as options.")
    ] = None,
    clients: Clients = None,
    dim: Annotated[int | None, typer.Option("--dim", "-d", help="Number of coordinates d.")] = None,
    minus: Annotated[float | None, typer.Option("--L-minus", help="L₋: f is L₋-smooth.")] = None,
    plus: Annotated[float | None, typer.Option("--L-plus", help="L₊; left out: sqrt(L₋² + L±²).")] = None,
    pm: Annotated[float | None, typer.Option("--L-pm", help="L±, how much Hessians differ; left out: L₊.")] = None,
    most: Annotated[float | None, typer.Option("--L-max", help="max Lᵢ; left out: sqrt(n) L₊.")] = None,
    mu: Annotated[float | None, typer.Option(help="PL constant, with --pl.")] = None,
    pl: PL = False,
    target: Annotated[
        float | None, typer.Option(help=f"‖∇f‖² to reach; left out: {DEEP:g} of ‖∇f(x⁰)‖², or of 2 L₋ delta0.")
    ] = None,
    delta0: Annotated[float | None, typer.Option(help="f(x⁰) - f*; left out: the problem's, or 1.")] = None,
    spread0: Annotated[float | None, typer.Option(help="Mean of ‖∇fᵢ(x⁰)‖², which DIANA and EF21 start from.")] = None,
    top: Annotated[int, typer.Option(help="Lines to print.")] = 15,
    numerical: Annotated[
        bool,
        typer.Option("--numerical", help="Let in constants that were searched or measured, not proved (marked *)."),
    ] = False,
    check_count: Annotated[
        int | None,
        typer.Option("--check", help="Run so many candidates from the top, and the best single compressors."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of the finalists of --check.")] = 3,
    limit: Annotated[int, typer.Option(help="Rounds of a run of --check at most.")] = 20_000,
    noise: Noise = None,
    split: Split = None,
    alpha: Alpha = None,
    loss: Loss = None,
    lam: Lam = None,
    problem_seed: ProblemSeed = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole plan, and the runs, here.")] = None,
) -> None:
    """Rank every method, compressor and parameter by the uplink bits that theory predicts; nothing is run but --check.

    [bold]shoal plan --clients 16 --dim 1024 --L-minus 1 --L-pm 0.02[/bold]
    [bold]shoal plan quadratics -n 16 -d 1024 --noise 0.02 --check 20[/bold]
    """
    _refuse(given(context), problem is not None, pl)
    if json is not None and not json.absolute().parent.is_dir():
        raise ConfigError(f"--json {json}: there is no folder {json.absolute().parent}; make it first.")
    if top < 1 or seeds < 1:
        raise ConfigError(f"--top {top} --seeds {seeds}: both count from 1.")
    torch.set_num_threads(1)
    built: Problem | None = None
    if problem is not None:
        built = ProblemSpec.of(
            name=problem, clients=clients, dim=dim, noise=noise, lam=lam, loss=loss, split=split, alpha=alpha,
            seed=problem_seed,
        ).build()  # fmt: skip
        setting = Setting(built.n, built.d, built.smoothness(), pl=pl)
        start = measured_start(built, setting.smoothness, delta0, target)
        if pl and setting.smoothness.mu is None:
            raise ConfigError(f"--pl: no PL constant is known for {built.name}; leave --pl out.")
    else:
        setting, start = _asked(clients, dim, minus, plus, pm, most, mu, pl, target, delta0, spread0)
    if check_count is not None and min(check_count, limit) < 1:
        raise ConfigError(f"--check {check_count} --limit {limit}: both count from one.")
    methods = candidates(setting.n, setting.d, float(setting.smoothness.samples))
    made = make_plan(methods, setting, start, numerical)
    print_plan(made, top)
    verdict = None
    if built is not None and check_count is not None:
        verdict = _checked(built, made, check_count, range(seeds), limit)
        print_verdict(made, verdict)
    if json is not None:
        made.save(json, {"check": None if verdict is None else verdict.facts()})


def _refuse(asked: set[str], has_problem: bool, pl: bool) -> None:
    """An option that would be ignored is a mistake."""
    wrong = sorted(asked & set(CONSTANTS if has_problem else SETTINGS))
    words = ", ".join("--" + OPTION.get(name, name).replace("_", "-") for name in wrong)
    if wrong and has_problem:
        raise ConfigError(f"the problem brings its own constants: leave out {words}.")
    if wrong:
        raise ConfigError(f"{words}: only with a problem, as in shoal plan quadratics.")
    if extra := sorted(asked & {"seeds", "limit"}) if "check_count" not in asked else []:
        raise ConfigError(f"--{extra[0]} goes with --check.")
    if "mu" in asked and not pl:
        raise ConfigError("--mu goes with --pl: the other theorems do not use it.")


def _asked(
    clients: int | None, dim: int | None, minus: float | None, plus: float | None, pm: float | None,
    most: float | None, mu: float | None, pl: bool, target: float | None, delta0: float | None, spread0: float | None,
) -> tuple[Setting, Start]:  # fmt: skip
    """What the options say, with the defaults that follow from them."""
    if clients is None or dim is None or minus is None:
        raise ConfigError("without a problem a plan needs --clients, --dim, --L-minus, and --L-pm or --L-plus.")
    if clients < 1 or dim < 1:
        raise ConfigError(f"--clients {clients} --dim {dim}: both count from 1.")
    if pl and mu is None:
        raise ConfigError("--pl needs --mu, the PL constant.")
    smoothness = known_smoothness(minus, plus, pm, clients, most, mu)
    for name, stated, used in (("L-plus", plus, smoothness.plus), ("L-pm", pm, smoothness.pm)):
        if stated is not None and stated > used * (1 + 1e-9):
            err_console.print(
                f"--{name} {stated:g}: the other constants prove {float(used):.6g}, which is taken.", highlight=False
            )
    gap = 1.0 if delta0 is None else delta0
    goal = 2.0 * DEEP * minus * gap if target is None else target
    return Setting(clients, dim, smoothness, pl=pl), Start(gap, goal, None, spread0)


def _checked(problem: Problem, made: Plan, count: int, seeds: range, limit: int) -> Verdict:
    """The runs, with a line that says which is going on."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err_console)
    with bar as progress:
        task = progress.add_task("")

        def tell(label: str, done: int, total: int) -> None:
            progress.update(task, description=escape(label[:60]), completed=done, total=total)

        return check(problem, made, count, list(seeds), limit, tell)


def bits_said(bits: float) -> str:
    """Bits for people: three digits and a unit."""
    for size, unit in ((1e12, "Tbit"), (1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit")):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits:.3g} bit" if math.isfinite(bits) else "-"


def print_plan(made: Plan, top: int) -> None:
    """The first lines of the ranking; where there is room, with step, p and theorem. Then the theorems, each once."""
    shown, wide = made.ranked[:top], out_console.width >= 100
    s, start = made.setting, made.start
    out_console.print(
        f"n = {s.n}, d = {s.d}, "
        + ", ".join(
            f"{name} {float(value):.3g} ({value.status})"
            for name, value in zip(
                ("L₋", "L₊", "L±"), (s.smoothness.minus, s.smoothness.plus, s.smoothness.pm), strict=True
            )
        )
        + f"; Δ₀ {start.gap:.3g}, ‖∇f‖² ≤ {start.target:.3g}",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "predicted", "rounds", *(("step", "p") if wide else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("for shoal run", overflow="fold")
    table.add_column("", justify="right")
    theorems = list(dict.fromkeys(p.theorem for p in shown))
    for k, p in enumerate(shown, 1):
        cells = [f"{k}{'' if p.evidence == 'proved' else '*'}", bits_said(p.bits), f"{p.rounds:,}"]
        cells += [f"{p.gamma:.3g}", "" if p.p is None else f"{p.p:.3g}"] if wide else []
        table.add_row(*cells, escape(p.method), f"[dim]{theorems.index(p.theorem) + 1}[/dim]")
    out_console.print(table)
    for k, theorem in enumerate(theorems, 1):
        out_console.print(f"{k}: {escape(theorem)}", style="dim", highlight=False, soft_wrap=True)
    out_console.print(
        f"{len(made.ranked)} candidates, uplink bits a client, by upper bounds: what runs need is less, by factors "
        "that differ.", style="dim", highlight=False,
    )  # fmt: skip
    for reason, count in made.left_out.items():
        out_console.print(f"left out, {count}: {escape(reason)}", style="dim", highlight=False, soft_wrap=True)


def print_verdict(made: Plan, verdict: Verdict) -> None:
    """Finalists, predicted against measured, and the answers in sentences."""
    table = Table(title="What runs say", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("in the plan", "predicted", "measured", "rounds", "loose by"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("at its theory step", overflow="fold")
    for trial in sorted(verdict.finalists, key=lambda t: t.mean):
        table.add_row(*_line(trial), escape(trial.prediction.method))
    out_console.print(table)
    runs = len(verdict.screened)
    arrived = sum(not math.isinf(t.mean) for t in verdict.screened)
    out_console.print(f"{runs} candidates were screened on one seed; {arrived} were not stopped.", highlight=False)
    color = "green" if verdict.ratio <= AIM else "red"
    out_console.print(
        f"The plan's choice needs [{color}]{verdict.ratio:.3g} x[/] the bits of the best, "
        f"{escape(verdict.best.prediction.method)}.", highlight=False, soft_wrap=True,
    )  # fmt: skip
    if verdict.plain is not None and verdict.plain != verdict.ratio:
        out_console.print(f"Without entropy codes: {verdict.plain:.3g} x the bits of the best.", highlight=False)
    if verdict.tau is not None:
        out_console.print(
            f"Kendall's tau of predicted and screened bits, without entropy codes: {verdict.tau:.2f}.", highlight=False
        )
    if verdict.composition is not None:
        out_console.print(
            f"The best composition needs {verdict.composition:.3g} x the bits of the best single compressor.",
            highlight=False,
        )


def _line(trial: Trial) -> list[str]:
    reached = not math.isinf(trial.mean)
    measured = bits_said(trial.mean) + (f" ± {bits_said(trial.half)}" if trial.half else "") if reached else "-"
    rounds = sum(trial.rounds) / len(trial.rounds)
    loose = f"{trial.prediction.bits / trial.mean:.3g} x" if reached else trial.stopped
    return ["other p" if trial.rank is None else str(trial.rank), bits_said(trial.prediction.bits), measured,
            f"{rounds:.0f}", loose]  # fmt: skip
