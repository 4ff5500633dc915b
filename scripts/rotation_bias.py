"""How far DRIVE and EDEN with Hadamard rotations are from unbiased: `python scripts/rotation_bias.py [SAMPLES]`.

Prints, for fixed vectors u, the measured E||C(u) - u||^2 / ||u||^2 and the bias ||E C(u) - u|| / ||u||. The squared
norm of a mean of T samples exceeds that of the expectation by the variance over T, which is taken off; what is left is
known to about `noise` = sqrt(omega / T), and "-" stands for what is below twice that. An excerpt is in
docs/derivations/rotation.md.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

from shoal.compressors import Drive, Eden
from shoal.compressors.drive import Turned, padded
from shoal.messages import Round


def vectors(d: int) -> dict[str, np.ndarray]:
    """One-hot, (1, 1/2, 0, ...), (1, 1, 0, ...), all ones, and the quantiles of the Cauchy law."""
    e = np.eye(d)
    tails = np.tan(np.pi * ((np.arange(d) + 0.5) / d - 0.5))
    return {"one-hot": e[0], "1, 1/2": e[0] + e[1] / 2, "1, 1": e[0] + e[1], "ones": np.ones(d), "cauchy": tails}


def measure(code: Turned, u: np.ndarray, samples: int) -> tuple[float, float, float]:
    """(omega, bias, noise): every client of one large round is a sample, for it has its own rotation."""
    row, size, total, square = torch.from_numpy(u.astype(np.float32)), float((u**2).sum()), np.zeros(len(u)), 0.0
    part = max(1, 2**22 // padded(len(u)))
    for index, lo in enumerate(range(0, samples, part)):
        m = min(part, samples - lo)
        rnd = Round.full(index, 0, m)
        drawn = code.decode(code.encode(row.expand(m, -1), rnd), rnd).double().numpy()
        total += drawn.sum(0)
        square += float(((drawn - row.double().numpy()) ** 2).sum())
    omega = square / samples / size
    bias = float(((total / samples - u) ** 2).sum()) / size - omega / samples
    return omega, math.sqrt(max(0.0, bias)), math.sqrt(omega / samples)


def main(samples: int) -> None:
    """One line a vector: omega / bias for one, two and three rounds."""
    for code in (Drive, lambda rounds: Eden(2, rounds), lambda rounds: Eden(4, rounds)):
        print(f"\n{code(rounds=1)!r}, {samples} samples: omega / bias of one, two and three rounds")
        for d in (8, 16, 64, 256, 1024):
            for name, u in vectors(d).items():
                found = [measure(code(rounds=k), u, samples) for k in (1, 2, 3)]
                cells = [f"{o:7.4f} / " + (f"{b:.4f}" if b > 2 * e else "-     ") for o, b, e in found]
                print(f"{d:5d}  {name:8s}  " + "   ".join(cells))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
