"""Networks of Table IV on one slice of a study, and the settings of their trainings."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from covtanet.model.covtanet import CovTANetConfig, JointClassifier, architecture
from covtanet.model.regional import RegionalFeatures
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.training.batch_augment import BatchAugmentConfig
from covtanet.training.phase_config import PhaseConfig

LESION_SHARE = "Lesion share"
COVTANET = "CovTANet"
# Rates among which each network chooses, on training patients of fold 0.
RATES = (3e-4, 1e-3)
# Share of the steps of a training that the trial of a choice takes.
TRIAL_SHARE = 0.4
# As for the segmenter, but milder: the lungs stay whole, and upright as in the scanner, since the
# label belongs to all of the slice. The same for all networks.
AUGMENT = BatchAugmentConfig(
    is_on=True,
    flip_vertical_probability=0.0,
    rotation_deg=12.0,
    scale_low=0.85,
    scale_high=1.1,
    shift=0.06,
    aspect=0.1,
    elastic_probability=0.3,
    elastic_deviation=0.02,
    low_resolution_probability=0.1,
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of networks, batches and trainings."""

    size_px: int = 256
    batch_size: int = 32
    num_epochs: tuple[int, int] = (6, 30)
    """Smallest and largest number of passes over the training patients."""
    covtanet: CovTANetConfig
    timed_steps: int = 16
    """Steps by which the duration of a training is estimated."""
    num_copies: int = 8
    """Copies of the slices, changed at random, whose features CovTANet is trained on. 6.9 GB with
    the slices themselves and their mirror images."""
    max_steps: int = 1 << 30
    """Largest number of steps of a training."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings that a network chooses on training patients of fold 0."""

    rate: float
    is_narrow: bool = False
    """CovTANet with half the channels behind the segmenter."""
    is_warm: bool = False
    """CovTANet's regional extractor starts from the final filter of the segmenter."""

    def __str__(self) -> str:
        """Return the settings as one word."""
        marks = ("narrow " * self.is_narrow) + ("warm " * self.is_warm)
        return f"{marks}{self.rate:g}"


SCALE = Scale(
    covtanet=CovTANetConfig(
        # V8's features as the segmenter of the lung box has them: six levels of 16 channels.
        segnet=replace(
            TASegNetConfig(in_channels=3, fusion_channels=16).row_of_table_i(
                "V8", "tf_efficientnet_lite0"
            ),
            stem_channels=16,
        ),
        num_slices=1,
    )
)
TOY = Scale(
    size_px=96,
    batch_size=4,
    num_epochs=(1, 1),
    covtanet=replace(SCALE.covtanet, pooled_px=16, regional_widths=(8, 8, 8, 16), path_channels=16),
    timed_steps=2,
    num_copies=1,
    max_steps=2,
)


def choices(name: str) -> list[Choice]:
    """Return the settings that a row compares: rates, and for CovTANet width and start as well."""
    if name != COVTANET:
        return [Choice(rate=rate) for rate in RATES]
    return [
        Choice(rate=rate, is_narrow=is_narrow, is_warm=is_warm)
        for is_warm in (False, True)
        for is_narrow in (False, True)
        for rate in RATES
    ]


def network_config(name: str, scale: Scale, choice: Choice) -> CovTANetConfig:
    """Return the network of one row; a classifier reads one channel, as it has no neighbours."""
    if name == COVTANET:
        config = scale.covtanet
        if not choice.is_narrow:
            return config
        widths = tuple(width // 2 for width in config.regional_widths)
        return replace(config, regional_widths=widths, path_channels=config.path_channels // 2)
    size = replace(scale.covtanet, segnet=TASegNetConfig(in_channels=1))
    return architecture(name, size, scale.size_px)


def phase_config(rate: float, scale: Scale, num_steps: int) -> PhaseConfig:
    """Return the optimization of one training."""
    return PhaseConfig(
        num_epochs=1,
        batch_size=scale.batch_size,
        micro_batches=1,
        optimizer="adamw",
        learning_rate=rate,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_share=0.1,
        clip_norm=1.0,
        # The average reaches back over about a twentieth of the steps.
        average_decay=max(0.0, 1 - 20 / num_steps),
    )


@torch.no_grad()
def start_warm(module: JointClassifier, segmenter: TASegNet) -> None:
    """Let the first filters of the regional extractor be those that make lesions of F_fus.

    The first convolution takes the segmenter's 3x3 filters with their norm, the second one's first
    channel its lesion logits.
    """
    first, norm, second = (_layer(module.regional, index) for index in (0, 1, 3))
    source, source_norm, logits = (segmenter.filter[index] for index in (0, 1, 3))
    target = first.state_dict()["weight"]
    width = min(len(target), len(source.state_dict()["weight"]))
    target[:width] = source.state_dict()["weight"][:width]
    # Biases and statistics too; tensors of a state dictionary share memory with the layer.
    for name, value in norm.state_dict().items():
        if value.ndim:
            value[:width] = source_norm.state_dict()[name][:width]
    kernel = second.state_dict()["weight"]
    kernel[0] = 0
    kernel[0, :width, 1, 1] = logits.state_dict()["weight"][0, :width, 0, 0]


def _layer(regional: nn.Module, index: int) -> nn.Module:
    """Return a layer of the first block of the regional extractor."""
    assert isinstance(regional, RegionalFeatures)
    block = regional.stages[0]
    assert isinstance(block, nn.Sequential)
    return block[index]
