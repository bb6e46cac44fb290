"""The newest row of each series, as far as it decides whether to screen the series again."""

from collections.abc import Collection
from dataclasses import dataclass

from covtanet.errors import Status
from covtanet.ledger.read import newest_rows

KNOWN_COLUMNS = ["series_key", "source_version", "status", "software_version", "series_uid"]


@dataclass(frozen=True)
class KnownSeries:
    """What earlier runs know about one series."""

    source_version: str
    status: str
    software_version: str
    series_uid: str | None

    def is_settled(self, source_versions: Collection[str], software_version: str) -> bool:
        """Return whether the series need not be screened again.

        It is settled if the bytes are the same and the row is screened, or rejected by this very software version.

        source_versions: the forms that the version of the bytes may have in a ledger.
        """
        if self.source_version not in source_versions:
            return False
        return self.status == Status.SCREENED or (
            self.status == Status.REJECTED and self.software_version == software_version
        )


def known_series(ledger: str, run_ids: set[str]) -> dict[str, KnownSeries]:
    """Return the newest row of each series of these runs by series key."""
    known = {}
    for batch in newest_rows(ledger, KNOWN_COLUMNS, run_ids).select(KNOWN_COLUMNS).to_batches():
        columns = [column.to_pylist() for column in batch.columns]
        for key, *values in zip(*columns, strict=True):
            known[key] = KnownSeries(*values)
    return known
