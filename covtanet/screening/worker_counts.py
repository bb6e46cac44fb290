"""The workers of a screening by the CPUs and GPUs of a cluster. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

# Share of the CPUs of a node without GPU that its predictor holds. Choice: an 8-bit network takes
# about half of the CPU time of a series, decoding a third, measuring the rest.
PREDICTING_SHARE = 0.5
# Share of the other CPUs that measure. Measuring takes a third of the CPU time of decoding.
MEASURING_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class WorkerCounts:
    """Workers of each stage. A decoder and a measuring task hold one CPU each."""

    num_predictors: int
    cpus_per_predictor: int
    num_decoders: int
    num_measurers: int


def num_cpus_needed(node_cpus: Sequence[int], num_gpus: int) -> int:
    """Return the least number of CPUs to screen with: predict, decode and measure.

    node_cpus: CPUs of each node. num_gpus: of the cluster.
    """
    return _num_predictors(node_cpus, num_gpus) + 2


def worker_counts(
    num_free_cpus: int, node_cpus: Sequence[int], num_gpus: int, max_decoders: int | None = None
) -> WorkerCounts:
    """Share out the free CPUs: one predictor per GPU, or one per node without GPUs.

    num_free_cpus: at least ``num_cpus_needed``. max_decoders: None for no limit. A node without
    CPUs, as the head of a cluster may be, gets no predictor.
    """
    num_predictors = _num_predictors(node_cpus, num_gpus)
    cpus_per_predictor = 1
    if not num_gpus:
        smallest = min(cpus for cpus in node_cpus if cpus)
        wanted = max(1, round(PREDICTING_SHARE * smallest))
        # On a cluster that others use as well, decoding and measuring keep their two CPUs.
        cpus_per_predictor = max(1, min(wanted, (num_free_cpus - 2) // num_predictors))
    num_left = num_free_cpus - num_predictors * cpus_per_predictor
    num_measurers = max(1, round(MEASURING_SHARE * num_left))
    return WorkerCounts(
        num_predictors=num_predictors,
        cpus_per_predictor=cpus_per_predictor,
        num_decoders=max(1, min(num_left - num_measurers, max_decoders or num_left)),
        num_measurers=num_measurers,
    )


def most_workers(
    workers: WorkerCounts, num_nodes: int, max_nodes: int, max_decoders: int | None = None
) -> WorkerCounts:
    """Return the workers of so many nodes like those that there are.

    workers: of ``num_nodes`` nodes, which they are never fewer than. max_decoders: None for no
    limit.
    """
    num_after = max(num_nodes, max_nodes)

    def grown(count: int) -> int:
        return count * num_after // num_nodes

    num_decoders = grown(workers.num_decoders)
    return WorkerCounts(
        num_predictors=grown(workers.num_predictors),
        cpus_per_predictor=workers.cpus_per_predictor,
        num_decoders=min(num_decoders, max_decoders or num_decoders),
        num_measurers=grown(workers.num_measurers),
    )


def _num_predictors(node_cpus: Sequence[int], num_gpus: int) -> int:
    return num_gpus or max(1, sum(cpus > 0 for cpus in node_cpus))
