"""CovTANet: TA-SegNet's features of one volume to diagnosis and severity (Fig. 1, Alg. 1)."""

from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.aggregation import VolumePath
from covtanet.model.baselines.classifiers import SliceBackbone
from covtanet.model.encoder import V8_ENCODER
from covtanet.model.regional import RegionalFeatures
from covtanet.model.registry import (
    CLASSIFIERS,
    SEGMENTERS,
    BaselineConfig,
    NoSegmenterConfig,
    SegmenterConfig,
    build_segmenter,
)
from covtanet.model.segnet import TASegNetConfig
from covtanet.model.table_i import PRETRAINED_ROW


@dataclass(frozen=True, kw_only=True)
class CovTANetConfig:
    """The whole network.

    Choice: 32 slices, 64 pixels (at 512 x 512 a volume's F_fus would take 6.7 GB).
    """

    segnet: SegmenterConfig = field(default_factory=TASegNetConfig)
    """The segmenter, whose features the diagnosis reads."""
    backbone: str = ""
    """Name of a classifier of Table IV that replaces the regional feature extractor; empty for
    the paper's extractor."""
    # Volumes of the paper have 30 to 46 slices, and the aggregation needs a fixed number.
    num_slices: int = 32
    """Slices per volume that the diagnosis reads."""
    pooled_px: int = 64
    """Side to which F_fus is averaged for the diagnosis."""
    regional_widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of the regional feature extractor's stages."""
    path_channels: int = 256
    """Channels of a volumetric path after depth reduction."""
    dropout: float = 0.5
    """Share of a path's head that is dropped in training."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "regional_widths", tuple(self.regional_widths))
        # Three poolings between four stages, each of which needs even sides.
        shrink = 2 ** (len(self.regional_widths) - 1)
        if not self.backbone and self.pooled_px % shrink:
            raise ValueError(f"pooled_px is {self.pooled_px}, expected a multiple of {shrink}")


SIZES: dict[str, CovTANetConfig] = {
    "paper": CovTANetConfig(),
    "small": CovTANetConfig(
        segnet=TASegNetConfig(widths=(8, 16, 32, 48, 64), fusion_channels=8),
        num_slices=16,
        pooled_px=32,
        regional_widths=(16, 24, 32, 48),
        path_channels=64,
        dropout=0.3,
    ),
    # Every network of the paper's tables in seconds; no more than a proof that it runs.
    "tiny": CovTANetConfig(
        segnet=TASegNetConfig(widths=(4, 8, 16, 16, 16), fusion_channels=4),
        num_slices=4,
        pooled_px=16,
        regional_widths=(8, 8, 8, 16),
        path_channels=16,
        dropout=0.3,
    ),
}
# Pixels of a slice's side. "small" and "tiny" are for the demo and the tests on a CPU.
INPUT_PX = {"paper": 512, "small": 128, "tiny": 96}


def architecture(
    name: str,
    size: CovTANetConfig,
    input_px: int,
    encoder: str = V8_ENCODER,
    stem_channels: int = 0,
    in_channels: int = 1,
    fusion_channels: int = 0,
) -> CovTANetConfig:
    """Return the network of one row of Tables I to IV at a size of SIZES.

    encoder, stem_channels: V8's; the other rows have neither. in_channels: 1, or 3 for a slice with
    both neighbours. fusion_channels: of each level in TA-SegNet's fusion; 0 for the size's own.
    """
    ta_segnet = size.segnet
    if not isinstance(ta_segnet, TASegNetConfig):
        raise ValueError(f"size with {type(ta_segnet).__name__}, expected TA-SegNet's widths")
    ta_segnet = replace(
        ta_segnet,
        in_channels=in_channels,
        fusion_channels=fusion_channels or ta_segnet.fusion_channels,
    )
    if name in CLASSIFIERS:
        # It reads the slices themselves, at their full size.
        none = NoSegmenterConfig(in_channels=ta_segnet.in_channels)
        return replace(size, segnet=none, backbone=name, pooled_px=input_px)
    if name in SEGMENTERS:
        baseline = BaselineConfig(
            name=name, in_channels=ta_segnet.in_channels, widths=ta_segnet.widths
        )
        return replace(size, segnet=baseline)
    row = ta_segnet.row_of_table_i(name, encoder)
    if name == PRETRAINED_ROW:
        row = replace(row, stem_channels=stem_channels)
    return replace(size, segnet=row)


class JointClassifier(nn.Module):
    """Regional feature extractor and volumetric paths of diagnosis and severity; phase 2's part."""

    def __init__(self, config: CovTANetConfig) -> None:
        super().__init__()
        self.num_slices = config.num_slices
        channels = config.segnet.fused_channels
        width = config.regional_widths[-1]
        self.regional: nn.Module
        if config.backbone:
            self.regional = SliceBackbone(CLASSIFIERS[config.backbone], channels, width)
        else:
            self.regional = RegionalFeatures(channels, config.regional_widths)
        # Diagnosis comes first: the order decides the initial weights that a seed gives.
        path = (width, config.num_slices, config.path_channels, config.dropout)
        self.diagnosis = VolumePath(*path)
        self.severity = VolumePath(*path)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map pooled fusion vectors of whole volumes to logits of infected and of severe.

        pooled: (B, S, C, P, P). Both logits: (B,).
        """
        if pooled.shape[1] != self.num_slices:
            raise ValueError(f"{pooled.shape[1]} slices per volume, expected {self.num_slices}")
        # (B, S, C, P, P) -> (B * S, C, P, P): the extractor sees single slices.
        regional = self.regional(pooled.flatten(0, 1))
        # Back to volumes, (B, S, C', H, W).
        regional = regional.reshape(*pooled.shape[:2], *regional.shape[1:])
        return self.diagnosis(regional), self.severity(regional)


class CovTANet(nn.Module):
    """TA-SegNet and the joint classifier on its fused features."""

    def __init__(self, config: CovTANetConfig) -> None:
        super().__init__()
        self.config = config
        self.segnet = build_segmenter(config.segnet)
        self.classifier = JointClassifier(config)

    def segment(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Return lesion logits and pooled fusion vectors.

        Logits: (B, 1, H, W). Vectors: (B, fused_channels, pooled_px, pooled_px).
        """
        # Averaged at once: F_fus of a whole volume at 512 x 512 pixels would take 6.7 GB.
        logits, fused = self.segnet.segment(slices)
        return logits, F.adaptive_avg_pool2d(fused, self.config.pooled_px)

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor]:
        """Map volumes (B, S, 1, H, W) to logits of infected and of severe, (B,) each."""
        # (B, S, 1, H, W) -> (B * S, 1, H, W)
        _, pooled = self.segment(volumes.flatten(0, 1))
        logits: tuple[Tensor, Tensor] = self.classifier(
            pooled.reshape(*volumes.shape[:2], *pooled.shape[1:])
        )
        return logits
