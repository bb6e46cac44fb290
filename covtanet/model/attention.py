"""Channel, spatial and pixel attention and the tri-level attention unit (Eq. 1-6, Fig. 3-4).

Each attention runs in two phases. Re-calibration describes the features, expands the description,
restores it, and multiplies the features with the resulting map (Eq. 1-2). Generalization describes
the re-calibrated features, squeezes the description and restores it to the final attention map
(Eq. 3).

The paper's formula stands above code that computes the same in another way.

Choice: ratios 2 (expand) and 8 (squeeze), ReLU inside, sigmoid at the maps; the paper names only
the sigmoid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Expand to 2C and squeeze to C/8: Eq. 1-3 give the order of the projections, not their ratios.
EXPAND = 2
SQUEEZE = 8
# Channels to which the one-channel map of the spatial attention is expanded.
SPATIAL_EXPAND = 8


def _bottleneck(channels: int, inner: int) -> nn.Sequential:
    """Project to ``inner`` channels and back by 1x1 convolutions.

    On a 1x1 map these are fully connected layers.
    """
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Sigmoid()
    )


class ChannelAttention(nn.Module):
    """One weight per channel, A_C (B, C, 1, 1), from the channels' global averages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.recalibrate = _bottleneck(channels, channels * EXPAND)
        self.generalize = _bottleneck(channels, max(1, channels // SQUEEZE))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, H, W) to A_C."""
        # (B, C, H, W) -> (B, C, 1, 1)
        descriptor = features.mean((2, 3), keepdim=True)
        # Eq. 1-3 as printed:
        #     recalibrated = features * self.recalibrate(descriptor)            # F_r = F_in * A_r
        #     attention = self.generalize(recalibrated.mean((2, 3), keepdim=True))
        # A_r is constant over a channel, so that mean(F_in * A_r) = mean(F_in) * A_r, and F_r of
        # size (B, C, H, W) is never built.
        attention: Tensor = self.generalize(descriptor * self.recalibrate(descriptor))
        return attention


class SpatialAttention(nn.Module):
    """One weight per position, A_S (B, 1, H, W), from a 1x1 convolution of the channels.

    Choice: 3x3 convolutions on the one-channel map; the squeeze halves its height and width, since
    a one-channel map can shrink in space only.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.describe = nn.Conv2d(channels, 1, 1)
        self.expand = nn.Conv2d(1, SPATIAL_EXPAND, 3, padding=1)
        self.restore = nn.Conv2d(SPATIAL_EXPAND, 1, 3, padding=1)
        self.describe_recalibrated = nn.Conv2d(channels, 1, 1)
        self.squeeze = nn.Conv2d(1, 1, 3, stride=2, padding=1)
        self.restore_squeezed = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, H, W) to A_S."""
        recalibration = torch.sigmoid(self.restore(F.relu(self.expand(self.describe(features)))))
        bias = self.describe_recalibrated.bias
        assert bias is not None
        # Eq. 1-3 as printed:
        #     recalibrated = features * recalibration                           # F_r = F_in * A_r
        #     descriptor = self.describe_recalibrated(recalibrated)             # W F_r + b
        # A_r is one value per position, so that W (F_in * A_r) = (W F_in) * A_r, and F_r of size
        # (B, C, H, W) is never built.
        weight = self.describe_recalibrated.weight
        descriptor = F.conv2d(features, weight) * recalibration + bias.view(1, 1, 1, 1)
        # (B, 1, H, W) -> (B, 1, H / 2, W / 2), rounded up
        squeezed = F.relu(self.squeeze(descriptor))
        size = (features.shape[2], features.shape[3])
        enlarged = F.interpolate(squeezed, size=size, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.restore_squeezed(enlarged))


class PixelAttention(nn.Module):
    """One weight per value, A_P (B, C, H, W); the features are their own description.

    Choice: 1x1 convolutions, the relevance of each pixel by itself (3x3 would double the
    network).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.recalibrate = _bottleneck(channels, channels * EXPAND)
        self.generalize = _bottleneck(channels, max(1, channels // SQUEEZE))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, H, W) to A_P."""
        # Both maps are (B, C, H, W): a weight for every value, without a mean over pixels or
        # channels.
        attention: Tensor = self.generalize(features * self.recalibrate(features))
        return attention


class TriLevelAttention(nn.Module):
    """The tri-level attention unit, TAU (Fig. 4).

    Choice: alpha is an unbounded scalar per unit that starts at 0.5.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention(channels)
        self.pixel = PixelAttention(channels)
        # The literal reading of Eq. 6, which names no bound.
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def attention(self, features: Tensor) -> Tensor:
        """Return A_T = A_P * (A_S * A_C) (Eq. 4), (B, C, H, W)."""
        # (B, 1, H, W) * (B, C, 1, 1) broadcasts to (B, C, H, W), the shape of the pixel attention.
        attention: Tensor = self.pixel(features) * (self.spatial(features) * self.channel(features))
        return attention

    def forward(self, features: Tensor) -> Tensor:
        """Return F_out (Eq. 5-6), (B, C, H, W)."""
        # Eq. 5-6 as printed: F_out = alpha * F_in + (1 - alpha) * F_in * A_T. F_in is factored out,
        # which saves a map of size (B, C, H, W).
        return features * (self.alpha + (1 - self.alpha) * self.attention(features))
