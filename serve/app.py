"""The HTTP endpoint: one study at a time, batches of a whole archive, their ledgers, and the worklist.

serve run serve.app:app     (or make serve), with COVTANET_SERVE_CONFIG naming a TOML file, see ``settings``.

Every route but the page itself, its script, ``/healthz`` and ``/readyz`` wants a bearer token, which is looked at
before a byte of the body is read. Answers carry stable reason codes, never an error's own text.
"""

import asyncio
import hashlib
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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

from covtanet import storage
from covtanet.ct.window import WindowConfig
from covtanet.errors import ConfigError, UnavailableError, UploadError
from covtanet.report import worklist
from covtanet.screening import intake, view
from covtanet.screening.decode import place_of
from covtanet.screening.records import FAILED, SCREENED
from covtanet.screening.single import Screener
from covtanet.screening.stages import for_model
from serve.batches import BatchConflictError, Batches
from serve.deployments import RemoteNetwork, Segmenter
from serve.metrics import cluster_metrics
from serve.schemas import BatchRequest, BatchState, Model, Problem, StudyAnswer, UriRequest
from serve.settings import Caller, ServeConfig, load_settings

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

STATUS_OF = {"too_large": 413, "unsupported_media": 415, "bad_zip": 422}
MAX_JSON_BYTES = 64 << 10
KEY = r"^[0-9a-f]{32}$"
BATCH_ID = r"^[0-9a-f]{16}$"
Responses = dict[int | str, dict[str, Any]]
PROBLEMS: Responses = {code: {"model": Problem} for code in (401, 403, 404, 422, 503)}
STUDY_PROBLEMS: Responses = {**PROBLEMS, 408: {"model": Problem}, 413: {"model": Problem}, 415: {"model": Problem}}


class RefusedError(Exception):
    """A request is refused with a status, a reason code and a sentence."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after_s = status, reason, message, retry_after_s


# Serve pickles the class where it is decorated: what it uses of this module stands above it.
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:"


def _where(error: Any) -> str:
    """Which part of a request is wrong, and how; never its value."""
    return f"{'.'.join(str(part) for part in error['loc'] if isinstance(part, str))}: {error['type']}"


def _json_of(kind: type[BaseModel]) -> dict[str, Any]:
    """A body for the API's description, where the route reads it itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


api = FastAPI(
    title="CovTANet on Ray",
    description="Screens chest CT for COVID-19. Research use only, not a medical device.",
    version="1",
)


@api.exception_handler(RefusedError)
async def _refused(request: Request, error: RefusedError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"reason": error.reason, "message": error.message}, error.status, headers)


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"reason": "invalid_request", "message": _where(error.errors()[0])}, 422)


@api.exception_handler(Exception)
async def _internal(request: Request, error: Exception) -> JSONResponse:
    logger.error("internal error, %s", place_of(error))
    return JSONResponse({"reason": "internal_error", "message": "a fault of this software"}, 500)


