"""What Ray must be told before this process joins a cluster or starts one; no Ray is imported."""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from covtanet.errors import ConfigError

# Ray's switches that unpickle what a Parquet file brings along; all of them begin so.
AUTOLOAD = "RAY_DATA_AUTOLOAD_"
OFF = ("", "0", "false")
LOOPBACK = "localhost"


def check_ray_doors(environment: Mapping[str, str]) -> None:
    """Refuse a cluster on the network without Ray's token, and Ray Data that would unpickle what it reads.

    environment: this process' variables. RAY_ADDRESS may be absent, or ``local``, for a Ray of its own.

    Raises:
        ConfigError: with the variable, and what is expected of it.
    """
    unsafe = [name for name, value in environment.items() if name.startswith(AUTOLOAD) and value.lower() not in OFF]
    if unsafe:
        raise ConfigError(f"{sorted(unsafe)[0]} is set, expected unset: Ray Data would run code out of Parquet files")
    address = environment.get("RAY_ADDRESS", "")
    is_own = address in ("", "local")
    if not is_own and not _is_loopback(address) and environment.get("RAY_AUTH_MODE", "").lower() != "token":
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
