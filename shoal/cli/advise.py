"""shoal advise: whether compressed gradients make a training step shorter on a given link, and which compressor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoal.cli.options import ChannelKind, With, app, err_console, given, out_console
from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.experiments.advise import DEFAULTS, Advice, advice
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import versions, write_json
from shoal.experiments.line import Line, measured_line
from shoal.experiments.timing import machine_line
from shoal.experiments.workload import BUILT_IN, Tell, Workload, assumed, found, measured
from shoal.runtimes.group import group
from shoal.runtimes.peers import Peers
from shoal.runtimes.ranks import channel_of
from shoal.runtimes.replicated import started_by_torchrun

LATENCY = 0.1  # ms one way, where only a bandwidth is given
PATIENCE = 2.0  # seconds without a progress bar


@app.command()
def advise(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help=f"FILE.py:FUNCTION (docs/advise.md; it is run: trust it), or {', '.join(BUILT_IN)}."),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Ranks, one model on each (under torchrun: those there are).")] = 4,
    bandwidth: Annotated[float | None, typer.Option(help="Mbit/s of a rank's line, each way.")] = None,
    latency: Annotated[float | None, typer.Option(help="ms one way (default 0.1).")] = None,
    numel: Annotated[int | None, typer.Option(help="Instead of a model: how many numbers a gradient has.")] = None,
    compute: Annotated[float | None, typer.Option(help="With --numel: ms of a step's forward and backward.")] = None,
    compressor: Annotated[
        list[str] | None, typer.Option("--compressor", "-c", help="An expression; several times. Default: seven.")
    ] = None,
    channel: ChannelKind = None,
    cores_per_rank: Annotated[
        float | None, typer.Option(help="Cores for each rank, where ranks share them: computing slows down so much.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Timed steps, and timed exchanges of each compressor.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write all of it here.")] = None,
    with_file: With = None,
) -> None:
    """Would compressed gradients make a training step shorter on this link? With which compressor?

    Measures the model's step and every compressor on this machine, and predicts. Under torchrun it measures the link.

    [bold]shoal advise train.py:setup --ranks 4 --bandwidth 100[/bold]
    [bold]shoal advise --numel 25000000 --compute 120 --ranks 8 --bandwidth 1000 --latency 0.5[/bold]
    [bold]torchrun --nproc-per-node 2 -m shoal advise resnet18[/bold]
    """
    there, inside = given(context), started_by_torchrun()
    _refuse(there, inside, model is not None)
    if json is not None and not json.absolute().parent.is_dir():
        raise ConfigError(f"--json {json}: there is no folder {json.absolute().parent}; make it first.")
    if repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least 1.")
    if with_file:
        err_console.print(f"running code from {', '.join(with_file)}: trusted, not sandboxed", highlight=False)
    names = known_names(with_file or ())
    codes = list(dict.fromkeys(parse(text, names, Compressor) for text in compressor or DEFAULTS))
    told = None if bandwidth is None else Line.told(bandwidth, LATENCY if latency is None else latency)
    make, stretch = channel_of(channel or "auto"), _stretch(cores_per_rank)
    setup = None if model is None else found(model)

    def work(tell: Tell, peers: Peers | None) -> Workload:
        if setup is None:
            return assumed(numel or 0, (compute or 0.0) / 1e3)
        return measured(setup, str(model), repeat, tell, peers)

    with group() if inside else nullcontext(None) as peers, _bar(peers) as tell:
        if peers is not None:
            ranks = peers.world
            peers.handshake({"command": "advise", "model": model, "numel": numel, "compute": compute, "repeat": repeat,
                             "compressors": [compact(code) for code in codes]})  # fmt: skip
        load = work(tell, peers)
        line = told or measured_line(_present(peers))
        result = advice(codes, load, ranks, line, make, stretch=stretch, repeat=repeat, peers=peers, tell=tell)
    if peers is None or peers.rank == 0:
        _print(result, told is None, json)


def _refuse(there: set[str], inside: bool, model: bool) -> None:
    """What would be ignored, or is missing, is a mistake."""
    if model and there & {"numel", "compute"}:
        raise ConfigError("a model brings its numbers and its time: leave out --numel and --compute.")
    if not model and not {"numel", "compute"} <= there:
        raise ConfigError(f"name a model (FILE.py:FUNCTION, {', '.join(BUILT_IN)}), or give --numel and --compute.")
    if "latency" in there and "bandwidth" not in there:
        raise ConfigError("--latency without --bandwidth: give both, or under torchrun neither.")
    if inside and there & {"ranks", "cores_per_rank"}:
        raise ConfigError("under torchrun the ranks are those there are, measured all at once: leave out --ranks and "
                          "--cores-per-rank.")  # fmt: skip
    if not inside and "bandwidth" not in there:
        raise ConfigError("--bandwidth is missing: Mbit/s of a rank's line. Or start the command under torchrun on the "
                          "machines of the training, which measures it.")  # fmt: skip


def _stretch(cores: float | None) -> float:
    """How much longer computing takes, the threads of a rank on so many cores."""
    if cores is None:
        return 1.0
    if not 0 < cores < float("inf"):
        raise ConfigError(f"--cores-per-rank {cores:g}: above 0, such as 0.5 where four ranks share two cores.")
    return max(1.0, torch.get_num_threads() / cores)


def _present(peers: Peers | None) -> Peers:
    assert peers is not None  # without ranks a bandwidth was given
    return peers


@contextmanager
def _bar(peers: Peers | None) -> Iterator[Tell]:
    """A bar on the screen once it takes longer than two seconds, of the first rank alone."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err_console, transient=True
    )
    task, began = bar.add_task("", total=1.0), time.monotonic()

    def tell(label: str, share: float) -> None:
        if peers is not None and peers.rank:
            return
        if time.monotonic() - began > PATIENCE and not bar.live.is_started:
            bar.start()
        bar.update(task, description=escape(label), completed=share)

    try:
        yield tell
    finally:
        bar.stop()


