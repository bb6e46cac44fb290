"""Alerts of a nightly run: one line in the log, and a POST to the site's URL if there is one."""

import json
import logging
import urllib.request
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from covtanet.errors import ConfigError

logger = logging.getLogger(__name__)

ALERT_TIMEOUT_S = 20


def send_alert(url_file: Path | None, content: dict[str, Any]) -> None:
    """Log an alert and POST it as JSON; a receiver that does not answer does not end the night.

    url_file: file with the URL, which is a secret. content: counts and dates, nothing of any study.
    """
    text = json.dumps(content, sort_keys=True)
    logger.error("ALERT %s", text)
    if url_file is None:
        return
    try:
        url = url_file.read_text().strip()
        check_alert_url(url)
        request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(NoRedirect)
        opener.open(request, timeout=ALERT_TIMEOUT_S).close()
    except (OSError, ValueError, HTTPException, ConfigError) as error:
        logger.error("the alert could not be sent: %s", type(error).__name__)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: only the configured URL gets the alert."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        """Make no other request, so that the redirect is an error."""
        return


def check_alert_url(url: str) -> None:
    """Refuse a URL that would send alerts in clear text beyond this machine, or that names a user.

    Raises:
        ConfigError: for either.
        ValueError: the text cannot be parsed as a URL.
    """
    parts = urlsplit(url)
    is_local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")
    is_allowed = is_local or parts.scheme == "https"
    if not is_allowed or "@" in parts.netloc or not parts.hostname:
        raise ConfigError("the alert URL is neither https:// nor on this machine, or names a user")
