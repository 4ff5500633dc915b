"""A race: methods x step rules x seeds on one problem, over processes, resumable, every run in its own folder.

Tuning: the multiples 2^LOW..2^HIGH of the theory's step size are tried on the first seed, smallest first, each on a
quarter of the budget; once the target has been reached, a later try is stopped when it has spent as many uplink bits
as the best so far. The multiple with the fewest bits to the target wins, ties go to the smaller; where no try reaches
the target, the smallest final ||grad f||^2 wins. The winner then runs on every seed with the whole budget. All tries
are kept.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch

from shoal.compressors.correlated import agree_locally
from shoal.core import Compressor, Method, Problem, Row
from shoal.errors import ConfigError, ResumeMismatch
from shoal.experiments.expressions import compact, known_names, parse
from shoal.experiments.folder import machine, make_folder, versions, write_json
from shoal.experiments.prepared import Survey, fingerprint, prepare
from shoal.experiments.run import Run, load_result, simulate
from shoal.experiments.spec import RaceSpec
from shoal.messages import Round
from shoal.runtimes.ranks import Ranks
from shoal.theory import ONE, ZERO, Smoothness
from shoal.wire import digest

UNPROVED = (-8, 4)  # exponents tried where no theorem gives a step size: multiples of 1/L_-
TRY = 0.25  # the share of the budget that a try may spend


class News(NamedTuple):
    """What a running job says: which job, which run of it, how far, and where."""

    job: str
    what: str
    fraction: float
    grad_norm_sq: float


class Course(NamedTuple):
    """What all runs of a race share. problem: on a rank that is not the first it holds this rank's clients alone;
    reasons: of each method without a theorem."""

    problem: Problem
    smoothness: Smoothness
    reasons: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What tuning needs to know of a finished run."""

    reached: bool
    bits: float
    grad_norm_sq: float


# ------------------------------------------------------------------------------------------------ in a worker
_told: Any = None  # the queue of News, set in each worker
_stop: Any = None  # an event: set when the race is interrupted


def _begin_worker(told: Any, stop: Any, parent: int) -> None:
    global _told, _stop
    _told, _stop = told, stop
    torch.set_num_threads(1)  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while idle; a run installs its own handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # the race was killed: nobody will ask for our results

    threading.Thread(target=watch, daemon=True).start()


def slug(index: int, label: str) -> str:
    """A folder's name for a method."""
    return f"{index:02d}-" + re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60]