@ray_serve.deployment(health_check_period_s=5, ray_actor_options={"num_cpus": 0})  # its work is the child's
@ray_serve.ingress(api)
class Api:
    """The routes. Reads and decodes studies, each in a sandbox of this replica; the model answers from elsewhere."""

    def __init__(self, segmenter: DeploymentHandle, settings: ServeConfig) -> None:
        self.segmenter, self.settings, self.screening = segmenter, settings, settings.screening
        self.slots: asyncio.Queue[list[Screener]] = asyncio.Queue()
        for _ in range(settings.num_decoders):
            self.slots.put_nowait([])  # each holds a screener, once a model is known
        self.num_waiting = 0
        self.batches = Batches(settings) if settings.ledger else None
        self.studies = Counter("covtanet_http_studies", "Series answered over HTTP.", ("status", "reason"))
        self.seconds = Histogram("covtanet_http_study_seconds", "From body to answer.", [0.5, 1, 2, 5, 10, 30, 60, 120])

    def _caller(self, request: Request) -> Caller:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise RefusedError(401, "no_token", "expected Authorization: Bearer TOKEN")
        caller = self.settings.caller_of(token.strip())
        if caller is None:
            raise RefusedError(403, "wrong_token", "nobody has this token")
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
        self._caller(request)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "unsupported_media", "expected a body without Content-Encoding")
        self._check_length(int(request.headers.get("content-length") or 0))
        async with self._slot() as slot:
            with tempfile.TemporaryDirectory(prefix="covtanet-") as folder:
                upload, objects = Path(folder) / "upload", Path(folder) / "objects"
                objects.mkdir()
                digest = await self._receive(request, upload)
                try:
                    await asyncio.to_thread(intake.lay_out, upload, objects, digest[:32], self.settings.limits)
                except UploadError as error:
                    raise RefusedError(STATUS_OF[error.reason], error.reason, str(error)) from None
                return await self._screen(slot, str(objects), f"upload:{digest}")

    @api.post(
        "/v1/studies:by-uri", response_model=StudyAnswer, responses=STUDY_PROBLEMS, openapi_extra=_json_of(UriRequest)
    )
    async def post_study_by_uri(self, request: Request) -> Response:
        """Screen a study that lies in storage, under a place that this caller may name."""
        caller = self._caller(request)
        body = await self._json(request, UriRequest)
        if not caller.may_read(body.uri):
            raise RefusedError(403, "place_not_allowed", "the URI lies under none of this caller's places")
        place = storage.absolute(body.uri)
        async with self._slot() as slot:
            return await self._screen(slot, place, "")

    async def _json(self, request: Request, kind: type[M]) -> M:
        """A small JSON body, read after the token was looked at, as FastAPI itself would not."""
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_JSON_BYTES:
                raise RefusedError(413, "too_large", f"expected at most {MAX_JSON_BYTES} bytes of JSON")
        try:
            return kind.model_validate_json(bytes(data))
        except ValidationError as error:
            first = error.errors()[0]
            raise RefusedError(422, "invalid_request", _where(first)) from None

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self.settings.limits.max_bytes:
            raise RefusedError(413, "too_large", f"expected at most {self.settings.limits.max_bytes} bytes")

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[list[Screener]]:
        """One of the decoders; at most ``max_waiting`` requests wait for one."""
        if self.slots.empty() and self.num_waiting >= self.settings.max_waiting:
            raise self._busy()
        self.num_waiting += 1
        try:
            slot = await self.slots.get()
        finally:
            self.num_waiting -= 1
        try:
            yield slot
        finally:
            self.slots.put_nowait(slot)

    def _busy(self) -> RefusedError:
        return RefusedError(503, "busy", "too much to do just now", self.settings.retry_after_s)

    async def _receive(self, request: Request, upload: Path) -> str:
        """Write the body to disk as it comes; returns the SHA-256 of it."""
        digest, num_bytes = hashlib.sha256(), 0
        try:
            async with asyncio.timeout(self.settings.upload_timeout_s):
                with upload.open("wb") as file:
                    async for chunk in request.stream():
                        num_bytes += len(chunk)
                        self._check_length(num_bytes)
                        digest.update(chunk)
                        file.write(chunk)
        except TimeoutError:
            raise RefusedError(408, "slow_upload", f"the body took over {self.settings.upload_timeout_s:g} s") from None
        return digest.hexdigest()

    async def _screen(self, slot: list[Screener], place: str, source: str) -> Response:
        """All series of a place, with one version of the model."""
        described = await self._describe()
        screener = self._screener(slot, described)
        try:
            started = asyncio.get_running_loop().time()
            rows = await asyncio.to_thread(lambda: list(screener(place)))
            self.seconds.observe(asyncio.get_running_loop().time() - started)
        except ConfigError:
            raise RefusedError(422, "no_series", "no series in it, expected a chest CT") from None
        except UnavailableError:
            raise self._busy() from None
        except storage.AccessError:
            raise RefusedError(403, "storage_refuses", "the object store refuses this endpoint") from None
        except OSError:
            raise RefusedError(503, "storage", "storage does not answer", self.settings.retry_after_s) from None
        for row in rows:
            self.studies.inc(tags={"status": row["status"], "reason": row["reason"] or ""})
            row["source_uri"] = source or row["source_uri"]
            row["model_name"], row["model_version"] = described["name"], described["version"]
        return self._answer(rows, described)

    async def _describe(self) -> dict[str, Any]:
        """The version of the model that answers now."""
        try:
            found: dict[str, Any] = await self.segmenter.describe.remote()
        except (ray.exceptions.RayError, BackPressureError):
            raise self._busy() from None
        return found

    def _answer(self, rows: list[dict[str, Any]], described: dict[str, Any]) -> Response:
        answer = StudyAnswer(model=Model(**{name: described[name] for name in Model.model_fields}), series=rows)
        if not any(row["status"] == SCREENED for row in rows):
            answer.reason = rows[0]["reason"]
        failed = [row["reason"] for row in rows if row["status"] == FAILED]
        status, headers = 200, {}
        if answer.reason is not None:
            status = 422
            if "internal_error" in failed:
                status = 500
            elif set(failed) - {"timeout"}:
                status, headers = 503, {"Retry-After": str(self.settings.retry_after_s)}
        return JSONResponse(answer.model_dump(mode="json"), status, headers)

    def _screener(self, slot: list[Screener], described: dict[str, Any]) -> Screener:
        """The slot's screener, where it is of this version; its decoder's child stays warm."""
        if slot and slot[0].model_digest == described["digest"]:
            return slot[0]
        while slot:
            slot.pop().close()
        config = for_model(self.screening, described["preprocessing"])
        window = WindowConfig(**described["preprocessing"]["window"])
        slot.append(Screener(RemoteNetwork(self.segmenter, described), window, config, described["digest"]))
        return slot[0]

    # Batches

    def _batches(self) -> Batches:
        if self.batches is None:
            raise RefusedError(404, "no_ledger", "this endpoint has no ledger for batches")
        return self.batches

    @api.post(
        "/v1/batches", status_code=202, response_model=BatchState, responses=PROBLEMS,
        openapi_extra=_json_of(BatchRequest),
    )  # fmt: skip
    async def post_batch(
        self, request: Request, idempotency_key: Annotated[str, Header(max_length=200)] = ""
    ) -> BatchState:
        """Screen a whole archive with the job of ``jobs/screen.py``; the same request again is the same batch."""
        caller = self._caller(request)
        body = await self._json(request, BatchRequest)
        if not caller.may_read(body.archive):
            raise RefusedError(403, "place_not_allowed", "the archive lies under none of this caller's places")
        try:
            return await asyncio.to_thread(self._batches().submit, body, caller, idempotency_key)
        except BatchConflictError as error:
            raise RefusedError(422, "idempotency_key_reused", str(error)) from None

    @api.get("/v1/batches", response_model=list[BatchState], responses=PROBLEMS)
    async def get_batches(self, request: Request) -> list[BatchState]:
        """The caller's batches, the newest first."""
        caller = self._caller(request)
        return await asyncio.to_thread(self._batches().all_of, caller)

    @api.get("/v1/batches/{batch_id}", response_model=BatchState, responses=PROBLEMS)
    async def get_batch(
        self, request: Request, batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)]
    ) -> BatchState:
        """How far a batch is."""
        return await self._of_batch(self._batches().find, batch_id, self._caller(request))

    @api.post("/v1/batches/{batch_id}:cancel", response_model=BatchState, responses=PROBLEMS)
    async def cancel_batch(
        self, request: Request, batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)]
    ) -> BatchState:
        """Stop a batch; finished series are kept, and the same request again goes on."""
        return await self._of_batch(self._batches().cancel, batch_id, self._caller(request))

    @api.get("/v1/batches/{batch_id}/ledger", responses=PROBLEMS)
    async def get_ledger(
        self,
        request: Request,
        batch_id: Annotated[str, PathParameter(pattern=BATCH_ID)],
        accept: Annotated[str, Header()] = "",
    ) -> Response:
        """The batch's ledger: Parquet, or JSON or CSV where Accept asks for it."""
        table = await self._of_batch(self._batches().rows, batch_id, self._caller(request))
        if "application/json" in accept:
            return JSONResponse(await asyncio.to_thread(lambda: jsonable_encoder(table.to_pylist())))
        buffer = BytesIO()
        if "text/csv" in accept:
            pa_csv.write_csv(view.for_spreadsheet(table), buffer)
            return Response(buffer.getvalue(), media_type="text/csv")
        pq.write_table(table, buffer)
        return Response(buffer.getvalue(), media_type="application/vnd.apache.parquet")

    @api.get("/v1/batches/{batch_id}/series/{series_key}/{name}", responses=PROBLEMS)
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
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    async def _of_batch(self, ask: Callable[[str, Caller], T], batch_id: str, caller: Caller) -> T:
        try:
            return await asyncio.to_thread(ask, batch_id, caller)
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
        """The model answers: a real inference, of one slice."""
        try:
            async with asyncio.timeout(10):
                await self.segmenter.is_ready.remote()
        except Exception:
            raise RefusedError(503, "not_ready", "the model does not answer", self.settings.retry_after_s) from None
        return "ok"

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
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=worklist.MAX_ROWS)] = worklist.MAX_ROWS,
    ) -> Response:
        """A finished batch at a glance, and some of its rows in the order asked for."""
        table = await self._of_batch(self._batches().rows, batch_id, self._caller(request))
        found = await asyncio.to_thread(
            worklist.page, table, sort=sort, status=status, grade=grade, text=text, offset=offset, limit=limit
        )
        return JSONResponse(found)

    @api.get("/", include_in_schema=False)
    async def page(self) -> FileResponse:
        """The worklist; it asks for the token itself."""
        return FileResponse(worklist.PAGE / "index.html", headers={"Content-Security-Policy": CSP})

    @api.get("/worklist/{name}", include_in_schema=False)
    async def page_part(self, name: Literal["worklist.js", "worklist.css"]) -> FileResponse:
        """Its script and style."""
        return FileResponse(worklist.PAGE / name, headers={"X-Content-Type-Options": "nosniff"})


def build(settings: ServeConfig) -> Any:
    """The application. Replicas of the API come and go with the load."""
    segmenter = Segmenter.bind(settings.model, settings.reload_every_s, settings.screening)  # type: ignore[attr-defined]
    busy = settings.num_decoders + settings.max_waiting
    options = Api.options(  # type: ignore[attr-defined]
        max_ongoing_requests=2 * busy,  # what waits is refused by the replica, which knows what is heavy
        max_queued_requests=4 * busy,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=settings.retry_after_s),
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.num_api_replicas,
            max_replicas=max(settings.num_api_replicas, settings.max_api_replicas),
            target_ongoing_requests=busy / 2,
        ),
    )
    return options.bind(segmenter, settings)


def app(arguments: dict[str, str]) -> Any:
    """What ``serve run serve.app:app`` starts."""
    return build(load_settings())
