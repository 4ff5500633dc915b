"""One compressor on n given vectors: its error with an interval, a check of its bias, its bits, its times, its theory.

The bound is the AB inequality (Szlendak et al., arXiv:2110.03300) evaluated on the vectors themselves. What the columns
mean, and why the tests are what they are, stands in docs/mean.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from shoal.core import Compressor
from shoal.errors import ConfigError
from shoal.experiments.exact import exact
from shoal.experiments.expressions import compact
from shoal.experiments.timing import clock
from shoal.messages import Round
from shoal.theory import AB, independent
from shoal.wire import HEADER

BATCHES = 20  # the rounds are cut into so many, for intervals and for the bias check
BIASED, RARE = 6.0, 10.0  # a bias is found above both: see `bias_z` and `biased`
AGREEMENT = 32  # bits up a client for a scale that all clients agree on
DECODES = 5  # rounds in which rows are also decoded one by one, to time it
ROUNDING = 1e-12  # normalized errors below this are float32's own


class Facts(NamedTuple):
    """What theory needs of the vectors: M = (1/n) sum ||a_i||^2, ||abar||^2, max ||a_i||^2, whether all are equal."""

    size: float
    mean: float
    top: float
    equal: bool

    @property
    def spread(self) -> float:
        """V/M = 1 - ||abar||^2/M, from 0 (all equal) to 1 (nothing in common)."""
        return 0.0 if self.equal else max(0.0, 1.0 - self.mean / self.size)


@dataclass(frozen=True)
class Measurement:
    """One compressor on n vectors. Errors are in units of M, bits are a coordinate and client, times ns for the same.

    `low` and `high` are a 95% interval of `error`; `bias_z` a test of unbiasedness and `bias` its verdict, "none seen",
    "found" or "stated" (the compressor is biased by design); `bound` is what a theorem guarantees on these vectors, and
    `exact` the error itself where it is known without measuring.
    """

    compressor: str
    error: float
    low: float
    high: float
    bias_z: float
    bias: str
    bits: float
    framed_bits: float
    encode_ns: float
    decode_ns: float
    aggregate_ns: float
    bound: float | None = None
    evidence: str = ""
    source: str = ""
    exact: float | None = None


def facts_of(rows: Tensor, name: str = "vectors") -> Facts:
    """M, ||abar||^2 and max ||a_i||^2, in float64. Raises ConfigError where all vectors are zero."""
    norms = (torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) ** 2).numpy()
    mean = rows.mean(0, dtype=torch.float64)
    if not norms.any():
        raise ConfigError(f"{name}: all vectors are zero, and an error relative to their size means nothing.")
    return Facts(float(norms.mean()), float(mean @ mean), float(norms.max()), bool((rows == rows[0]).all()))


# ------------------------------------------------------------------------------------------------ one compressor
def measure(
    rows: Tensor, facts: Facts, compressor: Compressor, rounds: int, seed: int, tell: Callable[[float], None]
) -> Measurement:
    """One compressor on the rows, in rounds 0..rounds-1; another round before them warms up and is thrown away."""
    (n, d), mean = rows.shape, rows.mean(0, dtype=torch.float64)
    edges = np.linspace(0, rounds, min(BATCHES, rounds) + 1).astype(int)[1:]
    sums = torch.zeros(len(edges), d, dtype=torch.float32)  # of the error vectors of each batch
    errors, sent, times = np.empty(rounds), 0, [[0.0], [0.0], [0.0]]
    _one_round(rows, compressor, Round.full(rounds, seed, n), True)
    for index in range(rounds):
        estimate, nbytes, spent = _one_round(rows, compressor, Round.full(index, seed, n), index < DECODES)
        off = estimate.double() - mean
        errors[index] = float(off @ off) / facts.size
        sums[int(np.searchsorted(edges, index, side="right"))] += off.float()
        sent += nbytes
        for column, value in zip(times, spent, strict=True):
            column.append(value)
        tell((index + 1) / rounds)
    encode, decode, aggregate = (float(np.nanmedian(column[1:])) / (n * d) for column in times)
    low, high = interval(errors, edges)
    z = bias_z(sums)
    ab = stated(compressor, n, d)
    known = theory(compressor, rows, facts, ab)
    drift = float((sums.sum(0, dtype=torch.float64) / rounds).square().sum()) / facts.size
    found = biased(z, drift, float(errors.mean()), known.get("bound"), rounds)
    agreement = AGREEMENT if compressor.agrees else 0
    bits = 8.0 * sent / (rounds * n) + agreement
    frames = 8 * HEADER * (2 if compressor.agrees else 1)
    return replace(
        Measurement(
            compact(compressor), float(errors.mean()), low, high, z if float(errors.mean()) > ROUNDING else 0.0,
            "stated" if ab is None else "found" if found else "none seen",
            bits / d, (bits + frames) / d, encode, decode, aggregate,
        ),
        **known,
    )  # fmt: skip


def _one_round(rows: Tensor, compressor: Compressor, rnd: Round, decode: bool) -> tuple[Tensor, int, list[float]]:
    """(the estimate, bytes of all payloads, CPU nanoseconds to encode, to decode all rows, to aggregate)."""
    began = clock()
    if compressor.agrees:
        rnd = replace(rnd, agreed=float(compressor.prepare(rows, rnd).max()))
    msgs = compressor.encode(rows, rnd)
    encoded = clock()
    estimate = compressor.aggregate(msgs, rnd)
    added = clock()
    if decode:
        compressor.decode(msgs, rnd)
    decoded = clock() - added if decode else math.nan
    return estimate, int(msgs.nbytes.sum()), [encoded - began, decoded, added - encoded]


def interval(errors: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    """A 95% interval of the mean of independent errors: Student's t over the means of batches ending at `edges`."""
    means = [part.mean() for part in np.split(errors, edges[:-1])]
    half = float(stdtrit(len(means) - 1, 0.975)) * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    middle = float(errors.mean())
    return max(0.0, middle - half), middle + half


