"""Sums over the validation lanes of all ranks, as both phases need them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from covtanet.training.feed import Lane, Rows
from covtanet.training.loop import in_order
from covtanet.training.ranks import Ranks
from covtanet.training.step import Named

B = TypeVar("B", bound=Named)


def sum_over_lanes(
    module: nn.Module,
    lanes: Sequence[Lane],
    batch_of: Callable[[Rows, int], B],
    sums: Callable[[B], Tensor],
    num_sums: int,
    autocast: torch.autocast,
    ranks: Ranks,
) -> Tensor:
    """Return the sums of every validation batch of every rank, float64 (num_sums,).

    sums: from one batch to numbers that add up (num_sums,). The module is left in eval mode.
    """
    module.eval()
    total = torch.zeros(num_sums, dtype=torch.float64)
    with torch.inference_mode(), autocast:
        for batch in in_order(lanes, batch_of):
            total += sums(batch).double().cpu()
    return ranks.sum(total)