class Job:
    """All runs of one method under one step rule, in order; a finished run is read, not run again."""

    def __init__(
        self, spec: RaceSpec, index: int, rule: str, out: Path, problem: Problem, smoothness: Smoothness,
        ranks: Ranks | None = None, on_news: Callable[[News], None] | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.rule, self.out, self.ranks, self.on_news = spec, rule, out, ranks, on_news
        self.problem, self.smoothness = problem, smoothness
        self.method: Method = parse(spec.methods[index], known_names(spec.files), Method)
        self.label, self.slug = compact(self.method), slug(index, compact(self.method))
        self.name = f"{self.label} · {rule}"
        # Once, for the whole budget: DCGD's theory depends on the horizon, and a try's is shorter.
        self.theory = prepare(
            self.problem, self.method, rounds=spec.rounds, bits=spec.bits, target=spec.target, step="theory",
            multiple=1.0, pl=spec.pl, need_theory=False, smoothness=smoothness,
        )[1]  # fmt: skip
        self._said = 0.0

    def run(self) -> str:
        """The name of the job, when all its runs are done."""
        best, began = (1.0, 0.0) if self.rule == "theory" else (self._tune(), 0.6)
        share = (1.0 - began) / len(self.spec.seeds)
        for k, seed in enumerate(self.spec.seeds):
            self._one(best, seed, False, self.spec.bits, began + k * share, share)
        return self.name

    def _tune(self) -> float:
        low, high = self.spec.tune if self.theory.evidence != "none" else UNPROVED
        exponents = range(low, high + 1)
        tried: dict[float, Outcome] = {}
        for k, exponent in enumerate(exponents):
            cap = min((o.bits for o in tried.values() if o.reached), default=None)
            quarter = None if self.spec.bits is None else TRY * self.spec.bits
            budget = cap if quarter is None else quarter if cap is None else min(cap, quarter)
            share = 0.6 / len(exponents)
            tried[2.0**exponent] = self._one(2.0**exponent, self.spec.seeds[0], True, budget, k * share, share)
        return min(
            tried, key=lambda m: (not tried[m].reached, tried[m].bits if tried[m].reached else tried[m].grad_norm_sq, m)
        )

    def _one(self, multiple: float, seed: int, trial: bool, bits: float | None, at: float, share: float) -> Outcome:
        what = f"x{multiple:g}" if self.rule == "tuned" else "theory"
        folder = self.out / "runs" / f"{self.slug}__{self.rule}-{'try-' if trial else ''}{what}__s{seed}"
        done = self._done(folder)
        if done is not None:
            norm = done["grad_norm_sq"]
            return Outcome(done["stopped"] == "target", done["up_bits"], norm if norm == norm else float("inf"))
        s = self.spec
        rounds = s.rounds if s.rounds is None or not trial else math.ceil(TRY * s.rounds)

        def tell(row: Row) -> None:
            if _stop is not None and _stop.is_set():
                signal.raise_signal(signal.SIGINT)
            if self.on_news is not None and time.monotonic() - self._said > 0.2:
                self._said = time.monotonic()
                spent = max(row.round / rounds if rounds else 0.0, row.up_bits / bits if bits else 0.0)
                where = f"{'try ' if trial else ''}{what}, seed {seed}"
                self.on_news(News(self.name, where, at + share * min(spent, 1.0), row.grad_norm_sq))

        place = {"label": self.label, "step": self.rule, "multiple": multiple, "seed": seed, "trial": trial}
        step: Any = "theory" if self.rule == "theory" else self.theory.gamma
        here: dict[str, Any] = {"out": folder, "resume": True, "facts": {"race": place}}
        if self.ranks is not None:
            config = {"spec": json.loads(s.model_dump_json()), **place}
            here["channel"] = self.ranks.channel(self.problem.n, digest(config))
        run: Run = simulate(
            self.problem, self.method, rounds=rounds, bits=bits, target=s.target, seed=seed, step=step,
            multiple=multiple, pl=s.pl, every=s.every, record=tell, smoothness=self.smoothness, **here,
        )  # fmt: skip
        last = run.rows[-1]
        norm = last.grad_norm_sq if last.grad_norm_sq == last.grad_norm_sq else float("inf")
        return Outcome(run.stopped == "target", last.up_bits, norm)

    def _done(self, folder: Path) -> dict[str, Any] | None:
        """The result of a run that is there already: for all ranks, the one that the first finds."""
        if self.ranks is None:
            return load_result(folder)
        found = load_result(folder) if self.ranks.first else None
        return json.loads(self.ranks.hear(json.dumps(found).encode()))


@lru_cache(maxsize=1)
def _problem(spec_json: str) -> Problem:
    """Kept: job follows job on one problem."""
    spec = RaceSpec.model_validate_json(spec_json)
    return spec.problem.build(spec.files)


def _work(spec_json: str, index: int, rule: str, out: str, smoothness: Smoothness) -> str:
    on_news, spec = _told.put if _told is not None else None, RaceSpec.model_validate_json(spec_json)
    return Job(spec, index, rule, Path(out), _problem(spec_json), smoothness, on_news=on_news).run()


# ------------------------------------------------------------------------------------------------ the race
def check(
    spec: RaceSpec,
    ranks: Ranks | None = None,
    held: list[Problem] | None = None,
    known: Smoothness | None = None,
) -> Course:
    """What all runs share. Raises ConfigError before anything is written.

    ranks: all of these do it together. held: the problem, built already; it is taken out, as on a rank of several
    nobody else may hold the others' data. known: its constants, found already.
    """
    names, reasons = known_names(spec.files), dict[str, str]()
    methods: list[Method] = [parse(text, names, Method) for text in spec.methods]
    labels = [compact(method) for method in methods]
    problem = held.pop() if held else spec.problem.build(spec.files)
    for method in methods:
        method.check(problem.n, problem.d)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"methods: {', '.join(labels)}: each at most once.")
    if ranks is None or ranks.peers.world == 1:
        smoothness, start = known or problem.smoothness(), fingerprint(problem)["grad_norm_sq"]
    else:
        _warm_up(problem, methods)
        channel = ranks.channel(problem.n, digest(json.loads(spec.model_dump_json())))
        if not ranks.first:
            problem = problem.only(channel.clients)
        survey = Survey(problem, known, channel)
        smoothness = survey.share(channel)
        norm = survey.start.facts["grad_norm_sq"] if ranks.first and survey.start else 0.0
        start = float(channel.together(torch.tensor([norm], dtype=torch.float64))[0])
    if spec.target >= start:
        raise ConfigError(f"target={spec.target:g}: ||grad f(x^0)||^2 is {start:.3g} already; choose a smaller one.")
    for method, label in zip(methods, labels, strict=True):
        theory = prepare(
            problem, method, rounds=spec.rounds, bits=spec.bits, target=spec.target, step="theory", multiple=1.0,
            pl=spec.pl, need_theory=False, smoothness=smoothness,
        )[1]  # fmt: skip
        if theory.evidence == "none":
            reasons[label] = theory.theorem
    if len(reasons) == len(labels) and "tuned" not in spec.steps:
        raise ConfigError(
            f"no method here has a step size from theory ({next(iter(reasons.values()))}); add --steps tuned."
        )
    return Course(problem, smoothness, reasons)


