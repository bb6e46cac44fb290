"""The data-parallel ranks: sums, averages and messages over all of them by torch.distributed."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Names of batch norm's running statistics; a layer has both.
MEAN = "running_mean"
VARIANCE = "running_var"


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
    """Running statistics of batch norm per lane, joined over all lanes before validation.

    A rank that accumulates several micro-batches a step then holds the same statistics as several
    ranks with one micro-batch.
    """

    def __init__(self, module: nn.Module, num_lanes: int, ranks: Ranks) -> None:
        buffers = dict(module.named_buffers())
        mean_names = [name for name in buffers if name.endswith(MEAN)]
        self.means = [buffers[name] for name in mean_names]
        # In the order of the means, because mean and variance are averaged together.
        self.variances = [buffers[name.removesuffix(MEAN) + VARIANCE] for name in mean_names]
        self.buffers = [*self.means, *self.variances]
        self.ranks = ranks
        self.num_lanes = num_lanes
        # Of any rank.
        self.most_lanes = -ranks.lowest(-num_lanes)
        # With one lane on every rank the module itself holds the lane's statistics. Otherwise lanes
        # run forward twice, and their statistics move once.
        self.lanes: list[list[Tensor]] = []
        if self.most_lanes > 1:
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
        """Give the module, and every lane, the statistics of all lanes of all ranks together.

        The variance of lanes with means m_i and variances v_i is E[x^2] - E[x]^2, which is
        mean(v_i) + mean((m_i - m)^2): a mean of variances alone would leave out the differences
        between lanes, N(0, 1) and N(4, 1) having variance 5. The second form has no difference of
        large numbers.
        """
        if not self.buffers:
            return
        lanes = self.lanes or [self.buffers]
        num_means = len(self.means)
        with torch.no_grad():
            # (lanes, channels of all layers): one exchange between ranks instead of one per layer.
            means = torch.stack([_flat(lane[:num_means]) for lane in lanes])
            variances = torch.stack([_flat(lane[num_means:]) for lane in lanes])
            mean = self._mean(means)
            variance = self._mean(variances + (means - mean) ** 2)
            _unflatten(mean, self.means)
            _unflatten(variance, self.variances)
            for lane in self.lanes:
                _copy(self.buffers, lane)

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean over the lanes of all ranks; values: (lanes, N)."""
        # Ranks may have unequal numbers of lanes: three ranks of four lanes, after a lost node.
        num_lanes = self.ranks.sum(values.new_tensor(self.num_lanes))
        return self.ranks.sum(values.sum(0)) / num_lanes


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers])


def _unflatten(values: Tensor, buffers: list[Tensor]) -> None:
    parts = torch.split(values, [buffer.numel() for buffer in buffers])
    for part, buffer in zip(parts, buffers, strict=True):
        buffer.copy_(part.view_as(buffer))


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    with torch.no_grad():
        for value, buffer in zip(source, target, strict=True):
            buffer.copy_(value)
