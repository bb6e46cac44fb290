"""Phase 1: TA-SegNet on slices (Alg. 1, first loop)."""

from collections.abc import Sequence
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
from covtanet.training.augment import Augmenter
from covtanet.training.feed import Lane, Rows, volumes_of
from covtanet.training.loop import Phase, in_order
from covtanet.training.metrics import count, counts_of
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import Ranks


class SliceBatch(NamedTuple):
    """Slices (B, 1, H, W) in [0, 1] and lesion masks alike, with the names of their series."""

    slices: Tensor
    lesion_mask: Tensor
    names: list[str]


def slice_batch(rows: Rows, device: torch.device) -> SliceBatch:
    """Stored levels and masks (B, H, W) to a micro-batch on the device."""
    levels, lesion = rows["levels"], rows["lesion"]
    scale = np.float32(np.iinfo(levels.dtype).max)
    slices = torch.from_numpy(levels.astype(np.float32) / scale)[:, None]
    mask = torch.from_numpy(lesion.astype(np.float32))[:, None]
    layout = torch.channels_last
    return SliceBatch(
        slices.to(device, memory_format=layout),
        mask.to(device, memory_format=layout),
        volumes_of(rows),
    )


def supervised_sums(
    found: Tensor | Outputs, lesion_mask: Tensor, terms: LossTerms | None = None
) -> Tensor:
    """The loss's sums of every map that a network gives in training, (K * num_sums,).

    Choice: the same loss on all of them, its mean over them, so that every network of a table is trained alike; an edge
    map is held against the masks' outline.
    """
    terms = terms or loss_terms(FocalTverskyConfig())
    if isinstance(found, Tensor):
        return terms.sums(found, lesion_mask)
    parts = [terms.sums(each, lesion_mask) for each in torch.split(found.masks, 1, 1)]
    if found.edge is not None:
        outline = F.max_pool2d(lesion_mask, 3, 1, 1) + F.max_pool2d(-lesion_mask, 3, 1, 1)
        parts.append(terms.sums(found.edge, outline))
    return torch.cat(parts)


def supervised_loss(total: Tensor, terms: LossTerms) -> Tensor:
    """The mean loss of all maps from their added-up sums, a scalar."""
    return torch.stack([terms.loss(sums) for sums in total.view(-1, terms.num_sums)]).mean()


def phase1(
    segnet: nn.Module,
    model: nn.Module,
    config: PhaseConfig,
    loss_config: FocalTverskyConfig | CrossEntropyDiceConfig,
    validation: Sequence[Lane],
    ranks: Ranks,
    augmenter: Augmenter | None = None,
) -> Phase[SliceBatch]:
    """Segmentation by the configured loss, judged by pooled Dice. model: segnet, wrapped where there are ranks."""
    device = next(segnet.parameters()).device
    terms = loss_terms(loss_config)

    def batch_of(rows: Rows, seed: int) -> SliceBatch:
        batch = slice_batch(rows, device)
        if augmenter is None:
            return batch
        slices, lesion_mask = augmenter(batch.slices, batch.lesion_mask, seed)
        return SliceBatch(slices, lesion_mask, batch.names)

    def sums(batch: SliceBatch) -> Tensor:
        with config.autocast(device):
            logits = model(batch.slices)
        return supervised_sums(logits, batch.lesion_mask, terms)

    def validate() -> dict[str, float]:
        segnet.eval()
        pixels = torch.zeros(4, dtype=torch.float64)
        with torch.inference_mode(), config.autocast(device):
            for batch in in_order(validation, lambda rows, _: slice_batch(rows, device)):
                pixels += count(segnet(batch.slices) > 0, batch.lesion_mask > 0).cpu()
        found = counts_of(ranks.sum(pixels))
        return {
            "val_dice": found.dice,
            "val_iou": found.iou,
            "val_sensitivity": found.sensitivity,
            "val_specificity": found.specificity,
        }

    return Phase(
        module=segnet,
        model=model,
        batch_of=batch_of,
        sums=sums,
        loss=lambda total: supervised_loss(total, terms),
        validate=validate,
        score=lambda metrics: metrics["val_dice"],
    )
