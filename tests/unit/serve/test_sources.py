"""Locations of rows in a PACS, the kept orders of slices, and the limit of open requests."""

import asyncio
import threading
from typing import Any

import pytest

from covtanet.archive.source_slices import SourceSlice
from serve.refusals import RefusedError
from serve.sources import MAX_OPEN_REQUESTS, KeptOrders, SeriesLocation, Sources, location_of

ROOT = "dicomweb+https://pacs.example/dicom-web"
SLICES = (SourceSlice(path="instances/1"),)


def place(series_uid: str) -> SeriesLocation:
    return SeriesLocation(ROOT, "1.2", series_uid)


def test_location_is_that_of_the_row() -> None:
    row = {"source_uri": f"{ROOT}/studies/1.2/series/3.4/"}
    assert location_of(row) == place("3.4")
    assert place("3.4").path == "studies/1.2/series/3.4"


@pytest.mark.parametrize(
    "source_uri",
    [
        "s3://bucket/studies/1.2/series/3.4/",
        "/data/studies/1.2/series/3.4/",
        "upload:abc",
        "0f" * 16,
        f"{ROOT}/studies/1.2",
        f"{ROOT}/studies/1.2/series/../../x",
        "dicomweb+http://pacs.example/studies/1.2/series/3.4",
        "dicomweb+https://user:x@pacs/studies/1.2/series/3.4",
    ],
)
def test_row_of_another_archive_has_no_location(source_uri: str) -> None:
    assert location_of({"source_uri": source_uri}) is None


def test_kept_orders_are_few_and_expire() -> None:
    now = [100.0]
    kept = KeptOrders(2, 60, lambda: now[0])
    for name in ("1", "2"):
        kept.keep(place(name), SLICES)
    assert kept.get(place("1")) == SLICES
    kept.keep(place("3"), SLICES)
    assert [kept.get(place(name)) is None for name in "123"] == [False, True, False]
    now[0] += 61
    assert kept.get(place("1")) is None


def test_requests_beyond_the_limit_return_503() -> None:
    """Those before them wait for a PACS that does not answer."""
    sources = Sources()
    answers = threading.Event()

    async def ask_all() -> list[Any]:
        waiting = [
            asyncio.create_task(sources._ask(lambda: answers.wait(30)))
            for _ in range(MAX_OPEN_REQUESTS)
        ]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError, match="wait for the PACS") as refused:
            await sources._ask(lambda: True)
        assert (refused.value.status, refused.value.reason) == (503, "busy")
        answers.set()
        results: list[Any] = await asyncio.gather(*waiting)
        # Room again.
        assert await sources._ask(lambda: True)
        return results

    assert asyncio.run(ask_all()) == [True] * MAX_OPEN_REQUESTS


def test_hidden_error_of_the_work_is_not_swallowed() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(Sources()._ask(fail))