def _warm_up(problem: Problem, methods: Sequence[Method]) -> None:
    """Two rounds of every method, and one message of its compressor: what must be compiled is compiled here, once."""
    n, rnd = problem.n, Round.full(1, 0, problem.n)
    # What is compiled does not depend on the constants: none need to be known here.
    some = Smoothness(
        ONE, ONE, ONE, ONE, ONE, f_inf=ZERO, each=(1.0,) * n, plus_w=ONE, pm_w=ONE, apart=ONE, together=ONE
    )
    for method in methods:
        simulate(problem, method, rounds=2, step=1e-9, smoothness=some)
        code = getattr(method, "compressor", None)
        if isinstance(code, Compressor):  # MARINA's coin may have shown heads twice
            u = problem.grad(problem.start(), rnd)
            agreed = agree_locally(u, code, rnd)
            sent = code.encode(u, agreed)
            code.decode(sent, agreed)
            code.aggregate(sent, agreed)


def race(
    spec: RaceSpec,
    out: Path,
    command: str,
    resume: bool = False,
    workers: int | None = None,
    on_news: Callable[[News], None] = lambda news: None,
    on_job: Callable[[str, float], None] = lambda job, fraction: None,
    on_step: Callable[[str], None] = lambda text: None,
    ranks: Ranks | None = None,
    course: Course | None = None,
) -> Path:
    """Run the race into `out` and return it; KeyboardInterrupt leaves a folder that resume=True can finish.

    on_news hears running jobs, on_job (name, 0 at the start and 1 at the end) each job, on_step what else takes time.
    ranks: every run is one of all ranks together, one after the other, instead of `workers` runs at a time; all
    write checkpoints, the first rank everything else. course: what `check` returned, if it was called.
    """
    course = course or check(spec, ranks)
    if ranks is not None and not ranks.first:
        _run_along(spec, out, course, ranks)
        return out
    stored = json.loads(spec.model_dump_json())
    facts = _facts(spec, course, command)
    if resume and (out / "race.json").exists():
        held = json.loads((out / "race.json").read_text())
        if held.get("spec") != stored:
            raise ResumeMismatch(f"{out} holds another race; resume it with: shoal race --resume {out}")
        facts["command"] = held.get("command", command)
    else:
        make_folder(out)
    write_json(out / "race.json", {**facts, "status": "running"})
    try:
        if ranks is not None:
            _run_along(spec, out, course, ranks, on_news, on_job)
        else:
            on_step("compiling kernels (kept for the next time)")
            _warm_up(course.problem, [parse(text, known_names(spec.files), Method) for text in spec.methods])
            _run_jobs(spec, out, course, workers, on_news, on_job)
    except BaseException:
        write_json(out / "race.json", {**facts, "status": "interrupted"})
        raise
    write_json(out / "race.json", {**facts, "status": "done"})
    return out


