"""FCN-8s on VGG-16 (Long et al., CVPR 2015)."""

import torch
from torch import Tensor, nn

CONVS_PER_STAGE = (2, 2, 3, 3, 3)
DROPOUT = 0.5


class FCN8s(nn.Module):
    """VGG-16 as a fully convolutional network whose scores at 1/32, 1/16 and 1/8 are added up.

    base: channels of the first stage; 64 is VGG-16, with 4096 in the layers that were fully
    connected.
    Choice: those layers keep the map's size by padding, instead of the original's border of 100
    pixels.
    """

    def __init__(self, in_channels: int, base: int = 64) -> None:
        super().__init__()
        widths = (base, 2 * base, 4 * base, 8 * base, 8 * base)
        self.stages = nn.ModuleList(
            _stage(before, width, count)
            for before, width, count in zip(
                (in_channels, *widths), widths, CONVS_PER_STAGE, strict=False
            )
        )
        wide = 64 * base
        self.head = nn.Sequential(
            nn.Conv2d(widths[-1], wide, 7, padding=3), nn.ReLU(), nn.Dropout2d(DROPOUT),
            nn.Conv2d(wide, wide, 1), nn.ReLU(), nn.Dropout2d(DROPOUT),
        )  # fmt: skip
        self.scores = nn.ModuleList(
            nn.Conv2d(width, 1, 1) for width in (widths[2], widths[3], wide)
        )
        self.ups = nn.ModuleList(_bilinear(factor) for factor in (8, 2, 2))
        # With torch's own initial weights 13 layers of ReLU would leave nothing of the slice.
        for stage in (*self.stages, self.head):
            for layer in stage.modules():
                if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                    nn.init.zeros_(layer.bias)

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to logits (B, 1, H, W); H and W multiples of 32."""
        features = []
        for stage in self.stages:
            slices = stage(slices)
            features.append(slices)
        score: Tensor = self.scores[2](self.head(features[-1]))
        score = self.ups[2](score) + self.scores[1](features[3])
        score = self.ups[1](score) + self.scores[0](features[2])
        logits: Tensor = self.ups[0](score)
        return logits


def _stage(channels_in: int, channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_convs):
        layers += [nn.Conv2d(channels if index else channels_in, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


def _bilinear(factor: int) -> nn.ConvTranspose2d:
    """A transposed convolution that starts as bilinear interpolation."""
    up = nn.ConvTranspose2d(1, 1, 2 * factor, stride=factor, padding=factor // 2, bias=False)
    ramp = 1 - (torch.arange(2 * factor) + 0.5 - factor).abs() / factor
    with torch.no_grad():
        up.weight.copy_((ramp[:, None] * ramp)[None, None])
    return up
