"""CPF-Net (Feng et al., IEEE TMI 2020) on a ResNet-34."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import conv_bn, resize_like
from covtanet.model.libraries import feature_extractor

SHARED_RATES = (1, 2, 4)


class PyramidGuidance(nn.Module):
    """Global pyramid guidance: deeper maps at one level's size, then dilated convolutions."""

    def __init__(self, deeper: Sequence[int], width: int) -> None:
        super().__init__()
        total = width * len(deeper)
        self.narrow = nn.ModuleList(conv_bn(channels, width) for channels in deeper)
        self.dilated = nn.ModuleList(
            nn.Sequential(
                conv_bn(total, total, dilation=2**power, groups=total, act=None),
                conv_bn(total, width, 1),
            )
            for power in range(len(deeper))
        )
        self.merge = conv_bn(total, width, 1, act=None)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map a level's features and all deeper ones to (B, width, H, W) at that level's size."""
        narrowed = [narrow(level) for narrow, level in zip(self.narrow, features, strict=True)]
        resized = [resize_like(level, narrowed[0]) for level in narrowed[1:]]
        joined = torch.cat([narrowed[0], *resized], 1)
        merged: Tensor = self.merge(torch.cat([branch(joined) for branch in self.dilated], 1))
        return merged


class ScaleAwareFusion(nn.Module):
    """Scale-aware pyramid fusion: one kernel at three dilations.

    The branches are merged two at a time by attention over positions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(nn.Conv2d(channels, channels, 3, bias=False).weight.detach())
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in SHARED_RATES)
        self.attend = nn.ModuleList(
            nn.Sequential(
                conv_bn(2 * channels, channels, 1),
                conv_bn(channels, channels // 2),
                nn.Conv2d(channels // 2, 2, 3, padding=1),
            )
            for _ in SHARED_RATES[1:]
        )
        self.gamma = nn.Parameter(torch.zeros(1))
        self.last = conv_bn(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        branches = [
            norm(F.conv2d(features, self.kernel, padding=rate, dilation=rate))
            for norm, rate in zip(self.norms, SHARED_RATES, strict=True)
        ]
        fused = branches[0]
        for attend, branch in zip(self.attend, branches[1:], strict=True):
            share = attend(torch.cat([fused, branch], 1)).softmax(1)
            fused = share[:, :1] * fused + share[:, 1:] * branch
        merged: Tensor = self.last(F.relu(self.gamma * fused + (1 - self.gamma) * features))
        return merged


class CPFNet(nn.Module):
    """A U-shaped decoder whose skips are guided by all deeper levels.

    Choice: without the fusion blocks of the public code's decoder, which its forward never calls.
    """

    def __init__(self, in_channels: int, num_last: int = 32) -> None:
        super().__init__()
        self.backbone = feature_extractor("resnet34", in_channels)
        widths = self.backbone.feature_info.channels()  # of 1/2 .. 1/32
        self.guidance = nn.ModuleList(
            PyramidGuidance(widths[level:], widths[level]) for level in (1, 2, 3)
        )
        self.fusion = ScaleAwareFusion(widths[4])
        self.filter = nn.ModuleList(
            nn.Identity() if level == 4 else conv_bn(widths[level], widths[level])
            for level in (1, 2, 3, 4)
        )
        self.narrow = nn.ModuleList(
            conv_bn(widths[level], widths[level - 1], 1) for level in (1, 2, 3, 4)
        )
        self.head = nn.Sequential(
            conv_bn(widths[0], num_last, 1), conv_bn(num_last, num_last), nn.Conv2d(num_last, 1, 1)
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to logits (B, 1, H, W); H and W multiples of 32."""
        features = list(self.backbone(slices))
        features[4] = self.fusion(features[4])
        deep = features[4]
        for level in (4, 3, 2, 1):
            deep = self.narrow[level - 1](
                resize_like(self.filter[level - 1](deep), features[level - 1])
            )
            guided = features[0] if level == 1 else self.guidance[level - 2](features[level - 1 :])
            deep = F.relu(deep + guided) if level > 1 else deep + guided
        logits: Tensor = self.head(resize_like(deep, slices))
        return logits
