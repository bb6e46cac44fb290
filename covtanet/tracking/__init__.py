"""MLflow: runs, the model registry and its aliases; the only package that imports mlflow (and
``screening/pyfunc.py``, which MLflow runs).

``runs`` logs experiments, ``registry`` registers and promotes models, ``resolve`` and ``models``
fetch their files. Everything a command needs is named here and imported at its first use: MLflow
takes a second, and a screening by a model's folder does without it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# MLflow reports usage as soon as it is imported, unless this is set before.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

if TYPE_CHECKING:
    from covtanet.tracking.models import MODEL_SOURCES
    from covtanet.tracking.registry import (
        DIGEST_TAG,
        MODEL_NAME,
        pinned,
        promote,
        register_model,
        tag_version,
        version_of,
    )
    from covtanet.tracking.resolve import ModelRef, resolve_model
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
    "log_history",
    "open_run",
    "pinned",
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

_MODULES = {
    "covtanet.tracking.models": ("MODEL_SOURCES",),
    "covtanet.tracking.registry": (
        "DIGEST_TAG",
        "MODEL_NAME",
        "pinned",
        "promote",
        "register_model",
        "tag_version",
        "version_of",
    ),
    "covtanet.tracking.resolve": ("ModelRef", "resolve_model"),
    "covtanet.tracking.runs": (
        "RunAddress",
        "describe_run",
        "log_history",
        "open_run",
        "system_metrics",
        "tolerated",
        "tracking_uri",
    ),
    "covtanet.tracking.version": ("software_version",),
}


def __getattr__(name: str) -> Any:
    """Import a name at its first use."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
