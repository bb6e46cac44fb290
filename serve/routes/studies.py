"""Routes that screen one study: as the body of the request, or by its URI in storage."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from covtanet import storage
from covtanet.archive import upload as intake
from covtanet.errors import ConfigError, Status
from covtanet.report.sending import REFUSED
from covtanet.storage import dicomweb
from serve.auth import AuthenticatedCaller, authenticated
from serve.bodies import describe_json_body, read_json
from serve.decoders import BusyError
from serve.multipart_answer import MEDIA_TYPE, accepts_dicom, multipart_answer
from serve.refusals import STUDY_PROBLEMS, RefusedError, busy
from serve.results import ResultsRequest
from serve.schemas import Model, SeriesResults, SeriesRow, StudyAnswer, UriRequest
from serve.settings import Caller
from serve.state import ReplicaState, State
from serve.studies import Check, ScreenedStudy, StudyRequest
from serve.uploads import Upload

router = APIRouter(dependencies=[Depends(authenticated)])

UPLOAD_KINDS = ("application/octet-stream", "application/gzip", "application/zip")
BINARY = {"schema": {"type": "string", "format": "binary"}}
UPLOAD_BODY = {"requestBody": {"required": True, "content": dict.fromkeys(UPLOAD_KINDS, BINARY)}}


@router.post(
    "/v1/studies",
    response_model=StudyAnswer,
    responses=STUDY_PROBLEMS,
    openapi_extra=UPLOAD_BODY,
)
async def post_study(request: Request, caller: AuthenticatedCaller, state: State) -> Response:
    """Screen a .nii, .nii.gz, or zip of DICOM objects; the answer has the rows of its series."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(415, "unsupported_media", "expected a body without Content-Encoding")
    with ExitStack() as resources:
        try:
            upload = await state.uploads.receive(request, caller, resources)
        except BusyError:
            raise busy(state.settings.retry_after_s) from None
        return await _screen(request, state, _study_of(upload, state), resources)


@router.post(
    "/v1/studies:by-uri",
    response_model=StudyAnswer,
    responses={**STUDY_PROBLEMS, 200: {"content": {MEDIA_TYPE: BINARY}}},
    openapi_extra=describe_json_body(UriRequest),
)
async def post_study_by_uri(
    request: Request, caller: AuthenticatedCaller, state: State
) -> Response:
    """Screen a study in storage, under an allowed location of this caller.

    With ``Accept: multipart/related; type="application/dicom"`` the rows are the first part of the
    answer, and SEG, SR and key images of the screened DICOM series are the other parts.
    """
    body = await read_json(request, UriRequest, state.settings.upload_timeout_s)
    if not state.settings.may_read(caller, body.uri):
        message = "the URI is not under an allowed location of this caller"
        raise RefusedError(403, "place_not_allowed", message)
    location = storage.absolute(body.uri)
    study = StudyRequest(
        locate=lambda check: location,
        limits=state.settings.study,
        results=_results_of(request, body, caller, state),
    )
    return await _screen(request, state, study, ExitStack())


def _results_of(
    request: Request, body: UriRequest, caller: Caller, state: ReplicaState
) -> ResultsRequest | None:
    """Return the results that a request asks for.

    Raises:
        RefusedError: 403, the caller may not store; 422, the URI is no study of a server, or is not
            at a server to store at.
    """
    server = ""
    if storage.is_dicomweb(body.uri):
        server, study_uid = _split_study(storage.absolute(body.uri))
        if not study_uid:
            raise RefusedError(422, "invalid_request", "expected .../studies/UID")
    if body.store_results and not caller.may_store:
        raise RefusedError(403, "store_not_allowed", "this caller may not store results")
    if body.store_results and not server:
        raise RefusedError(422, "invalid_request", "store_results needs a dicomweb URI")
    in_answer = accepts_dicom(request.headers.get("accept", ""))
    if not in_answer and not body.store_results:
        return None
    return ResultsRequest(
        in_answer=in_answer,
        server=server if body.store_results else "",
        folder=state.uploads.folder.path,
    )


def _split_study(uri: str) -> tuple[str, str]:
    """Return the root of a DICOMweb server and the UID of the study; empty if there is none."""
    try:
        root, study_uid, _ = dicomweb.split_path(uri)
    except ConfigError:
        return "", ""
    return root, study_uid


def _study_of(upload: Upload, state: ReplicaState) -> StudyRequest:
    """Return the study of an upload, which its thread unpacks."""
    settings = state.settings

    def unpack(check: Check) -> str:
        upload.objects.mkdir()
        key = upload.digest[:32]
        intake.parse_upload(upload.path, upload.objects, key, settings.limits, check)
        return str(upload.objects)

    # Unpacked objects may be larger than the upload; ``limits`` bounds them, not ``study``.
    limits = replace(settings.study, max_bytes=settings.limits.max_inflated_bytes)
    return StudyRequest(locate=unpack, limits=limits, source=f"upload:{upload.digest}")


async def _screen(
    request: Request, state: ReplicaState, study: StudyRequest, resources: ExitStack
) -> Response:
    screened = await state.studies.screen(study, resources)
    request.state.series_keys = [row["series_key"] for row in screened.rows]
    return _answer(screened, state.settings.retry_after_s)


def _answer(study: ScreenedStudy, retry_after_s: int) -> Response:
    """Return the rows, with 200 if a series was screened, else with the status of the failure."""
    model = Model(**{name: study.model[name] for name in Model.model_fields})
    series = [SeriesRow.model_validate(row) for row in study.rows]
    answer = StudyAnswer(model=model, series=series)
    status, headers = 200, {}
    if not any(row["status"] == Status.SCREENED for row in study.rows):
        answer.reason = study.rows[0]["reason"]
    if answer.reason is not None:
        status = _failure_status(study.rows)
    if status == 503:
        headers["Retry-After"] = str(retry_after_s)
    if study.results is None:
        return JSONResponse(answer.model_dump(mode="json", exclude={"results"}), status, headers)
    answer.results = [_results_in_answer(outcome) for outcome in study.results.outcomes]
    content = answer.model_dump(mode="json")
    if status == 200 and study.results.file is not None:
        return multipart_answer(content, study.results)
    study.results.close()
    return JSONResponse(content, status, headers)


def _results_in_answer(outcome: dict[str, Any]) -> SeriesResults:
    """Return an outcome without details that are for the log alone."""
    detail = outcome["detail"] if outcome["outcome"] == REFUSED else ""
    return SeriesResults(**{**outcome, "detail": detail})


def _failure_status(rows: Sequence[dict[str, Any]]) -> int:
    """Return 422 if the study itself is at fault, 500 for a fault of this software, else 503."""
    failed = {row["reason"] for row in rows if row["status"] == Status.FAILED}
    if "internal_error" in failed:
        return 500
    if failed - {"timeout"}:  # decoding that takes too long is the study's fault
        return 503
    return 422
