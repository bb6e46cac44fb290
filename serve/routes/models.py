"""Routes of the endpoint itself: the version of the model, the API's description, metrics."""

import asyncio

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from serve.auth import authenticated
from serve.metrics import cluster_metrics
from serve.refusals import PROBLEMS
from serve.schemas import Model
from serve.state import State

router = APIRouter(dependencies=[Depends(authenticated)])


@router.get("/v1/models", responses=PROBLEMS)
async def get_models(state: State) -> list[Model]:
    """Return the version of the model that answers now."""
    described = await state.studies.describe_model()
    return [Model(**{name: described[name] for name in Model.model_fields})]


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """Return the API's own description."""
    return JSONResponse(request.app.openapi())


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics() -> str:
    """Return metrics of the endpoint and of screening jobs on all nodes, as Prometheus text."""
    return await asyncio.to_thread(cluster_metrics)
