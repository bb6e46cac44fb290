"""COPLE-Net (Wang et al., IEEE TMI 2020)."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import conv_bn, doubling, resize_like

DROPOUTS = (0.0, 0.0, 0.3, 0.4, 0.5)
ASPP = ((1, 1), (3, 2), (3, 4), (3, 6))


class GatedBlock(nn.Module):
    """Two convolutions with dropout between them, plus their product with a channel gate."""

    def __init__(self, channels_in: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            conv_bn(channels_in, channels, act=nn.LeakyReLU),
            nn.Dropout(dropout),
            conv_bn(channels, channels, act=nn.LeakyReLU),
        )
        self.gate = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LeakyReLU(),
            nn.Conv2d(channels // 2, channels, 1),
            nn.ReLU(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels, H, W)."""
        convolved: Tensor = self.convs(features)
        gate = self.gate(convolved.mean((2, 3), keepdim=True))
        gated: Tensor = convolved + convolved * gate
        return gated


class COPLENet(nn.Module):
    """A U-Net that pools by maximum and mean and narrows its skips.

    An atrous pyramid is at its bottom.
    """

    def __init__(self, in_channels: int, base: int = 32) -> None:
        super().__init__()
        widths = doubling(base)
        self.first = GatedBlock(in_channels, base, DROPOUTS[0])
        self.downs = nn.ModuleList(
            GatedBlock(width, width, dropout)
            for width, dropout in zip(widths[1:], DROPOUTS[1:], strict=True)
        )
        self.bridges = nn.ModuleList(
            conv_bn(width, width // 2, 1, act=nn.LeakyReLU) for width in widths[:-1]
        )
        bottom = widths[-1]
        self.pyramid = nn.ModuleList(
            nn.Conv2d(bottom, bottom // 4, kernel, padding=rate * (kernel - 1) // 2, dilation=rate)
            for kernel, rate in ASPP
        )
        self.merge = conv_bn(bottom, bottom, 1, act=nn.LeakyReLU)
        self.narrows = nn.ModuleList(
            nn.Conv2d(deep, width // 2, 1) for width, deep in itertools.pairwise(widths)
        )
        self.ups = nn.ModuleList(
            GatedBlock(width, width, dropout)
            for width, dropout in zip(widths[:-1], DROPOUTS[:-1], strict=True)
        )
        self.head = nn.Conv2d(base, 1, 3, padding=1)

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to logits (B, 1, H, W); H and W multiples of 16."""
        skips = [self.first(slices)]
        for down in self.downs:
            pooled = torch.cat([F.max_pool2d(skips[-1], 2), F.avg_pool2d(skips[-1], 2)], 1)
            skips.append(down(pooled) + pooled)
        deep: Tensor = self.merge(torch.cat([branch(skips[-1]) for branch in self.pyramid], 1))
        for level in range(len(self.ups) - 1, -1, -1):
            bridge = self.bridges[level](skips[level])
            joined = torch.cat([bridge, resize_like(self.narrows[level](deep), bridge)], 1)
            deep = self.ups[level](joined) + joined
        logits: Tensor = self.head(deep)
        return logits
