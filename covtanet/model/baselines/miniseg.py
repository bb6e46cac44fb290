"""MiniSeg (Qiu et al., AAAI 2021), the Mini-SegNet of Table II."""

import torch
from torch import Tensor, nn

from covtanet.model.baselines.blocks import Outputs, conv_bn, resize_like

WIDTHS = (8, 24, 32, 64)
MAIN_BLOCKS, LONG_BLOCKS = (2, 3, 8, 6), (1, 1, 4, 3)
RATES = (1, 2, 4, 8)
DROPOUT = 0.01


class AttentivePyramid(nn.Module):
    """Attentive hierarchical spatial pyramid: depthwise dilated branches and their running sums.

    Every branch is weighted by a sigmoid map.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        narrow = channels // len(RATES)
        self.narrow = conv_bn(channels_in, narrow, 1, act=nn.PReLU)
        self.branches = nn.ModuleList(
            nn.Conv2d(narrow, narrow, 3, stride, rate, rate, groups=narrow, bias=False)
            for rate in RATES
        )
        self.pool = nn.AvgPool2d(3, stride, 1)
        self.attend = nn.Sequential(
            nn.Conv2d(channels, len(RATES), 1, groups=len(RATES)), nn.Sigmoid()
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(channels, channels, 1, groups=len(RATES), bias=False),
            nn.BatchNorm2d(channels),
        )
        self.act = nn.PReLU()
        self.is_residual = stride == 1 and channels_in == channels

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels, H / stride, W / stride)."""
        narrowed = self.narrow(features)
        branches = [branch(narrowed) for branch in self.branches]
        branches[0] = branches[0] + self.pool(narrowed)
        for index in range(1, len(branches)):
            branches[index] = branches[index] + branches[index - 1]
        joined = torch.cat(branches, 1)
        share = self.attend(joined).repeat_interleave(branches[0].shape[1], 1)
        fused = self.fuse(joined + joined * share)
        out: Tensor = self.act(fused + features if self.is_residual else fused)
        return out


class PlainUnit(nn.Module):
    """The first level's unit: a 3x3 convolution."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = conv_bn(channels_in, channels, stride=stride, act=nn.PReLU)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels, H / stride, W / stride)."""
        out: Tensor = self.conv(features)
        return out


class Level(nn.Module):
    """A main path and a light long path that exchange features."""

    def __init__(self, level: int, channels_in: int) -> None:
        super().__init__()
        width = WIDTHS[level]
        unit = AttentivePyramid if level else PlainUnit
        self.down = unit(channels_in, width, 2)
        self.main = nn.Sequential(*(unit(width, width) for _ in range(MAIN_BLOCKS[level])))
        self.long_down = _light(channels_in, width, 2)
        self.long = nn.Sequential(*(_light(width, width) for _ in range(LONG_BLOCKS[level])))
        is_last = level == len(WIDTHS) - 1
        self.exchange = None if is_last else conv_bn(2 * width, 2 * width, 1, act=None)

    def forward(self, main: Tensor, long: Tensor) -> tuple[Tensor, Tensor]:
        """Map both paths to those of the next level, at half the size."""
        main, long = self.down(main), self.long_down(long)
        # Both sums are of the same two maps.
        main, long = self.main(main + long), self.long(long + main)
        if self.exchange is None:
            return main, long
        to_main, to_long = self.exchange(torch.cat([main, long], 1)).chunk(2, 1)
        return main + to_main, long + to_long


def _light(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 1x1 convolution, then a depthwise 5x5 one."""
    point = nn.Conv2d(channels_in, channels, 1, bias=False)
    return nn.Sequential(
        point, conv_bn(channels, channels, 5, stride=stride, groups=channels, act=nn.PReLU)
    )


class Decoder(nn.Module):
    """One level up: two depthwise dilations of the deeper map, plus the skip."""

    def __init__(self, channels_in: int, channels_skip: int, channels: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.dilated = nn.ModuleList(
            nn.Conv2d(
                channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False
            )
            for rate in (1, 2)
        )
        self.norm = nn.BatchNorm2d(channels)
        self.skip = conv_bn(channels_skip, channels, 1, act=None)
        self.act = nn.PReLU()

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) and the level's skip to (B, channels, skip's H, skip's W)."""
        narrowed = resize_like(self.narrow(deep), skip)
        out: Tensor = self.act(
            self.norm(sum(conv(narrowed) for conv in self.dilated)) + self.skip(skip)
        )
        return out


class MiniSeg(nn.Module):
    """Two paths down, one path up.

    Choice: the exchange between the paths, which the paper's text leaves open, follows the sums of
    its figure.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            Level(level, before) for level, before in enumerate((in_channels, *WIDTHS[:-1]))
        )
        self.decoders = nn.ModuleList(
            Decoder(WIDTHS[level + 1], WIDTHS[level], WIDTHS[level])
            for level in range(len(WIDTHS) - 1)
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(width, 1, 1)) for width in WIDTHS
        )

    def forward(self, slices: Tensor) -> Tensor | Outputs:
        """Map slices (B, C, H, W) to logits (B, 1, H, W).

        In training also to logits of the deeper levels.
        """
        main = long = slices
        skips = []
        for level in self.levels:
            main, long = level(main, long)
            skips.append(main + long)
        decoded = [skips[-1]]
        for decoder, skip in zip(reversed(self.decoders), reversed(skips[:-1]), strict=True):
            decoded.append(decoder(decoded[-1], skip))
        if not self.training:
            return resize_like(self.heads[0](decoded[-1]), slices)
        masks = [
            resize_like(head(level), slices)
            for head, level in zip(self.heads, reversed(decoded), strict=True)
        ]
        return Outputs(torch.cat(masks, 1))
