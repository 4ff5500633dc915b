"""Dropout whose masks come from the round, in place of torch's, which draws from a hidden state of the process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal import rng
from shoal.errors import ConfigError
from shoal.messages import Round

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
RECURRENT = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Drawn(nn.Module):
    """In place of `nn.Dropout(p)`: the identity, or a mask out of the round that is under way."""

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        self.p, self.layer = p, layer
        self.round: Round | None = None
        self.calls = 0

    def forward(self, u: Tensor) -> Tensor:
        """u / (1 - p) where the round's uniform numbers are at least p, else 0."""
        if self.round is None or self.p == 0.0:
            return u
        draw = self.round.fork(f"{self.layer}.{self.calls}").draw("Module.dropout")
        self.calls += 1  # a layer that is used twice has two masks
        kept = rng.uniform(draw, u.numel())[0].reshape(u.shape) >= self.p
        return torch.where(kept, u / (1.0 - self.p), 0.0) if self.p < 1.0 else torch.zeros_like(u)


def without_dropout(module: nn.Module) -> nn.Module:
    """The module with `Drawn` in place of each active `nn.Dropout`; refuses what draws numbers of its own."""
    names = [(name, part) for name, part in module.named_modules() if part.training]
    for name, part in names:
        if isinstance(part, RECURRENT) and getattr(part, "dropout", None):
            who = name or type(part).__name__
            raise ConfigError(f"{who}: its dropout draws numbers of its own; set it to 0 or call eval().")
        if isinstance(part, DROPOUTS) and type(part) is not nn.Dropout:
            raise ConfigError(f"{name}: of torch's dropouts only nn.Dropout is drawn from the round; or call eval().")
    for name, part in names:
        if type(part) is nn.Dropout:
            drawn = Drawn(part.p, name)
            if not name:
                return drawn
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, drawn)
    return module
