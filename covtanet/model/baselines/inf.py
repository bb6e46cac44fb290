"""Inf-Net (Fan et al., IEEE TMI 2020) on a Res2Net-50."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import Outputs, conv_bn, resize_like
from covtanet.model.libraries import feature_extractor

WIDTH, EDGE_WIDTH, DEEP_WIDTH = 32, 64, 256


def unit(
    channels_in: int, channels: int, kernel: int | tuple[int, int] = 3, dilation: int = 1
) -> nn.Sequential:
    """Convolution and batch norm, without activation, as the public code has it."""
    return conv_bn(channels_in, channels, kernel, dilation=dilation, act=None)


class ReceptiveFields(nn.Module):
    """Four branches of growing receptive field, added to a 1x1 convolution of the input."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([unit(channels_in, WIDTH, 1)])
        for side in (3, 5, 7):
            self.branches.append(
                nn.Sequential(
                    unit(channels_in, WIDTH, 1),
                    unit(WIDTH, WIDTH, (1, side)),
                    unit(WIDTH, WIDTH, (side, 1)),
                    unit(WIDTH, WIDTH, 3, side),
                )
            )
        self.merge = unit(len(self.branches) * WIDTH, WIDTH)
        self.identity = unit(channels_in, WIDTH, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, 32, H, W)."""
        joined = torch.cat([branch(features) for branch in self.branches], 1)
        return F.relu(self.merge(joined) + self.identity(features))


class PartialDecoder(nn.Module):
    """The three deepest maps to one coarse mask."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(unit(WIDTH, WIDTH) for _ in range(4))
        self.up_joined = unit(2 * WIDTH, 2 * WIDTH)
        self.join4, self.join3 = unit(2 * WIDTH, 2 * WIDTH), unit(3 * WIDTH, 3 * WIDTH)
        self.last = nn.Sequential(unit(3 * WIDTH, 3 * WIDTH), nn.Conv2d(3 * WIDTH, 1, 1))

    def forward(self, third: Tensor, fourth: Tensor, fifth: Tensor) -> Tensor:
        """Map features (B, 32, ..) at 1/8, 1/16 and 1/32 to logits (B, 1, ..) at 1/8."""
        gated4 = self.ups[0](resize_like(fifth, fourth)) * fourth
        gated3 = (
            self.ups[1](resize_like(fifth, third)) * self.ups[2](resize_like(fourth, third)) * third
        )
        joined4 = self.join4(torch.cat([gated4, self.ups[3](resize_like(fifth, fourth))], 1))
        joined3 = self.join3(torch.cat([gated3, self.up_joined(resize_like(joined4, third))], 1))
        logits: Tensor = self.last(joined3)
        return logits


class ReverseAttention(nn.Module):
    """Refines a coarser mask from the positions outside of it and from the edge features."""

    def __init__(self, channels_in: int, width: int, num_convs: int, kernel: int) -> None:
        super().__init__()
        self.narrow = unit(channels_in, width, 1)
        layers: list[nn.Module] = []
        for index in range(num_convs):
            layers += [unit(width if index else width + EDGE_WIDTH, width, kernel), nn.ReLU()]
        self.convs = nn.Sequential(*layers, unit(width, 1, 1 if kernel > 3 else 3))

    def forward(self, features: Tensor, coarser: Tensor, edge: Tensor) -> Tensor:
        """Map features (B, channels_in, H, W) and logits of any size to logits (B, 1, H, W)."""
        coarser = resize_like(coarser, features)
        away = self.narrow((1 - torch.sigmoid(coarser)) * features)
        refined: Tensor = self.convs(torch.cat([away, resize_like(edge, features)], 1)) + coarser
        return refined


class InfNet(nn.Module):
    """A partial decoder whose mask is refined level by level; the finest map is the prediction."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.backbone = feature_extractor("res2net50d", in_channels, levels=(1, 2, 3, 4))
        second, third, fourth, fifth = self.backbone.feature_info.channels()
        self.edge = nn.Sequential(
            unit(second, EDGE_WIDTH, 1), unit(EDGE_WIDTH, EDGE_WIDTH), unit(EDGE_WIDTH, EDGE_WIDTH)
        )
        self.edge_head = unit(EDGE_WIDTH, 1)
        self.fields = nn.ModuleList(
            ReceptiveFields(channels) for channels in (third, fourth, fifth)
        )
        self.decoder = PartialDecoder()
        self.refine5 = ReverseAttention(fifth, DEEP_WIDTH, 3, 5)
        self.refine4 = ReverseAttention(fourth, EDGE_WIDTH, 2, 3)
        self.refine3 = ReverseAttention(third, EDGE_WIDTH, 2, 3)

    def forward(self, slices: Tensor) -> Tensor | Outputs:
        """Map slices (B, C, H, W) to logits (B, 1, H, W).

        In training also to those of the coarser maps and of the edge.
        """
        second, third, fourth, fifth = self.backbone(slices)
        edge = self.edge(second)
        coarse = self.decoder(
            *(field(each) for field, each in zip(self.fields, (third, fourth, fifth), strict=True))
        )
        fifth_map = self.refine5(fifth, coarse, edge)
        fourth_map = self.refine4(fourth, fifth_map, edge)
        third_map = self.refine3(third, fourth_map, edge)
        prediction = resize_like(third_map, slices)
        if not self.training:
            return prediction
        coarser = [resize_like(logits, slices) for logits in (fourth_map, fifth_map, coarse)]
        masks = torch.cat([prediction, *coarser], 1)
        return Outputs(masks, resize_like(self.edge_head(edge), slices))
