"""The compiled kernels at d = 1e6 coordinates: CPU nanoseconds a coordinate on one thread, beside a memory copy.

One row of d coordinates, called as the library calls them, outputs allocated; `mean_bits` adds 16 rows of d bits and is
divided by d, not by 16 d. Where a kernel makes k of d, k is 1 % of d and the time is still divided by d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from shoal import kernels, rng
from shoal.core import Round
from shoal.experiments.timing import Row, beside_copy, normal_rows

D, K, ROWS = 1_000_000, 10_000, 16
BITS = 4  # of a packed code


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    rnd, u = Round.full(1, 0, ROWS), normal_rows(1, D, 0)
    one, ops = rnd.rows(slice(0, 1)), kernels.of(u)
    private, ties = one.draw("bench.bits"), one.draw("bench.ties")
    r, place = ops.norms(u), torch.zeros(1, dtype=torch.int64)
    largest, shared = ops.maxes(u), rnd.shared("bench.shifts")
    payload = ops.encode_bits(u, r, private, ties, 1, place, None)
    sixteen, scales = payload.expand(ROWS, -1).contiguous(), r.expand(ROWS).contiguous()
    codes = rng.below(private, D, 2**BITS).long()
    packed = ops.pack(codes, BITS)
    return {
        "encode_bits, strata 1": lambda: ops.encode_bits(u, r, private, ties, 1, place, None),
        f"encode_bits, strata {ROWS}": lambda: ops.encode_bits(u, largest, private, ties, ROWS, place, shared),
        "decode_bits": lambda: ops.decode_bits(payload, r, D),
        f"mean_bits of {ROWS} rows": lambda: ops.mean_bits(sixteen, scales, D, ROWS),
        "encode_levels, 15": lambda: ops.encode_levels(u, r, private, ties, 15),
        "norms": lambda: ops.norms(u),
        "maxes": lambda: ops.maxes(u),
        "words": lambda: ops.words(private, D),
        f"pack, {BITS} bits": lambda: ops.pack(codes, BITS),
        f"unpack, {BITS} bits": lambda: ops.unpack(packed, D, BITS),
        "topk, 1 %": lambda: ops.topk(u, K),
        "support, 1 %": lambda: ops.support(private, D, K),
        "permutation": lambda: ops.permutation(private, D),
    }


def measure(repeat: int) -> Iterator[Row]:
    """A row a kernel."""
    for name, call in calls().items():
        taken, ratio = beside_copy(call, D, repeat)
        yield Row("kernels", name, "ns", [1e9 * t / D for t in taken], ratio)