def _facts(spec: RaceSpec, course: Course, command: str) -> dict[str, Any]:
    """What race.json says beside the status."""
    problem, smoothness, reasons = course
    described = {k: v for k, v in spec.problem.model_dump().items() if v is not None} | {"n": problem.n, "d": problem.d}
    described["description"] = repr(problem)
    names = known_names(spec.files)
    return {
        "format": 1, "kind": "race", "title": spec.title, "problem": described,
        "methods": [compact(parse(text, names, Method)) for text in spec.methods],
        "steps": list(spec.steps), "seeds": list(spec.seeds), "rounds": spec.rounds, "bits": spec.bits,
        "target": spec.target, "tune": list(spec.tune), "tune_unproved": list(UNPROVED), "no_theorem": reasons,
        "smoothness": {k: list(v) for k, v in smoothness.facts().items()}, "command": command,
        "versions": versions(), "machine": machine(), "spec": json.loads(spec.model_dump_json()),
    }  # fmt: skip


def _wanted(spec: RaceSpec, reasons: dict[str, str]) -> list[tuple[int, str, str]]:
    """(index of the method, step rule, name) of every job."""
    names = known_names(spec.files)
    labels = [compact(parse(text, names, Method)) for text in spec.methods]
    return [
        (i, rule, f"{label} · {rule}")
        for rule in spec.steps
        for i, label in enumerate(labels)
        if rule == "tuned" or label not in reasons
    ]


def _run_along(
    spec: RaceSpec,
    out: Path,
    course: Course,
    ranks: Ranks,
    on_news: Callable[[News], None] | None = None,
    on_job: Callable[[str, float], None] = lambda job, fraction: None,
) -> None:
    """All jobs in this process, each with all other ranks."""
    wanted = _wanted(spec, course.reasons)
    for _, _, job in wanted:
        on_job(job, 0.0)
    for index, rule, job in wanted:
        Job(spec, index, rule, out, course.problem, course.smoothness, ranks, on_news).run()
        on_job(job, 1.0)


def _run_jobs(
    spec: RaceSpec,
    out: Path,
    course: Course,
    workers: int | None,
    on_news: Callable[[News], None],
    on_job: Callable[[str, float], None],
) -> None:
    wanted = _wanted(spec, course.reasons)
    context = multiprocessing.get_context("spawn")
    told, stop = context.Queue(), context.Event()
    count = min(workers or os.cpu_count() or 1, len(wanted))
    pool = ProcessPoolExecutor(count, context, _begin_worker, (told, stop, os.getpid()))
    try:
        waiting: dict[Future[str], str] = {}
        # Workers inherit the mask: a Ctrl-C must not hit one that is still importing.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for index, rule, job in wanted:
            task = pool.submit(_work, spec.model_dump_json(), index, rule, str(out), course.smoothness)
            waiting[task] = job
            on_job(job, 0.0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while waiting:
            finished, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            while True:
                try:
                    on_news(told.get_nowait())
                except Empty:
                    break
            for future in finished:
                future.result()
                on_job(waiting.pop(future), 1.0)
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
