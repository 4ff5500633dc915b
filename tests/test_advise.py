"""`shoal advise`: a rehearsal moves the bytes of the exchange; the line, buckets as DDP fills them, verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_sharded import Seat, seated
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from shoal.cli import app
from shoal.compressors import QSGD, Correlated, Dense, PermK, Rotated, TopK
from shoal.errors import ConfigError
from shoal.experiments import line, workload
from shoal.experiments.advise import Advice, Part, Way, advice, compressed, float32
from shoal.experiments.expressions import compact
from shoal.experiments.line import Line, shared
from shoal.experiments.timing import normal_rows
from shoal.experiments.workload import Bucket, Workload, assumed, filled, found, measured
from shoal.messages import Round
from shoal.runtimes import Local, peers
from shoal.runtimes.ranks import KINDS
from shoal.runtimes.reduce import reduce
from shoal.runtimes.rehearsal import Spent, Step, rehearsed
from shoal.runtimes.signals import SIZE

QUIET = lambda label, share: None  # noqa: E731
CODES = [Dense(), Correlated(), Rotated(Correlated()), QSGD(7), TopK(0.01), PermK()]


def play_of(code, kind, world, d, channels, rows=None):
    """One exchange of `world` ranks, with rows of their own or with these in turn; channels[rank] is kept."""
    rows = normal_rows(world, d, 0) if rows is None else [rows[rank % len(rows)] for rank in range(world)]

    def play(peers):
        channel = channels[peers.rank] = KINDS[kind](world, b"advised.", peers)
        return reduce(channel, code, rows[peers.rank], Round.full(0, 0, world, torch.tensor([peers.rank]))).mean

    return play


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_rehearsal_moves_and_says_what_the_exchange_does(code, kind, world, monkeypatch):
    """Ranks that all run to the end say the same mean, and count the same bytes but for the signals."""
    monkeypatch.setattr(peers, "SMALL", -1)
    d, there, here = 2000, {}, {}
    means = seated(world, play_of(code, kind, world, d, there))
    done = rehearsed(world, play_of(code, kind, world, d, here))
    assert done.result.numpy().tobytes() == means[0].numpy().tobytes()
    signals = sum(step.nbytes for step in done.steps if step.kind == "signals")
    assert done.moved - signals == there[0].peers.moved
    assert signals >= SIZE * (world - 1) * sum(step.kind == "signals" for step in done.steps)
    assert done.moved == here[0].peers.moved <= sum(step.nbytes for step in done.steps)
    assert [s.kind for s in done.steps[::2]] == ["signals"] * (len(done.steps) // 2)
    assert isinstance(there[0].peers, Seat)


def test_a_rehearsal_has_few_bytes_in_the_signals():
    for size in (0, 5, peers.SMALL // 8):
        done = rehearsed(3, lambda seat, size=size: seat.all(torch.full((size,), seat.rank)))
        assert [one.tolist() for one in done.result] == [[rank] * size for rank in range(3)]
        assert [step.kind for step in done.steps] == ["signals"]
        assert done.moved == done.steps[0].nbytes == 2 * (SIZE + len("a tensor, torch.int64") + 8 * size)
    assert [step.kind for step in rehearsed(3, lambda seat: seat.all(torch.zeros(peers.SMALL))).steps] == [
        "signals",
        "ring",
    ]


def test_a_rehearsal_raises_what_another_rank_raises():
    def play(peers):
        peers.all(torch.zeros(4))
        if peers.rank == 2:
            raise ConfigError("rank 2 has enough.")
        return peers.all(torch.zeros(4))

    with pytest.raises(ConfigError, match="rank 2 has enough"):
        rehearsed(3, play)


def test_ranks_that_differ_are_found_in_a_rehearsal_too():
    """The fence is the real one."""
    with pytest.raises(Exception, match="the number of bytes is, at rank 0: 4; rank 1: 8"):
        rehearsed(2, lambda peers: peers.all(torch.zeros(1 + peers.rank)))


# ------------------------------------------------------------------------------------------------ the line
def simulated(pieces: int, nbytes: float, rate: float, latency: float) -> float:
    """A ring of equal ranks, piece by piece."""
    out, arrived = 0.0, [0.0, 0.0]
    for i in range(pieces):
        out = max(out, arrived[i]) + nbytes / pieces / rate
        arrived.append(out + latency)
    return arrived[-1]


@pytest.mark.parametrize("pieces", [2, 4, 14, 42])
@pytest.mark.parametrize("latency", [0.0, 1e-4, 1e-2, 1.0])
def test_a_ring_takes_what_its_pieces_take(pieces, latency):
    line = Line(1e6, latency)
    assert line.ring(pieces, 3e5) == pytest.approx(simulated(pieces, 3e5, 1e6, latency), rel=1e-12)


def test_lines():
    line = Line.told(100, 2)
    assert line.latency == 0.002
    assert line.bandwidth == pytest.approx(100)
    assert line.seconds(Step("signals", 1000), 4) == pytest.approx(0.002 + 1000 / line.rate)
    assert line.seconds(Step("straight", 10**6), 4) == pytest.approx(0.002 + 1e6 / line.rate)
    crowded = Line(line.rate, line.latency, across=line.rate / 2)
    assert crowded.seconds(Step("straight", 10**6), 4) == pytest.approx(0.002 + 2e6 / line.rate)
    assert crowded.seconds(Step("signals", 1000), 4) == line.seconds(Step("signals", 1000), 4)
    # Few bytes: 2 (W - 1) latencies one after the other; many: 2 (W - 1) / W of them through the line.
    assert line.all_reduce(4, 8) == pytest.approx(6 * 0.002, rel=1e-3)
    assert Line.told(10, 0).all_reduce(4, 26e6) == pytest.approx(1.5 * 26e6 / Line.told(10, 0).rate, rel=1e-12)
    for bandwidth, latency in ((0, 1), (-1, 1), (float("inf"), 0), (float("nan"), 0), (10, -1)):
        with pytest.raises(ConfigError, match="--bandwidth"):
            Line.told(bandwidth, latency)


@pytest.mark.parametrize(
    ("others", "seconds"),
    [
        ([(1.0, 0.9, 0, 2)], 1.0),  # two ranks on two cores: as timed
        ([(1.5, 0.9, 0, 2)], 1.5),  # the slowest of them
        ([(1.0, 0.9, 0, 2)] * 3, 1.8),  # four ranks on two cores: 3.6 seconds of work
        ([(1.0, 0.9, 1, 2), (1.0, 0.9, 2, 2)], 1.0),  # each on a machine of its own
        ([(1.0, 0.9, 1, 1)] * 3, 2.7),  # three of them on one core
    ],
)
def test_ranks_that_share_cores_keep_them_busy(others, seconds, monkeypatch):
    monkeypatch.setattr(line, "cores", lambda: (0, 2))
    told = [torch.tensor(row, dtype=torch.float64) for row in others]
    ranks = SimpleNamespace(all=lambda mine, what: [mine, *told])
    assert shared(ranks, Spent(1.0, 0.9)) == pytest.approx(seconds, rel=1e-12)
    assert shared(None, Spent(1.0, 0.9)) == 1.0


def test_cores_are_those_that_this_process_may_use():
    where, count = line.cores()
    assert count == len(os.sched_getaffinity(0))
    assert (where, count) == line.cores()


# ------------------------------------------------------------------------------------------------ the step
def test_buckets_queue_and_codecs_take_from_backward():
    work = Workload("w", 1.0, 0.25, (Bucket(10, 0, 0.5), Bucket(30, 0, 1.0)), ())
    line, signal = Line(100.0, 0.0), (Step("signals", 100),)
    way = Way("x", (Part(0.2, signal, 100), Part(0.1, signal, 100)), 0.0)
    # 0.5 + 0.2 + 1 = 1.7, after the delayed backward's end at 1.2; then 0.1 + 1, then the update.
    assert way.step(work, 4, line) == pytest.approx(1.7 + 1.1 + 0.25)
    assert way.step(work, 4, Line(1e12, 0.0)) == pytest.approx(1.2 + 0.1 + 0.25)
    # What the first bucket's exchange asks of the cores, a tenth for each and a hundredth a byte, delays the backward.
    asking = Line(1e12, 0.0, busy=(0.1, 0.01))
    assert way.step(work, 4, asking) == pytest.approx(1.2 + 0.1 + 1.0 + 0.1 + 0.25)
    assert way.step(work, 4, Line(1e12, 0.0), stretch=2.0) == pytest.approx(2 * (1.2 + 0.1 + 0.25))
    plain = float32(work, 4)
    # The first bucket takes 0.6 from 0.5 on, and so the second waits for it.
    assert plain.step(work, 4, line) == pytest.approx(1.1 + 1.5 * 4 * 30 / 100 + 0.25, rel=1e-6)
    assert plain.bits == 48


@pytest.mark.parametrize("code", [TopK(0.01), Correlated()], ids=repr)
def test_every_bucket_is_rehearsed(code):
    """Bytes of a way are those of its buckets, small parameters as they are."""
    work = Workload("w", 1.0, 0.0, (Bucket(5000, 300, 0.5), Bucket(0, 40, 0.7), Bucket(4000, 0, 1.0)),
                    tuple(normal_rows(1, 9340, k)[0] for k in range(3)))  # fmt: skip
    way = compressed(code, work, 4, KINDS["auto"], 1)
    parts = list(work.parts())

    def moved(c, d, rows=None):
        return rehearsed(4, play_of(c, "auto", 4, d, {}, rows)).moved

    # A prefix code is as long as it is for this very data.
    first, last = ([u for u, _ in parts[k]] for k in (0, 2))
    assert [part.moved for part in way.parts] == [
        moved(code, 5000, first) + moved(Dense(), 300), moved(Dense(), 40), moved(code, 4000, last)
    ]  # fmt: skip
    assert way.bits == pytest.approx(8 * sum(part.moved for part in way.parts) / 9340)
    assert way.name == compact(code)
    assert way.error > 0


def test_errors_are_those_of_the_mean():
    """Four ranks, two gradients: the error is that of the simulator's mean over the mean squared norm."""
    rows = normal_rows(2, 5000, 0)
    way = compressed(QSGD(7), Workload("w", 1.0, 0.0, (Bucket(5000, 0, 1.0),), tuple(rows)), 4, KINDS["auto"], 1)
    u, rnd = rows[[0, 1, 0, 1]], Round.full(0, 0, 4)
    mean = Local(4).mean(QSGD(7).encode(u, rnd), QSGD(7), rnd)
    error = float((mean.double() - u.double().mean(0)).square().sum() / u.double().square().sum() * 4)
    assert way.error == pytest.approx(error, rel=1e-9)
    assert way.bound == pytest.approx(QSGD(7).omega(5000) / 4)
    assert way.proved


