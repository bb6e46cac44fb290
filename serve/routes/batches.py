"""Routes of batches: submit, list, cancel, and read the ledger and the result files of a batch."""

from io import BytesIO
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse, Response

from covtanet import storage
from covtanet.ledger.read import for_spreadsheet
from serve.auth import AuthenticatedCaller, authenticated
from serve.batches import BatchConflictError, ModelNotAllowedError, TooManyBatchesError
from serve.bodies import describe_json_body, read_json
from serve.refusals import BATCH_PROBLEMS, PROBLEMS, RefusedError
from serve.schemas import BatchRequest, BatchState
from serve.settings import Caller
from serve.state import State

router = APIRouter(dependencies=[Depends(authenticated)])

MAX_BATCHES, MAX_OFFSET = 50, 1_000_000
RETRY_BATCH_S = 60
PARQUET = "application/vnd.apache.parquet"
MEDIA_TYPES = {"png": "image/png", "gz": "application/gzip", "json": "application/json"}

BatchId = Annotated[str, PathParameter(pattern=r"^[0-9a-f]{16}$")]
SeriesKey = Annotated[str, PathParameter(pattern=r"^[0-9a-f]{32}$")]
ResultName = Literal[
    "preview.png", "viewer.png", "viewer.json", "lesion_mask.nii.gz", "lung_mask.nii.gz"
]


def describe_content(*media_types: str) -> dict[str, Any]:
    """Return the description of an answer that is not a JSON model."""
    content: dict[str, Any] = {media_type: {} for media_type in media_types}
    return {"description": "Successful Response", "content": content}


@router.post(
    "/v1/batches",
    status_code=202,
    response_model=BatchState,
    responses=BATCH_PROBLEMS,
    openapi_extra=describe_json_body(BatchRequest),
)
async def post_batch(
    request: Request,
    caller: AuthenticatedCaller,
    state: State,
    idempotency_key: Annotated[str, Header(max_length=200)] = "",
) -> BatchState:
    """Screen an archive with ``jobs/screen.py``; the same request again is the same batch."""
    batches = state.open_batches()
    body = await read_json(request, BatchRequest, state.settings.upload_timeout_s)
    if not state.settings.may_read(caller, body.archive):
        message = "the archive is not under an allowed location of this caller"
        raise RefusedError(403, "place_not_allowed", message)
    try:
        return await state.in_batch_thread(batches.submit, body, caller, idempotency_key)
    except BatchConflictError as error:
        raise RefusedError(422, "idempotency_key_reused", str(error)) from None
    except ModelNotAllowedError as error:
        raise RefusedError(403, "model_not_allowed", str(error)) from None
    except TooManyBatchesError as error:
        raise RefusedError(429, "too_many_batches", str(error), RETRY_BATCH_S) from None


@router.get("/v1/batches", response_model=list[BatchState], responses=PROBLEMS)
async def get_batches(
    caller: AuthenticatedCaller,
    state: State,
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_BATCHES)] = MAX_BATCHES,
) -> list[BatchState]:
    """List the caller's batches, the newest first."""
    return await state.in_batch_thread(state.open_batches().page_of, caller, offset, limit)


@router.get("/v1/batches/{batch_id}", response_model=BatchState, responses=PROBLEMS)
async def get_batch(caller: AuthenticatedCaller, state: State, batch_id: BatchId) -> BatchState:
    """Return state and progress of a batch."""
    return await state.of_batch(state.open_batches().find, batch_id, caller)


@router.post("/v1/batches/{batch_id}:cancel", response_model=BatchState, responses=PROBLEMS)
async def cancel_batch(caller: AuthenticatedCaller, state: State, batch_id: BatchId) -> BatchState:
    """Stop a batch; its finished series are kept, and the same request again continues it."""
    return await state.of_batch(state.open_batches().cancel, batch_id, caller)


@router.get(
    "/v1/batches/{batch_id}/ledger",
    response_class=Response,
    responses={**PROBLEMS, 200: describe_content(PARQUET, "text/csv", "application/json")},
)
async def get_ledger(
    caller: AuthenticatedCaller,
    state: State,
    batch_id: BatchId,
    accept: Annotated[str, Header()] = "",
) -> Response:
    """Return the batch's ledger as Parquet, or as JSON or CSV if Accept names it."""
    table = await state.of_batch(state.open_batches().rows, batch_id, caller)
    return await state.in_batch_thread(_ledger_as, accept, table)


def _ledger_as(accept: str, table: pa.Table) -> Response:
    """Return a ledger in the format that the ``Accept`` header names."""
    if "application/json" in accept:
        return JSONResponse(jsonable_encoder(table.to_pylist()))
    buffer = BytesIO()
    if "text/csv" in accept:
        pa_csv.write_csv(for_spreadsheet(table), buffer)
        return Response(buffer.getvalue(), media_type="text/csv")
    pq.write_table(table, buffer)
    return Response(buffer.getvalue(), media_type=PARQUET)


@router.get(
    "/v1/batches/{batch_id}/series/{series_key}/{name}",
    response_class=Response,
    responses={**PROBLEMS, 200: describe_content(*MEDIA_TYPES.values())},
)
async def get_result(
    caller: AuthenticatedCaller,
    state: State,
    batch_id: BatchId,
    series_key: SeriesKey,
    name: ResultName,
) -> Response:
    """Return a result file of a screened series."""
    batches = state.open_batches()

    def read(batch_id: str, caller: Caller) -> bytes:
        return storage.read_bytes(batches.result_uri(batch_id, caller, series_key, name))

    data = await state.of_batch(read, batch_id, caller)
    return Response(data, media_type=MEDIA_TYPES[name.rpartition(".")[2]])
