"""The encoder of TA-SegNet: feature maps E_1..E_N, halving in size from level to level. No downloads."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


def conv_block(channels_in: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU. Choice: the usual U-Net block."""
    layers: list[nn.Module] = []
    for inner in (channels_in, channels):
        layers += [nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


class PlainEncoder(nn.Module):
    """A conv block per level, max pooling between levels."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        self.blocks = nn.ModuleList(conv_block(a, b) for a, b in itertools.pairwise(channels))

    def forward(self, slices: Tensor) -> list[Tensor]:
        """Map slices (B, C, H, W) to [E_1 .. E_N], E_i of size H / 2^(i-1)."""
        features: list[Tensor] = []
        for level, block in enumerate(self.blocks):
            slices = block(F.max_pool2d(slices, 2) if level else slices)
            features.append(slices)
        return features
