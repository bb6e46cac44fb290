"""The stages of a screening on Ray Data: decoders, predictors and measuring, one series per row.

What crosses between workers is the network's input and packed masks, never a raw volume, and as few
series at a time as keep every worker busy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray.data

from covtanet import ray_data
from covtanet.screening.plan import Plan
from covtanet.screening.worker_counts import WorkerCounts

Row = dict[str, Any]
# Two, so that the next series is there when one is finished.
SERIES_IN_FLIGHT_PER_PREDICTOR = 2
# Bound of the object store: so many prepared series for every worker that makes or reads them. Ray
# Data reserves three quarters of it for what other stages may put there, and counts a series that
# is being decoded as if it were there; with 8 in all, one of six decoders worked.
SERIES_PER_WORKER = 6
# Blocks of manifest rows, by the bytes of their series in storage.
BLOCK_BYTES = 16 << 20
MAX_SERIES_PER_BLOCK = 64
BLOCKS_PER_DECODER = 16
SLICES_PER_SERIES = 128  # of an adult's lungs at 2.5 mm
# A prepared slice is uint16, its lesion map uint8.
BYTES_PER_PIXEL = 3


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The work of each stage: two classes whose objects are called with a row, and a function."""

    decoder: type
    decoder_arguments: dict[str, Any]
    predictor: type
    predictor_arguments: dict[str, Any]
    measure: Callable[[Row], Row]


def assemble(uri: str, stages: Stages, plan: Plan) -> ray.data.Dataset:
    """Lead the series of a Parquet file through the stages, each with workers of its own.

    Those of ``plan.workers`` fill the nodes at the start. Those of ``plan.most_workers`` are there
    after all nodes have joined; none starts before, since no stage gets CPUs that another one holds
    or needs for its next task.
    """
    workers, most_workers = plan.workers, plan.most_workers
    return (
        ray_data.read_in_blocks(uri, series_per_block(plan))
        .map(
            stages.decoder,
            fn_constructor_kwargs=stages.decoder_arguments,
            compute=ray.data.ActorPoolStrategy(
                min_size=workers.num_decoders, max_size=most_workers.num_decoders
            ),
            num_cpus=1,
        )
        .map(
            stages.predictor,
            fn_constructor_kwargs=stages.predictor_arguments,
            compute=ray.data.ActorPoolStrategy(
                min_size=workers.num_predictors,
                max_size=most_workers.num_predictors,
                max_tasks_in_flight_per_actor=SERIES_IN_FLIGHT_PER_PREDICTOR,
            ),
            num_cpus=workers.cpus_per_predictor,
            num_gpus=1 if plan.num_gpus else 0,
        )
        .map(
            stages.measure,
            compute=ray.data.TaskPoolStrategy(size=most_workers.num_measurers),
            num_cpus=1,
        )
    )


def series_per_block(plan: Plan) -> int:
    """Return the number of series that a worker takes at a time.

    A block that is lost or repeated costs all its series: one of usual size. A block costs Ray some
    30 ms, so that many small ones share it. At the end of the run no worker waits long for another.
    """
    by_end = plan.num_remaining // (BLOCKS_PER_DECODER * plan.workers.num_decoders)
    # A PACS tells no sizes: its series are taken one by one.
    by_size = BLOCK_BYTES * plan.num_series // plan.num_bytes if plan.num_bytes else 1
    return max(1, min(by_end, by_size, MAX_SERIES_PER_BLOCK))


def limit_object_store(size_px: int, workers: WorkerCounts) -> None:
    """Bound the object store, so that memory does not grow with the archive.

    size_px: side of the network's slices.
    """
    series_bytes = SLICES_PER_SERIES * size_px**2 * BYTES_PER_PIXEL
    num_workers = workers.num_decoders + workers.num_predictors
    limits = ray.data.ExecutionResources(
        object_store_memory=SERIES_PER_WORKER * series_bytes * num_workers
    )
    ray.data.DataContext.get_current().execution_options.resource_limits = limits
