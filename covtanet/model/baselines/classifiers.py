"""Image classifiers as feature extractors of slices (Table IV).

They replace TA-SegNet and the regional feature extractor.
"""

from torch import Tensor, nn

from covtanet.model.libraries import pooled_extractor


class SliceBackbone(nn.Module):
    """A classifier of timm without its last layer, then a 1x1 convolution to aggregation's width.

    Choice: "slice-wise processing in the joint scheme" is read as the same aggregation and heads on
    its pooled vector.
    """

    def __init__(self, name: str, in_channels: int, channels: int) -> None:
        super().__init__()
        self.backbone, width = pooled_extractor(name, in_channels)
        self.narrow = nn.Sequential(nn.Conv2d(width, channels, 1), nn.ReLU())

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to (B, channels, 1, 1)."""
        narrowed: Tensor = self.narrow(self.backbone(slices)[:, :, None, None])
        return narrowed
