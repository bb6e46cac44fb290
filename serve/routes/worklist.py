"""The route behind the worklist: summary and rows of a batch."""

from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response

from covtanet.report import worklist
from serve.auth import AuthenticatedCaller, authenticated
from serve.refusals import PROBLEMS
from serve.routes.batches import MAX_OFFSET, BatchId
from serve.state import State

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
    return JSONResponse(await state.in_batch_thread(make_page))