def bias_z(sums: Tensor) -> float:
    """sum_{b<c} <s_b, s_c> / sqrt(sum_{b<c} <s_b, s_c>^2), s_b the sum of the error vectors of batch b.

    The numerator has the mean (number of pairs) x ||E s||^2, which is 0 for an unbiased compressor. Then the ratio is
    about standard normal where many coordinates err, and about (chi^2_1 - 1)/sqrt(2) where one does: above 6 with a
    probability below 0.003 in the worst case. With a bias it grows to sqrt(number of pairs), 13.8 for 20 batches.
    """
    gram = (sums.double() @ sums.double().T).numpy()
    pairs = gram[np.triu_indices(len(gram), 1)]
    scale = math.sqrt(float((pairs**2).sum()))
    return float(pairs.sum()) / scale if scale > 0 else 0.0


def biased(z: float, drift: float, error: float, bound: float | None, rounds: int) -> bool:
    """Whether z is large for another reason than rounding, or events too rare to have been seen.

    If the compressor is unbiased, events that were not seen contribute at most (bound - error) to the error of a round
    and (bound - error) / rounds to the expectation of `drift`, the squared norm of the mean error vector in units of M.
    By Markov's inequality they exceed ten times that with a probability of at most 0.1, and z > 6 comes on top.
    """
    unseen = 0.0 if bound is None else max(0.0, bound - error)
    return error > ROUNDING and z > BIASED and drift > RARE * unseen / rounds


# ------------------------------------------------------------------------------------------------ theory
def stated(compressor: Compressor, n: int, d: int) -> AB | None:
    """The AB inequality, from omega where that is all there is; None for a compressor that states neither."""
    try:
        if hasattr(compressor, "ab"):
            return compressor.ab(n, d)
        if hasattr(compressor, "omega"):
            return independent(compressor.omega(d), n, "independent")
    except ConfigError:
        return None  # stated only under a flag that is not set
    return None


def theory(compressor: Compressor, rows: Tensor, facts: Facts, ab: AB | None) -> dict[str, Any]:
    """bound, evidence, source and exact, as `Measurement` has them.

    bound = (a M - b ||abar||^2 + c max ||a_i||^2) / M, the least of the inequalities stated; for a biased compressor
    1 - alpha, since ||(1/n) sum e_i||^2 <= (1/n) sum ||e_i||^2.
    """
    known = exact(compressor, rows)
    found: dict[str, Any] = {"exact": None if known is None else known / facts.size}
    if ab is None:
        if hasattr(compressor, "alpha"):
            alpha = float(compressor.alpha(rows.shape[1]))
            found |= {"bound": 1.0 - alpha, "evidence": "proved", "source": f"1 - alpha, alpha = {alpha:.4g}"}
        return found
    for candidate in _chain(ab):
        if candidate.evidence == "homogeneous" and not facts.equal:
            continue
        value = candidate.a * facts.size - candidate.b * facts.mean + candidate.c * facts.top
        value = max(0.0, value / facts.size)
        if found.get("bound") is None or value < found["bound"]:
            found |= {"bound": value, "evidence": candidate.evidence, "source": candidate.source}
    return found


def _chain(ab: AB | None) -> list[AB]:
    return [] if ab is None else [ab, *_chain(ab.other)]
