"""Published experiments done again: a file a paper, each a set of sweeps and a judgment of what came out."""

from shoal.experiments.reproduce import autoencoder, cq_checks, cq_logistic, cq_quadratics, marina, permk
from shoal.experiments.reproduce.study import Finding, Outcome, Reproduction, load_findings, reproduce

__all__ = ["REPRODUCTIONS", "Finding", "Outcome", "Reproduction", "load_findings", "reproduce"]

REPRODUCTIONS = {
    one.name: one
    for one in (
        cq_quadratics.ZERO,
        cq_quadratics.POSITIVE,
        cq_quadratics.BLOCKS,
        cq_checks.RATIO,
        cq_checks.HETEROGENEITY,
        cq_checks.PARITY,
        cq_checks.STABILITY,
        cq_logistic.LOGISTIC,
        *permk.QUADRATICS,
        *autoencoder.AUTOENCODERS,
        marina.CLASSIFICATION,
    )
}
