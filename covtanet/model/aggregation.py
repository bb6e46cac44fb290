"""Volumetric aggregation and fusion: regional features of slices to one vector (Fig. 7)."""

import torch
from torch import Tensor, nn

from covtanet.model.attention import TriLevelAttention
from covtanet.model.encoder import conv_block

# The paper names dilated convolutions, not their rates.
DILATIONS = (1, 2, 3, 4)


class VolumePath(nn.Module):
    """One path, for diagnosis or for severity.

    TAU per slice, aggregation, dilated fusion, fully connected head.
    Choice: slices are concatenated along channels; rates 1, 2, 3, 4; 256 -> 128 -> 1 with dropout
    (at the paper's size), since the paper does not give them.
    """

    def __init__(
        self, regional_channels: int, num_slices: int, channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.tau = TriLevelAttention(regional_channels)
        self.depth_reduction = nn.Sequential(
            nn.Conv2d(regional_channels * num_slices, channels, 1), nn.ReLU()
        )
        # Padding by the rate keeps H and W, so that the four maps can be concatenated.
        self.dilated = nn.ModuleList(
            nn.Conv2d(channels, channels // len(DILATIONS), 3, padding=rate, dilation=rate)
            for rate in DILATIONS
        )
        self.fuse = conv_block(channels // len(DILATIONS) * len(DILATIONS), channels)
        self.head = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(channels // 2, 1),
        )

    def forward(self, regional: Tensor) -> Tensor:
        """Map F_reg of all slices (B, S, C, H, W) to one logit per volume (B,)."""
        # The attention unit works slice by slice: (B, S, C, H, W) -> (B * S, C, H, W).
        batch, num_slices = regional.shape[:2]
        attended = self.tau(regional.flatten(0, 1))
        # Slices become channels, (B, S * C, H, W); their order in z is the order of the channels.
        aggregated = attended.reshape(batch, num_slices * attended.shape[1], *attended.shape[2:])
        # (B, channels, H, W): the pointwise convolution is the only step that sees all slices
        # together.
        reduced = self.depth_reduction(aggregated)
        fused = self.fuse(torch.cat([torch.relu(conv(reduced)) for conv in self.dilated], 1))
        # Global average, (B, channels, H, W) -> (B, channels) -> (B, 1).
        logit: Tensor = self.head(fused.mean((2, 3)))
        return logit.squeeze(1)
