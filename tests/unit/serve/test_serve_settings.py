"""Settings of the endpoint: tokens, allowed locations, dates, memory."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from serve.schemas import BatchRequest
from serve.settings import EMPTY_SHA256, Caller, ServeConfig

TOKEN = "a-token"


def settings(ledger: str = "", places: tuple[str, ...] = ("s3://hospital/ct",)) -> ServeConfig:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    return ServeConfig(
        callers=(Caller(name="ann", token_sha256=digest, places=places),), ledger=ledger
    )


def test_digest_of_an_empty_token_is_refused() -> None:
    """``printf %s "$UNSET" | sha256sum`` prints it; a header with one blank would be that token."""
    with pytest.raises(ValueError, match="digest of an empty text"):
        Caller(name="ann", token_sha256=EMPTY_SHA256)
    assert settings().caller_of(TOKEN) is not None
    for wrong in ("", " ", "\xa0", f"{TOKEN} ", f"{TOKEN}\n"):
        assert settings().caller_of(wrong) is None


@pytest.mark.parametrize(
    "uri",
    [
        "s3://hospital/ct/a\nb",
        "s3://hospital/ct/a\x00",
        "s3://hospital/ct/*",
        "s3://hospital/ct/\x1b[0m",
        "~nobody/x",
    ],
)
def test_uri_with_control_characters_or_wildcard_is_not_read(uri: str) -> None:
    caller = settings().callers[0]
    assert settings().may_read(caller, "s3://hospital/ct/study 1")
    assert not settings().may_read(caller, uri)


def test_uri_inside_or_around_the_ledger_is_not_read() -> None:
    """The ledger holds the masks of other callers' batches."""
    configured = settings(ledger="s3://hospital/ct/ledger")
    caller = configured.callers[0]
    assert configured.may_read(caller, "s3://hospital/ct/ledger-of-2025/x")
    for uri in (
        "s3://hospital/ct",
        "s3://hospital/ct/ledger",
        "s3://hospital/ct/ledger/_batches/ledger/_results/x",
    ):
        assert not configured.may_read(caller, uri)


def test_run_date_far_from_today_is_refused() -> None:
    today = datetime.now(UTC).date()
    for days in (-1, 0, 1):
        assert BatchRequest(
            archive="s3://hospital/ct", run_date=today + timedelta(days=days)
        ).run_date
    for date in ("9999-12-31", (today - timedelta(days=3)).isoformat()):
        with pytest.raises(ValidationError, match="a day before or after"):
            BatchRequest.model_validate({"archive": "s3://hospital/ct", "run_date": date})


def test_replica_memory_is_the_limit_of_its_decoders() -> None:
    assert settings().replica_memory_bytes == 2 * (3072 + 600) << 20
