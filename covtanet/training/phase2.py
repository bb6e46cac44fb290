"""Phase 2: diagnosis and severity on the frozen TA-SegNet's features (Alg. 1, second loop). No cluster, no disk."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from covtanet.model.losses import Reduce, joint_loss
from covtanet.training.metrics import count, counts_of

VolumeBatch = tuple[Tensor, Tensor, Tensor]


def train_epoch(
    classifier: nn.Module, batches: Iterable[VolumeBatch], optimizer: Optimizer, reduce: Reduce, num_ranks: int
) -> dict[str, float]:
    """Run one epoch; returns its mean loss.

    batches: pooled fusion vectors (B, S, C, P, P), is_infected (B,), is_severe (B,). On ``num_ranks`` see phase 1.
    """
    classifier.train()
    losses = []
    for pooled, is_infected, is_severe in batches:
        infected_logits, severe_logits = classifier(pooled)
        loss = joint_loss(infected_logits, severe_logits, is_infected, is_severe, reduce)
        optimizer.zero_grad(set_to_none=True)
        (loss * num_ranks).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"train_loss": sum(losses) / len(losses) if losses else float("nan")}


def evaluate(classifier: nn.Module, batches: Iterable[VolumeBatch], reduce: Reduce) -> dict[str, float]:
    """Joint loss, and accuracy of diagnosis over all and of severity over the infected volumes."""
    classifier.eval()
    sums = torch.zeros(3, 4, dtype=torch.float64)
    with torch.inference_mode():
        for pooled, is_infected, is_severe in batches:
            infected_logits, severe_logits = classifier(pooled)
            infected, severe = is_infected > 0, is_severe > 0
            sums[0] += count(infected_logits > 0, infected).cpu()
            sums[1] += count(severe_logits > 0, severe, where=infected).cpu()
            loss = joint_loss(infected_logits, severe_logits, is_infected, is_severe)
            sums[2, :2] += torch.tensor([float(loss) * len(pooled), len(pooled)], dtype=torch.float64)
    sums = reduce(sums)
    diagnosis, severity = counts_of(sums[0]), counts_of(sums[1])
    loss_sum, num_volumes = sums[2, :2].tolist()
    return {
        "val_loss": loss_sum / num_volumes if num_volumes else float("nan"),
        "val_diagnosis_accuracy": diagnosis.accuracy,
        "val_diagnosis_sensitivity": diagnosis.sensitivity,
        "val_diagnosis_specificity": diagnosis.specificity,
        "val_severity_accuracy": severity.accuracy,
    }
