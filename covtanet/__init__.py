"""Screens archives of chest CT for COVID-19 on Ray, and trains the network it screens with.

The names below are the public interface. They are imported when they are first used: importing
the package takes no time and needs neither torch nor a cluster.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covtanet.api import read_ledger, read_volume, screen_study
    from covtanet.ct.volume import Volume
    from covtanet.errors import ConfigError, CovtanetError, QcFlag, Reason, Status, StudyError
    from covtanet.inference.predictor import Predictor
    from covtanet.model.saved_model import SavedModel, load_model
    from covtanet.screening.config import ScreeningConfig

__all__ = [
    "ConfigError",
    "CovtanetError",
    "Predictor",
    "QcFlag",
    "Reason",
    "SavedModel",
    "ScreeningConfig",
    "Status",
    "StudyError",
    "Volume",
    "load_model",
    "read_ledger",
    "read_volume",
    "screen_study",
]

_MODULES = {
    "ConfigError": "covtanet.errors",
    "CovtanetError": "covtanet.errors",
    "Predictor": "covtanet.inference.predictor",
    "QcFlag": "covtanet.errors",
    "Reason": "covtanet.errors",
    "SavedModel": "covtanet.model.saved_model",
    "ScreeningConfig": "covtanet.screening.config",
    "Status": "covtanet.errors",
    "StudyError": "covtanet.errors",
    "Volume": "covtanet.ct.volume",
    "load_model": "covtanet.model.saved_model",
    "read_ledger": "covtanet.api",
    "read_volume": "covtanet.api",
    "screen_study": "covtanet.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