# ------------------------------------------------------------------------------------------------ verdicts
def made_advice(rate: float) -> Advice:
    """A compressor that sends a hundredth of float32's bytes, and takes 10 ms."""
    work = Workload("w", 0.1, 0.0, (Bucket(10**6, 0, 0.1),), ())
    ways = [float32(work, 2), Way("tiny", (Part(0.01, (Step("straight", 40_000),), 40_000),), 0.32, 0.5)]
    line = Line(rate, 0.0)
    return Advice(work, 2, line, 1.0, tuple(sorted(ways, key=lambda w: w.step(work, 2, line))))


def test_the_verdict_turns_at_the_break_even():
    slow, fast = made_advice(1e6), made_advice(1e9)
    assert slow.worth
    assert slow.verdict()[0].startswith("compress: tiny makes a step 27 x shorter")
    assert not fast.worth
    assert fast.verdict()[0].startswith("do not compress: at this bandwidth the float32 exchange takes 4 ms")
    (even,) = {round(a.even(a.ways[0] if a.ways[0].parts else a.ways[1]), 3) for a in (slow, fast)}
    at = made_advice(Line.told(even, 0.0).rate)
    assert at.step(at.ways[0]) == pytest.approx(at.step(at.ways[1]), rel=1e-4)
    assert f"{even:.3g} Mbit/s" in fast.verdict()[1]
    assert slow.facts()["compress"]
    assert json.loads(json.dumps(slow.facts()))["rows"][1]["gain"] == 1.0


