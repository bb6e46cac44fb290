"""Image classifiers as feature extractors of slices (Table IV).

They replace TA-SegNet and the regional feature extractor.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.libraries import feature_extractor

# Side of the map of CovTANet's regional features at the paper's size. On a map of one pixel the
# dilated convolutions of the aggregation would see padding in 8 of 9 taps.
MAP_PX = 8
LAST_LEVEL = (-1,)


class SliceBackbone(nn.Module):
    """A classifier of timm up to its last map, then a 1x1 convolution to aggregation's width.

    Choice: "slice-wise processing in the joint scheme" is read as the same aggregation and heads on
    the classifier's last map, averaged to the size of CovTANet's.
    """

    def __init__(self, name: str, in_channels: int, channels: int) -> None:
        super().__init__()
        self.backbone = feature_extractor(name, in_channels, LAST_LEVEL)
        width = self.backbone.feature_info.channels()[-1]
        self.narrow = nn.Sequential(nn.Conv2d(width, channels, 1), nn.ReLU())

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to (B, channels, 8, 8)."""
        last = F.adaptive_avg_pool2d(self.backbone(slices)[-1], MAP_PX)
        narrowed: Tensor = self.narrow(last)
        return narrowed
