"""The HTTP endpoint: one study at a time, batches of a whole archive, their ledgers, and the worklist.

serve run serve.app:app     (or make serve), with COVTANET_SERVE_CONFIG naming a TOML file, see ``settings``.

Every route but the page itself, its script, ``/healthz`` and ``/readyz`` wants a bearer token, which is looked at
before a byte of the body is read; so does ``/openapi.json``, and there are no pages of FastAPI's own, which load
scripts from elsewhere. Answers carry stable reason codes, never an error's own text.
"""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import ray
from fastapi import FastAPI, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram
from starlette.exceptions import HTTPException

from covtanet import storage
from covtanet.archive import upload as intake
from covtanet.decoding.child_process import refuse_weak_sandbox
from covtanet.environment import check_endpoints, check_ray_environment
from covtanet.errors import (
    LedgerVersionError,
    NoSeriesError,
    Status,
    UnavailableError,
    UploadError,
    error_location,
)
from covtanet.ledger.read import for_spreadsheet
from covtanet.report import worklist
from covtanet.screening.config import for_model
from covtanet.screening.study import StudyLimits
from covtanet.tracking import software_version
from serve.batches import (
    BatchConflictError,
    Batches,
    JobsUnavailableError,
    ModelNotAllowedError,
    TooManyBatchesError,
)
from serve.decoders import BusyError, DeadlineError, Decoders, Slot
from serve.deployments import Readiness, RemoteNetwork, Segmenter, StudyScreener
from serve.metrics import cluster_metrics
from serve.middleware import Audit, SecurityHeaders
from serve.refusals import RefusedError
from serve.schemas import (
    BatchRequest,
    BatchState,
    Model,
    Problem,
    SeriesRow,
    StudyAnswer,
    UriRequest,
)
from serve.settings import Caller, ServeConfig, load_settings
from serve.uploads import Uploads

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

STATUS_OF = {"too_large": 413, "unsupported_media": 415, "bad_zip": 422}
MAX_JSON_BYTES = 64 << 10
KEY = r"^[0-9a-f]{32}$"
BATCH_ID = r"^[0-9a-f]{16}$"
Responses = dict[int | str, dict[str, Any]]
PROBLEMS: Responses = {code: {"model": Problem} for code in (401, 403, 404, 405, 422, 500, 503)}
BODY_PROBLEMS: Responses = {**PROBLEMS, 408: {"model": Problem}, 413: {"model": Problem}}
# A study that was read and refused answers with its rows, under a status of a problem.
STUDY_PROBLEMS: Responses = {
    **BODY_PROBLEMS,
    415: {"model": Problem},
    504: {"model": Problem},
    **{code: {"model": Problem | StudyAnswer} for code in (422, 500, 503)},
}
PARQUET = "application/vnd.apache.parquet"
BATCH_PROBLEMS: Responses = {**BODY_PROBLEMS, 429: {"model": Problem}}
READY_FOR_S = 5.0
DESCRIBE_TIMEOUT_S = 10.0
RETRY_STORAGE_S = 10
BATCH_THREADS = 4
RETRY_BATCH_S = 60
MAX_BATCHES, MAX_OFFSET = 50, 1_000_000
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def _where(error: Any) -> str:
    """Which part of a request is wrong, and how; never its value."""
    return (
        f"{'.'.join(str(part) for part in error['loc'] if isinstance(part, str))}: {error['type']}"
    )


def _json_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A body for the API's description, where the route reads it itself."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": kind.model_json_schema()}},
        }
    }


# Serve pickles the class of the routes where it is decorated: what it uses of this module stands above it.
def _ledger_as(accept: str, table: pa.Table) -> Response:
    """A ledger in the form that was asked for."""
    if "application/json" in accept:
        return JSONResponse(jsonable_encoder(table.to_pylist()))
    buffer = BytesIO()
    if "text/csv" in accept:
        pa_csv.write_csv(for_spreadsheet(table), buffer)
        return Response(buffer.getvalue(), media_type="text/csv")
    pq.write_table(table, buffer)
    return Response(buffer.getvalue(), media_type=PARQUET)


def _content(*kinds: str) -> dict[str, Any]:
    """Describe a route's answer that is not a JSON model."""
    return {"description": "Successful Response", "content": {kind: {} for kind in kinds}}


api = FastAPI(
    title="CovTANet on Ray",
    description="Screens chest CT for COVID-19. Research use only, not a medical device.",
    version="1",
    openapi_url=None,
    docs_url=None,
    redoc_url=None,
)
api.add_middleware(Audit)
api.add_middleware(SecurityHeaders)  # the last one added is the outermost