def test_a_break_even_is_one_of_this_line():
    """Of how full its all-to-alls are, and what they ask of the cores."""
    work = Workload("w", 0.1, 0.0, (Bucket(10**6, 0, 0.05), Bucket(10**6, 0, 0.1)), ())
    way = Way("way", (Part(0.02, (Step("straight", 10**6),), 10**6),) * 2, 8.0)
    for across in (None, 7e7, 3e7):
        line = Line(1e8, 1e-4, across, (1e-3, 1e-9))
        advice = Advice(work, 4, line, 1.0, (way, float32(work, 4)))
        assert line.at(line.bandwidth).across == (across and pytest.approx(across, rel=1e-12))
        even = advice.even(way)
        assert even is not None
        assert (line.bandwidth < even) == (advice.gain(way) > 1.0)
        at = line.at(even)
        assert advice.step(way, at) == pytest.approx(advice.step(advice.plain, at), rel=1e-6)


def test_no_break_even_is_no_number():
    """Nothing to gain anywhere, or everywhere."""
    work = Workload("w", 0.1, 0.0, (Bucket(1000, 0, 0.1),), ())
    dear = Way("dear", (Part(0.5, (Step("straight", 10_000),), 10_000),), 80.0)
    free = Way("free", (Part(0.0, (Step("straight", 1),), 1),), 0.01)
    told = Advice(work, 2, Line(1e6, 0.0), 1.0, (free, float32(work, 2), dear))
    assert told.even(dear) is None
    assert told.even(free) == float("inf")


