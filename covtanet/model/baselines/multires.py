"""MultiResUNet (Ibtehaz and Rahman, Neural Networks 2020)."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import conv_bn, doubling

ALPHA = 1.67
SHARES = (0.167, 0.333, 0.5)


class MultiResBlock(nn.Module):
    """Three chained convolutions, concatenated, plus a 1x1 convolution of the input."""

    def __init__(self, channels_in: int, filters: int) -> None:
        super().__init__()
        widths = [int(ALPHA * filters * share) for share in SHARES]
        self.channels = sum(widths)
        self.convs = nn.ModuleList(
            conv_bn(before, width)
            for before, width in zip((channels_in, *widths), widths, strict=False)
        )
        self.norm = nn.BatchNorm2d(self.channels)
        self.identity = conv_bn(channels_in, self.channels, 1, act=None)
        self.last = nn.BatchNorm2d(self.channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels, H, W)."""
        chained: list[Tensor] = []
        last = features
        for conv in self.convs:
            last = conv(last)
            chained.append(last)
        return F.relu(self.last(self.norm(torch.cat(chained, 1)) + self.identity(features)))


class ResPath(nn.Module):
    """A skip through residual units, more of them if encoder and decoder are further apart."""

    def __init__(self, channels_in: int, channels: int, length: int) -> None:
        super().__init__()
        widths = [channels_in, *[channels] * length]
        self.wide = nn.ModuleList(conv_bn(a, b, act=None) for a, b in itertools.pairwise(widths))
        self.narrow = nn.ModuleList(
            conv_bn(a, b, 1, act=None) for a, b in itertools.pairwise(widths)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels, H, W)."""
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            features = F.relu(wide(features) + narrow(features))
        return features


class MultiResUNet(nn.Module):
    """A U-Net of five levels of MultiRes blocks.

    Choice: a plain 1x1 head, without the public port's batch norm and extra class.
    """

    def __init__(self, in_channels: int, base: int = 32) -> None:
        super().__init__()
        filters = doubling(base)
        encoder: list[MultiResBlock] = []
        channels = in_channels
        for width in filters:
            encoder.append(MultiResBlock(channels, width))
            channels = encoder[-1].channels
        self.encoder = nn.ModuleList(encoder)
        num_skips = len(filters) - 1
        self.paths = nn.ModuleList(
            ResPath(encoder[level].channels, filters[level], num_skips - level)
            for level in range(num_skips)
        )
        decoder = [MultiResBlock(2 * width, width) for width in filters[:-1]]
        deeper = [*(block.channels for block in decoder[1:]), encoder[-1].channels]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(deep, width, 2, stride=2)
            for deep, width in zip(deeper, filters, strict=False)
        )
        self.decoder = nn.ModuleList(decoder)
        self.head = nn.Conv2d(decoder[0].channels, 1, 1)

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to logits (B, 1, H, W); H and W multiples of 16."""
        features: list[Tensor] = []
        for block in self.encoder:
            features.append(block(F.max_pool2d(features[-1], 2) if features else slices))
        deep = features[-1]
        for level in range(len(self.decoder) - 1, -1, -1):
            joined = torch.cat([self.ups[level](deep), self.paths[level](features[level])], 1)
            deep = self.decoder[level](joined)
        logits: Tensor = self.head(deep)
        return logits
