"""Settings of Ray Data that every plan of this package needs, and the start of those on files."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data._internal.logical.interfaces import LogicalPlan

from covtanet import storage

# A worker hands on its results in blocks of this size: a decoded series at once, whatever else its
# input block holds, and many refused ones together. Ray's own 128 MB would keep back 20 series.
BLOCK_BYTES = 1 << 20
# A row of a DICOM series names all its objects, some 20 KB.
ROWS_PER_READ = 256


def configure(
    *,
    preserve_order: bool,
    no_progress_timeout_s: float | None = None,
    callbacks: Sequence[type] = (),
) -> None:
    """Set up Ray Data in this process: no progress bars, no lost blocks.

    preserve_order: rows leave a plan in the order in which they entered it. no_progress_timeout_s:
    seconds without any row that moves after which Ray Data ends a plan; null for its own 1,800.
    callbacks: classes of Ray Data's callbacks during the execution of a plan.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.max_errored_blocks = 0
    context.execution_options.preserve_order = preserve_order
    context.custom_execution_callback_classes = list(callbacks)
    if no_progress_timeout_s is not None:
        context.execution_no_progress_timeout_s = no_progress_timeout_s


def read_in_blocks(uri: str, num_rows: int) -> ray.data.Dataset:
    """Read a Parquet file in blocks of at most so many rows, by one task on the driver's node.

    The task takes no CPU: the driver's node may have none. Two tasks, Ray Data's own reader and one
    that splits its rows, stood still on four CPUs with 6,000 series of 200 objects and with a
    million small ones: the reader held the last CPU while it waited for room in the object store.
    """
    here = ray.get_runtime_context().get_node_id()
    rows = (
        ray.data.from_items([{"uri": uri}])
        .map_batches(
            _read_tables,
            batch_format="pyarrow",
            num_cpus=0,
            # Not any node without CPUs: this one wrote the file.
            label_selector={"ray.io/node-id": here},
        )
        .repartition(target_num_rows_per_block=num_rows)
    )
    # With the reader's options the blocks are made within the reader's task, and take no CPU
    # either. Ray Data has no public way to say so.
    repartition = rows._logical_plan.dag
    (reader,) = repartition.input_dependencies
    without_cpu = replace(repartition, ray_remote_args=reader.ray_remote_args)
    return ray.data.Dataset._from_parent(rows, LogicalPlan(without_cpu, rows.context))


def _read_tables(files: pa.Table) -> Iterator[pa.Table]:
    for uri in files["uri"].to_pylist():
        # A copy: a night that reads for hours depends on the store no longer.
        with tempfile.TemporaryDirectory() as folder:
            path = storage.local_copy(uri, Path(folder))
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS_PER_READ):
                    yield pa.Table.from_batches([batch])