# ------------------------------------------------------------------------------------------------ the model
class Long(nn.Module):
    """Parameters that are used one after the other."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [300_000, 500, 2_000_000, 900, 5_000_000, 1_400_000, 200, 250_000, 30]
        self.held = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for p in self.held:
            x = (x + p[0]).tanh()
        return x


def test_buckets_are_those_that_ddp_fills(tmp_path):
    """From its second step on."""
    seen: list[list[int]] = []

    def hook(state, bucket):
        seen.append(sorted(p.numel() for p in bucket.parameters()))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Long())
        model.register_comm_hook(None, hook)
        for _ in range(2):
            seen.clear()
            model(torch.ones(1)).sum().backward()
    finally:
        dist.destroy_process_group()
    sizes = [p.numel() for p in model.module.parameters()]
    assert seen == [sorted(sizes[i] for i in bucket) for bucket in filled(sizes)]
    assert len(seen) == 3


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise([30, 600, 500, 40, 3])))


def test_a_model_is_measured():
    """Gradients lie bucket by bucket, small parameters behind; they are ready in the order of the backward pass."""
    model, x = net(), torch.ones(2, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    work = measured(lambda: (model, lambda: model(x).square().mean(), optimizer), "net", 1, QUIET)
    sizes = [p.numel() for p in model.parameters()]
    small = sum(size for size in sizes if size < 1024)
    assert work.d == sum(sizes)
    assert sum(b.plain for b in work.buckets) == small
    assert len(work.buckets) == 2
    assert 0 < work.buckets[0].ready < work.buckets[1].ready <= work.compute
    assert work.update > 0
    first = filled(sizes)[0]
    held = list(model.parameters())
    coded = torch.cat([held[i].grad.flatten() for i in first if sizes[i] >= 1024])
    assert torch.equal(work.parts()[0][-1][0], coded)


def test_an_assumed_step_has_all_numbers(monkeypatch):
    monkeypatch.setattr(workload, "ROWS", 1)
    work = assumed(7_000_000, 0.3)
    assert [4 * (b.coded + b.plain) for b in work.buckets] == [1 << 20, 25 << 20, 28_000_000 - (26 << 20)]
    assert work.buckets[-1].ready == pytest.approx(0.3)
    assert work.buckets[0].ready == pytest.approx(0.1 + 0.2 * 2**18 / 7e6)
    for numel, compute in ((0, 0.1), (10, 0.0), (10, float("nan"))):
        with pytest.raises(ConfigError, match="--numel"):
            assumed(numel, compute)


MODELS = """
import torch
def fine():
    model = torch.nn.Linear(40, 50)
    return model, lambda: model(torch.ones(3, 40)).sum()
def wrong(): return torch.nn.Linear(2, 3)
def unused():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    return model, lambda: model[0](torch.ones(2)).sum()
def half():
    model = torch.nn.Linear(2, 2).half()
    return model, lambda: model(torch.ones(2)).sum()
def vector():
    model = torch.nn.Linear(2, 2)
    return model, lambda: model(torch.ones(2))
