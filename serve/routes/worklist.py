"""The route behind the worklist: summary and rows of a batch."""

from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response

from covtanet.report import worklist
from serve.auth import AuthenticatedCaller, authenticated
from serve.refusals import PROBLEMS
from serve.routes.batches import MAX_OFFSET, BatchId
from serve.settings import ServeConfig
from serve.sources import location_of
from serve.state import State
from serve.viewer_link import viewer_url

router = APIRouter(dependencies=[Depends(authenticated)])


@router.get("/v1/batches/{batch_id}/worklist", responses=PROBLEMS)
async def get_worklist(
    caller: AuthenticatedCaller,
    state: State,
    batch_id: BatchId,
    sort: Literal["worst", "uncertain", "refused"] = "worst",
    status: Literal["", "screened", "rejected", "failed"] = "",
    grade: Literal["", "normal", "mild", "severe"] = "",
    text: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
    limit: Annotated[int, Query(ge=1, le=worklist.MAX_ROWS)] = worklist.MAX_ROWS,
) -> Response:
    """Return the summary of a committed batch and some of its rows, sorted and filtered."""
    table = await state.of_batch(state.open_batches().rows, batch_id, caller)
    make_page = partial(
        worklist.page,
        table,
        sort=sort,
        status=status,
        grade=grade,
        text=text,
        offset=offset,
        limit=limit,
    )
    answer = await state.in_batch_thread(make_page)
    for row in answer["rows"]:
        row["pacs"] = _pacs_of(row, state.settings)
    return JSONResponse(answer)


def _pacs_of(row: dict[str, Any], settings: ServeConfig) -> dict[str, Any]:
    """Return what the page offers of a row from the PACS."""
    has_source = location_of(row) is not None
    return {
        "viewer_url": viewer_url(settings.viewer_url, row),
        "has_source": has_source,
        "has_labels": has_source and settings.shows_accession,
    }
