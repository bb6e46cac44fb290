"""Every decoder works while the predictor keeps up, at the sizes of a real series.

Ray Data counts what a running decoder may put into the object store against its limit. A limit for
the waiting series alone once let one of six decoders work.
"""

import json
import subprocess
import sys

from repository import ROOT

NUM_DECODERS, NUM_SERIES, DECODE_S = 6, 36, 1.0
# Measured on two cores: 0.76 to 0.86 of the decoders; 0.16 with the earlier limit.
MIN_SHARE = 0.6
# Stages that sleep, with rows as large as those of a series of 96 slices of 160 pixels.
PIPELINE = """
import json, sys, time

import numpy as np
import ray

from covtanet import ray_data
from covtanet.screening.pipeline import Stages, assemble, limit_object_store
from covtanet.screening.plan import Plan
from covtanet.screening.worker_counts import WorkerCounts

num_decoders, num_series = int(sys.argv[1]), int(sys.argv[2])
decode_s = float(sys.argv[3])

class Decoder:
    def __call__(self, row):
        started = time.time()
        time.sleep(decode_s)
        slices = np.zeros((96, 160, 160), np.uint16)
        return {"slices": slices, "started": started, "ended": time.time()}

class Predictor:
    def __call__(self, row):
        time.sleep(0.05)
        levels = np.zeros((96, 160, 160), np.uint8)
        return {**row, "levels": levels}

def measure(row):
    return {"started": row["started"], "ended": row["ended"]}

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
    num_series=num_series, num_bytes=0, num_finished=0, num_cpus=num_decoders + 3, num_gpus=0,
    workers=workers, most_workers=workers,
)
rows = assemble(series, stages, plan).take_all()
print(json.dumps([[row["started"], row["ended"]] for row in rows]))
ray.shutdown()
"""


def test_most_decoders_work_at_the_same_time() -> None:
    arguments = [str(NUM_DECODERS), str(NUM_SERIES), str(DECODE_S)]
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    spans = json.loads(done.stdout.splitlines()[-1])
    assert len(spans) == NUM_SERIES
    busy_s = sum(ended - started for started, ended in spans)
    # Until the last series begins: after that decoders have nothing left to do.
    first = min(started for started, _ in spans)
    last = max(started for started, _ in spans)
    busy_until_last_s = sum(min(ended, last) - started for started, ended in spans)
    assert busy_s >= NUM_SERIES * DECODE_S
    mean = busy_until_last_s / (last - first)
    assert mean >= MIN_SHARE * NUM_DECODERS
