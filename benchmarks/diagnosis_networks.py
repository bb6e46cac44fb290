"""Networks of Table IV on one slice of a study, and the settings of their trainings."""

from dataclasses import dataclass, replace

from covtanet.model.covtanet import CovTANetConfig, architecture
from covtanet.model.segnet import TASegNetConfig
from covtanet.training.batch_augment import BatchAugmentConfig
from covtanet.training.phase_config import PhaseConfig

LESION_SHARE = "Lesion share"
COVTANET = "CovTANet"
# Rates among which each network chooses, on training patients of fold 0.
RATES = (3e-4, 1e-3)
# Share of the steps of a training that the choice of a rate takes.
TRIAL_SHARE = 0.5
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
    num_epochs: tuple[int, int] = (6, 40)
    """Smallest and largest number of passes over the training patients."""
    covtanet: CovTANetConfig
    timed_steps: int = 16
    """Steps by which the duration of a training is estimated."""


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
    covtanet=replace(
        SCALE.covtanet, pooled_px=16, regional_widths=(8, 8, 8, 16), path_channels=16
    ),
    timed_steps=2,
)


def network_config(name: str, scale: Scale) -> CovTANetConfig:
    """Return the network of one row; a classifier reads one channel, as it has no neighbours."""
    if name == COVTANET:
        return scale.covtanet
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
