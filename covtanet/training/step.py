"""One optimizer step over micro-batches of several ranks, as if they were one batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from covtanet.training.ranks import LaneStatistics, Ranks


class Named(Protocol):
    """A micro-batch that names the series it came from."""

    @property
    def names(self) -> list[str]:
        """Names of its series."""
        ...


B = TypeVar("B", bound=Named)


class StepLoss(NamedTuple):
    """Loss of a step on the device; nothing of it has been read by the host."""

    loss: Tensor
    total: Tensor
    """Sums of all micro-batches of all ranks, (k,), the same on every rank."""
    parts: list[Tensor]
    """Sums of each of this rank's micro-batches, (k,)."""


def backward(
    model: nn.Module,
    micro_batches: Sequence[B],
    sums: Callable[[B], Tensor],
    loss: Callable[[Tensor], Tensor],
    statistics: LaneStatistics,
    seeds: Sequence[int],
) -> StepLoss:
    """Set the gradients of ``loss`` of the sums over all micro-batches of all ranks.

    sums: forward of one micro-batch to numbers that add up, (k,). seeds: for dropout, one per
    micro-batch.

    Ranks with several micro-batches run them forward without gradient first, since the loss needs
    every sum before the first gradient: a third more work for the memory of one micro-batch.
    """
    ranks = statistics.ranks
    # The same on every rank, also if some have fewer: DDP exchanges its buckets in a forward pass
    # with gradient, and ranks must meet there and in the sums in the same order.
    is_alone = statistics.most_lanes == 1
    parts = []
    for lane, batch in enumerate(micro_batches):
        with nullcontext() if is_alone else torch.no_grad():
            parts.append(_forward(sums, batch, lane, statistics, seeds[lane]))
    # Sums of all micro-batches of all ranks, (k,), the same on every rank.
    total = ranks.sum(torch.stack([part.detach() for part in parts]).sum(0))
    value = total.new_tensor(math.nan)
    for lane, batch in enumerate(micro_batches):
        is_last = lane == len(micro_batches) - 1
        # Ranks exchange gradients once, with the last micro-batch.
        with nullcontext() if is_last else _without_exchange(model):
            # The second forward pass draws the same dropout, by the seed of its micro-batch.
            part = parts[0] if is_alone else _forward(sums, batch, lane, statistics, seeds[lane])
            # The value of the whole sum, with the gradient of this micro-batch's part.
            step_loss = loss(total - part.detach() + part)
            # Data-parallel gradients are averaged over ranks, and the loss of summed counts needs
            # their sum.
            (step_loss * ranks.count).backward()  # type: ignore[no-untyped-call]
        statistics.leave(lane)
        value = step_loss.detach()
    return StepLoss(value, total, [part.detach() for part in parts])


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def _forward(
    sums: Callable[[B], Tensor], batch: B, lane: int, statistics: LaneStatistics, seed: int
) -> Tensor:
    statistics.enter(lane)
    # Seeded before every forward pass, since a micro-batch may run forward twice.
    torch.manual_seed(seed)
    return sums(batch)


def check_finite(
    model: nn.Module, step: StepLoss, micro_batches: Sequence[Named], ranks: Ranks
) -> None:
    """Refuse a loss or gradients that are not finite, which are the same on every rank.

    Raises:
        FloatingPointError: names the series of the step's micro-batches, of a loss those alone
            whose sums are not finite.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # One number for everything: the host waits for the device once a step.
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients) + step.loss):
        return
    kind, culprits = "a gradient", list(micro_batches)
    if not torch.isfinite(step.total).all():
        pairs = zip(step.parts, micro_batches, strict=True)
        kind = "the loss"
        culprits = [batch for part, batch in pairs if not torch.isfinite(part).all()]
    # Every rank takes part, also one whose own sums are finite.
    names = ranks.gather([name for batch in culprits for name in batch.names])
    raise FloatingPointError(
        f"{kind} is not finite (NaN or inf); series of the batch: {', '.join(names)}"
    )
