"""UNet++ (Zhou et al., DLMIA 2018) by MONAI, with its deep supervision."""

import torch
from torch import Tensor, nn

from covtanet.model.baselines.blocks import Outputs


class NestedUNet(nn.Module):
    """MONAI's network; its heads, of which the last is the prediction, all learn in training."""

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        from monai.networks.nets import BasicUNetPlusPlus

        features = (*widths, widths[0])
        # Choice: batch norm and ReLU as in the other networks of the tables, not MONAI's instance
        # norm and LeakyReLU.
        self.net = BasicUNetPlusPlus(
            2, in_channels, 1, features=features, deep_supervision=True, act="relu", norm="batch"
        )

    def forward(self, slices: Tensor) -> Tensor | Outputs:
        """Map slices (B, C, H, W) to logits (B, 1, H, W).

        In training also to logits of the shallower nets.
        """
        logits: list[Tensor] = self.net(slices)
        return Outputs(torch.cat(logits[::-1], 1)) if self.training else logits[-1]
