"""Phase 1: TA-SegNet on slices (Alg. 1, first loop)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covtanet.model.baselines.blocks import Outputs
from covtanet.model.losses import FocalTverskyConfig, focal_tversky, overlap_sums
from covtanet.training.augment import Augmenter
from covtanet.training.feed import Lane, Rows, volumes_of
from covtanet.training.loop import Phase, PhaseConfig
from covtanet.training.metrics import count, metrics_of
from covtanet.training.ranks import Ranks
from covtanet.training.validation import sum_over_lanes


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


def supervised_sums(found: Tensor | Outputs, lesion_mask: Tensor) -> Tensor:
    """``overlap_sums`` of every map that a network gives in training, (3 K,).

    Choice: the same loss on all of them, its mean over them, so that every network of a table is trained alike; an edge
    map is held against the masks' outline.
    """
    if isinstance(found, Tensor):
        return overlap_sums(found, lesion_mask)
    parts = [overlap_sums(each, lesion_mask) for each in torch.split(found.masks, 1, 1)]
    if found.edge is not None:
        outline = F.max_pool2d(lesion_mask, 3, 1, 1) + F.max_pool2d(-lesion_mask, 3, 1, 1)
        parts.append(overlap_sums(found.edge, outline))
    return torch.cat(parts)


def phase1(
    segnet: nn.Module,
    model: nn.Module,
    config: PhaseConfig,
    loss_config: FocalTverskyConfig,
    validation: Sequence[Lane],
    ranks: Ranks,
    augmenter: Augmenter | None = None,
) -> Phase[SliceBatch]:
    """Segmentation by the focal Tversky loss, judged by pooled Dice. model: segnet, wrapped where there are ranks."""
    device = next(segnet.parameters()).device

    def batch_of(rows: Rows, seed: int) -> SliceBatch:
        batch = slice_batch(rows, device)
        if augmenter is None:
            return batch
        slices, lesion_mask = augmenter(batch.slices, batch.lesion_mask, seed)
        return SliceBatch(slices, lesion_mask, batch.names)

    def sums(batch: SliceBatch) -> Tensor:
        with config.autocast(device):
            logits = model(batch.slices)
        return supervised_sums(logits, batch.lesion_mask)

    def validate() -> dict[str, float]:
        pixels = sum_over_lanes(
            segnet,
            validation,
            lambda rows, _: slice_batch(rows, device),
            lambda batch: count(segnet(batch.slices) > 0, batch.lesion_mask > 0),
            4,
            config.autocast(device),
            ranks,
        )
        metrics = metrics_of(pixels)
        names = ("dice", "iou", "sensitivity", "specificity")
        return {f"val_{name}": metrics[name] for name in names}

    return Phase(
        module=segnet,
        model=model,
        batch_of=batch_of,
        sums=sums,
        loss=lambda total: torch.stack(
            [focal_tversky(each, loss_config) for each in total.view(-1, 3)]
        ).mean(),
        validate=validate,
        score=lambda metrics: metrics["val_dice"],
    )
