"""Phase 1: TA-SegNet on slices (Alg. 1, first loop). One epoch as a function; no cluster, no disk."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from covtanet.model.losses import FocalTverskyConfig, Reduce, focal_tversky_loss
from covtanet.training.metrics import count, counts_of

SliceBatch = tuple[Tensor, Tensor]


def train_epoch(
    segnet: nn.Module,
    batches: Iterable[SliceBatch],
    optimizer: Optimizer,
    loss_config: FocalTverskyConfig,
    reduce: Reduce,
    num_ranks: int,
) -> dict[str, float]:
    """Run one epoch; returns its mean loss.

    batches: slices (B, 1, H, W) in [0, 1] and lesion masks alike. Data-parallel gradients are averaged over ranks,
    while the loss of summed counts wants their sum, hence the factor ``num_ranks``.
    """
    segnet.train()
    losses = []
    for slices, lesion_mask in batches:
        loss = focal_tversky_loss(segnet(slices), lesion_mask, loss_config, reduce)
        optimizer.zero_grad(set_to_none=True)
        (loss * num_ranks).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"train_loss": sum(losses) / len(losses) if losses else float("nan")}


def evaluate(segnet: nn.Module, batches: Iterable[SliceBatch], reduce: Reduce) -> dict[str, float]:
    """Pooled Dice, IoU, sensitivity and specificity over all pixels at threshold one half."""
    segnet.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    with torch.inference_mode():
        for slices, lesion_mask in batches:
            sums += count(segnet(slices) > 0, lesion_mask > 0).cpu()
    found = counts_of(reduce(sums))
    return {
        "val_dice": found.dice,
        "val_iou": found.iou,
        "val_sensitivity": found.sensitivity,
        "val_specificity": found.specificity,
    }
