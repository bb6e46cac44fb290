"""Sums over the validation lanes: of all ranks together, or by series."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from covtanet.training.feed import Lane, Rows, series_of
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


def sums_by_series(
    module: nn.Module,
    lanes: Sequence[Lane],
    batch_of: Callable[[Rows, int], B],
    sums: Callable[[B], Tensor],
    num_sums: int,
    autocast: torch.autocast,
) -> dict[str, Tensor]:
    """Return the sums of every series of this rank's lanes, float64 (num_sums,).

    sums: from one batch to numbers of each sample that add up (B, num_sums). A lane holds whole
    series. The module is left in eval mode.
    """
    module.eval()
    by_series: dict[str, Tensor] = {}
    with torch.inference_mode(), autocast:
        for rows in (rows for lane in lanes for rows in lane.in_order()):
            values = sums(batch_of(rows, 0)).double().cpu()
            for name, value in zip(rows["name"].tolist(), values, strict=True):
                series = series_of(name)
                before = by_series.get(series, torch.zeros(num_sums, dtype=torch.float64))
                by_series[series] = before + value
    return by_series
