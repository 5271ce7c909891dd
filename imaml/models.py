"""The networks of the paper's experiments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Fully connected layers of the given ``sizes``, with tanh between them.

    Smooth, as implicit gradients use second derivatives. (batch, sizes[0]) → (batch, sizes[-1]); other shapes raise
    torch's RuntimeError, and fewer than two sizes ValueError.

    >>> import torch
    >>> MLP([1, 40, 40, 1])(torch.zeros(7, 1)).shape
    torch.Size([7, 1])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2:
            raise ValueError(f"sizes is {sizes!r}, but it must name at least the inputs and the outputs.")
        layers: list[nn.Module] = []
        for width, following in pairwise(sizes):
            layers += [nn.Linear(width, following), nn.Tanh()]
        super().__init__(*layers[:-1])


FEATURE_SCALE = 6.0
WEIGHT_SCALE = 4.0
"""Of the convolutions, relative to torch's own initialisation."""


class ConvNet(nn.Module):
    """The networks of MAML and iMAML: four 3×3 convolutions and a linear head (Finn et al. 2017, section 5.2).

    Each convolution is followed by batch norm, on the statistics of the batch at hand, and ReLU. They halve the image
    by their stride, as for Omniglot (112 thousand parameters for 5 ways), or with ``pooling=True`` by max-pooling after
    them, as with 32 filters for mini-ImageNet. The last feature maps are averaged, so that any side of at least 16
    pixels will do: ``features`` ends in that vector, ``head`` starts at it.
    (batch, channels, side, side) → (batch, ways); other shapes raise torch's RuntimeError.

    * ``ways``: the number of classes; ``channels``: of the image, 1 for grey; ``filters``: of each convolution.

    >>> import torch
    >>> ConvNet(ways=5)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 5])
    >>> ConvNet(ways=5, channels=3, filters=32, pooling=True)(torch.zeros(2, 3, 84, 84)).shape
    torch.Size([2, 5])
    """

    def __init__(self, ways: int, *, channels: int = 1, filters: int = 64, pooling: bool = False) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs in (channels, filters, filters, filters):
            blocks += [
                nn.Conv2d(inputs, filters, 3, stride=1 if pooling else 2, padding=1),
                nn.BatchNorm2d(filters, track_running_stats=False),
                nn.ReLU(),
            ]
            if pooling:
                blocks.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(filters, ways)
        # The proximal term of iMAML prefers the shortest way to fit the support set. Where that leads through the head,
        # towards the class means, it generalises; through the convolutions it does not. A head of zeros on large
        # features makes the first way short. Large convolutions make the second one long, and its curvature small:
        # under batch norm only their direction counts, and turning takes steps in proportion to their length.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # Every task draws its labels anew: nothing can be learned of the head, and each task starts from zeros.
        self.head.requires_grad_(False)
        norms = [layer for layer in self.features if isinstance(layer, nn.BatchNorm2d)]
        nn.init.constant_(norms[-1].weight, FEATURE_SCALE)
        with torch.no_grad():
            for layer in self.features:
                if isinstance(layer, nn.Conv2d):
                    layer.weight *= WEIGHT_SCALE

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))
