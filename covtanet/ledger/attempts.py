"""Attempts at a series, counted in storage, so that they outlive the worker that made them."""

import json
import os

from covtanet import storage
from covtanet.ledger.run import Run

# Per stage and driver.
MAX_ATTEMPTS = 3


def count_attempt(run: Run, series_key: str, stage: str) -> bool:
    """Count one more attempt of a stage at a series; return whether it may be made.

    Ray gives a series that kills its worker to the next worker, without end; this count ends it.
    Each driver counts for itself: its own death does not count as an attempt at the series in
    flight. The process of the newest attempt is noted beside the counts.
    """
    uri = run.work_uri("attempts", run.driver, f"{series_key}.json")
    try:
        counts = json.loads(storage.read_bytes(uri))
    except FileNotFoundError:
        counts = {}
    if counts.get(stage, 0) >= MAX_ATTEMPTS:
        return False
    counts[stage] = counts.get(stage, 0) + 1
    counts["pid"] = os.getpid()  # Ray names a worker's log by its process
    # Written before the attempt begins: a worker that dies in it cannot count any more.
    storage.write_bytes(uri, json.dumps(counts).encode())
    return True
