"""Workers of a screening by the CPUs and GPUs of a cluster."""

import pytest

from covtanet.screening.worker_counts import (
    WorkerCounts,
    most_workers,
    num_cpus_needed,
    worker_counts,
)


def num_cpus(counts: WorkerCounts) -> int:
    predicting = counts.num_predictors * counts.cpus_per_predictor
    return predicting + counts.num_decoders + counts.num_measurers


@pytest.mark.parametrize("num_nodes", [1, 2, 100])
@pytest.mark.parametrize("cpus", [4, 5, 8, 16, 64])
@pytest.mark.parametrize("gpus_per_node", [0, 1])
def test_workers_fill_the_cluster_and_no_more(
    num_nodes: int, cpus: int, gpus_per_node: int
) -> None:
    counts = worker_counts(num_nodes * cpus, [cpus] * num_nodes, num_nodes * gpus_per_node)
    assert num_cpus(counts) == num_nodes * cpus
    assert counts.num_predictors == num_nodes


def test_measuring_grows_with_the_cluster() -> None:
    counts = worker_counts(800, [8] * 100, 100)
    assert counts.num_decoders == 525
    assert counts.num_measurers == 175


def test_head_without_cpus_gets_no_predictor() -> None:
    assert worker_counts(16, [0, 8, 8], 0).num_predictors == 2
    assert num_cpus_needed([0, 8, 8], 0) == 4


def test_pools_grow_in_proportion_to_max_nodes() -> None:
    counts = worker_counts(16, [8, 8], 0)
    most = most_workers(counts, 2, 5)
    assert most.num_predictors == 5
    assert most.cpus_per_predictor == counts.cpus_per_predictor
    assert num_cpus(most) == 40
    # Nodes that are there already count.
    assert most_workers(counts, 2, 1) == counts


def test_predictor_holds_half_of_the_smallest_node() -> None:
    assert worker_counts(72, [8, 64], 0).cpus_per_predictor == 4


def test_gpu_predictor_holds_one_cpu() -> None:
    counts = worker_counts(8, [8], 1)
    assert (counts.num_predictors, counts.cpus_per_predictor) == (1, 1)
    assert (counts.num_decoders, counts.num_measurers) == (5, 2)


@pytest.mark.parametrize("free", [3, 4, 5, 8])
def test_busy_cluster_keeps_a_cpu_for_decoding_and_one_for_measuring(free: int) -> None:
    counts = worker_counts(free, [8], 0)
    assert num_cpus(counts) <= free
    assert counts.num_decoders >= 1
    assert counts.num_measurers >= 1


def test_three_cpus_are_needed_on_one_node() -> None:
    assert num_cpus_needed([4], 0) == 3


def test_decoders_are_no_more_than_the_pacs_gets_requests() -> None:
    assert worker_counts(64, [64], 0).num_decoders == 24
    limited = worker_counts(64, [64], 0, 8)
    assert limited.num_decoders == 8
    assert limited.num_measurers == worker_counts(64, [64], 0).num_measurers
    assert most_workers(limited, 1, 4, 8).num_decoders == 8
    assert worker_counts(4, [4], 0, 8) == worker_counts(4, [4], 0)
