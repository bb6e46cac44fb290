"""The HTTP endpoint: single studies, batches of a whole archive, and the worklist page.

    serve run serve.app:app

or ``make serve``; COVTANET_SERVE_CONFIG names a TOML file, see ``settings``.

Every router but ``health`` and ``page`` requires a bearer token, which is checked before a byte of
the body is read. FastAPI's own pages are off, since they load scripts from other hosts. Answers
carry stable reason codes, never an error's own text.
"""

import os
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from covtanet.environment import check_endpoints, check_ray_environment
from serve.deployments import Segmenter
from serve.handlers import HANDLERS
from serve.middleware import Audit, SecurityHeaders
from serve.replicas import api_options, model_options, model_threads
from serve.routes import batches, health, models, page, source, studies, worklist
from serve.settings import ServeConfig, load_settings
from serve.state import ReplicaState

api = FastAPI(
    title="CovTANet on Ray",
    description="Screens chest CT for COVID-19. Research use only, not a medical device.",
    version="1",
    openapi_url=None,
    docs_url=None,
    redoc_url=None,
    exception_handlers=HANDLERS,
)
api.add_middleware(Audit)
api.add_middleware(SecurityHeaders)  # the last one added is the outermost
# The routes of a row's source before those of its result files, which match any name.
for subject in (studies, source, batches, models, health, worklist, page):
    api.include_router(subject.router)


@ray_serve.deployment(health_check_period_s=5)
@ray_serve.ingress(api)
class Api:
    """One replica of the routes.

    It reads and decodes studies in sandboxes; the model answers in other replicas.
    """

    def __init__(self, segmenter: DeploymentHandle, settings: ServeConfig) -> None:
        self.state = ReplicaState(segmenter, settings)


def build(settings: ServeConfig) -> Any:
    """Return the application; its replicas come and go with the load."""
    segmenter = Segmenter.options(**model_options(settings)).bind(  # type: ignore[attr-defined]
        settings.model, settings.reload_every_s, settings.screening, model_threads(settings)
    )
    return Api.options(**api_options(settings)).bind(segmenter, settings)  # type: ignore[attr-defined]


def app(arguments: dict[str, str]) -> Any:
    """Return the application that ``serve run serve.app:app`` starts.

    Raises:
        ConfigError: wrong settings, or a Ray cluster or store that is open to strangers.
    """
    address = ray.get_runtime_context().gcs_address if ray.is_initialized() else ""
    check_ray_environment({**os.environ, "RAY_ADDRESS": address})
    check_endpoints(os.environ)
    return build(load_settings())
