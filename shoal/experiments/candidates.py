"""What `shoal plan` chooses from: the library's methods around its compressors, on grids of their parameters.

Numbers of levels fill their bits (2^b points, or 2^b - 1 where zero is one of them), kept coordinates and groups go in
powers of two or four; of quantizers that are nearly the same, some numbers of levels stand for all. PerLayer is left
out, whose layers only the user knows, and so are Correlated's own scales of max |u_j|, whose constants are Grid's.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.compressors import (
    QSGD,
    Bernoulli,
    Coded,
    Composed,
    Correlated,
    CorrelatedOffset,
    Drive,
    Eden,
    Grid,
    Independent,
    LowRank,
    Natural,
    NaturalDithering,
    PermK,
    RandK,
    Rotated,
    Scaled,
    Sign,
    Ternary,
    TopK,
)  # fmt: skip
from shoal.core import Compressor, Method, Unbiased
from shoal.errors import ConfigError
from shoal.methods import DCGD, EF21, GD, Dasha, Diana, Marina, PPMarina, VRDiana, VRMarina

Codes = Iterator[Compressor]
DEEPEST = 10  # RandK and TopK keep d/2, d/4, .., d/2^10


def counts(n: int, d: int) -> list[int]:
    """Numbers of kept coordinates: halvings of d, and PermK's ceil(d/n)."""
    return sorted({d >> j for j in range(1, DEEPEST + 1) if d >> j} | {max(1, -(-d // n))}, reverse=True)


def groups(n: int, d: int) -> list[int]:
    """Numbers of Correlated's blocks: 1, 4, 16, .. and as many as there are clients, as far as they fit."""
    most = min(n, d)
    return sorted({4**j for j in range(10) if 4**j <= most} | {most})


def quantizers() -> Iterator[Unbiased]:
    """Unbiased and independent from client to client: what `Composed` takes, too."""
    yield from (QSGD(2 ** (bits - 1) - 1) for bits in (2, 3, 4, 5, 6, 7, 8, 10, 12))
    yield from (Independent(2**bits) for bits in (1, 2, 4))
    yield from (Grid(2), Grid(3), Grid(15), Grid(255))
    yield from (NaturalDithering(2 ** (bits - 1) - 1) for bits in (3, 4))
    yield from (Natural(), Ternary())


def correlated(n: int, d: int) -> Codes:
    """Correlated quantization: scales, levels, blocks, offsets; after a rotation; in an entropy code."""
    for sigma in groups(n, d):
        yield from (Correlated(levels=2**bits, blocks=sigma) for bits in (1, 2, 3, 4, 6, 8))
        yield from (Correlated("own", levels=levels, blocks=sigma) for levels in (2, 3, 7, 15, 64, 256))
    yield from (CorrelatedOffset("random", "shared", 2**bits) for bits in (1, 2, 3, 4, 6))
    yield from (CorrelatedOffset("even"), CorrelatedOffset("random", "own", 8))
    yield from (Rotated(Correlated(levels=2**bits)) for bits in (1, 2, 3, 4, 6))
    yield from (Coded(Correlated("own", levels=levels)) for levels in (3, 7, 31))


def composed(n: int, d: int) -> Iterator[Composed]:
    """A quantizer on PermK's coordinates, and on RandK's for a few k."""
    yield from (Composed(PermK(), inner) for inner in quantizers())
    for k in sorted({d // 4, d // 16, d // 64, -(-d // n)} - {0}):
        yield from (Composed(RandK(k), QSGD(2 ** (bits - 1) - 1)) for bits in (3, 5, 8))


def unbiased(n: int, d: int) -> Codes:
    """Everything that MARINA takes; some of it has an omega, for DIANA and DASHA."""
    yield from (RandK(k) for k in counts(n, d))
    yield PermK()
    yield from quantizers()
    yield from (Coded(QSGD(s)) for s in (1, 3, 7, 15, 31, 63, 127))
    yield from (Rotated(Grid(2**bits)) for bits in (1, 2, 3, 4, 6, 8))
    yield from (Bernoulli(2.0**-j) for j in (1, 3, 5))
    yield from correlated(n, d)
    yield from composed(n, d)
    yield Drive(numerical=True)
    yield from (Eden(bits, numerical=True) for bits in (1, 2, 3, 4, 6))


def contractive(n: int, d: int) -> Codes:
    """What EF21 takes: biased compressors, and unbiased ones made contractive."""
    yield from (TopK(k) for k in counts(n, d))
    yield from (Sign(), Drive("least"), LowRank(1), LowRank(2), LowRank(4))
    yield from (Scaled(RandK(k)) for k in counts(n, d)[::3])
    yield from (Scaled(QSGD(2 ** (bits - 1) - 1)) for bits in (2, 3, 4, 6, 8))
    yield Scaled(Natural())


def has_omega(compressor: Compressor, d: int) -> bool:
    """Whether DIANA and DASHA may use it (a shared scale and blocks have none, whatever their class says)."""
    try:
        return hasattr(compressor, "omega") and compressor.omega(d) >= 0.0
    except ConfigError:
        return False


def fits(compressor: Compressor, n: int, d: int) -> bool:
    """Whether n clients can compress d coordinates with it, and it states what it is used for there."""
    try:
        compressor.check(n, d)
        if hasattr(compressor, "ab"):
            compressor.ab(n, d)
    except ConfigError:
        return False
    return True


def candidates(n: int, d: int, samples: float = 1.0) -> list[Method]:
    """Methods with a dense downlink and every compressor that fits; minibatches where clients have several samples.

    Cohorts of PP-MARINA and EF21: n/2 and n/4, around PermK, RandK and a quantizer inside PermK, and around TopK.
    """
    codes = list(dict.fromkeys(c for c in unbiased(n, d) if fits(c, n, d)))
    found: list[Method] = [GD(), *(Marina(c) for c in codes), *(DCGD(c) for c in codes)]
    shifted = [c for c in codes if has_omega(c, d)]
    found += [Diana(c) for c in shifted] + [Dasha(c) for c in shifted]
    found += [EF21(c) for c in contractive(n, d) if fits(c, n, d)]
    for r in sorted({n // 2, n // 4} - {0, n}, reverse=True):
        some: list[Compressor] = [PermK(), *(RandK(k) for k in counts(n, d)[::2])]
        some += [Composed(PermK(), QSGD(2 ** (bits - 1) - 1)) for bits in (4, 6, 8)]
        found += [PPMarina(c, clients=r) for c in some if fits(c, r, d)]
        found += [EF21(TopK(k), clients=r) for k in counts(n, d)[::3]]
    if samples > 1.0:
        found += [VRMarina(c) for c in codes] + [VRDiana(c) for c in shifted]
        found += [Dasha(c, batch=max(1, round(samples / 100.0))) for c in shifted]
    return list(dict.fromkeys(found))
