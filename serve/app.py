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
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from covtanet.environment import check_endpoints, check_ray_environment
from serve.deployments import Segmenter
from serve.handlers import HANDLERS
from serve.middleware import Audit, SecurityHeaders
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
    """Return the application; its API replicas come and go with the load."""
    segmenter = Segmenter.bind(settings.model, settings.reload_every_s, settings.screening)  # type: ignore[attr-defined]
    busy = settings.num_decoders + settings.max_waiting + settings.max_uploads
    options = Api.options(  # type: ignore[attr-defined]
        ray_actor_options={
            "num_cpus": settings.num_decoders * settings.cpus_per_decoder,
            "memory": settings.replica_memory_bytes,
        },
        # Twice as many as it serves: the replica itself refuses the rest, since it knows which
        # requests are heavy.
        max_ongoing_requests=2 * busy,
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
    """Return the application that ``serve run serve.app:app`` starts.

    Raises:
        ConfigError: wrong settings, or a Ray cluster or store that is open to strangers.
    """
    address = ray.get_runtime_context().gcs_address if ray.is_initialized() else ""
    check_ray_environment({**os.environ, "RAY_ADDRESS": address})
    check_endpoints(os.environ)
    return build(load_settings())