def broken(): return 1 / 0
number = 3
"""


@pytest.mark.parametrize(("name", "why"), [
    ("wrong", "returned Linear: it returns \\(module"), ("unused", "1.weight, 1.bias got no gradient"),
    ("half", "float16"), ("vector", "not a loss of one number"), ("broken", "ZeroDivisionError"),
    ("number", "defines no function number"), ("missing", "defines no function missing"),
])  # fmt: skip
def test_what_is_no_model(tmp_path, name, why):
    (tmp_path / "models.py").write_text(MODELS)
    with pytest.raises(ConfigError, match=why):
        measured(found(f"{tmp_path / 'models.py'}:{name}"), name, 1, QUIET)


# ------------------------------------------------------------------------------------------------ the command
def shoal(*words: str) -> SimpleNamespace:
    result = CliRunner().invoke(app, ["advise", *words])
    return SimpleNamespace(said=" ".join(result.output.split()), error=str(result.exception), code=result.exit_code)


def test_the_command_says_and_writes(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    file = tmp_path / "advice.json"
    words = [
        f"{tmp_path / 'models.py'}:fine",
        "--bandwidth",
        "0.05",
        "--repeat",
        "1",
        "-c",
        "QSGD(7)",
        "-c",
        "TopK(0.02)",
    ]
    done = shoal(*words, "--json", str(file))
    assert done.code == 0, done
    assert "compress: TopK(0.02) makes a step" in done.said
    facts = json.loads(file.read_text())
    assert facts["d"] == 2050
    assert facts["buckets"][0]["plain"] == 50
    assert [row["way"] for row in facts["rows"]] == ["TopK(0.02)", "QSGD(levels=7)", "float32 all-reduce"]
    assert facts["rows"][0]["step_seconds"] > facts["compute_seconds"] > 0
    slower = shoal(*words, "--cores-per-rank", str(torch.get_num_threads() / 4), "--json", str(file))
    assert slower.code == 0
    assert json.loads(file.read_text())["stretch"] == 4


@pytest.mark.parametrize(("words", "why"), [
    ([], "name a model"), (["mnist-cnn"], "--bandwidth is missing"), (["nothing", "--bandwidth", "1"], "is no model"),
    (["none.py:f", "--bandwidth", "1"], "no file"), (["mnist-cnn", "--latency", "1"], "--latency without"),
    (["mnist-cnn", "--numel", "9", "--bandwidth", "1"], "leave out --numel"),
    (["mnist-cnn", "--bandwidth", "0"], "Mbit/s above 0"),
    (["mnist-cnn", "--bandwidth", "1", "--ranks", "1"], "at least two ranks"),
    (["mnist-cnn", "--bandwidth", "1", "--repeat", "0"], "--repeat 0"),
    (["mnist-cnn", "--bandwidth", "1", "--cores-per-rank", "0"], "--cores-per-rank 0"),
    (["mnist-cnn", "--bandwidth", "1", "-c", "Drive()"], "states no omega"),
    (["mnist-cnn", "--bandwidth", "1", "--channel", "tube"], "a channel is one of"),
    (["--numel", "9", "--compute", "1", "--bandwidth", "1", "-c", "RandK(20)"], "RandK"),
])  # fmt: skip
def test_what_the_command_refuses(words, why):
    done = shoal(*words)
    assert done.code != 0
    assert why in done.error + done.said


@pytest.mark.slow
def test_ranks_measure_their_link(tmp_path):
    """Two ranks under torchrun: rank 0 alone speaks, and the line between them has a rate and a latency."""
    (tmp_path / "models.py").write_text(MODELS)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "shoal"]
    words += ["advise", f"{tmp_path / 'models.py'}:fine", "--repeat", "1", "-c", "QSGD(7)", "--json", "advice.json"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads((tmp_path / "advice.json").read_text())
    assert facts["link_measured"]
    assert facts["ranks"] == 2
    assert facts["bandwidth_mbit"] > 10
    assert 0 < facts["latency_ms"] < 1000
    assert done.stdout.count("break-even") + done.stdout.count("compress:") <= 2, "one rank speaks"


def test_under_torchrun_ranks_are_those_there_are(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    for option in ("--ranks", "--cores-per-rank"):
        assert "under torchrun the ranks are those there are" in shoal("mnist-cnn", option, "3").error


def test_advice_is_in_the_order_of_steps():
    result = advice([QSGD(7), TopK(0.01)], assumed(50_000, 0.01), 4, Line.told(10, 0.1), KINDS["auto"], repeat=1)
    steps = [result.step(way) for way in result.ways]
    assert steps == sorted(steps)
    assert result.ways[-1] is result.plain
