"""Links from a series to a viewer of the PACS, made from a template of the settings."""

import ipaddress
from collections.abc import Mapping
from string import Formatter
from typing import Any
from urllib.parse import quote, urlsplit

from covtanet.storage.dicomweb import is_uid

PLACEHOLDERS = ("study_uid", "series_uid")
EXPECTED = "expected {study_uid} and {series_uid} alone"


def check_template(template: str) -> None:
    """Check the template of a link, such as ``https://pacs/viewer?study={study_uid}``.

    Raises:
        ValueError: it is no https URL (or http URL of loopback) whose path or query has a
            placeholder.
    """
    if not template.isprintable() or not template.isascii() or " " in template:
        raise ValueError("viewer_url has a blank or a control character, expected a URL")
    _check_placeholders(template)
    url = urlsplit(template)
    if {"{", "}", "@"} & set(url.netloc):
        raise ValueError("viewer_url has a user or a placeholder in its host, expected a name")
    if not url.hostname:
        raise ValueError("viewer_url has no host, expected https://HOST/...")
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.hostname)):
        raise ValueError(
            f"viewer_url begins with {url.scheme}://{url.hostname}, expected https, or http to "
            "loopback"
        )


def _check_placeholders(template: str) -> None:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"viewer_url has a brace without its pair ({error}), {EXPECTED}") from None
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in fields:
        if name not in PLACEHOLDERS or spec or conversion:
            raise ValueError(f"viewer_url has the placeholder {{{name}}}, {EXPECTED}")
    if not fields:
        raise ValueError(f"viewer_url has no placeholder, {EXPECTED}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def viewer_url(template: str, row: Mapping[str, Any]) -> str | None:
    """Return the link of a row.

    None without a template, without a UID that the template needs, or if identities are hidden.
    """
    # A pseudonym has no slash, every location has one.
    if not template or "/" not in row["source_uri"]:
        return None
    uids = {name: row[name] or "" for name in PLACEHOLDERS if f"{{{name}}}" in template}
    if not all(map(is_uid, uids.values())):
        return None
    return template.format(**{name: quote(uid, safe="") for name, uid in uids.items()})
