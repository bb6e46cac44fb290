"""TA-SegNet, the tri-level attention segmentation network (Eq. 7, Fig. 5, Table I)."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn import functional as F

from covtanet.model.attention import TriLevelAttention
from covtanet.model.encoder import (
    EFFICIENTNETS,
    V8_ENCODER,
    EfficientNetEncoder,
    FullSizeStem,
    PlainEncoder,
    conv_block,
)
from covtanet.model.table_i import PRETRAINED_ROW, SWITCHES


@dataclass(frozen=True, kw_only=True)
class TASegNetConfig:
    """Widths of the levels and Table I's switches; the default is V7.

    Choice: five levels of 32..512 channels, fusion at 32 channels a level.
    """

    in_channels: int = 1
    encoder: str = "plain"
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    fusion_channels: int = 32
    encoder_tau: bool = True
    decoder_tau: bool = True
    encoder_in_fusion: bool = True
    decoder_in_fusion: bool = True
    stem_channels: int = 0
    """Channels of a level of the slice's full size above an EfficientNet's levels; 0 leaves it out,
    as in the paper's V8. Without it V8's logits have half the slice's size, at which even a perfect
    map of small lesions has a Dice of 0.87."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) < 2:
            raise ValueError(f"widths has {len(self.widths)} level, expected at least 2")
        if self.encoder != "plain" and EFFICIENTNETS.get(self.encoder) != self.widths:
            raise ValueError(
                f"encoder {self.encoder} with widths {self.widths}, expected one of {EFFICIENTNETS}"
            )
        if self.stem_channels < 0 or (self.stem_channels and self.encoder == "plain"):
            raise ValueError(
                f"stem_channels is {self.stem_channels} with encoder {self.encoder}, expected 0: "
                "only an EfficientNet lacks the level of the full size"
            )

    def row_of_table_i(self, row: str, encoder: str = V8_ENCODER) -> "TASegNetConfig":
        """Return the same size with the switches of one row of Table I.

        encoder: V8's, whose widths replace those of the size.
        """
        switches = asdict(SWITCHES[row])
        if row == PRETRAINED_ROW:
            return replace(self, encoder=encoder, widths=EFFICIENTNETS[encoder], **switches)
        return replace(self, encoder="plain", **switches)

    @property
    def stride(self) -> int:
        """Pixels of the slice per pixel of the first level."""
        return 1 if self.encoder == "plain" or self.stem_channels else 2

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of E_1 .. E_N, including the stem."""
        return (self.stem_channels, *self.widths) if self.stem_channels else self.widths

    @property
    def multiple(self) -> int:
        """Number that a slice's sides must be a multiple of."""
        return int(self.stride * 2 ** (len(self.level_widths) - 1))

    @property
    def has_fusion(self) -> bool:
        """Whether the mask comes from the fused levels rather than from the last decoder level."""
        return self.encoder_in_fusion or self.decoder_in_fusion

    @property
    def fused_channels(self) -> int:
        """Channels of the fusion vector F_fus, or of the last decoder level without fusion."""
        if not self.has_fusion:
            return self.level_widths[0]
        return self.fusion_channels * len(self._fused_levels)

    @property
    def _fused_levels(self) -> range:
        num_levels = len(self.level_widths)
        return range(num_levels if self.encoder_in_fusion else num_levels - 1)


def _units(widths: Sequence[int], enabled: bool) -> nn.ModuleList:
    return nn.ModuleList(TriLevelAttention(width) if enabled else nn.Identity() for width in widths)


