"""The kernels on a GPU at d = 2^27 coordinates: picoseconds a coordinate, beside a copy in the GPU's memory.

One row of d coordinates, called as the library calls them, outputs allocated; `mean_bits` adds 16 rows of d bits,
`mean_dealt` 16 rows of d/16 numbers, and both are divided by d. Timed by the GPU's own events, after a call that
compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from shoal import kernels, rng
from shoal.experiments.timing import Row
from shoal.messages import Round

D, ROWS, BITS = 1 << 27, 16, 4


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, by the GPU's clock."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    rnd = Round.full(1, 0, ROWS).to("cuda")
    one = rnd.rows(slice(0, 1))
    u = rng.uniform(one.draw("bench.input"), D) - 0.5
    ops, private, ties = kernels.of(u), one.draw("bench.bits"), one.draw("bench.ties")
    r, place = ops.norms(u), torch.zeros_like(one.slots)
    top, shared, part = ops.maxes(u), rnd.shared("bench.shifts"), torch.arange(ROWS, device=u.device)
    payload = ops.encode_bits(u, r, private, ties, 1, place, None)
    sixteen, scales = payload.expand(ROWS, -1).contiguous(), r.expand(ROWS).contiguous()
    codes = ops.below(private, D, 2**BITS - 1)
    packed, digits = ops.pack(codes, BITS), ops.encode_trits(u, top, private, ties)[:, 4:]
    table, dealt = torch.linspace(-2.0, 2.0, 2**BITS, device=u.device), u[:, : D // ROWS].expand(ROWS, -1).contiguous()
    factor, odd = torch.ones_like(r, dtype=torch.float64), u[:, :-1].contiguous()
    return {
        "words": lambda: ops.words(private, D),
        "halves": lambda: ops.halves(private, D),
        "encode_bits, strata 1": lambda: ops.encode_bits(u, r, private, ties, 1, place, None),
        f"encode_bits, strata {ROWS}": lambda: ops.encode_bits(u, top, private, ties, ROWS, place, shared),
        "decode_bits": lambda: ops.decode_bits(payload, r, D),
        f"mean_bits of {ROWS} rows": lambda: ops.mean_bits(sixteen, scales, D, ROWS),
        "sign_bits": lambda: ops.sign_bits(u),
        "encode_levels, 15": lambda: ops.encode_levels(u, r, private, ties, 15),
        "decode_levels, 15": lambda: ops.decode_levels(packed, r, 2**BITS - 1, D),
        "mean_levels, 15, of 1 row": lambda: ops.mean_levels(packed, r, 2**BITS - 1, D, 1),
        "encode_trits": lambda: ops.encode_trits(u, top, private, ties),
        "decode_trits": lambda: ops.decode_trits(digits, top, D),
        "encode_natural": lambda: ops.encode_natural(u, private),
        f"encode_points, {BITS} bits": lambda: ops.encode_points(u, factor, table),
        f"decode_points, {BITS} bits": lambda: ops.decode_points(packed, r, table, D),
        f"pack, {BITS} bits": lambda: ops.pack(codes, BITS),
        f"unpack, {BITS} bits": lambda: ops.unpack(packed, D, BITS),
        "norms": lambda: ops.norms(u),
        "maxes": lambda: ops.maxes(u),
        "mean_rows of 1 row": lambda: ops.mean_rows(u, 1),
        "hadamard": lambda: ops.hadamard(u),
        "rotate, two transforms": lambda: ops.rotate(odd, [private, ties]),
        "rotate_padded": lambda: ops.rotate_padded(u, [private], D),
        f"gather_dealt, {ROWS} parts": lambda: ops.gather_dealt(u, shared, part[:1], ROWS, D // ROWS),
        f"mean_dealt of {ROWS} rows": lambda: ops.mean_dealt(dealt, shared, part, ROWS, D, 1.0, ROWS),
    }


def measure(repeat: int) -> Iterator[Row]:
    """A row a kernel. Raises OSError where there is no GPU."""
    if not torch.cuda.is_available():
        raise OSError("no GPU is at hand.")
    source, target = torch.ones(D, device="cuda"), torch.ones(D, device="cuda")
    for name, call in calls().items():
        pairs = [(seconds(call), seconds(lambda: target.copy_(source))) for _ in range(repeat + 1)][1:]
        samples = [1e12 * taken / D for taken, _ in pairs]
        yield Row("gpu", name, "ps", samples, float(np.median([copy / taken for taken, copy in pairs])))
