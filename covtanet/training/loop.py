"""Epochs, learning rate, validation and the best weights; still no cluster, no disk."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

EpochReport = Callable[[int, dict[str, float], bool], None]


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase's optimization. The defaults are the paper's: Adam, 1e-5, decayed by 0.99 every 10 epochs.

    Choice: number of epochs and batch size, which the paper does not give.
    """

    num_epochs: int = 100
    batch_size: int = 8
    learning_rate: float = 1e-5
    decay: float = 0.99
    decay_epochs: int = 10

    def __post_init__(self) -> None:
        if self.num_epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError("num_epochs and batch_size must be at least 1 and learning_rate above 0")


def optimizer_of(parameters: list[nn.Parameter], config: PhaseConfig) -> tuple[torch.optim.Adam, StepLR]:
    """Adam and its step decay (Section III-B)."""
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    return optimizer, StepLR(optimizer, config.decay_epochs, config.decay)


def fit(
    config: PhaseConfig,
    module: nn.Module,
    train: Callable[[torch.optim.Optimizer, int], dict[str, float]],
    validate: Callable[[], dict[str, float]],
    score: Callable[[dict[str, float]], float],
    report: EpochReport,
) -> None:
    """Train for all epochs and report each: (epoch, metrics, is the best so far).

    score: the larger the better; a nan never is the best.

    Raises:
        FloatingPointError: where the loss is not finite.
    """
    optimizer, schedule = optimizer_of([p for p in module.parameters() if p.requires_grad], config)
    best = -math.inf
    for epoch in range(config.num_epochs):
        rate = float(schedule.get_last_lr()[0])
        metrics = {"epoch": float(epoch), "learning_rate": rate, **train(optimizer, epoch)}
        if not math.isfinite(metrics["train_loss"]):
            raise FloatingPointError(f"training loss is {metrics['train_loss']} in epoch {epoch}, expected a number")
        schedule.step()
        metrics |= validate()
        is_best = score(metrics) > best
        best = max(best, score(metrics)) if is_best else best
        report(epoch, metrics, is_best)
