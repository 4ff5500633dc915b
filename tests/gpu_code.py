"""Compile the kernels that compute with floats for a GPU that need not be there, and search for what changes bits.

`python tests/gpu_code.py 90` does it for sm_90. Prints "N kernels" and leaves with 0, or says what it found. Nothing
runs: what a kernel is called with is turned into a signature, as Triton would at a launch, where a 1 is a constant.
"""

from __future__ import annotations

import re
import sys
import warnings

import torch
import triton
from test_kernels import CASES, Inputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shoal.kernels import gpu
from shoal.kernels.gpu import bits, levels, packing, philox, pointwise, rotation, sparse, sums

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
CHANGES_BITS = re.compile(r"\b(?:fma|[a-z0-9.]*\.(?:ftz|approx|full)|(?:atom|red)\.[a-z.]*add[a-z.]*\.f)\b[a-z0-9.]*")
ARCH = int(sys.argv[1])  # 80, 90, ...
ROUNDING = [
    "add_rows", "decode_bits", "decode_levels", "encode_bits", "encode_levels", "encode_natural_levels", "hadamard",
    "mean_abs", "mean_bits", "mean_levels", "mean_sparse", "norms", "scatter",
]  # fmt: skip
seen: set[tuple[object, ...]] = set()
found: list[str] = []


def signature(kernel, arguments, constants):
    """({name: type}, {name: constant}) of a launch."""
    free, types, fixed = set(kernel.do_not_specialize), {}, dict(constants)
    for name, x in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(x, torch.Tensor):
            types[name] = "*" + TYPES.get(x.dtype, "u8")
        elif isinstance(x, float):
            types[name] = "fp32"
        elif x == 1 and name not in free:
            fixed[name] = 1
        else:
            types[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
    return types | dict.fromkeys(fixed, "constexpr"), fixed


def compiled(kernel, programs, device, *arguments, num_warps=4, **constants):
    """In place of a launch."""
    types, fixed = signature(kernel, arguments, constants)
    which = (kernel.fn.__name__, *types.items(), *fixed.items())
    if which in seen or not programs or "BITS" in fixed:
        return
    seen.add(which)
    source, options = ASTSource(kernel, types, fixed), {"enable_fp_fusion": False, "num_warps": num_warps}
    code = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    found.extend(f"{kernel.fn.__name__}: {x}" for x in CHANGES_BITS.findall(code.asm["ptx"]))


def main() -> int:
    """Exit status."""
    warnings.simplefilter("ignore")
    for module in (bits, levels, packing, philox, pointwise, rotation, sparse, sums):
        if hasattr(module, "launch"):
            module.launch = compiled
    for name in ROUNDING:
        CASES[name](gpu, Inputs(3, 1500, 1.0))
    print(f"{len(seen)} kernels", *sorted(set(found)), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
