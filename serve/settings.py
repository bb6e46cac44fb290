"""What the endpoint is told: one TOML file, named by COVTANET_SERVE_CONFIG; no secret stands in it."""

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from covtanet import storage
from covtanet.archive.upload import IntakeLimits
from covtanet.config import load_config, read_toml
from covtanet.errors import ConfigError
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import StudyLimits

VARIABLE = "COVTANET_SERVE_CONFIG"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
# Beyond the decoder's own limit: the API replica's buffers and its share of the measuring.
REPLICA_MEMORY_MIB = 600


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who may ask. token_sha256: hex digest of the bearer token. places: s3:// prefixes that may be named."""

    name: str
    token_sha256: str
    places: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.token_sha256) != 64 or set(self.token_sha256) - set("0123456789abcdef"):
            raise ValueError("token_sha256 is no SHA-256 in hex")
        if self.token_sha256 == EMPTY_SHA256:
            raise ValueError(
                "token_sha256 is the digest of an empty text, expected that of a token"
            )
        for place in self.places:
            if not storage.is_s3(place):
                raise ValueError("places are s3://BUCKET/PREFIX")
            storage.absolute(place)

    def may_read(self, uri: str) -> bool:
        """Whether an s3:// URI, taken apart by the one parser there is, lies under a place of this caller."""
        if not storage.is_s3(uri) or not uri.isprintable():
            return False
        if set(uri) & set("?#%\\*") or "//" in uri.removeprefix("s3://"):
            return False
        try:
            wanted = storage.absolute(uri)
        except ConfigError:
            return False
        allowed = (storage.absolute(place) for place in self.places)
        return any(wanted == place or wanted.startswith(f"{place}/") for place in allowed)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The endpoint's settings.

    model: what the registry or storage calls it. models: what else a batch may name. ledger: under its ``_batches``
    batches write. config: path of a TOML file with a [screening] table, for studies and batches alike; empty for the
    defaults.

    upload_timeout_s: for the whole body. request_timeout_s: from then on to the answer. max_uploads: bodies that a
    replica receives at a time, max_uploads_per_caller: of one caller. num_decoders: studies that it reads at a time.
    max_waiting: requests that may wait for that. study: what one request may hold.
    cpus_per_decoder: what a replica asks of Ray for each, beside the memory that decoding may take. With
    reserves_memory = false it asks for none, as on a laptop.

    max_batches, max_batches_per_caller: open at a time. batch_timeout_s: after which a batch's job is ended.
    driver_cpus, driver_memory_mib: what it asks of Ray; above 0, so that it does not run on the head.
    """

    model: str = "models:/covtanet@champion"
    models: tuple[str, ...] = ()
    ledger: str = ""
    callers: tuple[Caller, ...] = ()
    upload_timeout_s: float = 120.0
    request_timeout_s: float = 300.0
    max_uploads: int = 16
    max_uploads_per_caller: int = 8
    num_decoders: int = 2
    cpus_per_decoder: float = 1.0
    reserves_memory: bool = True
    max_waiting: int = 8
    max_batches: int = 8
    max_batches_per_caller: int = 2
    batch_timeout_s: int = 86400
    driver_cpus: float = 1.0
    driver_memory_mib: int = 2048
    num_api_replicas: int = 1
    max_api_replicas: int = 4
    reload_every_s: float = 30.0
    retry_after_s: int = 5
    config: str = ""
    limits: IntakeLimits = field(default_factory=IntakeLimits)
    study: StudyLimits = field(default_factory=StudyLimits)

    def __post_init__(self) -> None:
        if not self.callers:
            raise ValueError("callers is empty, expected at least one with a token")
        at_least_one = (
            "num_decoders", "num_api_replicas", "retry_after_s", "max_uploads", "max_uploads_per_caller",
            "max_batches", "max_batches_per_caller", "batch_timeout_s",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("upload_timeout_s", "request_timeout_s", "reload_every_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("max_waiting", "cpus_per_decoder", "driver_cpus", "driver_memory_mib"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")

    @property
    def replica_memory_bytes(self) -> int:
        """What an API replica asks of Ray."""
        if not self.reserves_memory:
            return 0
        return self.num_decoders * (self.screening.decode_memory_mib + REPLICA_MEMORY_MIB) << 20

    def may_read(self, caller: Caller, uri: str) -> bool:
        """Whether a caller may name this URI: under a place of theirs, and apart from the ledger.

        The ledger holds what other callers' batches wrote.
        """
        if not caller.may_read(uri):
            return False
        if not self.ledger:
            return True
        wanted, ledger = f"{storage.absolute(uri)}/", f"{storage.absolute(self.ledger)}/"
        return not wanted.startswith(ledger) and not ledger.startswith(wanted)

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
        found = [
            caller for caller in self.callers if hmac.compare_digest(caller.token_sha256, digest)
        ]
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
