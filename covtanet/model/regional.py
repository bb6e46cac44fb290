"""The regional feature extractor RFex, per slice (Fig. 6)."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from covtanet.model.attention import TriLevelAttention
from covtanet.model.encoder import conv_block


class RegionalFeatures(nn.Module):
    """Stages of a conv block and a TAU with pooling between them.

    Choice: four stages of 32, 64, 128, 256 channels.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        stages: list[nn.Module] = []
        for index, (before, width) in enumerate(itertools.pairwise(channels)):
            if index:
                # Between stages only: four stages halve the sides three times.
                stages.append(nn.MaxPool2d(2))
            stages += [conv_block(before, width), TriLevelAttention(width)]
        self.stages = nn.Sequential(*stages)

    def forward(self, fused: Tensor) -> Tensor:
        """Map pooled fusion vectors (B, C, H, W) to F_reg.

        F_reg of four stages: (B, widths[-1], H / 8, W / 8).
        """
        regional: Tensor = self.stages(fused)
        return regional
