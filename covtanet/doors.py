"""Checks of the environment of a job or of the endpoint: servers in clear text, a Ray without token.

Pure functions on a mapping such as ``os.environ``; they open nothing and resolve no name.
"""

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from covtanet.errors import ConfigError

# Where S3's clients and MLflow's take the address of a server from.
ENDPOINTS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
)
ALLOW_PLAIN_HTTP = "COVTANET_ALLOW_PLAIN_HTTP"
CLUSTER_SUFFIXES = (".svc", ".svc.cluster.local")
PRIVATE_SUFFIXES = (".local", ".internal")
# A first letter: digits alone are an IPv4 address to the resolver, 0x... as well.
LABEL = r"[a-z](?:[a-z0-9-]*[a-z0-9])?"
NAME = re.compile(rf"{LABEL}(?:\.{LABEL})*")
# Switches by which Ray Data unpickles what it finds in Parquet and Arrow files.
UNPICKLE = "RAY_DATA_AUTOLOAD_"


def check_endpoints(environment: Mapping[str, str]) -> None:
    """Refuse http:// to a store or registry beyond this machine and this cluster.

    Allowed are https:// and values that are no URL of a server; http:// to loopback or to a
    Service of the cluster (a name without a dot, ``NAME.NAMESPACE.svc``,
    ``NAME.NAMESPACE.svc.cluster.local``); and, with COVTANET_ALLOW_PLAIN_HTTP=1, http:// to a
    private address or to a ``.local`` or ``.internal`` name.

    Raises:
        ConfigError: with the variable and the host; never with the rest of the URL, which may hold a password.
    """
    is_private_allowed = environment.get(ALLOW_PLAIN_HTTP) == "1"
    for name in ENDPOINTS:
        uri = environment.get(name, "").strip()
        if not uri.lower().startswith("http:"):
            continue
        host = _host(uri)
        if _is_near(host) or (is_private_allowed and _is_private(host)):
            continue
        raise ConfigError(
            f"{name} is plain http to {host or 'no host'}, keys and images would travel in clear "
            "text; expected https://, loopback or a Service of this cluster "
            f"(a private address, .local or .internal: {ALLOW_PLAIN_HTTP}=1)"
        )


def check_authentication(environment: Mapping[str, str]) -> None:
    """Refuse a Ray that answers without a token, or that unpickles data.

    For jobs that join a cluster and for the endpoint; a Ray that a job starts for itself is on loopback.

    Raises:
        ConfigError: with the variable, what it is and what it must be.
    """
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE is {mode or 'not set'}, expected token: everybody who reaches this Ray would run code on it"
        )
    for name in sorted(environment):
        if name.startswith(UNPICKLE) and environment[name].lower() not in ("", "0", "false"):
            raise ConfigError(f"{name} is set, expected unset: Ray Data would unpickle data files")


def _host(uri: str) -> str:
    """The host of a URL in small letters, without brackets and a last dot; empty if there is none."""
    try:
        return (urlsplit(uri).hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_near(host: str) -> bool:
    """Whether packets to a host stay on this machine or in this cluster."""
    address = _address(host)
    if address is not None:
        return address.is_loopback
    return NAME.fullmatch(host) is not None and ("." not in host or host.endswith(CLUSTER_SUFFIXES))


def _is_private(host: str) -> bool:
    """Whether a host is of a private network; its own link and the unspecified address are none."""
    address = _address(host)
    if address is not None:
        return address.is_private and not address.is_link_local and not address.is_unspecified
    return NAME.fullmatch(host) is not None and host.endswith(PRIVATE_SUFFIXES)