@api.exception_handler(RefusedError)
async def _refused(request: Request, error: RefusedError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"reason": error.reason, "message": error.message}, error.status, headers)


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"reason": "invalid_request", "message": _where(error.errors()[0])}, 422)


@api.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    reasons = {404: "no_such_route", 405: "method_not_allowed"}
    reason = reasons.get(error.status_code, "invalid_request")
    return JSONResponse(
        {"reason": reason, "message": "see /openapi.json"}, error.status_code, error.headers
    )


@api.exception_handler(UploadError)
async def _no_study(request: Request, error: UploadError) -> JSONResponse:
    return JSONResponse({"reason": error.reason, "message": str(error)}, STATUS_OF[error.reason])


@api.exception_handler(LedgerVersionError)
async def _other_version(request: Request, error: LedgerVersionError) -> JSONResponse:
    return JSONResponse(
        {"reason": "other_version", "message": "written by another version of this software"}, 422
    )


@api.exception_handler(OSError)
async def _storage(request: Request, error: OSError) -> JSONResponse:
    """Answer for storage, Ray's job server and a full disk: all worth another try, but for storage that refuses us."""
    logger.error("a request met %s", error_location(error))
    headers = {"Retry-After": str(RETRY_STORAGE_S)}
    if isinstance(error, storage.AccessError):
        message = "the object store refuses this endpoint"
        return JSONResponse({"reason": "storage_refuses", "message": message}, 403)
    if isinstance(error, JobsUnavailableError):
        message = "Ray's job server does not answer"
        return JSONResponse({"reason": "jobs_unavailable", "message": message}, 503, headers)
    if error.errno in NO_SPACE:
        message = "this endpoint has no room for the study"
        return JSONResponse({"reason": "no_space", "message": message}, 503, headers)
    return JSONResponse({"reason": "storage", "message": "storage does not answer"}, 503, headers)


