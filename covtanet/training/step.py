"""One optimizer step over micro-batches of several ranks, as if they were one batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

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


def backward(
    model: nn.Module,
    micro_batches: Sequence[B],
    sums: Callable[[B], Tensor],
    loss: Callable[[Tensor], Tensor],
    statistics: LaneStatistics,
    seeds: Sequence[int],
) -> float:
    """Set the gradients of ``loss`` of the sums over all micro-batches of all ranks.

    sums: forward of one micro-batch to numbers that add up, (k,). seeds: for dropout, one per
    micro-batch. Returns the loss.

    A rank with several micro-batches runs them forward without gradient first, since the loss needs
    every sum before the first gradient: a third more work for the memory of one micro-batch.

    Raises:
        FloatingPointError: a sum is not finite; names the series of the step's micro-batches.
    """
    ranks = statistics.ranks
    is_alone = len(micro_batches) == 1
    parts = []
    for lane, batch in enumerate(micro_batches):
        with nullcontext() if is_alone else torch.no_grad():
            parts.append(_forward(sums, batch, lane, statistics, seeds[lane]))
    # Sums of all micro-batches of all ranks, (k,), the same on every rank.
    total = ranks.sum(torch.stack([part.detach() for part in parts]).sum(0))
    # Before the first gradient, so that no weight changes by a loss that is NaN.
    _check_finite(total, parts, micro_batches, ranks)
    value = math.nan
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
        value = float(step_loss.detach())
    return value


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


def _check_finite(
    total: Tensor, parts: Sequence[Tensor], micro_batches: Sequence[Named], ranks: Ranks
) -> None:
    if torch.isfinite(total).all():
        return
    names: list[str] = []
    for part, batch in zip(parts, micro_batches, strict=True):
        if not torch.isfinite(part).all():
            names += batch.names
    # Every rank takes part, also one whose own sums are finite.
    gathered = ", ".join(ranks.gather(names))
    raise FloatingPointError(
        f"the loss is not finite (NaN or inf); series of the batch: {gathered}"
    )


def check_gradients(model: nn.Module, micro_batches: Sequence[Named], ranks: Ranks) -> None:
    """Refuse gradients that are not finite, which are the same on every rank.

    Raises:
        FloatingPointError: names the series of the step's micro-batches.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    # One norm of all gradients: the host waits for the device once, not once per tensor.
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return
    names = ranks.gather([name for batch in micro_batches for name in batch.names])
    raise FloatingPointError(
        f"a gradient is not finite (NaN or inf); series of the batch: {', '.join(names)}"
    )
