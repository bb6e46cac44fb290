"""Decoders work while the predictor keeps up, and wait if it does not; rows of a real series' size.

Ray Data counts what a running decoder may put into the object store against its limit. A limit for
the waiting series alone once let one of six decoders work.
"""

import json
import subprocess
import sys

import pytest
from repository import ROOT

from covtanet.screening.assembly import SERIES_PER_WORKER

NUM_DECODERS, NUM_SERIES, DECODE_S = 6, 36, 1.0
# Measured on two cores: 0.76 to 0.86 of the decoders; 0.16 with the earlier limit.
MIN_SHARE = 0.6
# Stages that sleep, with rows as large as those of a series of 96 slices of 160 pixels.
PIPELINE = """
import json, sys, time

import numpy as np
import ray

from covtanet import ray_data
from covtanet.screening.assembly import Stages, assemble, limit_object_store
from covtanet.screening.plan import Plan
from covtanet.screening.worker_counts import WorkerCounts

num_decoders, num_series = int(sys.argv[1]), int(sys.argv[2])
decode_s, predict_s = float(sys.argv[3]), float(sys.argv[4])

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
    return {"times": [row["started"], row["ended"], row["predicted"]]}

ray.init(address="local", num_cpus=num_decoders + 3, include_dashboard=False, logging_level="ERROR")
ray_data.configure(preserve_order=False)
workers = WorkerCounts(
    num_predictors=1, cpus_per_predictor=1, num_decoders=num_decoders, num_measurers=1
)
limit_object_store(160, workers)
stages = Stages(
    decoder=Decoder, decoder_arguments={}, predictor=Predictor, predictor_arguments={},
    measure=measure,
)
series = ray.data.from_items([{"number": number} for number in range(num_series)])
plan = Plan(
    num_series=num_series, num_bytes=num_series * 30_000_000, num_finished=0,
    num_nodes=1, num_cpus=num_decoders + 3, num_gpus=0, workers=workers, most_workers=workers,
)
rows = assemble(series, stages, plan).take_all()
print(json.dumps([list(row["times"]) for row in rows]))
ray.shutdown()
"""


def run(num_decoders: int, num_series: int, decode_s: float, predict_s: float) -> list[list[float]]:
    """Return for each series when its decoding began and ended, and when it was predicted."""
    arguments = [str(value) for value in (num_decoders, num_series, decode_s, predict_s)]
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    times: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    assert len(times) == num_series
    return times


@pytest.mark.slow
def test_decoders_wait_for_a_slow_predictor_so_that_memory_is_bounded() -> None:
    """As when spot nodes bring many decoders: they would decode all series in three seconds."""
    num_decoders = 4
    times = run(num_decoders, num_series=60, decode_s=0.2, predict_s=0.4)
    ended = sorted(decoded for _, decoded, _ in times)
    waiting = [
        sum(decoded <= moment < predicted for _, decoded, predicted in times) for moment in ended
    ]
    assert max(waiting) <= SERIES_PER_WORKER * (num_decoders + 1)


def test_most_decoders_work_at_the_same_time() -> None:
    times = run(NUM_DECODERS, NUM_SERIES, DECODE_S, predict_s=0.05)
    spans = [(started, ended) for started, ended, _ in times]
    busy_s = sum(ended - started for started, ended in spans)
    # Until the last series begins: after that decoders have nothing left to do.
    first = min(started for started, _ in spans)
    last = max(started for started, _ in spans)
    busy_until_last_s = sum(min(ended, last) - started for started, ended in spans)
    assert busy_s >= NUM_SERIES * DECODE_S
    mean = busy_until_last_s / (last - first)
    assert mean >= MIN_SHARE * NUM_DECODERS