@ray_serve.deployment(health_check_period_s=5)
@ray_serve.ingress(api)
class Api:
    """The routes. Reads and decodes studies, each in a sandbox of this replica; the model answers from elsewhere."""

    def __init__(self, segmenter: DeploymentHandle, settings: ServeConfig) -> None:
        self.segmenter, self.settings, self.screening = segmenter, settings, settings.screening
        self.software_version = software_version()
        refuse_weak_sandbox(self.screening.decode_limits)  # at the start, not with a study
        self.decoders = Decoders(
            settings.num_decoders, settings.max_waiting, settings.request_timeout_s
        )
        self.uploads = Uploads(settings)
        self.batches = Batches(settings) if settings.ledger else None
        # Batches ask storage and Ray; what they wait for must not keep a study waiting.
        self.batch_threads = ThreadPoolExecutor(BATCH_THREADS, "batches")
        self.readiness = Readiness(segmenter, READY_FOR_S)
        self.studies = Counter(
            "covtanet_http_studies", "Series answered over HTTP.", ("status", "reason")
        )
        self.seconds = Histogram(
            "covtanet_http_study_seconds", "From body to answer.", [0.5, 1, 2, 5, 10, 30, 60, 120]
        )

    def _caller(self, request: Request) -> Caller:
        """Return the caller whose token the request carries, and note it for the log."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise RefusedError(401, "no_token", "expected Authorization: Bearer TOKEN")
        caller = self.settings.caller_of(token)
        if caller is None:
            raise RefusedError(403, "wrong_token", "nobody has this token")
        request.state.caller = caller.name
        return caller

    # Studies

    @api.post("/v1/studies", response_model=StudyAnswer, responses=STUDY_PROBLEMS, openapi_extra={
        "requestBody": {"required": True, "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("application/octet-stream", "application/gzip", "application/zip")
        }}
    })  # fmt: skip
    async def post_study(self, request: Request) -> Response:
        """Screen one .nii, .nii.gz, or zip of DICOM objects; the answer has the rows of all its series."""
        caller = self._caller(request)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "unsupported_media", "expected a body without Content-Encoding")
        with ExitStack() as resources:
            try:
                upload = await self.uploads.receive(request, caller, resources)
            except BusyError:
                raise self._busy() from None

            def lay_out(check: Callable[[], None]) -> str:
                upload.objects.mkdir()
                intake.lay_out(
                    upload.path, upload.objects, upload.digest[:32], self.settings.limits, check
                )
                return str(upload.objects)

            # What was inflated may be more than was sent, within limits of its own.
            limits = replace(self.settings.study, max_bytes=self.settings.limits.max_inflated_bytes)
            source = f"upload:{upload.digest}"
            return await self._screen(request, lay_out, limits, source, resources)

    @api.post(
        "/v1/studies:by-uri",
        response_model=StudyAnswer,
        responses=STUDY_PROBLEMS,
        openapi_extra=_json_of(UriRequest),
    )
    async def post_study_by_uri(self, request: Request) -> Response:
        """Screen a study that lies in storage, under a place that this caller may name."""
        caller = self._caller(request)
        body = await self._json(request, UriRequest)
        if not self.settings.may_read(caller, body.uri):
            raise RefusedError(
                403, "place_not_allowed", "the URI lies under none of this caller's places"
            )
        place = storage.absolute(body.uri)
        return await self._screen(
            request, lambda check: place, self.settings.study, "", ExitStack()
        )

    async def _json(self, request: Request, kind: type[M]) -> M:
        """A small JSON body, read after the token was looked at, as FastAPI itself would not."""
        data = bytearray()
        try:
            async with asyncio.timeout(self.settings.upload_timeout_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > MAX_JSON_BYTES:
                        raise RefusedError(
                            413, "too_large", f"expected at most {MAX_JSON_BYTES} bytes of JSON"
                        )
        except TimeoutError:
            raise RefusedError(
                408, "slow_upload", f"the body took over {self.settings.upload_timeout_s:g} s"
            ) from None
        try:
            return kind.model_validate_json(bytes(data))
        except ValidationError as error:
            first = error.errors()[0]
            raise RefusedError(422, "invalid_request", _where(first)) from None

    def _busy(self) -> RefusedError:
        return RefusedError(503, "busy", "too much to do just now", self.settings.retry_after_s)

    async def _screen(
        self,
        request: Request,
        find: Callable[[Callable[[], None]], str],
        limits: StudyLimits,
        source: str,
        resources: ExitStack,
    ) -> Response:
        """Screen all series of a study with one version of the model.

        find: called in the study's thread; returns where its objects lie. source: in place of that in the rows.
        resources: what the study's thread reads; it takes them over.
        """
        described = await self._describe()
        started = time.monotonic()
        try:
            rows = await self.decoders.run(
                partial(self._read_study, find, limits, described), resources
            )
        except NoSeriesError:
            raise RefusedError(422, "no_series", "no series in it, expected a chest CT") from None
        except (UnavailableError, BusyError):
            raise self._busy() from None
        except DeadlineError:
            limit_s = self.settings.request_timeout_s
            raise RefusedError(
                504, "deadline", f"it took over {limit_s:g} s; an archive is a batch"
            ) from None
        self.seconds.observe(time.monotonic() - started)
        for row in rows:
            self.studies.inc(tags={"status": row["status"], "reason": row["reason"] or ""})
            row["source_uri"] = source or row["source_uri"]
            row["model_name"], row["model_version"] = described["name"], described["version"]
        request.state.series_keys = [row["series_key"] for row in rows]
        return self._answer(rows, described)

    def _read_study(
        self,
        find: Callable[[Callable[[], None]], str],
        limits: StudyLimits,
        described: dict[str, Any],
        slot: Slot,
    ) -> list[dict[str, Any]]:
        """Read and screen a study, in a thread that has this slot to itself."""
        place = find(slot.check)
        screener = slot.screener(described["digest"], partial(self._make_screener, described))
        return list(screener(place, limits))

    async def _describe(self) -> dict[str, Any]:
        """The version of the model that answers now."""
        try:
            async with asyncio.timeout(
                DESCRIBE_TIMEOUT_S
            ):  # a replica that stands still answers nobody
                found: dict[str, Any] = await self.segmenter.describe.remote()
        except (ray.exceptions.RayError, BackPressureError, TimeoutError):
            raise self._busy() from None
        return found

    def _answer(self, rows: list[dict[str, Any]], described: dict[str, Any]) -> Response:
        model = Model(**{name: described[name] for name in Model.model_fields})
        answer = StudyAnswer(model=model, series=[SeriesRow.model_validate(row) for row in rows])
        if not any(row["status"] == Status.SCREENED for row in rows):
            answer.reason = rows[0]["reason"]
        failed = [row["reason"] for row in rows if row["status"] == Status.FAILED]
        status, headers = 200, {}
        if answer.reason is not None:
            status = 422
            if "internal_error" in failed:
                status = 500
            elif set(failed) - {"timeout"}:
                status, headers = 503, {"Retry-After": str(self.settings.retry_after_s)}
        return JSONResponse(answer.model_dump(mode="json"), status, headers)

    def _make_screener(self, described: dict[str, Any]) -> StudyScreener:
        config = for_model(self.screening, described["preprocessing"])
        network = RemoteNetwork(self.segmenter, described)
        window, digest = described["window"], described["digest"]
        return StudyScreener(network, window, config, digest, self.software_version)

    # Batches

    def _batches(self) -> Batches:
        if self.batches is None:
            raise RefusedError(404, "no_ledger", "this endpoint has no ledger for batches")
        return self.batches

    async def _in_batch_thread(self, ask: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.batch_threads, ask, *arguments)

    @api.post(
        "/v1/batches", status_code=202, response_model=BatchState, responses=BATCH_PROBLEMS,
        openapi_extra=_json_of(BatchRequest),
    )  # fmt: skip
    async def post_batch(
        self, request: Request, idempotency_key: Annotated[str, Header(max_length=200)] = ""
    ) -> BatchState:
        """Screen a whole archive with the job of ``jobs/screen.py``; the same request again is the same batch."""
        caller, batches = self._caller(request), self._batches()
        body = await self._json(request, BatchRequest)
        if not self.settings.may_read(caller, body.archive):
            raise RefusedError(
                403, "place_not_allowed", "the archive lies under none of this caller's places"
            )
        try:
            return await self._in_batch_thread(batches.submit, body, caller, idempotency_key)
        except BatchConflictError as error:
            raise RefusedError(422, "idempotency_key_reused", str(error)) from None
        except ModelNotAllowedError as error:
            raise RefusedError(403, "model_not_allowed", str(error)) from None
        except TooManyBatchesError as error:
            raise RefusedError(429, "too_many_batches", str(error), RETRY_BATCH_S) from None

    @api.get("/v1/batches", response_model=list[BatchState], responses=PROBLEMS)
    async def get_batches(
        self,
        request: Request,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_BATCHES)] = MAX_BATCHES,
    ) -> list[BatchState]:
        """Some of the caller's batches, the newest first."""
        caller = self._caller(request)
        return await self._in_batch_thread(self._batches().page_of, caller, offset, limit)

    @api.get("/v1/batches/{batch_id}", response_model=BatchState, responses=PROBLEMS)
    async def get_batch(
        self, request: Request, batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)]
    ) -> BatchState:
        """How far a batch is."""
        caller = self._caller(request)
        return await self._of_batch(self._batches().find, batch_id, caller)

    @api.post("/v1/batches/{batch_id}:cancel", response_model=BatchState, responses=PROBLEMS)
    async def cancel_batch(
        self, request: Request, batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)]
    ) -> BatchState:
        """Stop a batch; finished series are kept, and the same request again goes on."""
        caller = self._caller(request)
        return await self._of_batch(self._batches().cancel, batch_id, caller)

    @api.get(
        "/v1/batches/{batch_id}/ledger",
        response_class=Response,
        responses={**PROBLEMS, 200: _content(PARQUET, "text/csv", "application/json")},
    )
    async def get_ledger(
        self,
        request: Request,
        batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)],
        accept: Annotated[str, Header()] = "",
    ) -> Response:
        """The batch's ledger: Parquet, or JSON or CSV where Accept asks for it."""
        caller = self._caller(request)
        table = await self._of_batch(self._batches().rows, batch_id, caller)
        return await self._in_batch_thread(_ledger_as, accept, table)

    @api.get(
        "/v1/batches/{batch_id}/series/{series_key}/{name}",
        response_class=Response,
        responses={**PROBLEMS, 200: _content("image/png", "application/gzip")},
    )
    async def get_result(
        self,
        request: Request,
        batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)],
        series_key: Annotated[str, PathParameter(pattern=KEY)],
        name: Literal["preview.png", "viewer.png", "lesion_mask.nii.gz", "lung_mask.nii.gz"],
    ) -> Response:
        """A result file of a screened series."""
        caller, batches = self._caller(request), self._batches()

        def read(batch_id: str, caller: Caller) -> bytes:
            return storage.read_bytes(batches.result_uri(batch_id, caller, series_key, name))

        data = await self._of_batch(read, batch_id, caller)
        kind = "image/png" if name.endswith(".png") else "application/gzip"
        return Response(data, media_type=kind)

    async def _of_batch(self, ask: Callable[[str, Caller], T], batch_id: str, caller: Caller) -> T:
        try:
            return await self._in_batch_thread(ask, batch_id, caller)
        except KeyError:
            raise RefusedError(404, "no_such_batch", "this caller has no such batch") from None
        except FileNotFoundError:
            raise RefusedError(404, "not_there", "it is not there, or not there yet") from None

    # Models and health

    @api.get("/v1/models", responses=PROBLEMS)
    async def get_models(self, request: Request) -> list[Model]:
        """The version that answers now."""
        self._caller(request)
        described = await self._describe()
        return [Model(**{name: described[name] for name in Model.model_fields})]

    @api.get("/healthz", response_class=PlainTextResponse)
    async def healthz(self) -> str:
        """A replica answers."""
        return "ok"

    @api.get("/readyz", response_class=PlainTextResponse, responses={503: {"model": Problem}})
    async def readyz(self) -> str:
        """The model has answered a moment ago. Costs no inference, however often strangers ask."""
        if not await self.readiness.is_ready():
            raise RefusedError(
                503, "not_ready", "the model does not answer", self.settings.retry_after_s
            )
        return "ok"

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi(self, request: Request) -> Response:
        """The API's own description."""
        self._caller(request)
        return JSONResponse(api.openapi())

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self, request: Request) -> str:
        """What this endpoint and the screening jobs count, on all nodes, as Prometheus reads it."""
        self._caller(request)
        return await asyncio.to_thread(cluster_metrics)

    # The worklist

    @api.get("/v1/batches/{batch_id}/worklist", responses=PROBLEMS)
    async def get_worklist(
        self,
        request: Request,
        batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)],
        sort: Literal["worst", "uncertain", "refused"] = "worst",
        status: Literal["", "screened", "rejected", "failed"] = "",
        grade: Literal["", "normal", "mild", "severe"] = "",
        text: Annotated[str, Query(max_length=200)] = "",
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=worklist.MAX_ROWS)] = worklist.MAX_ROWS,
    ) -> Response:
        """A finished batch at a glance, and some of its rows in the order asked for."""
        caller = self._caller(request)
        table = await self._of_batch(self._batches().rows, batch_id, caller)
        show = partial(
            worklist.page,
            table,
            sort=sort,
            status=status,
            grade=grade,
            text=text,
            offset=offset,
            limit=limit,
        )
        return JSONResponse(await self._in_batch_thread(show))

    @api.get("/", include_in_schema=False)
    async def page(self) -> FileResponse:
        """The worklist; it asks for the token itself."""
        return FileResponse(worklist.PAGE / "index.html")

    @api.get("/worklist/{name}", include_in_schema=False)
    async def page_part(self, name: Literal["worklist.js", "worklist.css"]) -> FileResponse:
        """Its script and style."""
        return FileResponse(worklist.PAGE / name)


