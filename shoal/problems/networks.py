"""Three networks of plain `torch.nn`, with starts that are functions of a seed.

    small_cnn        5386 parameters for digits of 28 x 28 pixels
    character_model  a causal convolution over characters, after a trained table of them
    resnet18         He, Zhang, Ren, Sun, "Deep residual learning", 2015, arXiv:1512.03385, for images of 32 x 32

Weights are He's (arXiv:1502.01852), N(0, 2 / fan-in), before a ReLU or SiLU, and N(0, 1 / fan-in) for the scores;
biases are 0 and gains 1. torch's own initialization draws from a hidden state of the process, so none of it runs. Where
the ResNet has batch normalization there is group normalization (Wu, He, arXiv:1803.08494) with as many parameters: it
has no statistics that move, and treats every sample by itself. The two small ones have SiLU, u / (1 + exp(-u)), since
the gradient of a network of ReLUs jumps, and no constant of smoothness exists; the ResNet keeps its ReLUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoal.messages import Round
from shoal.problems.curvature import gaussian
from shoal.rng import checked_seed

GROUPS = 32


class Residual(nn.Module):
    """relu(shortcut(u) + two convolutions of 3 x 3); where the shape changes the shortcut is one of 1 x 1."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(GROUPS, outside)
            )

    def forward(self, u: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(u)).relu()))
        return (inner + self.shortcut(u)).relu()


class Causal(nn.Module):
    """Characters (m, T) -> scores (m, vocabulary, T) of the next one, each from itself and the 14 before it."""

    def __init__(self, vocabulary: int, table: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, table)
        shapes = ((table, width, 1), (width, width, 2), (width, width, 4))
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 3, dilation=gap) for a, b, gap in shapes)
        self.before = [2 * gap for *_, gap in shapes]  # zeros in front: nothing is seen ahead of its time
        self.scores = nn.Conv1d(width, vocabulary, 1)

    def forward(self, characters: Tensor) -> Tensor:
        u = self.table(characters).transpose(1, 2)
        for before, layer in zip(self.before, self.layers, strict=True):
            u = nn.functional.silu(layer(nn.functional.pad(u, (before, 0))))
        return self.scores(u)


def small_cnn(seed: int = 0) -> nn.Module:
    """(m, 1, 28, 28) -> (m, 10): two convolutions with strides, one dense layer; d = 5386."""

    def build() -> nn.Module:
        first, second = nn.Conv2d(1, 8, 5, 2), nn.Conv2d(8, 16, 3, 2)
        return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Flatten(), nn.Linear(400, 10))

    return started(build, seed)


def character_model(vocabulary: int, table: int = 8, width: int = 32, seed: int = 0) -> nn.Module:
    """`Causal`, started; 65 characters make d = 9673."""
    return started(lambda: Causal(vocabulary, table, width), seed)


def resnet18(classes: int = 10, seed: int = 0) -> nn.Module:
    """(m, 3, h, w) -> (m, classes); d = 11,173,962 with ten of them.

    torchvision's shape but for the stem, which is 3 x 3 without stride or pooling: with theirs the last stage sees one
    pixel of a 32 x 32 image, and 65 % of all coordinates have a gradient of zero everywhere. The gain of each block's
    last norm starts at 8^(-1/2): eight blocks then add about as much as one (as in arXiv:2002.10444). At 1 a first
    step of 0.03 raises f; at 0, as is also done, the gradient at x^0 is zero in 98 % of the coordinates.
    """

    def build() -> nn.Module:
        stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(GROUPS, 64), nn.ReLU())
        stages = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        blocks = [Residual(*shape) for a, b, s in stages for shape in ((a, b, s), (b, b, 1))]
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))

    module = started(build, seed)
    for part in module.modules():
        if isinstance(part, Residual):
            nn.init.constant_(part.norm2.weight, 8.0**-0.5)
    return module


def started(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module with its weights, each from the stream of its layer; the table of characters N(0, 1)."""
    rnd = Round.full(0, checked_seed(seed), 1)
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu")
    last = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv1d)][-1]
    with torch.no_grad():
        for name, part in module.named_modules():
            for kind, parameter in part.named_parameters(recurse=False):
                if kind == "bias":
                    parameter.zero_()
                elif isinstance(part, nn.GroupNorm):
                    parameter.fill_(1.0)
                else:
                    # Of the last layer no ReLU takes half, and a table's rows are chosen, not added.
                    gain = 1.0 if name == last or isinstance(part, nn.Embedding) else 2.0
                    fan = 1 if isinstance(part, nn.Embedding) else parameter[0].numel()
                    drawn = gaussian(rnd.fork(name).uniform(parameter.numel(), "networks.started")[0])
                    parameter.copy_((drawn * math.sqrt(gain / fan)).float().reshape(parameter.shape))
    return module
