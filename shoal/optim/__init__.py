"""MARINA, DIANA and EF21 as `torch.optim.Optimizer`s: each rank is a client, and steps carry compressed messages.

    optimizer = shoal.optim.Marina(model.parameters(), lr=0.05, compressor="Correlated()")
    for inputs, targets in loader:          # this rank's own data
        def closure():
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            return loss
        optimizer.step(closure)

The model is a bare module, not one in DistributedDataParallel: a method needs each rank's own gradient. It runs as
`shoal.simulate` runs it (the same `up`, `commit` and `estimate` of `shoal.methods`), and ends at the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal import methods
from shoal.core import Compressor, Method
from shoal.experiments.expressions import known_names, parse
from shoal.optim.clients import Clients

__all__ = ["EF21", "Diana", "Marina"]


def _parsed(compressor: str | Compressor) -> Any:
    return parse(compressor, known_names(), Compressor) if isinstance(compressor, str) else compressor


class Marina(Clients):
    """VR-MARINA, online: compressed differences of a minibatch's gradients, now and then gradients themselves.

    With probability p, and in the first step: g = mean grad f_i(x; batch); else g += mean C_i(grad f_i(x; batch) -
    grad f_i(x-; batch)), x- being the parameters of the step before: two calls of the closure, on one batch.

    `full` says before a step whether it is one with probability p: theory wants a larger batch there, whose noise
    stays in g until the next. p=None: the share of bits |C| / (32 d), as in the paper. Any compressor with an AB
    inequality.

    References: arXiv:2102.07845, Algorithm 3; docs/derivations/sampling.md.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: str | Compressor = "Correlated()",
        p: float | None = None,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        channel: str = "auto",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        code = _parsed(compressor)
        method = methods.VRMarina(code, p, batch=1)  # how many samples there are is the closure's business

        def make(n: int, d: int) -> Method:
            return replace(method, p=min(1.0, code.predicted_bits(n, d) / (32.0 * d))) if p is None else method

        super().__init__(params, lr, code, make, weight_decay, seed, channel, process_group, timeout)

    @property
    def full(self) -> bool:
        """Whether the next step is one with gradients instead of differences."""
        assert isinstance(self.method, methods.VRMarina)
        return self.method._full(self._round())


class Diana(Clients):
    """DIANA on minibatches: compressed differences to shifts that learn the gradients.

    m_i = Q_i(grad f_i(x; batch) - h_i); g = h + mean m_i; h_i += shift m_i; h += shift mean m_i. One call of the
    closure. Any compressor with omega; shift=None: 1/(1+omega).

    References: arXiv:1901.09269; docs/derivations/methods.md (full gradients: with minibatches their noise stays).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: str | Compressor = "QSGD(7)",
        shift: float | None = None,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        channel: str = "auto",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        code = _parsed(compressor)
        method = methods.Diana(code, shift)
        super().__init__(
            params, lr, code, lambda n, d: method, weight_decay, seed, channel, process_group, timeout
        )  # fmt: skip


class EF21(Clients):
    """EF21 on minibatches: error feedback for biased compressors.

    g_i += C(grad f_i(x; batch) - g_i); g = mean g_i. One call of the closure. Any compressor with alpha.

    References: arXiv:2106.05203; docs/derivations/methods.md (full gradients: with minibatches their noise stays).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: str | Compressor = "TopK(0.01)",
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        channel: str = "auto",
        process_group: Any = None,
        timeout: float = 60.0,
    ) -> None:
        code = _parsed(compressor)
        method = methods.EF21(code)
        super().__init__(
            params, lr, code, lambda n, d: method, weight_decay, seed, channel, process_group, timeout
        )  # fmt: skip
