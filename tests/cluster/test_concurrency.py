"""Decoders work while the predictor keeps up, and wait if it does not; rows of a real series' size.

Ray Data counts what a running decoder may put into the object store against its limit. A limit for
the waiting series alone once let one of six decoders work. A reader with more to read than has room
once kept the CPU that the last stage needed, and nothing moved.
"""

import pytest
from scripts import output_of

from covtanet.screening.assembly import SERIES_PER_WORKER

NUM_DECODERS, NUM_SERIES, DECODE_S = 6, 36, 1.0
# Measured on two cores: 0.76 to 0.86 of the decoders; 0.16 with the earlier limit.
MIN_SHARE = 0.6
# More than the object store may hold, 118 MB.
MANY_SERIES, LISTING_BYTES = 400, 500_000
# Stages that sleep, with rows as large as those of a series of 96 slices of 160 pixels.
PIPELINE = """
import json, sys, tempfile, time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from covtanet import ray_data
from covtanet.screening.assembly import Stages, assemble, limit_object_store
from covtanet.screening.plan import Plan
from covtanet.screening.worker_counts import WorkerCounts

num_decoders, num_series = int(sys.argv[1]), int(sys.argv[2])
decode_s, predict_s = float(sys.argv[3]), float(sys.argv[4])
listing_bytes = int(sys.argv[5])

class Decoder:
    def __call__(self, row):
        started = time.time()
        time.sleep(decode_s)
        slices = np.zeros((96, 160, 160), np.uint16)
        return {"slices": slices, "started": started, "ended": time.time()}

class Predictor:
    def __call__(self, row):
        time.sleep(predict_s)
        levels = np.zeros((96, 160, 160), np.uint8)
        return {**row, "levels": levels, "predicted": time.time()}

def measure(row):
    return {"times": [row["started"], row["ended"], row["predicted"], time.time()]}

ray.init(address="local", num_cpus=num_decoders + 2, include_dashboard=False, logging_level="ERROR")
ray_data.configure(preserve_order=False)
workers = WorkerCounts(
    num_predictors=1, cpus_per_predictor=1, num_decoders=num_decoders, num_measurers=1
)
limit_object_store(160, workers)
stages = Stages(
    decoder=Decoder, decoder_arguments={}, predictor=Predictor, predictor_arguments={},
    measure=measure,
)
path = Path(tempfile.mkdtemp()) / "series.parquet"
listings = [np.random.default_rng(number).bytes(listing_bytes) for number in range(num_series)]
pq.write_table(pa.table({"number": range(num_series), "objects": listings}), path)
plan = Plan(
    num_series=num_series, num_bytes=num_series * 30_000_000, num_finished=0,
    num_nodes=1, num_cpus=num_decoders + 2, num_gpus=0, workers=workers, most_workers=workers,
)
rows = assemble(str(path), stages, plan).take_all()
print(json.dumps([list(row["times"]) for row in rows]))
ray.shutdown()
"""


def run(
    num_decoders: int,
    num_series: int,
    decode_s: float,
    predict_s: float,
    listing_bytes: int = 0,
) -> list[list[float]]:
    """Return for each series when its decoding began and ended, it was predicted, and measured.

    listing_bytes: of the row that names its objects.
    """
    times: list[list[float]] = output_of(
        PIPELINE, num_decoders, num_series, decode_s, predict_s, listing_bytes
    )
    assert len(times) == num_series
    return times


@pytest.mark.slow
def test_decoders_wait_for_a_slow_predictor_so_that_memory_is_bounded() -> None:
    """As when spot nodes bring many decoders: they would decode all series in three seconds."""
    num_decoders = 4
    times = run(num_decoders, num_series=60, decode_s=0.2, predict_s=0.4)
    ended = sorted(decoded for _, decoded, _, _ in times)
    waiting = [
        sum(decoded <= moment < predicted for _, decoded, predicted, _ in times) for moment in ended
    ]
    assert max(waiting) <= SERIES_PER_WORKER * (num_decoders + 1)


@pytest.mark.slow
def test_most_decoders_work_at_the_same_time() -> None:
    times = run(NUM_DECODERS, NUM_SERIES, DECODE_S, predict_s=0.05)
    spans = [(started, ended) for started, ended, _, _ in times]
    busy_s = sum(ended - started for started, ended in spans)
    # Until the last series begins: after that decoders have nothing left to do.
    first = min(started for started, _ in spans)
    last = max(started for started, _ in spans)
    busy_until_last_s = sum(min(ended, last) - started for started, ended in spans)
    assert busy_s >= NUM_SERIES * DECODE_S
    mean = busy_until_last_s / (last - first)
    assert mean >= MIN_SHARE * NUM_DECODERS


def test_archive_whose_listing_has_no_room_in_the_object_store_is_screened() -> None:
    """As one of 4,500 DICOM series of 200 objects, whose rows name them all."""
    times = run(1, MANY_SERIES, 0, 0, LISTING_BYTES)
    assert len(times) == MANY_SERIES
    # While the reader waits for room, the last stage has the last CPU.
    assert min(measured for *_, measured in times) < max(started for started, *_ in times)
