"""Smoothness constants as they are met: what the clients' gradients at two points say of L_-, L_+ and L_±.

With D_i = grad f_i(y) - grad f_i(x) and Dbar their mean,

    L_- >= ||Dbar|| / ||y - x||,
    L_+^2 >= mean ||D_i||^2 / ||y - x||^2,
    L_±^2 >= mean ||D_i - Dbar||^2 / ||y - x||^2.

The right-hand sides are what is seen, typed "estimate": they are lower bounds, and no theorem covers a step size made
from them. The most that rounding the gradients to float32 can contribute, 2^-24 sqrt(mean (||grad f_i(x)|| +
||grad f_i(y)||)^2), is subtracted, so that clients which agree give L_± = 0; where it is more than a thousandth of what
L_+ is made of, the two points say nothing. Derivation: docs/derivations/curvature.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.kernels import secants as kernels
from shoal.kernels.cpu.threads import LEAST, spread
from shoal.messages import Rows, Vector
from shoal.theory import Constant

FIRST, EVERY = 4, 16  # the first pairs of recorded points, and every so many later: a pass over the gradients costs
TELLING = 1e-3


class Seen(NamedTuple):
    """The largest L_-, L_+ and L_± so far."""

    minus: float = 0.0
    plus: float = 0.0
    pm: float = 0.0

    def facts(self) -> dict[str, Constant]:
        """name -> constant, as `Smoothness` names them."""
        return {name: Constant(value, "estimate") for name, value in self._asdict().items()}


class Secant:
    """Two points x, y: add every client's gradients there, in the order of their ids, and ask what was `seen`."""

    def __init__(self, x: Vector, y: Vector) -> None:
        self.length = float((y.double() - x.double()).norm())
        self._sums = np.zeros((4, len(x)))
        self._n = 0

    def add(self, before: Rows, after: Rows) -> None:
        """The next clients' gradients at x and at y."""
        if len(before) == 0:
            return
        if self._n == 0:
            # Relative to the first client's D: a spread does not care, and what is common to all cancels exactly.
            self._sums[0] = after[0].double().numpy() - before[0].double().numpy()
        self._n += len(before)
        args = (before.contiguous().numpy(), after.contiguous().numpy(), *self._sums)
        spread(kernels.add, args, self._sums.shape[1], kernels.BLOCK, LEAST // len(before))

    def seen(self) -> Seen | None:
        """What was seen; None where the points say nothing: equal, not finite, or too near for float32 gradients."""
        if self._n == 0 or not 0.0 < self.length < math.inf:
            return None
        origin, moved, squares, sizes = self._sums
        mean, varied, size = kernels.totals(origin, moved, squares, sizes, self._n)
        roots = [math.sqrt(max(0.0, square)) for square in (mean, mean + varied, varied)]
        rounding = 2.0**-24 * math.sqrt(2.0 * size)
        if not math.isfinite(sum(roots) + rounding) or rounding > TELLING * roots[1]:
            return None
        return Seen(*(max(0.0, root - rounding) / self.length for root in roots))


class Trail:
    """The recorded points of a run, told one after the other; the largest of what is seen between neighbors.

    The first FIRST pairs are looked at, then every EVERY-th: which ones depends on nothing but their numbers, so that a
    run that was resumed, or ran over ranks, sees the same. What it saw is held here, with the last point; the gradients
    there are its caller's.
    """

    def __init__(self) -> None:
        self.count, self.x, self.seen = 0, torch.zeros(0), Seen()

    def due(self, k: int) -> bool:
        """Whether points k - 1 and k are compared."""
        return 0 < k <= FIRST or (k > 0 and k % EVERY == 0)

    def secant(self, x: Vector) -> Secant | None:
        """What to add the gradients at the last point and at x to, where they are compared."""
        return Secant(self.x, x) if self.due(self.count) else None

    def reach(self, x: Vector, secant: Secant | None) -> None:
        """x is the last point now; what came of the secant to it counts."""
        found = None if secant is None else secant.seen()
        if found is not None:
            self.seen = Seen(*map(max, self.seen, found))
        self.x, self.count = x, self.count + 1

    def arrays(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"x": self.x, "seen": torch.tensor([float(self.count), *self.seen], dtype=torch.float64)}

    def restore(self, x: Vector, seen: Tensor) -> None:
        """Go on from what `arrays` gave."""
        self.x, (count, *largest) = x, seen.tolist()
        self.count, self.seen = int(count), Seen(*largest)
