"""Epochs, learning rate, validation, early stop and the best weights; no cluster, no tracker, no disk: torch alone."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from covtanet.training.feed import Lane, Rows, seed_of, steps
from covtanet.training.optimizer import (
    AVERAGE,
    WeightAverage,
    clip_gradients,
    make_optimizer,
    set_rate,
)
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import LaneStatistics, Ranks
from covtanet.training.step import Named, backward, check_gradients

B = TypeVar("B", bound=Named)
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Phase(Generic[B]):
    """What a phase optimizes and how it is judged.

    module: the network; model: the same, wrapped where there are several ranks. batch_of: rows and a seed to a
    micro-batch on the device. sums, loss: see ``step.backward``. score: of validated metrics, the larger the better.
    """

    module: nn.Module
    model: nn.Module
    batch_of: Callable[[Rows, int], B]
    sums: Callable[[B], Tensor]
    loss: Callable[[Tensor], Tensor]
    validate: Callable[[], dict[str, float]]
    score: Callable[[dict[str, float]], float]


@dataclass(kw_only=True)
class Progress:
    """All that a training needs to go on. history: metrics of every epoch so far."""

    history: list[dict[str, float]] = field(default_factory=list)
    weights: State = field(default_factory=dict)
    best: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights count."""
        return int(self.history[-1]["best_epoch"]) if self.history else -1


def fit(
    config: PhaseConfig,
    phase: Phase[B],
    lanes: dict[int, Lane],
    ranks: Ranks,
    seed: int,
    progress: Progress,
    report: Callable[[Progress], None],
) -> Progress:
    """Train from where ``progress`` stands to the last epoch or the early stop; reports after every epoch.

    lanes: this rank's, by number.

    Raises:
        FloatingPointError: for a loss or gradient that is not finite; the epoch is not reported.
        ValueError: where a lane has less than one micro-batch.
    """
    named = {name: value for name, value in phase.module.named_parameters() if value.requires_grad}
    optimizer = make_optimizer(config, phase.module)
    average = WeightAverage(phase.module, config.average_decay) if config.average_decay else None
    if progress.history:
        phase.module.load_state_dict(progress.weights)
        _load_optimizer(optimizer, named, progress.optimizer)
        if average:
            average.restore(progress.optimizer)
    statistics = LaneStatistics(phase.module, len(lanes), ranks)
    while not is_finished(config, progress):
        epoch = len(progress.history)
        metrics = {"epoch": float(epoch), "learning_rate": config.rate(epoch)}
        metrics |= _train_epoch(config, phase, lanes, optimizer, average, statistics, seed, epoch)
        statistics.average()
        weights = _copy(phase.module.state_dict())
        if average:  # what is validated, and may become the best, are the averaged weights
            phase.module.load_state_dict(average.parameters(), strict=False)
        judged = _copy(phase.module.state_dict()) if average else weights
        metrics |= phase.validate() | attention_weights(phase.module)
        if average:
            phase.module.load_state_dict(weights)
        best = progress.history[progress.best_epoch] if progress.history else None
        # Without any number to compare, as where nothing is held back to validate, the last epoch counts.
        is_better = (
            best is None
            or math.isnan(phase.score(best))
            or phase.score(metrics) > phase.score(best)
        )
        metrics["best_epoch"] = float(epoch if is_better else progress.best_epoch)
        moments = _optimizer_state(optimizer, named)
        progress = Progress(
            history=[*progress.history, metrics],
            weights=weights,
            best=judged if is_better else progress.best,
            optimizer=moments | (average.checkpoint() if average else {}),
        )
        report(progress)
    return progress


def is_finished(config: PhaseConfig, progress: Progress) -> bool:
    """Whether all epochs are done, or too many went by without a better validation."""
    done = len(progress.history)
    return done >= config.num_epochs or done - 1 - progress.best_epoch >= config.stop_after_epochs


def _train_epoch(
    config: PhaseConfig,
    phase: Phase[B],
    lanes: dict[int, Lane],
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    statistics: LaneStatistics,
    seed: int,
    epoch: int,
) -> dict[str, float]:
    """One pass; mean loss, steps, and the share of the time that went into waiting for data."""
    phase.module.train()
    started, waited, losses = time.perf_counter(), 0.0, []
    num_steps = statistics.ranks.lowest(min(lane.num_batches(epoch) for lane in lanes.values()))
    if not num_steps:
        raise ValueError(
            "a lane has fewer samples than batch_size; take a smaller batch_size or fewer micro_batches"
        )
    feed = steps(list(lanes.values()), epoch, num_steps)
    for number in range(num_steps):
        set_rate(optimizer, config.rate(epoch + number / num_steps))
        asked = time.perf_counter()
        rows = next(feed)
        waited += time.perf_counter() - asked
        seeds = [seed_of(seed, epoch, number, lane) for lane in lanes]
        batches = [phase.batch_of(each, one) for each, one in zip(rows, seeds, strict=True)]
        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(phase.model, batches, phase.sums, phase.loss, statistics, seeds))
        check_gradients(phase.module, batches, statistics.ranks)
        clip_gradients(config, phase.module.parameters())
        optimizer.step()
        if average:
            average.update()
    spent = time.perf_counter() - started
    return {
        "train_loss": sum(losses) / num_steps,
        "num_steps": float(num_steps),
        "data_wait_share": waited / spent,
        "step_s": spent / num_steps,
    }


def in_order(lanes: Sequence[Lane], batch_of: Callable[[Rows, int], B]) -> Any:
    """Every sample of this rank's validation lanes once."""
    return (batch_of(rows, 0) for lane in lanes for rows in lane.in_order())


def attention_weights(module: nn.Module) -> dict[str, float]:
    """The learned alpha of every tri-level attention unit (Eq. 6)."""
    return {
        f"alpha/{name.removesuffix('.alpha')}": float(value.detach())
        for name, value in module.named_parameters()
        if name.endswith(".alpha")
    }


def _copy(state: State) -> State:
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _optimizer_state(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> State:
    """Adam's moments and steps as flat names."""
    entries = ((name, optimizer.state[parameter].items()) for name, parameter in named.items())
    return _copy({f"{name}/{entry}": value for name, items in entries for entry, value in items})


def _load_optimizer(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], state: State
) -> None:
    for key, value in state.items():
        if key.startswith(AVERAGE):
            continue
        name, _, entry = key.rpartition("/")
        parameter = named[name]
        # Adam keeps its count of steps on the CPU.
        optimizer.state[parameter][entry] = (
            value.clone() if entry == "step" else value.to(parameter.device)
        )
