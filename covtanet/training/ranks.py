"""The data-parallel ranks: sums, averages and messages over all of them by torch.distributed."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A process among ``count``."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device that tensors must be on to be exchanged."""

    def sum(self, values: Tensor) -> Tensor:
        """Add up over ranks; without gradient."""
        total = values.detach().clone()
        if self.count > 1:
            # The backend exchanges tensors of its own device only.
            moved = total.to(self.device)
            dist.all_reduce(moved)
            total = moved.to(values.device)
        return total

    def lowest(self, value: int) -> int:
        """Return the smallest of the ranks' numbers."""
        smallest = torch.tensor(value, device=self.device)
        if self.count > 1:
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def gather(self, names: list[str]) -> list[str]:
        """Return the names of all ranks in the order of ranks."""
        if self.count == 1:
            return names
        by_rank: list[list[str]] = [[] for _ in range(self.count)]
        dist.all_gather_object(by_rank, names)
        return [name for rank_names in by_rank for name in rank_names]


class LaneStatistics:
    """Running statistics of batch norm per lane, averaged over all lanes before validation.

    A rank that accumulates several micro-batches a step then holds the same statistics as several
    ranks with one micro-batch.
    """

    def __init__(self, module: nn.Module, num_lanes: int, ranks: Ranks) -> None:
        self.buffers = [
            buffer
            for name, buffer in module.named_buffers()
            if name.endswith(("running_mean", "running_var"))
        ]
        self.ranks = ranks
        self.num_lanes = num_lanes
        # With one lane the module itself holds the lane's statistics.
        self.lanes: list[list[Tensor]] = []
        if num_lanes > 1:
            self.lanes = [[buffer.clone() for buffer in self.buffers] for _ in range(num_lanes)]

    def enter(self, lane: int) -> None:
        """Put a lane's statistics into the module."""
        if self.lanes:
            _copy(self.lanes[lane], self.buffers)

    def leave(self, lane: int) -> None:
        """Keep the module's statistics as the lane's."""
        if self.lanes:
            _copy(self.buffers, self.lanes[lane])

    def average(self) -> None:
        """Give the module, and every lane, the mean over all lanes of all ranks."""
        with torch.no_grad():
            for position, buffer in enumerate(self.buffers):
                total = buffer
                if self.lanes:
                    total = torch.stack([lane[position] for lane in self.lanes]).sum(0)
                # Every rank has the same number of lanes.
                buffer.copy_(self.ranks.sum(total) / (self.num_lanes * self.ranks.count))
            for lane in self.lanes:
                _copy(self.buffers, lane)


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    with torch.no_grad():
        for value, buffer in zip(source, target, strict=True):
            buffer.copy_(value)
