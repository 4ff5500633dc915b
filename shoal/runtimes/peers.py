"""The ranks of a process group and the two ways in which they exchange bytes.

Bytes alone travel, in uint8: gloo reads another type's bytes without a word, sums strided tensors wrongly and ends the
process where sizes differ, so sizes are always agreed on before. Sums never go through all_reduce, whose order of
summation is its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """All ranks of `group` (default: the world), of which this process is `rank` of `world`.

    `moved` counts the bytes that this rank has sent to others; what it keeps for itself is not among them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.moved = group, 0
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def all(self, mine: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; all of one shape and type."""
        mine = mine.contiguous()
        out = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(out, mine, group=self.group)
        self.moved += mine.numel() * mine.element_size() * (self.world - 1)
        return out

    def swap(self, mine: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """What each rank has for this one, `sizes[r]` bytes of rank r, for what this one has for each: mine[r], (b,)
        uint8. The sizes are what both ends know without asking."""
        out = torch.empty(sum(sizes), dtype=torch.uint8)
        sent = [len(piece) for piece in mine]
        dist.all_to_all_single(out, torch.cat(list(mine)), list(sizes), sent, group=self.group)
        self.moved += sum(sent) - sent[self.rank]
        return list(out.split(list(sizes)))

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        dist.barrier(group=self.group)