def build(settings: ServeConfig) -> Any:
    """The application. Replicas of the API come and go with the load."""
    segmenter = Segmenter.bind(settings.model, settings.reload_every_s, settings.screening)  # type: ignore[attr-defined]
    busy = settings.num_decoders + settings.max_waiting + settings.max_uploads
    resources = {
        "num_cpus": settings.num_decoders * settings.cpus_per_decoder,
        "memory": settings.replica_memory_bytes,
    }
    options = Api.options(  # type: ignore[attr-defined]
        ray_actor_options=resources,
        max_ongoing_requests=2
        * busy,  # what waits is refused by the replica, which knows what is heavy
        max_queued_requests=4 * busy,
        backpressure_config=BackpressureConfig(
            status_code=503, retry_after_s=settings.retry_after_s
        ),
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.num_api_replicas,
            max_replicas=max(settings.num_api_replicas, settings.max_api_replicas),
            target_ongoing_requests=(settings.num_decoders + settings.max_waiting) / 2,
        ),
    )
    return options.bind(segmenter, settings)


def app(arguments: dict[str, str]) -> Any:
    """What ``serve run serve.app:app`` starts.

    Raises:
        ConfigError: the settings, or a Ray or a store that would answer strangers or be read by them.
    """
    address = ray.get_runtime_context().gcs_address if ray.is_initialized() else ""
    check_ray_environment({**os.environ, "RAY_ADDRESS": address})
    check_endpoints(os.environ)
    return build(load_settings())
