"""What a PACS shows of a row's series: labels of its study, and its slices at full resolution.

The endpoint asks the PACS itself. The location comes from the row, never from the caller, and
nothing that the PACS answers is stored or logged.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from covtanet import storage
from covtanet.archive import dicomweb_images
from covtanet.archive.source_slices import SourceSlice
from covtanet.errors import AccessError, ConfigError, error_location
from covtanet.storage.dicomweb import series_path, split_path
from serve.refusals import RefusedError, busy

logger = logging.getLogger("ray.serve")
T = TypeVar("T")

# The PACS serves people as well. Requests beyond are refused, so that a PACS that hangs fills no
# queue.
NUM_THREADS, MAX_OPEN_REQUESTS = 4, 16
RETRY_PACS_S = 10
# Orders of slices that a replica keeps; a series may change at the PACS meanwhile.
MAX_ORDERS, KEEP_ORDER_S = 32, 300.0


@dataclass(frozen=True)
class SeriesLocation:
    """A series at a DICOMweb server."""

    root: str
    study_uid: str
    series_uid: str

    @property
    def path(self) -> str:
        """Path below the root."""
        return series_path(self.study_uid, self.series_uid)


def location_of(row: Mapping[str, Any]) -> SeriesLocation | None:
    """Return the location of a row's series; None if it is in no PACS, or identities are hidden."""
    if not storage.is_dicomweb(row["source_uri"]):
        return None
    try:
        root, study_uid, series_uid = split_path(row["source_uri"])
        root = storage.absolute(root)
    except ConfigError:
        return None
    return SeriesLocation(root, study_uid, series_uid) if series_uid else None


class KeptOrders:
    """Slices of the series that were asked for last, each kept for a while after its listing."""

    def __init__(self, max_orders: int, keep_s: float, clock: Callable[[], float]) -> None:
        self._max_orders = max_orders
        self._keep_s = keep_s
        self._clock = clock
        self._orders: OrderedDict[SeriesLocation, tuple[float, tuple[SourceSlice, ...]]]
        self._orders = OrderedDict()
        self._lock = threading.Lock()

    def get(self, location: SeriesLocation) -> tuple[SourceSlice, ...] | None:
        """Return the slices of a series in order; None if they are not kept any more."""
        with self._lock:
            listed_at, slices = self._orders.get(location, (0.0, ()))
            if not slices or self._clock() - listed_at > self._keep_s:
                return None
            self._orders.move_to_end(location)
            return slices

    def keep(self, location: SeriesLocation, slices: tuple[SourceSlice, ...]) -> None:
        """Keep the slices of a series in place of those of the series that was asked for first."""
        with self._lock:
            self._orders[location] = self._clock(), slices
            self._orders.move_to_end(location)
            while len(self._orders) > self._max_orders:
                self._orders.popitem(last=False)


class Sources:
    """Requests of one replica to the PACS."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, "pacs")
        self._open = threading.BoundedSemaphore(MAX_OPEN_REQUESTS)
        self._orders = KeptOrders(MAX_ORDERS, KEEP_ORDER_S, time.monotonic)
        # One listing at a time: its answer may have many megabytes.
        self._listing = threading.Lock()

    async def study_labels(self, location: SeriesLocation) -> dicomweb_images.StudyLabels:
        """Return accession number and date of the study.

        Raises:
            RefusedError: see ``_ask``.
        """
        return await self._ask(
            lambda: dicomweb_images.find_study_labels(location.root, location.study_uid)
        )

    async def slices(self, location: SeriesLocation) -> tuple[SourceSlice, ...]:
        """Return the slices of the series from base to apex.

        Raises:
            RefusedError: see ``_ask``.
        """
        return await self._ask(lambda: self._ordered(location))

    async def picture(
        self, location: SeriesLocation, index: int, low_hu: int, high_hu: int
    ) -> tuple[bytes, str]:
        """Return the picture of a slice and its media type.

        Raises:
            RefusedError: 404, the series has no such slice; others see ``_ask``.
        """

        def render() -> tuple[bytes, str]:
            slices = self._ordered(location)
            if index >= len(slices):
                raise RefusedError(404, "no_such_slice", f"the series has {len(slices)} slices")
            return dicomweb_images.render_slice(
                location.root, location.path, slices[index].path, low_hu, high_hu
            )

        return await self._ask(render)

    def _ordered(self, location: SeriesLocation) -> tuple[SourceSlice, ...]:
        slices = self._orders.get(location)
        if slices is None:
            with self._listing:
                # Another request may have listed the series meanwhile.
                slices = self._orders.get(location)
                if slices is None:
                    slices = dicomweb_images.find_slices(
                        location.root, location.study_uid, location.series_uid
                    )
                    self._orders.keep(location, slices)
        return slices

    async def _ask(self, work: Callable[[], T]) -> T:
        """Run work that waits for the PACS.

        Raises:
            RefusedError: 404, the PACS does not have it; 502, it denies access; 503, it does not
                answer as it should, or too many requests wait for it.
        """
        if not self._open.acquire(blocking=False):
            raise busy(RETRY_PACS_S, "too many requests wait for the PACS")
        future = self._threads.submit(work)
        # Not when the caller hangs up: the thread may still wait for the PACS.
        future.add_done_callback(lambda _: self._open.release())
        try:
            return await asyncio.wrap_future(future)
        except FileNotFoundError:
            message = "the PACS does not have this series any more"
            raise RefusedError(404, "not_in_pacs", message) from None
        except (AccessError, ConfigError) as error:
            logger.error("a request to the PACS met %s", error_location(error))
            message = "the PACS denies this endpoint access"
            raise RefusedError(502, "pacs_refuses", message) from None
        except OSError as error:
            logger.error("a request to the PACS met %s", error_location(error))
            message = "the PACS does not answer"
            raise RefusedError(503, "pacs", message, RETRY_PACS_S) from None
