"""A batch over HTTP: the request, and everything that was answered until it was committed."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

NIGHT = {"archive": "s3://bucket/archive", "run_date": datetime.now(UTC).date().isoformat()}
NIGHT_HEADERS = {"Content-Type": "application/json", "Idempotency-Key": "one night"}


@dataclass(frozen=True, kw_only=True)
class SubmittedBatch:
    """Answers to a batch's submission, as pairs of status and body.

    repeated: to the same request with the same key. conflicting: to another request with that key.
    early_ledger: to a GET of the ledger before it is committed. state: the batch's last state.
    metrics: names of the metrics that Ray showed while it ran.
    """

    submitted: tuple[int, Any]
    repeated: tuple[int, Any]
    conflicting: tuple[int, Any]
    early_ledger: tuple[int, Any]
    state: Any
    metrics: set[str]
