"""What the endpoint is told: one TOML file, named by COVTANET_SERVE_CONFIG; no secret stands in it."""

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from covtanet import storage
from covtanet.config import load_config, read_toml
from covtanet.errors import ConfigError
from covtanet.screening.intake import IntakeLimits
from covtanet.screening.stages import ScreeningConfig

VARIABLE = "COVTANET_SERVE_CONFIG"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who may ask. token_sha256: hex digest of the bearer token. places: s3:// prefixes that may be named."""

    name: str
    token_sha256: str
    places: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.token_sha256) != 64 or set(self.token_sha256) - set("0123456789abcdef"):
            raise ValueError("token_sha256 is no SHA-256 in hex")
        for place in self.places:
            if not storage.is_s3(place):
                raise ValueError("places are s3://BUCKET/PREFIX")
            storage.absolute(place)

    def may_read(self, uri: str) -> bool:
        """Whether an s3:// URI, taken apart by the one parser there is, lies under a place of this caller."""
        try:
            wanted = storage.absolute(uri)
        except ConfigError:
            return False
        is_plain = storage.is_s3(uri) and not set(uri) & set("?#%\\") and "//" not in uri.removeprefix("s3://")
        allowed = (storage.absolute(place) for place in self.places)
        return is_plain and any(wanted == place or wanted.startswith(f"{place}/") for place in allowed)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The endpoint's settings.

    model: what the registry or storage calls it. ledger: where batches write. upload_timeout_s: for the whole body.
    num_decoders: series that one API replica decodes at a time. max_waiting: requests that may wait for it.
    config: path of a TOML file with a [screening] table, for studies and batches alike; empty for the defaults.
    """

    model: str = "models:/covtanet@champion"
    ledger: str = ""
    callers: tuple[Caller, ...] = ()
    upload_timeout_s: float = 120.0
    num_decoders: int = 2
    max_waiting: int = 8
    num_api_replicas: int = 1
    max_api_replicas: int = 4
    reload_every_s: float = 30.0
    retry_after_s: int = 5
    config: str = ""
    limits: IntakeLimits = field(default_factory=IntakeLimits)

    def __post_init__(self) -> None:
        if not self.callers:
            raise ValueError("callers is empty, expected at least one with a token")
        if min(self.num_decoders, self.num_api_replicas, self.retry_after_s) < 1:
            raise ValueError("num_decoders, num_api_replicas and retry_after_s must be at least 1")
        if self.max_waiting < 0 or self.upload_timeout_s <= 0 or self.reload_every_s <= 0:
            raise ValueError("max_waiting must be at least 0, upload_timeout_s and reload_every_s above 0")

    @property
    def screening(self) -> ScreeningConfig:
        """What steers a screening, for studies as for batches.

        Raises:
            ConfigError: where the file that ``config`` names is none.
        """
        return load_config(Path(self.config) if self.config else None).screening

    def caller_of(self, token: str) -> Caller | None:
        """The caller with this token; every digest is compared, in constant time."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = [caller for caller in self.callers if hmac.compare_digest(caller.token_sha256, digest)]
        return found[0] if found else None


def load_settings() -> ServeConfig:
    """Read the file that the environment names.

    Raises:
        ConfigError: where there is none, or it says what it may not.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(f"{VARIABLE} is not set, expected the path of the endpoint's TOML file")
    return read_toml(Path(path), ServeConfig)
