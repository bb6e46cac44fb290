"""Epochs, learning rate, validation, early stop and the best weights.

Torch only: no cluster, no tracking, no disk.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

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
from covtanet.training.step import Named, backward, check_finite

B = TypeVar("B", bound=Named)
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Phase(Generic[B]):
    """Network, loss and validation of a phase."""

    module: nn.Module
    """The network."""
    model: nn.Module
    """The network, wrapped if there are several ranks."""
    batch_of: Callable[[Rows, int], B]
    """Map rows and a seed to a micro-batch on the device."""
    sums: Callable[[B], Tensor]
    """Map a micro-batch to the loss's sums, see ``step.backward``."""
    loss: Callable[[Tensor], Tensor]
    """Map the added-up sums to the loss."""
    validate: Callable[[], dict[str, float]]
    """Return the metrics of the validation data."""
    score: Callable[[dict[str, float]], float]
    """Map validation metrics to a number; larger is better."""


@dataclass(kw_only=True)
class Progress:
    """State from which a training continues."""

    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of every epoch so far."""
    weights: State = field(default_factory=dict)
    best: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)

    @property
    def best_epoch(self) -> int:
        """Number of the epoch with the best validation; -1 before the first epoch."""
        return int(self.history[-1]["best_epoch"]) if self.history else -1


@dataclass(frozen=True, kw_only=True)
class _Training(Generic[B]):
    """Objects that all epochs of a phase share."""

    config: PhaseConfig
    phase: Phase[B]
    lanes: dict[int, Lane]
    seed: int
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    statistics: LaneStatistics


def fit(
    config: PhaseConfig,
    phase: Phase[B],
    lanes: dict[int, Lane],
    ranks: Ranks,
    seed: int,
    progress: Progress,
    report: Callable[[Progress], None],
) -> Progress:
    """Train from ``progress`` to the last epoch or the early stop; report after every epoch.

    lanes: this rank's, by number.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the epoch is not reported.
        ValueError: there are too few samples for one step.
    """
    optimizer = make_optimizer(config, phase.module, fused=ranks.device.type == "cuda")
    average = WeightAverage(phase.module, config.average_decay) if config.average_decay else None
    if progress.history:
        _restore(phase.module, optimizer, average, progress)
    # After restoring: the lanes' statistics start from those of the module.
    statistics = LaneStatistics(phase.module, len(lanes), ranks)
    training = _Training(
        config=config,
        phase=phase,
        lanes=lanes,
        seed=seed,
        optimizer=optimizer,
        average=average,
        statistics=statistics,
    )
    while not is_finished(config, progress):
        progress = _next_epoch(training, progress)
        report(progress)
    return progress


def _restore(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    progress: Progress,
) -> None:
    module.load_state_dict(progress.weights)
    _load_optimizer(optimizer, _trained(module), progress.optimizer)
    if average:
        average.restore(progress.optimizer)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def _next_epoch(training: _Training[B], progress: Progress) -> Progress:
    """Train and validate one epoch."""
    phase = training.phase
    epoch = len(progress.history)
    metrics = {"epoch": float(epoch), "learning_rate": training.config.rate(epoch)}
    metrics |= _train_epoch(training, epoch)
    # Before weights are copied: validation and checkpoint hold the mean over lanes.
    training.statistics.average()
    weights = _copy(phase.module.state_dict())
    validated, validation = _validate(training, weights)
    metrics |= validation
    is_better = _is_better(phase, progress, metrics)
    metrics["best_epoch"] = float(epoch if is_better else progress.best_epoch)
    optimizer = _optimizer_state(training.optimizer, _trained(phase.module))
    if training.average:
        optimizer |= training.average.checkpoint()
    return Progress(
        history=[*progress.history, metrics],
        weights=weights,
        best=validated if is_better else progress.best,
        optimizer=optimizer,
    )


def _validate(training: _Training[B], weights: State) -> tuple[State, dict[str, float]]:
    """Return the validated weights, averaged if there is an average, and their metrics."""
    module = training.phase.module
    if training.average is None:
        return weights, training.phase.validate() | attention_weights(module)
    module.load_state_dict(training.average.parameters(), strict=False)
    averaged = _copy(module.state_dict())
    metrics = training.phase.validate() | attention_weights(module)
    # Training goes on from the weights themselves, not from their average.
    module.load_state_dict(weights)
    return averaged, metrics


def _is_better(phase: Phase[B], progress: Progress, metrics: dict[str, float]) -> bool:
    if not progress.history:
        return True
    best_score = phase.score(progress.history[progress.best_epoch])
    # Without validation data the scores are NaN and the last epoch counts.
    return math.isnan(best_score) or phase.score(metrics) > best_score


def is_finished(config: PhaseConfig, progress: Progress) -> bool:
    """Return whether all epochs are done, or too many passed without a better validation."""
    done = len(progress.history)
    # Epochs count from 0: after the best epoch itself nothing has passed yet.
    return done >= config.num_epochs or done - 1 - progress.best_epoch >= config.stop_after_epochs


def _train_epoch(training: _Training[B], epoch: int) -> dict[str, float]:
    """Train on all samples once; return mean loss, steps, and the share of time spent on data."""
    phase = training.phase
    phase.module.train()
    started = time.perf_counter()
    waited = 0.0
    losses = []
    num_steps = _num_steps(training, epoch)
    feed = steps(list(training.lanes.values()), epoch, num_steps)
    for number in range(num_steps):
        # The rate may change within an epoch, hence the fraction.
        set_rate(training.optimizer, training.config.rate(epoch + number / num_steps))
        asked = time.perf_counter()
        # Timed apart from the step: the share of time spent on data shows whether reading limits.
        rows = next(feed)
        waited += time.perf_counter() - asked
        seeds = [seed_of(training.seed, epoch, number, lane) for lane in training.lanes]
        losses.append(_step(training, rows, seeds))
    # Read before the clock: the host waits for the device here.
    total_loss = sum(torch.stack(losses).tolist())
    spent = time.perf_counter() - started
    return {
        "train_loss": total_loss / num_steps,
        "num_steps": float(num_steps),
        "data_wait_share": waited / spent,
        "step_s": spent / num_steps,
    }


def _num_steps(training: _Training[B], epoch: int) -> int:
    fewest = min(lane.num_batches(epoch) for lane in training.lanes.values())
    # Ranks step together: the lane with the fewest micro-batches ends the epoch for all.
    num_steps = training.statistics.ranks.lowest(fewest)
    if not num_steps:
        raise ValueError(
            "a lane has fewer samples than batch_size; "
            "take a smaller batch_size or fewer micro_batches"
        )
    return num_steps


def _step(training: _Training[B], rows: Sequence[Rows], seeds: list[int]) -> Tensor:
    """Take one optimizer step, a micro-batch per lane, and return its loss on the device."""
    phase = training.phase
    statistics = training.statistics
    pairs = zip(rows, seeds, strict=True)
    batches = [phase.batch_of(lane_rows, seed) for lane_rows, seed in pairs]
    training.optimizer.zero_grad(set_to_none=True)
    step = backward(phase.model, batches, phase.sums, phase.loss, statistics, seeds)
    # Before the weights change, and before clipping, which would spread one NaN over all gradients.
    check_finite(phase.module, step, batches, statistics.ranks)
    clip_gradients(training.config, phase.module.parameters())
    training.optimizer.step()
    if training.average:
        training.average.update()
    return step.loss


def in_order(lanes: Sequence[Lane], batch_of: Callable[[Rows, int], B]) -> Iterator[B]:
    """Return every sample of this rank's validation lanes once."""
    return (batch_of(rows, 0) for lane in lanes for rows in lane.in_order())


def attention_weights(module: nn.Module) -> dict[str, float]:
    """Return the learned alpha of every tri-level attention unit (Eq. 6)."""
    return {
        f"alpha/{name.removesuffix('.alpha')}": float(value.detach())
        for name, value in module.named_parameters()
        if name.endswith(".alpha")
    }


def _copy(state: State) -> State:
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _optimizer_state(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> State:
    """Return Adam's moments and steps under flat names."""
    entries = ((name, optimizer.state[parameter].items()) for name, parameter in named.items())
    return _copy({f"{name}/{entry}": value for name, items in entries for entry, value in items})


def _load_optimizer(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], state: State
) -> None:
    groups = optimizer.state_dict()["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number_of = {id(value): number for value, number in zip(parameters, numbers, strict=True)}
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if not key.startswith(AVERAGE):
            name, _, entry = key.rpartition("/")
            # A copy: the optimizer changes it, a progress never changes.
            entries.setdefault(number_of[id(named[name])], {})[entry] = value.clone()
    # torch puts the moments on their parameter's device, and the count of steps there too if the
    # optimizer is fused.
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
