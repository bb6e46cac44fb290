"""Records of batches: small JSON objects in the ledger's storage.

LEDGER/_batches/callers/CALLER/<batch_id>.json
    the request, the Ray jobs started for it, and how it ended
LEDGER/_batches/callers/CALLER/newest/ORDER-<batch_id>
    empty; the names list a caller's batches, the newest first

CALLER is a digest of the caller's name, so that one caller's requests read no record of another's.
ORDER falls with time.
"""

import hashlib
import json
import logging
from datetime import datetime
from typing import Any

from covtanet import storage
from serve.settings import Caller

logger = logging.getLogger("ray.serve")

ID_DIGITS = 16
# Milliseconds. ORDER is this less the time of submission, with the same number of digits until the
# year 2286.
LAST_ORDER = 10**13


class BatchRecords:
    """The records of all callers below one folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def uri(self, caller: Caller, *names: str) -> str:
        """Return the URI of a file of a caller."""
        digest = hashlib.sha256(caller.name.encode()).hexdigest()[:ID_DIGITS]
        return storage.join(self.root, "callers", digest, *names)

    def read(self, batch_id: str, caller: Caller) -> dict[str, Any] | None:
        """Return a record; None if it is missing or unreadable."""
        # Checked before it becomes part of a path.
        if len(batch_id) != ID_DIGITS or set(batch_id) - set("0123456789abcdef"):
            return None
        try:
            data = storage.read_bytes(self.uri(caller, f"{batch_id}.json"))
            record: dict[str, Any] = json.loads(data)
        except FileNotFoundError:
            return None
        except ValueError:
            logger.error("the record of batch %s is not JSON", batch_id)
            return None
        return record

    def read_owned(self, batch_id: str, caller: Caller) -> dict[str, Any]:
        """Return a record.

        Raises:
            KeyError: the caller has no such batch.
        """
        record = self.read(batch_id, caller)
        if record is None:
            raise KeyError(batch_id)
        return record

    def write(self, record: dict[str, Any], caller: Caller) -> None:
        """Write or replace a record."""
        uri = self.uri(caller, f"{record['batch_id']}.json")
        storage.write_bytes(uri, json.dumps(record, indent=2).encode())

    def list_as_newest(self, batch_id: str, caller: Caller, submitted_at: datetime) -> None:
        """Put a batch at the head of the caller's list."""
        order = LAST_ORDER - int(submitted_at.timestamp() * 1000)
        # An empty object: its name sorts the list, the newest first.
        storage.write_bytes(self.uri(caller, "newest", f"{order}-{batch_id}"), b"")

    def newest(self, caller: Caller, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return some of a caller's records, the newest first."""
        names = storage.list_names(self.uri(caller, "newest"))
        batch_ids = [name.rpartition("-")[2] for name in names[offset : offset + limit]]
        # Only the page is read, not all records.
        records = [self.read(batch_id, caller) for batch_id in batch_ids]
        return [record for record in records if record is not None]
