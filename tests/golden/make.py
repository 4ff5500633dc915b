"""Golden bytes: every compressor's payload for one fixed input, seed and round, one frame, and means of slices.

`python tests/golden/make.py` writes them again; a difference is a change of results and belongs in CHANGELOG.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

import zoo  # noqa: E402

from shoal import kernels, rng, wire  # noqa: E402
from shoal.compressors.correlated import agree_locally  # noqa: E402
from shoal.messages import Round  # noqa: E402

N, D, SEED, INDEX = 3, 21, 20240117, 731


def vectors() -> torch.Tensor:
    """(3, 21) float32: multiples of 1/8 within 4, exact in any arithmetic; the last row has one coordinate."""
    i, j = torch.arange(N)[:, None], torch.arange(D)[None]
    u = ((i * 37 + j * j * 11) % 64 - 32) / 8.0
    u[2] = 0.0
    u[2, 5] = -1.5
    return u


def payloads() -> dict[str, list[str]]:
    """repr of the compressor -> the rows' bytes in hex."""
    out, u = {}, vectors()
    for compressor in zoo.COMPRESSORS:
        rnd = agree_locally(u, compressor, Round.full(INDEX, SEED, N))
        out[repr(compressor)] = [row.hex() for row in zoo.rows_of(compressor.encode(u, rnd))]
    return out


def stamp() -> wire.Stamp:
    """The stamp of the golden frame: every field has another value."""
    return wire.Stamp(rng.LAYOUT, wire.UP, round=731, cohort=9, d=21, digest=bytes(range(1, 9)), attempt=2)


def frame() -> str:
    """A frame of five payload bytes from slot 6, padded to seven, in hex."""
    body = torch.tensor([[0, 255, 1, 128, 77]], dtype=torch.uint8)
    return wire.frame(body, torch.tensor([5]), torch.tensor([6]), stamp(), 7).numpy().tobytes().hex()


def means() -> dict[str, str]:
    """What `fold_codes` says of 50 sums of four bits, as digits, and of 500 that are mostly alike, in its prefix code,
    in hex."""
    alike = [2 + (j % 7 == 0) - (j % 50 == 3) for j in range(500)]
    sums = {"digits": [j * j % 5 for j in range(50)], "coded": alike}
    out = {}
    for name, those in sums.items():
        codes = torch.tensor([[int(i < one) for one in those] for i in range(4)])
        out[name] = kernels.reference.fold_codes(kernels.reference.pack(codes, 1), 2, len(those))[0].numpy()
    return {name: body.tobytes().hex() for name, body in out.items()}


if __name__ == "__main__":
    (HERE / "payloads.json").write_text(json.dumps(payloads(), indent=1) + "\n")
    (HERE / "frame.json").write_text(json.dumps({"frame": frame()}, indent=1) + "\n")
    (HERE / "means.json").write_text(json.dumps(means(), indent=1) + "\n")
