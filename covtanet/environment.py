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
# All of Ray's switches that unpickle values of a Parquet file begin with this.
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


def check_ray_environment(environment: Mapping[str, str]) -> None:
    """Refuse a cluster on the network without Ray's token, and Ray Data that would unpickle what it reads.

    environment: this process' variables. RAY_ADDRESS may be absent, or ``local``, for a Ray of its own.

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
    is_own = address in ("", "local")
    if (
        not is_own
        and not _is_loopback(address)
        and environment.get("RAY_AUTH_MODE", "").lower() != "token"
    ):
        raise ConfigError(
            "RAY_ADDRESS is not on this machine, expected RAY_AUTH_MODE=token with a token of the cluster"
        )


def _is_loopback(address: str) -> bool:
    """Whether an address is HOST:PORT or ray://HOST:PORT of loopback; ``auto`` may be any cluster, so it is not."""
    try:
        host = urlsplit(address if "://" in address else f"ray://{address}").hostname or ""
        return host == LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(uri: str) -> str:
    """Return the host of a URL in lower case, without brackets and a trailing dot; empty if it is missing."""
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
    """Return whether a host is in a private network; link-local and unspecified addresses are not."""
    address = _address(host)
    if address is not None:
        return address.is_private and not address.is_link_local and not address.is_unspecified
    return NAME.fullmatch(host) is not None and host.endswith(PRIVATE_SUFFIXES)
