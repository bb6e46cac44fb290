"""MLflow: runs, the model registry and its aliases; the only package that imports mlflow (and
``screening/pyfunc.py``, which MLflow runs).

``runs`` logs experiments, ``registry`` registers and promotes models, ``models`` fetches their
files. Everything a command needs is named here.
"""

import os

# MLflow reports usage as soon as it is imported, unless this is set before.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from covtanet.tracking.models import MODEL_SOURCES, ModelRef, resolve_model
from covtanet.tracking.registry import (
    DIGEST_TAG,
    MODEL_NAME,
    digest_of,
    promote,
    register_model,
    tag_version,
    version_of,
)
from covtanet.tracking.runs import (
    RunAddress,
    describe_run,
    log_history,
    open_run,
    system_metrics,
    tolerated,
    tracking_uri,
)
from covtanet.tracking.version import software_version

__all__ = [
    "DIGEST_TAG",
    "MODEL_NAME",
    "MODEL_SOURCES",
    "ModelRef",
    "RunAddress",
    "describe_run",
    "digest_of",
    "log_history",
    "open_run",
    "promote",
    "register_model",
    "resolve_model",
    "software_version",
    "system_metrics",
    "tag_version",
    "tolerated",
    "tracking_uri",
    "version_of",
]