class TASegNet(nn.Module):
    """Encoder and decoder joined by attention units, all levels fused into the mask."""

    def __init__(self, config: TASegNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.level_widths
        self.encoder = (
            PlainEncoder(config.in_channels, widths)
            if config.encoder == "plain"
            else EfficientNetEncoder(config.encoder, config.in_channels)
        )
        # Outside the encoder: its published weights have no such level.
        self.stem: FullSizeStem | None = None
        if config.stem_channels:
            self.stem = FullSizeStem(config.in_channels, config.stem_channels)
        self.encoder_taus = _units(widths, config.encoder_tau)
        # (B, deep, H, W) -> (B, width, 2 H, 2 W)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(deep, width, 2, stride=2)
            for width, deep in itertools.pairwise(widths)
        )
        # Twice the width: the encoder's map and the one from below are concatenated.
        self.decoder = nn.ModuleList(conv_block(2 * width, width) for width in widths[:-1])
        self.decoder_taus = _units(widths[:-1], config.decoder_tau)
        if config.has_fusion:
            self.reduce = nn.ModuleList(
                nn.Conv2d(self._level_channels(level), config.fusion_channels, 1)
                for level in config._fused_levels
            )
            self.filter = nn.Sequential(
                nn.Conv2d(config.fused_channels, config.fusion_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(config.fusion_channels),
                nn.ReLU(),
                nn.Conv2d(config.fusion_channels, 1, 1),
            )
        else:
            self.filter = nn.Sequential(nn.Conv2d(widths[0], 1, 1))

    def _level_channels(self, level: int) -> int:
        widths = self.config.level_widths
        is_bottom = level == len(widths) - 1
        return widths[level] * (
            int(self.config.encoder_in_fusion)
            + int(self.config.decoder_in_fusion and not is_bottom)
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to lesion logits (B, 1, H, W).

        H and W are multiples of ``config.multiple``.
        """
        return self.segment(slices)[0]

    def segment(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Return lesion logits and the fusion vector F_fus.

        Logits: (B, 1, H, W). F_fus: (B, fused_channels, H / stride, W / stride).
        """
        multiple = self.config.multiple
        if not is_tracing() and (  # type: ignore[no-untyped-call]
            slices.shape[2] % multiple or slices.shape[3] % multiple
        ):
            raise ValueError(
                f"slices are {tuple(slices.shape[2:])} pixels, expected multiples of {multiple}"
            )
        # [E_1 .. E_N], from the largest map to the smallest.
        levels = self.encoder(slices)
        if self.stem is not None:
            levels = [self.stem(slices), *levels]
        encoded = [tau(level) for tau, level in zip(self.encoder_taus, levels, strict=True)]
        decoded = self._decode(encoded)
        fused = self._fuse(encoded, decoded)
        logits: Tensor = self.filter(fused)
        # An EfficientNet's first level has half the slice's size.
        if self.config.stride > 1:
            logits = F.interpolate(
                logits, size=slices.shape[2:], mode="bilinear", align_corners=False
            )
        return logits, fused

    def _decode(self, encoded: list[Tensor]) -> list[Tensor]:
        """Return T(D_1) .. T(D_N-1) from T(E_1) .. T(E_N).

        Choice: the refined map goes up to the next level.
        """
        decoded: list[Tensor] = []
        # From the bottom up.
        deep = encoded[-1]
        for level in range(len(self.decoder) - 1, -1, -1):
            deep = self.decoder[level](torch.cat([encoded[level], self.ups[level](deep)], 1))
            deep = self.decoder_taus[level](deep)
            decoded.insert(0, deep)
        return decoded

    def _fuse(self, encoded: list[Tensor], decoded: list[Tensor]) -> Tensor:
        """Return F_fus (Eq. 7).

        Per level: concatenate, reduce channels, upsample to the first level. Then concatenate the
        levels. Choice: the bottom level, which has no decoder map, fuses T(E_N) alone.
        """
        if not self.config.has_fusion:
            return decoded[0]
        # Every level is enlarged to the size of the first one.
        size = encoded[0].shape[2:]
        fused = []
        for level, reduce in enumerate(self.reduce):
            # At most two maps of one size, (B, 2 * width, H_level, W_level).
            maps = [encoded[level]] if self.config.encoder_in_fusion else []
            if self.config.decoder_in_fusion and level < len(decoded):
                maps.append(decoded[level])
            reduced = reduce(torch.cat(maps, 1))
            fused.append(
                F.interpolate(reduced, size=size, mode="bilinear", align_corners=False)
                if level
                else reduced
            )
        # (B, fused_channels, H, W); each level has the same number of channels in it.
        return torch.cat(fused, 1)
