"""Phase 2: diagnosis and severity on the frozen TA-SegNet's features (Alg. 1, second loop)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from covtanet.model.losses import JointLossConfig, joint, joint_sums
from covtanet.training.device import to_device
from covtanet.training.feed import Lane, Rows, volumes_of
from covtanet.training.loop import Phase
from covtanet.training.metrics import count, metrics_of
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import Ranks
from covtanet.training.validation import sum_over_lanes

# F_fus of a whole volume would take gigabytes.
SLICES_AT_ONCE = 8

# Levels of whole volumes (B, S, C, H, W) to pooled fusion vectors (B, S, C, P, P).
Features = Callable[[np.ndarray], Tensor]


class VolumeBatch(NamedTuple):
    """Pooled fusion vectors (B, S, C, P, P), labels (B,) and names of their series."""

    pooled: Tensor
    is_infected: Tensor
    is_severe: Tensor
    names: list[str]


def frozen_features(
    segment: Callable[[Tensor], tuple[Tensor, Tensor]], device: torch.device, config: PhaseConfig
) -> Features:
    """Return TA-SegNet's pooled features of whole volumes, without gradient.

    segment: a network's, in eval mode. It maps a few slices at a time, since a whole volume's F_fus
    would take gigabytes.
    """

    def features(levels: np.ndarray) -> Tensor:
        scale = np.float32(np.iinfo(levels.dtype).max)
        # (B, S, C, H, W), or (B, S, H, W) of one channel -> (B * S, C, H, W)
        flat = levels.reshape(levels.shape[0] * levels.shape[1], -1, *levels.shape[-2:])
        pooled = []
        with torch.no_grad(), config.autocast(device):
            for start in range(0, len(flat), SLICES_AT_ONCE):
                slices = torch.from_numpy(
                    flat[start : start + SLICES_AT_ONCE].astype(np.float32) / scale
                )
                pooled.append(
                    segment(slices.to(device, memory_format=torch.channels_last))[1].half()
                )
        # (B * S, C, P, P)
        joined = torch.cat(pooled)
        # (B, S, C, P, P)
        return joined.reshape(*levels.shape[:2], *joined.shape[1:])

    return features


def volume_batch(rows: Rows, device: torch.device, features: Features | None) -> VolumeBatch:
    """Return rows as a micro-batch on the device.

    features: computes pooled features if the rows hold slices; null if the rows hold features.
    """
    pooled = to_device(rows["pooled"], device) if features is None else features(rows["levels"])
    is_infected, is_severe = (
        to_device(rows[name], device).float() for name in ("is_infected", "is_severe")
    )
    return VolumeBatch(pooled.to(device).float(), is_infected, is_severe, volumes_of(rows))


def _validation_sums(
    classifier: nn.Module, batch: VolumeBatch, loss_config: JointLossConfig
) -> Tensor:
    """Return counts of diagnosis and of severity, four each, and the four sums of the loss."""
    infected_logits, severe_logits = classifier(batch.pooled)
    infected = batch.is_infected > 0
    # A logit above 0 is a probability above one half.
    diagnosis = count(infected_logits > 0, infected)
    # Of the infected alone, as in Eq. 8.
    severity = count(severe_logits > 0, batch.is_severe > 0, mask=infected)
    losses = joint_sums(
        infected_logits, severe_logits, batch.is_infected, batch.is_severe, loss_config
    )
    # (12,): 4 + 4 counts and 4 sums of the loss.
    return torch.cat([diagnosis, severity, losses.double()])


def _validation_metrics(sums: Tensor) -> dict[str, float]:
    """Return the metrics of added-up ``_validation_sums``."""
    diagnosis = metrics_of(sums[:4])
    severity = metrics_of(sums[4:8])
    return {
        "val_loss": float(joint(sums[8:])),
        "val_diagnosis_accuracy": diagnosis["accuracy"],
        "val_diagnosis_sensitivity": diagnosis["sensitivity"],
        "val_diagnosis_specificity": diagnosis["specificity"],
        "val_severity_accuracy": severity["accuracy"],
    }


def phase2(
    classifier: nn.Module,
    model: nn.Module,
    config: PhaseConfig,
    loss_config: JointLossConfig,
    validation: Sequence[Lane],
    ranks: Ranks,
    features: Features | None = None,
) -> Phase[VolumeBatch]:
    """Diagnosis and severity by the joint loss (Eq. 8), judged by it on the validation part."""
    device = next(classifier.parameters()).device

    def batch_of(rows: Rows, seed: int) -> VolumeBatch:
        return volume_batch(rows, device, features)

    def sums_of(batch: VolumeBatch) -> Tensor:
        with config.autocast(device):
            infected_logits, severe_logits = model(batch.pooled)
        return joint_sums(
            infected_logits, severe_logits, batch.is_infected, batch.is_severe, loss_config
        )

    def validate() -> dict[str, float]:
        sums = sum_over_lanes(
            classifier,
            validation,
            batch_of,
            lambda batch: _validation_sums(classifier, batch, loss_config),
            12,
            config.autocast(device),
            ranks,
        )
        return _validation_metrics(sums)

    return Phase(
        module=classifier,
        model=model,
        batch_of=batch_of,
        sums=sums_of,
        loss=joint,
        validate=validate,
        # The best epoch has the highest score, hence the sign.
        score=lambda metrics: -metrics["val_loss"],
    )
