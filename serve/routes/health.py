"""Probes, which need no token."""

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from serve.refusals import RefusedError
from serve.schemas import Problem
from serve.state import State

router = APIRouter()


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """Return ok if a replica answers."""
    return "ok"


@router.get("/readyz", response_class=PlainTextResponse, responses={503: {"model": Problem}})
async def readyz(state: State) -> str:
    """Return ok if the model passed its last health checks; a probe costs no inference."""
    if not await state.readiness.is_ready():
        retry_after_s = state.settings.retry_after_s
        raise RefusedError(503, "not_ready", "the model does not answer", retry_after_s)
    return "ok"
