"""Metrics of a screening, which Ray's agents collect for Prometheus; infra/grafana.json shows them.

Each process counts for itself, and Prometheus adds up. No tag names a series.
"""

import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

# Ray's processes report every 10 s.
SHOW_EVERY_S = 5.0
# Bounds of the histogram, two a decade.
STAGE_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100]


def count_series(row: Mapping[str, Any]) -> None:
    """Count a series that has its row, its bytes, and the seconds of the stages in the row."""
    _series().inc(tags={"status": str(row["status"]), "reason": str(row["reason"] or "")})
    for stage in ("decode", "predict"):
        if row[f"{stage}_s"]:
            observe_stage(stage, row[f"{stage}_s"])
    if row["num_bytes"]:
        _bytes().inc(row["num_bytes"])


def observe_stage(stage: str, seconds: float) -> None:
    """Count the time that a stage took for a series."""
    _stage_seconds().observe(seconds, {"stage": stage})


class Remaining:
    """How many series of a run have no row yet; the driver knows.

    Used within ``contextlib.closing``. Ray shows a gauge for some 20 s after it was set, so it is
    set again and again: a run in which no series ends must not vanish from the dashboard.
    """

    def __init__(self, num_series: int) -> None:
        self._num_series = num_series
        self._closed = threading.Event()
        _remaining().set(num_series)
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def set(self, num_series: int) -> None:
        """Set the number, which is shown within seconds."""
        self._num_series = num_series

    def close(self) -> None:
        """Show the last number, and then none."""
        self._closed.set()
        self._thread.join()

    def _show(self) -> None:
        is_closed = False
        while not is_closed:
            is_closed = self._closed.wait(SHOW_EVERY_S)
            _remaining().set(self._num_series)


@cache
def _series() -> Counter:
    return Counter(
        "covtanet_series", "Series of screening jobs that are finished.", ("status", "reason")
    )


@cache
def _bytes() -> Counter:
    return Counter("covtanet_series_bytes", "Bytes of the series that are finished.")


@cache
def _stage_seconds() -> Histogram:
    return Histogram(
        "covtanet_stage_seconds", "How long a stage took for a series.", STAGE_SECONDS, ("stage",)
    )


@cache
def _remaining() -> Gauge:
    return Gauge("covtanet_series_remaining", "Series of screening jobs that are not finished.")
