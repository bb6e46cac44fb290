"""What several of the compared networks are made of."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Outputs(NamedTuple):
    """What a deeply supervised network returns in training; in eval mode it returns the first of ``masks`` alone.

    masks: lesion logits (B, K, H, W), the prediction first. edge: logits of the lesions' outline (B, 1, H, W).
    """

    masks: Tensor
    edge: Tensor | None = None


def conv_bn(
    channels_in: int,
    channels: int,
    kernel: int | tuple[int, int] = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    act: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution that keeps the size (at stride 1), batch norm and, unless null, an activation."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (sides[0] - 1) // 2, dilation * (sides[1] - 1) // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels, sides, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(channels),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


def resize_like(features: Tensor, other: Tensor) -> Tensor:
    """Bilinear to another map's height and width."""
    return F.interpolate(features, size=other.shape[2:], mode="bilinear", align_corners=False)


def doubling(base: int, levels: int = 5) -> tuple[int, ...]:
    """Widths that double from level to level."""
    return tuple(base * 2**level for level in range(levels))
