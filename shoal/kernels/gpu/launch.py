"""How every kernel is started, and what the starts have in common."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.draw import Draw

TILE = 1024  # coordinates a program; a multiple of the generator's blocks of 64 words and 128 halves
KEY = ("index", "stream", "k0", "k1")  # change from round to round: no kernel is compiled anew for their values


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the tensors' device.

    Contraction is off: a fused u s - floor(u s) has other bits than a product and a difference.
    """
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **constants, enable_fp_fusion=False)


def tiles(size: int, tile: int = TILE) -> int:
    """How many tiles cover `size` coordinates."""
    return -(-size // tile)


def signed(word: int) -> int:
    """The 32 bits as a signed number: Triton then gives every key the same type."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def key(draw: Draw) -> tuple[int, int, int, int]:
    """(index, stream, k0, k1) of KEY."""
    return signed(draw.round), signed(draw.stream), signed(draw.seed), signed(draw.seed >> 32)


def inner(x: Tensor) -> Tensor:
    """Rows whose coordinates lie side by side; a view of some columns stays one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def headed(r: Tensor, width: int, head: bool) -> tuple[Tensor, Tensor]:
    """(rows of bytes, the `width` of them that are to fill): with `head`, the four bytes of r_i stand before those."""
    start = 4 if head else 0
    out = torch.empty((len(r), start + width), dtype=torch.uint8, device=r.device)
    if head:
        out[:, :4] = r.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(-1, 4)
    return out, out[:, start:]


def constant(value: float, like: Tensor) -> Tensor:
    """(1,) float64 on the tensor's device: as a plain argument a kernel would get it in float32."""
    return torch.full((1,), value, dtype=torch.float64, device=like.device)
