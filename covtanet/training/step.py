"""One optimizer step over micro-batches of several ranks, as if they were one batch."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from covtanet.training.ranks import LaneStatistics, Ranks


class Named(Protocol):
    """A micro-batch that knows which series it came from."""

    @property
    def names(self) -> list[str]:
        """One name per sample."""
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
    """Set the gradients of ``loss`` of the sums over all micro-batches of all ranks; returns that loss.

    sums: forward of one micro-batch to what adds up, (k,). seeds: for dropout, one per micro-batch.

    A rank with several micro-batches runs them forward without gradient first, since the loss needs every sum before
    the first gradient: a third more work for the memory of one micro-batch. Data-parallel gradients are averaged over
    ranks while the loss of summed counts wants their sum, hence the factor.

    Raises:
        FloatingPointError: where a sum is not finite; names the series of the step's micro-batches.
    """
    ranks = statistics.ranks
    own = []
    for lane, batch in enumerate(micro_batches):
        with nullcontext() if len(micro_batches) == 1 else torch.no_grad():
            own.append(_forward(sums, batch, lane, statistics, seeds[lane]))
    total = ranks.sum(torch.stack([each.detach() for each in own]).sum(0))
    _check_finite(total, own, micro_batches, ranks)
    value = math.nan
    for lane, batch in enumerate(micro_batches):
        is_last = lane == len(micro_batches) - 1
        is_distributed = isinstance(model, DistributedDataParallel)
        with model.no_sync() if is_distributed and not is_last else nullcontext():  # type: ignore[operator]
            part = (
                own[0]
                if len(micro_batches) == 1
                else _forward(sums, batch, lane, statistics, seeds[lane])
            )
            found = loss(total - part.detach() + part)
            (found * ranks.count).backward()  # type: ignore[no-untyped-call]
        statistics.leave(lane)
        value = float(found.detach())
    return value


def _forward(
    sums: Callable[[B], Tensor], batch: B, lane: int, statistics: LaneStatistics, seed: int
) -> Tensor:
    statistics.enter(lane)
    torch.manual_seed(seed)
    return sums(batch)


def _check_finite(
    total: Tensor, own: Sequence[Tensor], micro_batches: Sequence[Named], ranks: Ranks
) -> None:
    if torch.isfinite(total).all():
        return
    at_fault = [
        name
        for found, batch in zip(own, micro_batches, strict=True)
        if not torch.isfinite(found).all()
        for name in batch.names
    ]
    raise FloatingPointError(
        f"the loss is no number; the batch holds {', '.join(ranks.gather(at_fault))}"
    )


def check_gradients(model: nn.Module, micro_batches: Sequence[Named], ranks: Ranks) -> None:
    """Refuse gradients that are not finite, which are the same on every rank.

    Raises:
        FloatingPointError: names the series of the step's micro-batches.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return
    names = ranks.gather([name for batch in micro_batches for name in batch.names])
    raise FloatingPointError(f"a gradient is no number; the batch holds {', '.join(names)}")
