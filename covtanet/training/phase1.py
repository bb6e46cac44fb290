"""Phase 1: TA-SegNet on slices (Alg. 1, first loop)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import Outputs
from covtanet.model.losses import (
    CrossEntropyDiceConfig,
    FocalTverskyConfig,
    LossTerms,
    loss_terms,
)
from covtanet.training.device import to_device
from covtanet.training.feed import Lane, Rows, volumes_of
from covtanet.training.loop import Phase
from covtanet.training.metrics import count_samples, metrics_of
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import Ranks
from covtanet.training.validation import sums_by_series

Augment = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class SliceBatch(NamedTuple):
    """Slices (B, C, H, W) in [0, 1], lesion masks (B, 1, H, W) and names of their series."""

    slices: Tensor
    lesion_mask: Tensor
    names: list[str]


def slice_batch(rows: Rows, device: torch.device) -> SliceBatch:
    """Return stored levels and masks as a micro-batch on the device.

    rows: levels (B, H, W), or (B, C, H, W) with neighbours in z; masks (B, H, W).
    """
    levels = rows["levels"]
    if levels.ndim == 3:
        levels = levels[:, None]
    layout = torch.channels_last
    # Scaled on the device: 2 bytes a pixel and 1 of the mask are sent instead of 4 each.
    slices = to_device(levels, device).to(torch.float32, memory_format=layout)
    mask = to_device(rows["lesion"], device)[:, None].to(torch.float32, memory_format=layout)
    # (B, C, H, W), in [0, 1]
    return SliceBatch(slices.div_(np.iinfo(levels.dtype).max), mask, volumes_of(rows))


def supervised_sums(
    outputs: Tensor | Outputs, lesion_mask: Tensor, terms: LossTerms | None = None
) -> Tensor:
    """Return the loss's sums of every map that a network gives in training, (K * num_sums,).

    Choice: the same loss on all maps, and its mean over them, so that every network of a table is
    trained in the same way; an edge map is compared with the masks' outline.
    """
    terms = terms or loss_terms(FocalTverskyConfig())
    if isinstance(outputs, Tensor):
        return terms.sums(outputs, lesion_mask)
    # masks: (B, K, H, W), of a network with deep supervision.
    sums = [terms.sums(logits, lesion_mask) for logits in torch.split(outputs.masks, 1, 1)]
    if outputs.edge is not None:
        # Dilation minus erosion of 3 x 3 pixels: the outline is two pixels wide.
        outline = F.max_pool2d(lesion_mask, 3, 1, 1) + F.max_pool2d(-lesion_mask, 3, 1, 1)
        sums.append(terms.sums(outputs.edge, outline))
    return torch.cat(sums)


def supervised_loss(total: Tensor, terms: LossTerms) -> Tensor:
    """Return the mean loss of all maps from their added-up sums, a scalar."""
    # (K * num_sums,) -> (K, num_sums), one row for each map.
    return torch.stack([terms.loss(sums) for sums in total.view(-1, terms.num_sums)]).mean()


def phase1(
    segnet: nn.Module,
    model: nn.Module,
    config: PhaseConfig,
    loss_config: FocalTverskyConfig | CrossEntropyDiceConfig,
    validation: Sequence[Lane],
    ranks: Ranks,
    augment: Augment | None = None,
    lesion_threshold: float = 0.5,
) -> Phase[SliceBatch]:
    """Return segmentation by the configured loss, validated by the mean Dice per volume.

    model: ``segnet``, wrapped if there are several ranks. augment: maps slices, masks and a seed to
    changed slices and masks. lesion_threshold: probability from which validation calls a pixel
    lesion.
    """
    device = next(segnet.parameters()).device
    terms = loss_terms(loss_config)

    def batch_of(rows: Rows, seed: int) -> SliceBatch:
        batch = slice_batch(rows, device)
        if augment is None:
            return batch
        slices, lesion_mask = augment(batch.slices, batch.lesion_mask, seed)
        return SliceBatch(slices, lesion_mask, batch.names)

    def sums(batch: SliceBatch) -> Tensor:
        with config.autocast(device):
            logits = model(batch.slices)
        return supervised_sums(logits, batch.lesion_mask, terms)

    return Phase(
        module=segnet,
        model=model,
        batch_of=batch_of,
        sums=sums,
        loss=lambda total: supervised_loss(total, terms),
        validate=lambda: _validate(
            segnet, validation, config.autocast(device), ranks, lesion_threshold
        ),
        score=lambda metrics: metrics["val_volume_dice"],
    )


def _validate(
    segnet: nn.Module,
    validation: Sequence[Lane],
    autocast: torch.autocast,
    ranks: Ranks,
    lesion_threshold: float,
) -> dict[str, float]:
    """Return metrics of the validation slices of all ranks, pooled, and the mean Dice per volume.

    Choice: the mean per volume decides which epoch is best, as in the tables; of pooled pixels one
    scan with large lesions would decide alone.
    """
    device = next(segnet.parameters()).device
    # Compared with logits; 0 is a probability of one half.
    least_logit = math.log(lesion_threshold / (1 - lesion_threshold))
    by_volume = sums_by_series(
        segnet,
        validation,
        lambda rows, _: slice_batch(rows, device),
        lambda batch: count_samples(segnet(batch.slices) > least_logit, batch.lesion_mask > 0),
        4,
        autocast,
    )
    pixels = sum(by_volume.values(), torch.zeros(4, dtype=torch.float64))
    metrics = metrics_of(ranks.sum(pixels))
    names = ("dice", "iou", "sensitivity", "specificity")
    validated = {f"val_{name}": metrics[name] for name in names}
    return validated | {"val_volume_dice": _volume_dice(by_volume.values(), ranks)}


def _volume_dice(counts: Iterable[Tensor], ranks: Ranks) -> float:
    """Return the mean Dice of the volumes of all ranks that have lesion in truth or prediction.

    counts: (TP, FP, FN, TN) of every volume. NaN without such a volume.
    """
    dice = [metrics_of(volume)["dice"] for volume in counts]
    defined = [value for value in dice if not math.isnan(value)]
    total, number = ranks.sum(torch.tensor([sum(defined), len(defined)], dtype=torch.float64))
    return float(total / number)
