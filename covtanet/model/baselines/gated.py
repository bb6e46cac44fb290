"""Gated U-Net: attention gates driven by the network's bottom (Schlemper et al., MedIA 2019)."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import conv_bn, resize_like
from covtanet.model.encoder import PlainEncoder, conv_block


class AttentionGate(nn.Module):
    """Weights a skip by position; all gates share the network's gating signal."""

    def __init__(self, channels: int, gate_channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels, 2, stride=2, bias=False)
        self.phi = nn.Conv2d(gate_channels, channels, 1)
        self.psi = nn.Conv2d(channels, 1, 1)
        self.last = conv_bn(channels, channels, 1, act=None)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Map a skip (B, C, H, W) and the gate (B, G, h, w) to the skip's shape."""
        small = self.theta(skip)
        share = torch.sigmoid(self.psi(F.relu(small + resize_like(self.phi(gate), small))))
        weighted: Tensor = self.last(skip * resize_like(share, skip))
        return weighted


class GatedUNet(nn.Module):
    """A U-Net whose skips, but for the finest, pass a gate; all decoder levels add to the mask."""

    def __init__(self, in_channels: int, widths: tuple[int, ...] = (32, 64, 128, 256, 512)) -> None:
        super().__init__()
        self.encoder = PlainEncoder(in_channels, widths)
        gate_channels = widths[-1] // 2
        self.gate = conv_bn(widths[-1], gate_channels, 1)
        self.gates = nn.ModuleList(AttentionGate(width, gate_channels) for width in widths[1:-1])
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(deep, width, 4, stride=2, padding=1)
            for width, deep in itertools.pairwise(widths)
        )
        self.decoder = nn.ModuleList(conv_block(2 * width, width) for width in widths[:-1])
        self.says = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in widths[:-1])
        self.head = nn.Conv2d(len(self.says), 1, 1)

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to logits (B, 1, H, W); H and W multiples of 16."""
        *skips, deep = self.encoder(slices)
        gate = self.gate(deep)
        scores = []
        for level in range(len(skips) - 1, -1, -1):
            skip = self.gates[level - 1](skips[level], gate) if level else skips[0]
            deep = self.decoder[level](torch.cat([skip, self.ups[level](deep)], 1))
            scores.append(resize_like(self.says[level](deep), slices))
        logits: Tensor = self.head(torch.cat(scores, 1))
        return logits
