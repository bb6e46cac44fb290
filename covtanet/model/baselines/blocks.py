"""Building blocks that several of the compared networks share."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Outputs(NamedTuple):
    """Outputs of a deeply supervised network in training.

    In eval mode such a network returns the first of ``masks`` alone.
    """

    masks: Tensor
    """Lesion logits (B, K, H, W), the prediction first."""
    edge: Tensor | None = None
    """Logits of the lesions' outline (B, 1, H, W)."""


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
    if act is not None:
        layers.append(act())
    return nn.Sequential(*layers)


def resize_like(features: Tensor, other: Tensor) -> Tensor:
    """Resize a map bilinearly to another map's height and width."""
    return F.interpolate(features, size=other.shape[2:], mode="bilinear", align_corners=False)


def doubling(base: int, levels: int = 5) -> tuple[int, ...]:
    """Return widths that double from level to level."""
    return tuple(base * 2**level for level in range(levels))
