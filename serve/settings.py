"""Settings of the endpoint: one TOML file, named by COVTANET_SERVE_CONFIG; it holds no secret."""

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from covtanet import storage
from covtanet.archive.upload import IntakeLimits
from covtanet.config import load_screening, read_toml
from covtanet.errors import ConfigError
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import StudyLimits
from serve.viewer_link import check_template

VARIABLE = "COVTANET_SERVE_CONFIG"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
# Beyond the decoder's own limit: the API replica's buffers and its share of the measuring.
REPLICA_MEMORY_MIB = 600

AT_LEAST_ONE = (
    "num_decoders",
    "num_api_replicas",
    "retry_after_s",
    "max_uploads",
    "max_uploads_per_caller",
    "max_batches",
    "max_batches_per_caller",
    "batch_timeout_s",
    "num_model_replicas",
    "max_model_replicas_per_node",
)
# A replica that asks for no CPU may be placed on a head without CPUs.
ABOVE_ZERO = (
    "upload_timeout_s",
    "request_timeout_s",
    "reload_every_s",
    "cpus_per_decoder",
    "model_cpus",
    "model_requests",
)
AT_LEAST_ZERO = ("max_waiting", "driver_cpus", "driver_memory_mib", "model_gpus", "model_threads")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A client of the endpoint."""

    name: str
    """Name in log lines and metrics."""
    token_sha256: str
    """SHA-256 of the bearer token, in hex."""
    places: tuple[str, ...] = ()
    """Allowed locations: the ``s3://BUCKET/PREFIX``, or ``dicomweb+https://HOST/PATH`` of a server
    or of one of its studies, below which this caller may read."""
    may_store: bool = False
    """Whether this caller may have results stored at the DICOMweb server of a study."""

    def __post_init__(self) -> None:
        if len(self.token_sha256) != 64 or set(self.token_sha256) - set("0123456789abcdef"):
            raise ValueError("token_sha256 is not a SHA-256 in hex")
        if self.token_sha256 == EMPTY_SHA256:
            raise ValueError(
                "token_sha256 is the digest of an empty text, expected that of a token"
            )
        for location in self.places:
            if not _is_location(location):
                raise ValueError(
                    f"places has {location}, expected s3://BUCKET/PREFIX or "
                    "dicomweb+https://HOST/PATH"
                )
            storage.absolute(location)

    def may_read(self, uri: str) -> bool:
        """Return whether a URI is under an allowed location of this caller."""
        if not _is_location(uri) or not uri.isprintable():
            return False
        path = uri.partition("://")[2]
        if set(uri) & set("?#%\\*") or "//" in path:
            return False
        try:
            location = storage.absolute(uri)
        except ConfigError:
            return False
        return any(_is_under(location, storage.absolute(allowed)) for allowed in self.places)


def _is_location(uri: str) -> bool:
    return storage.is_s3(uri) or storage.is_dicomweb(uri)


def _is_under(location: str, folder: str) -> bool:
    # With the slash: a bucket's "ct-private" is not under its "ct".
    return f"{location}/".startswith(f"{folder}/")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the endpoint."""

    model: str = "models:/covtanet@champion"
    """Model that answers studies and screens batches: a name of the registry, or a location."""
    models: tuple[str, ...] = ()
    """Further models that a batch may name."""
    ledger: str = ""
    """Location of the ledger; batches write under its ``_batches``. Empty: no batches."""
    callers: tuple[Caller, ...] = ()
    """Clients with a token; at least one."""
    upload_timeout_s: float = 120.0
    """Time limit of a whole body."""
    request_timeout_s: float = 300.0
    """Time limit from the end of the body to the answer."""
    max_uploads: int = 16
    """Bodies that a replica receives at a time."""
    max_uploads_per_caller: int = 8
    """Bodies of one caller that a replica receives at a time."""
    num_decoders: int = 2
    """Studies that a replica reads at a time."""
    cpus_per_decoder: float = 1.0
    """CPUs that a replica asks Ray for, per decoder."""
    reserves_memory: bool = True
    """Whether a replica asks Ray for the memory of its decoders; false on a laptop."""
    max_waiting: int = 8
    """Requests that may wait for a decoder of a replica."""
    max_batches: int = 8
    """Batches of all callers that may be open at a time."""
    max_batches_per_caller: int = 2
    """Batches of one caller that may be open at a time."""
    batch_timeout_s: int = 86400
    """Time limit of a batch's job."""
    driver_cpus: float = 1.0
    """CPUs that a batch's driver asks Ray for; above 0, so that it does not run on the head."""
    driver_memory_mib: int = 2048
    """Memory that a batch's driver asks Ray for, in MiB."""
    num_api_replicas: int = 1
    """API replicas without load."""
    max_api_replicas: int = 4
    """API replicas under full load."""
    model_gpus: float = 0.0
    """GPUs that a model replica asks Ray for, such as 1 or 0.5. 0: it runs on CPUs and sees no GPU.
    """
    model_cpus: float = 2.0
    """CPUs that a model replica asks Ray for."""
    model_threads: int = 0
    """Threads of the network on CPUs; 0 for as many as ``model_cpus``, rounded up."""
    num_model_replicas: int = 1
    """Model replicas without load."""
    max_model_replicas: int = 1
    """Model replicas under full load."""
    max_model_replicas_per_node: int = 1
    """Model replicas on one node; as many as a node has GPUs, divided by ``model_gpus``."""
    model_requests: float = 8.0
    """Requests of at most 16 slices, in work or waiting, for which Serve wants one model replica.
    """
    reload_every_s: float = 30.0
    """Interval at which a model replica checks whether an alias names another version, and an API
    replica which version the model replicas have."""
    retry_after_s: int = 5
    """``Retry-After`` of an answer 503, in seconds."""
    config: str = ""
    """TOML file with a [screening] table, for studies and batches; empty for the defaults."""
    limits: IntakeLimits = field(default_factory=IntakeLimits)
    """Limits of an upload and of what a zip may unpack to."""
    study: StudyLimits = field(default_factory=StudyLimits)
    """Limits of one study."""
    viewer_url: str = ""
    """Address of a PACS viewer, to which the worklist links each row, with ``{study_uid}`` and
    ``{series_uid}`` in it; https, or http to loopback. Empty: no link."""
    shows_accession: bool = False
    """Whether the worklist shows accession number and study date of an opened row, from the PACS.
    """

    def __post_init__(self) -> None:
        if not self.callers:
            raise ValueError("callers is empty, expected at least one with a token")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in AT_LEAST_ZERO:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        # Ray gives out a share of one GPU, or several whole ones.
        if self.model_gpus > 1 and self.model_gpus % 1:
            raise ValueError(f"model_gpus is {self.model_gpus}, expected at most 1 or an integer")
        if self.viewer_url:
            check_template(self.viewer_url)

    @property
    def replica_memory_bytes(self) -> int:
        """Return the memory that an API replica asks Ray for."""
        if not self.reserves_memory:
            return 0
        return self.num_decoders * (self.screening.decode_memory_mib + REPLICA_MEMORY_MIB) << 20

    def may_read(self, caller: Caller, uri: str) -> bool:
        """Return whether a caller may read a URI: an allowed location, apart from the ledger.

        The ledger holds the results of other callers' batches. A location around it is refused
        too.
        """
        if not caller.may_read(uri):
            return False
        if not self.ledger:
            return True
        location = storage.absolute(uri)
        ledger = storage.absolute(self.ledger)
        return not _is_under(location, ledger) and not _is_under(ledger, location)

    @property
    def screening(self) -> ScreeningConfig:
        """Return the screening configuration of studies and batches.

        Raises:
            ConfigError: the file that ``config`` names is missing or invalid.
        """
        return load_screening(Path(self.config) if self.config else None)

    def caller_of(self, token: str) -> Caller | None:
        """Return the caller with this token; every digest is compared, in constant time."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        matching = [
            caller for caller in self.callers if hmac.compare_digest(caller.token_sha256, digest)
        ]
        return matching[0] if matching else None


def load_settings() -> ServeConfig:
    """Read the file that the environment names.

    Raises:
        ConfigError: the variable is not set, or the file is missing or invalid.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(f"{VARIABLE} is not set, expected the path of the endpoint's TOML file")
    return read_toml(Path(path), ServeConfig)
