"""A race folder as the recorders write it, made up of plausible numbers: something for the report's tests to read.

The model: ||grad f||^2 falls geometrically, faster with a larger step until it diverges, with a noise floor for biased
methods, jitter from the seed, and MARINA's coin for full rounds. All of it comes from numpy Generators seeded from
the method, the multiple and the seed, so the same call writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

D, N = 68, 20
HEADER = 8 * 64


@dataclass(frozen=True)
class Model:
    """bits: up a round; p: probability of a full round (0: none); rate: log-decrease a round at the theory step."""

    bits: int
    p: float
    rate: float
    limit: float  # the largest multiple that still converges
    noise: float = 0.05


METHODS: dict[str, Model] = {
    "GD()": Model(32 * D, 0.0, 0.030, 8.0, 0.0),
    "Dcgd(RandK(k=4))": Model(32 * 4, 0.0, 0.0022, 4.0, 0.2),
    "Diana(QSGD(levels=2))": Model(D * 2 + 32, 0.0, 0.0085, 8.0),
    "Marina(PermK())": Model(32 * D // N, 0.05, 0.0105, 8.0),
    "Marina(Correlated())": Model(D + 32, 0.04, 0.0150, 16.0),
    "Marina(Independent(QSGD(levels=4)))": Model(D * 3 + 32, 0.06, 0.0100, 8.0),
    "EF21(TopK(k=4))": Model(39 * 4, 0.0, 0.0055, 64.0),
}


def write_race(
    folder: Path,
    methods: dict[str, Model] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    target: float | None = 1e-6,
    rounds: int = 6000,
    interrupted: bool = False,
    title: str = "Logistic regression on phishing, 20 clients",
) -> Path:
    """Write the race and return its folder. `interrupted` cuts one run short, in the middle of a line."""
    methods = METHODS if methods is None else methods
    (folder / "runs").mkdir(parents=True)
    _json(
        folder / "race.json",
        {
            "format": 1,
            "kind": "race",
            "title": title,
            "problem": {
                "name": "phishing",
                "n": N,
                "d": D,
                "rows": 11055,
                "split": "iid",
                "loss": "logistic",
                "lam": 0.1,
            },
            "methods": list(methods),
            "steps": ["theory", "tuned"],
            "seeds": list(seeds),
            "rounds": rounds,
            "bits": None,
            "target": target,
            "smoothness": {
                "minus": [0.703, "bound"],
                "plus": [0.731, "bound"],
                "pm": [0.182, "bound"],
                "tilde": [0.735, "bound"],
                "max": [0.842, "bound"],
                "f_inf": [0.0, "bound"],
            },
            "command": "shoal race --data phishing --clients 20 --target 1e-6",
            "versions": {"shoal": "0.1.0", "torch": "2.13.0", "numpy": "2.4.0", "python": "3.11.9"},
            "machine": "x86_64, 2 cores, Linux",
            "status": "interrupted" if interrupted else "done",
        },
    )
    for label, model in methods.items():
        for seed in seeds:
            _write(folder, label, model, "theory", 1.0, seed, False, target, rounds)
        multiples = [m for m in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0) if m <= 2 * model.limit]
        for multiple in multiples:
            _write(folder, label, model, "tuned", multiple, 1000, True, target, rounds)
        for seed in seeds:
            _write(folder, label, model, "tuned", min(model.limit, multiples[-1]), seed, False, target, rounds)
    if interrupted:
        last = max(path for path in (folder / "runs").iterdir() if not path.name.endswith("-trial"))
        lines = (last / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (last / "metrics.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
        (last / "result.json").unlink()
    return folder


def write_run(folder: Path, rows: list[dict[str, float]], **config: Any) -> Path:
    """One run folder from rows written by hand; `config` is added to config.json, `result` goes to result.json."""
    folder.mkdir(parents=True)
    result = config.pop("result", None)
    _json(
        folder / "config.json",
        {
            "format": 1,
            "kind": "run",
            "problem": {"name": "toy", "n": 2, "d": 3},
            "method": "GD()",
            "seed": 0,
            "step": {},
        }
        | config,
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if result is not None:
        _json(folder / "result.json", result)
    return folder


def row(k: int, norm: float, up: float, down: float = 0.0, seconds: float = 0.0) -> dict[str, float]:
    """One line of metrics.jsonl; each round has framed both directions once."""
    return {
        "round": k,
        "value": 0.5 + norm,
        "grad_norm_sq": norm,
        "up_bits": up,
        "down_bits": down,
        "up_framed_bits": up + HEADER * k,
        "down_framed_bits": down + HEADER * k,
        "seconds": seconds,
    }


def _write(
    folder: Path,
    label: str,
    model: Model,
    step: str,
    multiple: float,
    seed: int,
    trial: bool,
    target: float | None,
    rounds: int,
) -> None:
    name = f"{zlib.crc32(label.encode()):08x}-{step}-{multiple:g}-{seed}{'-trial' if trial else ''}"
    norms, up, stopped = _trajectory(model, multiple, zlib.crc32(f"{label}{multiple}{seed}".encode()), target, rounds)
    down = 32.0 * D * np.arange(len(norms))
    rows = [row(k, float(norms[k]), float(up[k]), float(down[k]), 0.0004 * (k + 1)) for k in range(len(norms))]
    gamma = 0.31 * multiple
    constants = {"omega": 2.43, "L_minus": 0.703, "Gamma": 0.0312} | ({"p": model.p} if model.p else {})
    write_run(
        folder / "runs" / name,
        rows,
        method=label,
        seed=seed,
        rounds=rounds,
        target=target,
        race={"label": label, "step": step, "multiple": multiple, "seed": seed, "trial": trial},
        result={
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
            "rounds": len(rows) - 1,
            "stopped": stopped,
            "method": label,
            "resolved": label.replace("()", "(levels=2, scale='shared')"),
            "gamma": gamma,
            "theorem": "MARINA, Theorem 2.1, with the AB inequality" if model.p else "Theorem 3, general nonconvex",
            "constants": constants,
            "seen": {"minus": [0.61, "estimate"], "plus": [0.62, "estimate"], "pm": [0.0511, "estimate"]},
            **{key: value for key, value in rows[-1].items() if key != "round"},
        },
    )


def _trajectory(
    model: Model, multiple: float, seed: int, target: float | None, rounds: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """(||grad f||^2, cumulative up bits, why it stopped), at most 6,000 rounds."""
    rng = np.random.default_rng(seed)
    rate = model.rate * multiple if multiple <= model.limit else -0.5
    speed = rate * (1 + model.noise * rng.standard_normal())
    wiggle = np.cumsum(rng.standard_normal(rounds + 1)) * model.noise * 0.1
    norms = 0.08 * np.exp(np.minimum(-speed * np.arange(rounds + 1) + wiggle - wiggle[0], 60.0))
    coin = rng.random(rounds) < model.p
    coin[0] |= model.p > 0
    up = np.concatenate([[0.0], np.cumsum(np.where(coin, 32 * D, model.bits))])
    end, stopped = rounds, "rounds"
    if (hit := np.flatnonzero(norms <= target)).size if target is not None else False:
        end, stopped = int(hit[0]), "target"
    if (blown := np.flatnonzero(norms > 1e6)).size and blown[0] < end:
        end, stopped = int(blown[0]), "diverged"
    return norms[: end + 1], up[: end + 1], stopped


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
