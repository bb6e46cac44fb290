"""Every network of the paper's tables by name: what it is, where it comes from, how it is built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import Outputs
from covtanet.model.segnet import OWN, SLICES, TABLE_I, SegNetConfig, TASegNet

Build = Callable[[SegNetConfig], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A segmentation network. source: who describes it. multiple: what a slice's sides are padded to."""

    source: str
    build: Build
    multiple: int = 1


def _fcn(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.fcn import FCN8s

    return FCN8s(config.in_channels, 2 * config.widths[0])


def _vnet(config: SegNetConfig) -> nn.Module:
    from monai.networks.nets import VNet

    net: nn.Module = VNet(spatial_dims=2, in_channels=config.in_channels, out_channels=1)
    for module in list(
        net.modules()
    ):  # MONAI's are for volumes: on slices they would drop a whole sample's features
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout3d):
                setattr(module, name, nn.Dropout2d(child.p))
    return net


def _unet_plus_plus(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.nested import NestedUNet

    return NestedUNet(config.in_channels, config.widths)


def _cpf(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.cpf import CPFNet

    return CPFNet(config.in_channels)


def _cople(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.cople import COPLENet

    return COPLENet(config.in_channels, config.widths[0])


def _miniseg(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.miniseg import MiniSeg

    return MiniSeg(config.in_channels)


def _inf(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.inf import InfNet

    return InfNet(config.in_channels)


def _multires(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.multires import MultiResUNet

    return MultiResUNet(config.in_channels, config.widths[0])


def _attention_unet(config: SegNetConfig) -> nn.Module:
    from monai.networks.nets import AttentionUnet

    strides = (2,) * (len(config.widths) - 1)
    net: nn.Module = AttentionUnet(2, config.in_channels, 1, config.widths, strides)
    return net


def _gated(config: SegNetConfig) -> nn.Module:
    from covtanet.model.baselines.gated import GatedUNet

    return GatedUNet(config.in_channels, config.widths)


# Choice: widths 32..512 for every network whose authors leave them free, as TA-SegNet has them.
SEGMENTERS = {
    "FCN": Segmenter(source="Long 2015, FCN-8s on VGG-16", build=_fcn, multiple=32),
    "Vnet": Segmenter(source="Milletari 2016, MONAI's VNet in 2D", build=_vnet, multiple=16),
    "Unet++": Segmenter(
        source="Zhou 2018, MONAI's BasicUNetPlusPlus", build=_unet_plus_plus, multiple=16
    ),
    "CPF-Net": Segmenter(source="Feng 2020, on ResNet-34", build=_cpf, multiple=32),
    "COPLE-Net": Segmenter(source="Wang 2020", build=_cople, multiple=16),
    "Mini-SegNet": Segmenter(source="Qiu 2021, MiniSeg", build=_miniseg, multiple=16),
    "Inf-Net": Segmenter(source="Fan 2020, on Res2Net-50", build=_inf, multiple=32),
    "MultiResUnet": Segmenter(source="Ibtehaz 2020", build=_multires, multiple=16),
    "Attention-Unet": Segmenter(
        source="Oktay 2018, MONAI's AttentionUnet", build=_attention_unet, multiple=16
    ),
    "Gated-Unet": Segmenter(source="Schlemper 2019", build=_gated, multiple=16),
}
# Names of timm.
CLASSIFIERS = {
    "VGG-19": "vgg19",
    "ResNet-50": "resnet50",
    "Xception": "legacy_xception",
    "DenseNet121": "densenet121",
    "InceptionV3": "inception_v3",
}
NAMES = (*TABLE_I, *SEGMENTERS, *CLASSIFIERS)
SOURCES = {
    **dict.fromkeys(TABLE_I, "TA-SegNet, a row of Table I"),
    "V1": "TA-SegNet without its parts, the Unet of Tables II and III (Ronneberger 2015)",
    "V7": "TA-SegNet",
    "V8": "TA-SegNet with timm's efficientnet_b0 as encoder",
    **{name: each.source for name, each in SEGMENTERS.items()},
    **{
        name: f"timm's {each}, then CovTANet's aggregation and heads"
        for name, each in CLASSIFIERS.items()
    },
}


class Baseline(nn.Module):
    """A compared network behind TA-SegNet's interface; it has no fusion vector, so its logits stand for one."""

    def __init__(self, name: str, config: SegNetConfig) -> None:
        super().__init__()
        known = SEGMENTERS[name]
        self.net, self.multiple = known.build(config), known.multiple

    def forward(self, slices: Tensor) -> Tensor | Outputs:
        """Map slices (B, C, H, W) to logits (B, 1, H, W); a deeply supervised network in training to ``Outputs``."""
        height, width = slices.shape[2:]
        padded = F.pad(slices, (0, -width % self.multiple, 0, -height % self.multiple))
        found = self.net(padded)
        if isinstance(found, Outputs):
            edge = None if found.edge is None else found.edge[..., :height, :width]
            return Outputs(found.masks[..., :height, :width], edge)
        logits: Tensor = found[..., :height, :width]
        return logits

    def segment(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Lesion logits (B, 1, H, W), twice. In eval mode."""
        logits = self(slices)
        return logits, logits


class NoSegmenter(nn.Module):
    """Stands where a classifier reads the slices themselves: no lesion anywhere, and the slices as features."""

    def forward(self, slices: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of no lesion."""
        return self.segment(slices)[0]

    def segment(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of no lesion, and the slices."""
        return slices[:, :1] * 0 - 20, slices


def build_segmenter(config: SegNetConfig) -> Any:
    """The network of a configuration, with ``forward`` and ``segment`` as TA-SegNet has them."""
    if config.network == OWN:
        return TASegNet(config)
    if config.network == SLICES:
        return NoSegmenter()
    if config.network not in SEGMENTERS:
        raise ValueError(
            f"network {config.network}, expected one of {', '.join((OWN, *SEGMENTERS))}"
        )
    return Baseline(config.network, config)
