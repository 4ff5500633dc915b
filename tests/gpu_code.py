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
from test_kernels import Inputs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shoal.kernels import gpu

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
CHANGES_BITS = re.compile(r"\b(?:fma|[a-z0-9.]*\.(?:ftz|approx|full)|(?:atom|red)\.[a-z.]*add[a-z.]*\.f)\b[a-z0-9.]*")
ARCH = int(sys.argv[1])  # 80, 90, ...
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
    if which in seen or not programs:
        return
    seen.add(which)
    source, options = ASTSource(kernel, types, fixed), {"enable_fp_fusion": False, "num_warps": num_warps}
    code = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
    found.extend(f"{kernel.fn.__name__}: {x}" for x in CHANGES_BITS.findall(code.asm["ptx"]))


def encode(v, place, shifts, offset):
    """Call what rounds."""
    u, r, draws = v.u, v.r, (v.private, v.tie)
    for lot in (None, shifts, v.shared):
        gpu.encode_bits(u, r, *draws, 5, place, lot, head=True)
    gpu.encode_bits(u, r, *draws, 500, place, v.shared)
    gpu.encode_levels(u, r, *draws, 12)
    gpu.encode_levels(u, r, *draws, 12, 5, place, shifts)
    gpu.encode_trits(u, r, *draws)
    gpu.encode_strata(u, r, *draws, 3, 5, place, shifts, 9, offset)
    gpu.encode_natural(u, v.private)
    gpu.encode_natural_levels(u, r, v.private, 5)
    gpu.encode_points(u, r.double(), torch.linspace(-2, 2, 8))
    gpu.encode_signs(u)
    gpu.rotate_signs(torch.zeros(3, 1000), [v.private], 1 << 10)
    gpu.norms(u)
    for turn in (gpu.rotate_padded, gpu.rotate_padded_back):
        turn(torch.zeros(3, 1 << 14), [v.private], 1 << 14)
    for turn in (gpu.rotate, gpu.rotate_back):
        turn(torch.zeros(3, 20_000), [v.private, v.tie])


def decode(v, place, shifts, offset):
    """Call what reads, scales and adds."""
    r, d, draw, rows, one = v.r, v.d, v.shared, torch.zeros(3, 2 * v.d, dtype=torch.uint8), torch.zeros(3, v.d).long()
    for name, more in {"bits": (r,), "levels": (r, 12), "trits": (r,), "natural": (), "natural_levels": (r, 5)}.items():
        getattr(gpu, f"decode_{name}")(rows, *more, d)
        getattr(gpu, f"mean_{name}")(rows, *more, d, 7)
    gpu.decode_strata(one, r, 5, 9, offset)
    gpu.mean_strata(one, r, 5, 9, offset, 7)
    gpu.decode_points(rows, r, torch.linspace(-2, 2, 8), d)
    gpu.outer(v.u[:, :30].reshape(3, 10, 3), v.u[:, :60].reshape(3, 20, 3))
    gpu.mean_rows(v.u, 7)
    gpu.gather_dealt(v.u, draw, place, 4, d)
    gpu.scatter_dealt(v.u, draw, place, 4, d, 3.0)
    gpu.mean_dealt(v.u, draw, place, 4, d, 3.0, 7)
    index, pointer = torch.arange(9), torch.arange(4) * 3
    gpu.gather(v.u, index, pointer, 3)
    gpu.scatter(v.u[:, :3], index, pointer, d, 3.0)
    gpu.mean_sparse(v.u[:, :3], index, pointer, d, 3.0, 7)


def main() -> int:
    """Exit status."""
    warnings.simplefilter("ignore")
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{gpu.__name__}.") and hasattr(module, "launch"):
            module.launch = compiled
    v = Inputs(3, 1500, 1.0)
    given = torch.arange(3), torch.zeros(1, v.d, dtype=torch.int32), torch.zeros(v.d, dtype=torch.int32)
    encode(v, *given)
    decode(v, *given)
    print(f"{len({which[0] for which in seen})} kernels", *sorted(set(found)), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