def _print(result: Advice, line_measured: bool, json: Path | None) -> None:
    out_console.print(_table(result))
    for sentence in result.verdict():
        out_console.print(f"[bold]{escape(sentence)}[/bold]" if sentence == result.verdict()[0] else escape(sentence),
                          highlight=False)  # fmt: skip
    out_console.print(
        "\nstep: predicted; exchange: of all buckets, one after the other; bits: a rank sends, a coordinate; error: of "
        "the mean, measured once, over the mean squared norm; stated: at most this in expectation, * not proved, with "
        f"biased compressors before error feedback.\n{machine_line()}", style="dim", highlight=False,
    )  # fmt: skip
    if json is not None:
        facts = {"format": 1, "kind": "advice", "link_measured": line_measured, "threads": torch.get_num_threads(),
                 "machine": machine_line(), "versions": versions()}  # fmt: skip
        write_json(json, facts | result.facts())


def _table(result: Advice) -> Table:
    """A line a way, the shortest step first."""
    work, line = result.work, result.line
    computing = 1e3 * result.stretch * (work.compute + work.update)
    title = (
        f"{escape(work.name)}: d = {work.d:,} in {len(work.buckets)} buckets, {computing:.3g} ms of computing; "
        f"{result.world} ranks, {line.bandwidth:.3g} Mbit/s, {1e3 * line.latency:.2g} ms"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for column in ("step ms", "shorter", "exchange ms", "bits", "error", "stated"):
        table.add_column(column, justify="right", no_wrap=True)
    for way in result.ways:
        bound = "–" if way.bound is None else f"{way.bound:.2g}" + ("" if way.proved else " *")
        table.add_row(
            escape(way.name), f"{1e3 * result.step(way):.3g}", f"{result.gain(way):.2f} x",
            f"{1e3 * result.exchange(way):.3g}", f"{way.bits:.3g}", f"{way.error:.2g}", bound,
        )  # fmt: skip
    return table
