"""Samples in memory: mixed over the lanes, none left out, no micro-batch of a single sample."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from training import CONFIG, lanes, slice_rows

from covtanet.training.feed import Rows, Sampling, series_of
from covtanet.training.pool import SamplePool, count_steps


def names_of(batches: list[Rows]) -> list[str]:
    return [str(name) for batch in batches for name in batch["name"]]


def pool_of(count: int, batch_size: int, num_lanes: int) -> SamplePool:
    return SamplePool(slice_rows(count, 0), Sampling(batch_size=batch_size), num_lanes)


@pytest.mark.parametrize(("count", "batch_size", "num_lanes"), [(23, 4, 2), (50, 8, 3), (7, 2, 2)])
def test_epoch_takes_every_sample_once_in_equal_steps(
    count: int, batch_size: int, num_lanes: int
) -> None:
    pool = pool_of(count, batch_size, num_lanes)
    dealt = [list(pool.lane(number).batches(3)) for number in range(num_lanes)]
    names = [name for batches in dealt for name in names_of(batches)]
    assert sorted(names) == slice_rows(count, 0)["name"].tolist()
    assert {len(batches) for batches in dealt} == {pool.lane(0).num_batches(3)}
    sizes = [len(batch["name"]) for batches in dealt for batch in batches]
    assert max(sizes) - min(sizes) <= 1


def test_micro_batches_mix_series_of_all_lanes() -> None:
    """Each of the two lanes sees both series in every epoch."""
    for lane in lanes(1, CONFIG).values():
        series = Counter(series_of(name) for name in names_of(list(lane.batches(0))))
        assert set(series) == {"series0", "series1"}


def test_order_is_shuffled_and_another_one_every_epoch() -> None:
    pool = pool_of(50, 8, 1)
    orders = [names_of(list(pool.lane().batches(epoch))) for epoch in (0, 1)]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1]
    assert orders[0] == names_of(list(pool_of(50, 8, 1).lane().batches(0)))


def test_lanes_of_two_ranks_are_those_of_one() -> None:
    first, second = (pool_of(23, 4, 2) for _ in range(2))
    for epoch in range(2):
        for number in range(2):
            alone = names_of(list(first.lane(number).batches(epoch)))
            assert names_of(list(second.lane(number).batches(epoch))) == alone


def test_micro_batch_of_a_single_sample_occurs_only_if_asked_for() -> None:
    for batch_size in range(2, 9):
        for num_lanes in range(1, 5):
            step_size = batch_size * num_lanes
            for count in range(step_size, 6 * step_size):
                num_steps = count_steps(count, batch_size, num_lanes)
                sizes = [len(part) for part in np.array_split(range(count), num_steps * num_lanes)]
                assert min(sizes) >= 2, (count, batch_size, num_lanes)
                assert max(sizes) <= max(batch_size, 4), (count, batch_size, num_lanes)
    # With a batch size of 1 every micro-batch has a sample: 2, 1, 1, 1, 1, 1.
    assert count_steps(7, 1, 2) == 3


def test_batch_norm_of_one_value_per_sample_trains_on_every_micro_batch() -> None:
    """A classifier's 1 x 1 map has one value per sample and channel: one sample has no variance."""
    norm = nn.BatchNorm2d(1)
    for batch in pool_of(9, 2, 2).lane(1).batches(0):
        values = torch.from_numpy(batch["levels"][:, :1, :1].astype(np.float32))[:, None]
        assert torch.isfinite(norm(values)).all()


def test_too_few_samples_give_no_step() -> None:
    assert pool_of(7, 4, 2).lane(0).num_batches(0) == 0
