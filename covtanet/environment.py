"""Checks of the environment variables of a job or of the endpoint.

Servers in clear text, and a Ray cluster without token. Pure functions on a mapping such as
``os.environ``; they open no connection and resolve no name.
"""

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from covtanet.errors import ConfigError

# Variables from which the clients of S3 and MLflow take the address of a server.
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
# The first character is a letter: the resolver takes digits, and 0x..., for an IPv4 address.
LABEL = r"[a-z](?:[a-z0-9-]*[a-z0-9])?"
NAME = re.compile(rf"{LABEL}(?:\.{LABEL})*")
# Prefix of all of Ray's switches that unpickle values of a Parquet file.
AUTOLOAD = "RAY_DATA_AUTOLOAD_"
OFF = ("", "0", "false")
LOOPBACK = "localhost"


def check_endpoints(environment: Mapping[str, str]) -> None:
    """Refuse http:// to a store or registry beyond this machine and this cluster.

    Allowed are https:// and values that name a file or a database; http:// to loopback or to a
    Service of the cluster (a name without a dot, ``NAME.NAMESPACE.svc``,
    ``NAME.NAMESPACE.svc.cluster.local``); and, with COVTANET_ALLOW_PLAIN_HTTP=1, http:// to a
    private address or to a ``.local`` or ``.internal`` name.

    Raises:
        ConfigError: with the variable and the host, without the rest of the URL, which may hold a
            password.
    """
    for name in ENDPOINTS:
        uri = environment.get(name, "").strip()
        if not uri.lower().startswith("http:"):
            continue
        host = _host(uri)
        if allows_plain_http(environment, host):
            continue
        raise ConfigError(
            f"{name} is plain http to {host or 'no host'}, keys and images would travel in clear "
            "text; expected https://, loopback or a Service of this cluster "
            f"(a private address, .local or .internal: {ALLOW_PLAIN_HTTP}=1)"
        )


def allows_plain_http(environment: Mapping[str, str], host: str) -> bool:
    """Return whether a host may be asked in clear text.

    It is loopback or a Service of this cluster, or, with COVTANET_ALLOW_PLAIN_HTTP=1, private.
    """
    is_private_allowed = environment.get(ALLOW_PLAIN_HTTP) == "1"
    return _is_near(host) or (is_private_allowed and _is_private(host))


def check_ray_environment(environment: Mapping[str, str]) -> None:
    """Refuse a Ray cluster without token on the network, and a Ray Data that would unpickle files.

    environment: the variables of this process. RAY_ADDRESS may be missing, or ``local``, if the job
    starts Ray itself.

    Raises:
        ConfigError: with the variable and its expected value.
    """
    unsafe = [
        name
        for name, value in environment.items()
        if name.startswith(AUTOLOAD) and value.lower() not in OFF
    ]
    if unsafe:
        raise ConfigError(
            f"{min(unsafe)} is set, expected unset: Ray Data would run code out of Parquet files"
        )
    address = environment.get("RAY_ADDRESS", "")
    is_near = address in ("", "local") or _is_loopback(address)
    has_token = environment.get("RAY_AUTH_MODE", "").lower() == "token"
    if not is_near and not has_token:
        raise ConfigError(
            "RAY_ADDRESS is not on this machine, expected RAY_AUTH_MODE=token with a token of the "
            "cluster"
        )


def _is_loopback(address: str) -> bool:
    """Return whether an address is HOST:PORT or ray://HOST:PORT of loopback.

    ``auto`` is not: it may be any cluster.
    """
    try:
        host = urlsplit(address if "://" in address else f"ray://{address}").hostname or ""
        return host == LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(uri: str) -> str:
    """Return the host of a URL in lower case, without brackets and final dot; empty if missing."""
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
    """Return whether packets to a host stay on this machine or in this cluster."""
    address = _address(host)
    if address is not None:
        return address.is_loopback
    return NAME.fullmatch(host) is not None and ("." not in host or host.endswith(CLUSTER_SUFFIXES))


def _is_private(host: str) -> bool:
    """Return whether a host is in a private network, without link-local addresses and 0.0.0.0."""
    address = _address(host)
    if address is not None:
        return address.is_private and not address.is_link_local and not address.is_unspecified
    return NAME.fullmatch(host) is not None and host.endswith(PRIVATE_SUFFIXES)
