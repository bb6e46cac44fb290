"""How many series a worker takes at a time."""

from covtanet.screening.assembly import MAX_SERIES_PER_BLOCK, series_per_block
from covtanet.screening.plan import Plan
from covtanet.screening.worker_counts import WorkerCounts


def plan(num_series: int, mean_bytes: int, num_finished: int = 0, num_decoders: int = 2) -> Plan:
    workers = WorkerCounts(
        num_predictors=1, cpus_per_predictor=1, num_decoders=num_decoders, num_measurers=1
    )
    return Plan(
        num_series=num_series,
        num_bytes=num_series * mean_bytes,
        num_finished=num_finished,
        num_nodes=1,
        num_cpus=4,
        num_gpus=0,
        workers=workers,
        most_workers=workers,
    )


def test_series_of_usual_size_are_taken_one_by_one() -> None:
    assert series_per_block(plan(1_000_000, 30_000_000)) == 1


def test_small_series_share_a_block_up_to_a_limit() -> None:
    assert series_per_block(plan(1_000_000, 4_000_000)) == 4
    assert series_per_block(plan(1_000_000, 400)) == MAX_SERIES_PER_BLOCK


def test_few_series_are_spread_over_all_decoders() -> None:
    assert series_per_block(plan(60, 400)) == 1
    assert series_per_block(plan(320, 400)) == 10
    assert series_per_block(plan(320, 400, num_finished=256)) == 2
    assert series_per_block(plan(320, 400, num_decoders=10)) == 2


def test_series_of_unknown_size_are_taken_one_by_one() -> None:
    assert series_per_block(plan(1_000_000, 0)) == 1
