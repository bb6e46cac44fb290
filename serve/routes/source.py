"""Routes that ask the PACS about a row: labels of its study, slices at full resolution."""

from dataclasses import asdict
from typing import Annotated

import pyarrow.compute as pc
from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response

from covtanet.archive.source_slices import MAX_SLICES
from serve.auth import AuthenticatedCaller, authenticated
from serve.refusals import PACS_PROBLEMS, RefusedError
from serve.routes.batches import BatchId, SeriesKey, describe_content
from serve.schemas import SourceSeries, StudyLabels
from serve.settings import Caller
from serve.sources import SeriesLocation, location_of
from serve.state import State

router = APIRouter(dependencies=[Depends(authenticated)])

# Of a window; beyond what 16 bits of CT hold.
MIN_HU, MAX_HU = -65536, 65535
PICTURES = ("image/png", "image/jpeg")
SliceIndex = Annotated[int, PathParameter(ge=0, lt=MAX_SLICES)]
Hu = Annotated[int, Query(ge=MIN_HU, le=MAX_HU)]


async def location_of_row(
    request: Request,
    caller: AuthenticatedCaller,
    state: State,
    batch_id: BatchId,
    series_key: SeriesKey,
) -> SeriesLocation:
    """Return the location of a series of the caller's batch, by its row.

    Raises:
        RefusedError: 404, there is no such row, or it is of no DICOMweb server; 403, the caller may
            not read from there.
    """
    batches = state.open_batches()

    def find(batch_id: str, caller: Caller) -> SeriesLocation | None:
        table = batches.rows(batch_id, caller)
        rows = table.filter(pc.equal(table["series_key"], series_key)).to_pylist()
        if not rows:
            raise FileNotFoundError("the batch has no such series")
        return location_of(rows[0])

    # In the log line, as for studies: who looked at which series.
    request.state.series_keys = [series_key]
    location = await state.of_batch(find, batch_id, caller)
    if location is None:
        message = "the series is of no DICOMweb server, or its identity is hidden"
        raise RefusedError(404, "no_source", message)
    # A location may have been taken from the caller since the batch.
    if not state.settings.may_read(caller, f"{location.root}/{location.path}"):
        message = "the series is not under an allowed location of this caller"
        raise RefusedError(403, "place_not_allowed", message)
    return location


Location = Annotated[SeriesLocation, Depends(location_of_row)]


@router.get("/v1/batches/{batch_id}/series/{series_key}/study", responses=PACS_PROBLEMS)
async def get_study_labels(state: State, location: Location) -> StudyLabels:
    """Return accession number and date of a series' study, if the settings allow it."""
    if not state.settings.shows_accession:
        message = "the settings of this endpoint show no accession number"
        raise RefusedError(404, "not_shown", message)
    labels = await state.sources.study_labels(location)
    return StudyLabels(**asdict(labels))


@router.get("/v1/batches/{batch_id}/series/{series_key}/source", responses=PACS_PROBLEMS)
async def get_source(state: State, location: Location) -> SourceSeries:
    """Return the slices of a series at the PACS, from base to apex."""
    slices = await state.sources.slices(location)
    numbers = [one.instance_number for one in slices]
    return SourceSeries(num_slices=len(slices), instance_numbers=numbers)


@router.get(
    "/v1/batches/{batch_id}/series/{series_key}/source/{index}",
    response_class=Response,
    responses={**PACS_PROBLEMS, 200: describe_content(*PICTURES)},
)
async def get_source_picture(
    state: State, location: Location, index: SliceIndex, low_hu: Hu = -1350, high_hu: Hu = 150
) -> Response:
    """Return the picture of a slice at full resolution; HU beyond the window are black or white."""
    if low_hu >= high_hu:
        message = f"the window {low_hu}..{high_hu} HU is empty, low_hu must be below high_hu"
        raise RefusedError(422, "invalid_request", message)
    content, media_type = await state.sources.picture(location, index, low_hu, high_hu)
    return Response(content, media_type=media_type)
