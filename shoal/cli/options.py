"""What the commands share: the application, its options, its consoles, and how it fails."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from shoal.errors import ConfigError, PeerLost, ShoalError
from shoal.experiments.spec import ProblemSpec
from shoal.runtimes.group import checked_timeout
from shoal.runtimes.lines import TIMEOUT
from shoal.runtimes.ranks import Make, channel_of
from shoal.runtimes.replicated import started_by_torchrun

UNREACHED = 3  # exit status where a target was not reached, or a run diverged
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Distributed nonconvex optimization with compressed messages: compare methods and compressors by the bits "
    "they really send. Start with [bold]shoal race[/bold], or [bold]shoal list[/bold] for what there is.",
)
# Without emoji: rich would turn the `:b:` of a name or a path into a picture.
out_console, err_console = Console(emoji=False), Console(stderr=True, emoji=False)

PROBLEMS = (
    "quadratics, autoencoder, mnist-cnn, shakespeare, resnet18, heart, phishing, mushrooms, a LIBSVM file, or an "
    "expression of a --with problem."
)
Clients = Annotated[int | None, typer.Option("--clients", "-n", help="Number of clients n.")]
Split = Annotated[str | None, typer.Option(help="How rows are shared out: iid, label, dirichlet, contiguous.")]
Alpha = Annotated[float | None, typer.Option(help="Dirichlet parameter of --split dirichlet; smaller is more uneven.")]
Loss = Annotated[
    str | None,
    typer.Option(help="logistic, with the regularizer lam sum x²/(1+x²), or nonconvex: the MARINA paper's (1-s(yz))²."),
]
Lam = Annotated[float | None, typer.Option(help="Weight of the regularizer (quadratics: strong convexity of f).")]
Dim = Annotated[int | None, typer.Option("--dim", "-d", help="quadratics: number of coordinates d.")]
Noise = Annotated[float | None, typer.Option(help="quadratics: how much clients differ; L_± is about this.")]
Data = Annotated[
    str | None, typer.Option(help="The folder of the data's files; or 'mnist', 'tinyshakespeare': found or downloaded.")
]
DataRows = Annotated[
    int | None,
    typer.Option(
        "--rows",
        help="autoencoder, resnet18: so many images; mnist-cnn, shakespeare: at most so many samples a client.",
    ),
]
Similarity = Annotated[
    float | None, typer.Option(help="autoencoder: the probability that a client's image is one that all share.")
]
ProblemSeed = Annotated[int | None, typer.Option(help="Seed of the split, of the quadratics, of a network's start.")]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with", metavar="FILE", help="A Python file with your own Method, Compressor or Problem. It is run: trust it."
    ),
]
Rounds = Annotated[int | None, typer.Option(help="Budget in rounds.")]
Bits = Annotated[float | None, typer.Option(help="Budget in uplink payload bits a client.")]
Target = Annotated[float | None, typer.Option(help="Stop at ‖∇f‖² <= this.")]
Out = Annotated[Path | None, typer.Option(help="Folder of results; must be empty or new.")]
NumberOfRanks = Annotated[int, typer.Option("--ranks", help="Processes here that talk over gloo; 0: none.")]
ChannelKind = Annotated[
    str | None,
    typer.Option(
        "--channel", help="Between ranks: sharded (each adds up a slice), replicated (all messages to all), or auto."
    ),
]
Timeout = Annotated[
    float | None, typer.Option(help=f"Seconds that a rank waits for another, {TIMEOUT:g} unless given.")
]
PL = Annotated[bool, typer.Option("--pl", help="Step sizes of the PL theorems (needs a known PL constant).")]


def fail(error: Exception | str, status: int = 1) -> NoReturn:
    """One clear line on standard error, and out."""
    said = " ".join(str(error).split())  # what a user's own file raises may have several lines
    err_console.print(f"[bold red]error:[/bold red] {escape(said)}", soft_wrap=True, highlight=False)
    raise SystemExit(status)


def _speaker(error: ShoalError) -> int:
    """The rank that says for all what happened: the first that is not lost."""
    lost = error.ranks if isinstance(error, PeerLost) else ()
    return next(rank for rank in range(len(lost) + 1) if rank not in lost)


def spoken(work: Callable[[], object]) -> None:
    """Do the work; every error that can be expected is one line, of one rank, and a non-zero exit."""
    try:
        work()
    except ShoalError as error:
        if not started_by_torchrun() or int(os.environ["RANK"]) == _speaker(error):
            fail(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        fail("interrupted.", 130)
    except BrokenPipeError:
        raise SystemExit(0) from None


def new_folder(kind: str, name: str) -> Path:
    """Where results go unless --out says otherwise: runs/ or races/, with the time and the problem."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-").lower() or "problem"
    return Path(f"{kind}s") / f"{datetime.now():%Y%m%d-%H%M%S}-{stem}"


def again() -> str:
    """The words that run this command again, into a folder of its own."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return "shoal " + shlex.join(kept)


def given(context: typer.Context) -> set[str]:
    """The parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def channel_given(kind: str | None, ranks: int) -> Make:
    """What makes the ranks' channel. Raises ConfigError for a channel that there is not, or that nobody would use."""
    if kind is not None and not ranks and not started_by_torchrun():
        raise ConfigError(f"--channel {kind} without ranks: add --ranks 2, or start the command under torchrun.")
    return channel_of(kind or "auto")


def timeout_given(seconds: float | None, ranks: int) -> float:
    """Seconds that a rank waits for another. Raises ConfigError for what is no such time, or where nobody waits."""
    if seconds is not None and not ranks and not started_by_torchrun():
        raise ConfigError(f"--timeout {seconds:g} without ranks: add --ranks 2, or start the command under torchrun.")
    return checked_timeout(TIMEOUT if seconds is None else seconds)


def checked_ranks(ranks: int, n: int) -> None:
    """Raise ConfigError unless each of these ranks has a client."""
    if not 1 <= ranks <= n:
        raise ConfigError(f"--ranks {ranks} for n={n} clients: from 1 to {n}, since a rank hosts one.")


def stored_spec(context: typer.Context, folder: Path, kind: str, beside: set[str]) -> dict[str, Any]:
    """The spec in a folder that is to be resumed. Refuses options that would have to be ignored."""
    extra = sorted(given(context) - beside - {"resume"})
    if extra:
        words = ", ".join(extra).replace("_", "-")
        raise ConfigError(f"--resume takes its settings from the folder: leave out {words}.")
    file = folder / ("config.json" if kind == "run" else "race.json")
    if not file.is_file():
        raise ConfigError(f"{folder} holds no {kind}: there is no {file.name}.")
    try:
        spec = json.loads(file.read_text())["spec"]
        return {**spec, "problem": ProblemSpec.of(**spec["problem"])}
    except ConfigError:
        raise
    except KeyError:
        raise ConfigError(f"{file} was not written by `shoal {kind}`: resume it from Python.") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}.") from None
