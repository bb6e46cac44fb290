"""Every network of the paper's tables by name: its source, its configuration and how it is built.

A segmenter is one of three types: TA-SegNet, a baseline of Tables II and III, or none, if a
classifier of Table IV reads the slices themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import Outputs
from covtanet.model.baselines.cople import COPLENet
from covtanet.model.baselines.cpf import CPFNet
from covtanet.model.baselines.fcn import FCN8s
from covtanet.model.baselines.gated import GatedUNet
from covtanet.model.baselines.inf import InfNet
from covtanet.model.baselines.miniseg import MiniSeg
from covtanet.model.baselines.monai_networks import attention_unet, vnet
from covtanet.model.baselines.multires import MultiResUNet
from covtanet.model.baselines.nested import NestedUNet
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.model.table_i import SWITCHES


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """A baseline by its name in ``SEGMENTERS``."""

    name: str
    in_channels: int = 1
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Channels of the levels; some networks read the first alone, some have widths of their own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.name not in SEGMENTERS:
            raise ValueError(f"network {self.name}, expected one of {', '.join(SEGMENTERS)}")

    @property
    def fused_channels(self) -> int:
        """Channels of the map that phase 2 reads: the logits, as there is no fusion vector."""
        return 1


@dataclass(frozen=True, kw_only=True)
class NoSegmenterConfig:
    """No segmentation: a classifier of Table IV reads the slices themselves."""

    in_channels: int = 1

    @property
    def fused_channels(self) -> int:
        """Channels of the map that phase 2 reads: those of the slices."""
        return self.in_channels


SegmenterConfig = TASegNetConfig | BaselineConfig | NoSegmenterConfig


@dataclass(frozen=True, kw_only=True)
class BaselineNetwork:
    """A segmentation network that the paper compares with."""

    source: str
    """Author and year, and the library that has it."""
    build: Callable[[BaselineConfig], nn.Module]
    multiple: int = 1
    """Sides of a slice are padded to a multiple of this."""


# Choice: widths 32..512 for every network whose authors leave them free, as TA-SegNet has them.
SEGMENTERS = {
    "FCN": BaselineNetwork(
        source="Long 2015, FCN-8s on VGG-16",
        # VGG-16 begins with 64 channels, twice the width of TA-SegNet's first level.
        build=lambda config: FCN8s(config.in_channels, 2 * config.widths[0]),
        multiple=32,
    ),
    "Vnet": BaselineNetwork(
        source="Milletari 2016, MONAI's VNet in 2D",
        build=lambda config: vnet(config.in_channels),
        multiple=16,
    ),
    "Unet++": BaselineNetwork(
        source="Zhou 2018, MONAI's BasicUNetPlusPlus",
        build=lambda config: NestedUNet(config.in_channels, config.widths),
        multiple=16,
    ),
    "CPF-Net": BaselineNetwork(
        source="Feng 2020, on ResNet-34",
        build=lambda config: CPFNet(config.in_channels),
        multiple=32,
    ),
    "COPLE-Net": BaselineNetwork(
        source="Wang 2020",
        build=lambda config: COPLENet(config.in_channels, config.widths[0]),
        multiple=16,
    ),
    "Mini-SegNet": BaselineNetwork(
        source="Qiu 2021, MiniSeg",
        build=lambda config: MiniSeg(config.in_channels),
        multiple=16,
    ),
    "Inf-Net": BaselineNetwork(
        source="Fan 2020, on Res2Net-50",
        build=lambda config: InfNet(config.in_channels),
        multiple=32,
    ),
    "MultiResUnet": BaselineNetwork(
        source="Ibtehaz 2020",
        build=lambda config: MultiResUNet(config.in_channels, config.widths[0]),
        multiple=16,
    ),
    "Attention-Unet": BaselineNetwork(
        source="Oktay 2018, MONAI's AttentionUnet",
        build=lambda config: attention_unet(config.in_channels, config.widths),
        multiple=16,
    ),
    "Gated-Unet": BaselineNetwork(
        source="Schlemper 2019",
        build=lambda config: GatedUNet(config.in_channels, config.widths),
        multiple=16,
    ),
}
# Names of timm.
CLASSIFIERS = {
    "VGG-19": "vgg19",
    "ResNet-50": "resnet50",
    "Xception": "legacy_xception",
    "DenseNet121": "densenet121",
    "InceptionV3": "inception_v3",
}
NAMES = (*SWITCHES, *SEGMENTERS, *CLASSIFIERS)
SOURCES = {
    **dict.fromkeys(SWITCHES, "TA-SegNet, a row of Table I"),
    "V1": "TA-SegNet without its parts, the Unet of Tables II and III (Ronneberger 2015)",
    "V7": "TA-SegNet",
    "V8": "TA-SegNet with timm's efficientnet_b0 as encoder",
}
SOURCES |= {name: network.source for name, network in SEGMENTERS.items()}
SOURCES |= {
    name: f"timm's {timm_name}, then CovTANet's aggregation and heads"
    for name, timm_name in CLASSIFIERS.items()
}


class Baseline(nn.Module):
    """A baseline with TA-SegNet's interface.

    It has no fusion vector; phase 2 would read its logits.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        network = SEGMENTERS[config.name]
        self.net = network.build(config)
        self.multiple = network.multiple

    def forward(self, slices: Tensor) -> Tensor | Outputs:
        """Map slices (B, C, H, W) to logits (B, 1, H, W).

        A deeply supervised network returns ``Outputs`` in training.
        """
        height, width = slices.shape[2:]
        outputs = self.net(F.pad(slices, (0, -width % self.multiple, 0, -height % self.multiple)))
        if not isinstance(outputs, Outputs):
            logits: Tensor = outputs[..., :height, :width]
            return logits
        edge = outputs.edge
        if edge is not None:
            edge = edge[..., :height, :width]
        return Outputs(outputs.masks[..., :height, :width], edge)

    def segment(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lesion logits (B, 1, H, W), twice. In eval mode."""
        logits = self(slices)
        return logits, logits


# A logit whose probability, 2e-9, is 0 in steps of 1/254.
NO_LESION_LOGIT = -20


class NoSegmenter(nn.Module):
    """No lesion anywhere, and the slices as the features that a classifier reads."""

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to logits (B, 1, H, W) of no lesion."""
        return self.segment(slices)[0]

    def segment(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, 1, H, W) of no lesion, and the slices (B, C, H, W)."""
        # Computed from the slices, so that a traced graph keeps their size and device.
        return slices[:, :1] * 0 + NO_LESION_LOGIT, slices


SegmenterNetwork = TASegNet | Baseline | NoSegmenter


def build_segmenter(config: SegmenterConfig) -> SegmenterNetwork:
    """Return the network of a configuration, with ``forward`` and ``segment`` as TA-SegNet."""
    match config:
        case TASegNetConfig():
            return TASegNet(config)
        case BaselineConfig():
            return Baseline(config)
        case NoSegmenterConfig():
            return NoSegmenter()
