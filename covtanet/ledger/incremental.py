"""Series and folders that earlier runs settled, so that the next run need not read them again."""

import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from covtanet.errors import Status
from covtanet.ledger.run import Run, known_runs
from covtanet.ledger.view import iter_newest_rows
from covtanet.ledger.work import ListedFolder, read_folders

logger = logging.getLogger(__name__)

KNOWN_COLUMNS = ["series_key", "source_version", "status", "software_version", "series_uid"]


@dataclass(frozen=True, slots=True)
class KnownSeries:
    """The newest row of one series, as far as it decides whether to screen the series again."""

    source_version: str
    status: str
    software_version: str
    series_uid: str | None

    def is_settled(self, source_versions: Collection[str], software_version: str) -> bool:
        """Return whether the series need not be screened again.

        It is settled if the bytes are the same and the row is screened, or rejected by this very
        software version.

        source_versions: the forms that the version of the bytes may have in a ledger.
        """
        if self.source_version not in source_versions:
            return False
        # Another version of the software may be able to read the series.
        if self.status == Status.REJECTED:
            return self.software_version == software_version
        # A failed series was not at fault and is tried again.
        return self.status == Status.SCREENED


@dataclass(frozen=True, kw_only=True)
class PreviousRuns:
    """The newest row of each series of an archive, and each folder as it was listed last."""

    series: dict[str, KnownSeries] = field(default_factory=dict)
    """By series key."""
    folders: dict[str, ListedFolder] = field(default_factory=dict)
    """By folder, relative to the archive."""

    def settles(self, row: dict[str, Any], run: Run) -> bool:
        """Return whether a series of the manifest need not be screened again."""
        known = self.series.get(row["series_key"])
        # Ledgers of older software hold the plain version even if they hide identities.
        versions = {row["source_version"], run.pseudonym(row["source_version"])}
        return known is not None and known.is_settled(versions, run.software_version)

    def settles_folder(self, folder: str, version: str, software_version: str) -> bool:
        """Return whether a folder has not changed and all its series are settled."""
        listed = self.folders.get(folder, ListedFolder())
        # Names, sizes and versions of the objects: something was added, removed or replaced.
        if listed.version != version:
            return False
        # Another version of the software may find a series in what this one ignored.
        if listed.num_ignored != 0 and listed.software_version != software_version:
            return False
        return all(self._is_settled(key, software_version) for key in listed.series_keys)

    def _is_settled(self, series_key: str, software_version: str) -> bool:
        known = self.series.get(series_key)
        return known is not None and known.is_settled({known.source_version}, software_version)


def read_previous_runs(run: Run) -> PreviousRuns:
    """Return the rows of the archive's committed runs, and the folders of the last whole listing.

    A run counts if its model was asked for by the same name: rows of another model, such as a
    challenger, do not settle a series for this run. Runs with a date in the future do not
    count.
    """
    committed = [known for known in known_runs(run.ledger, run.work_root) if known.is_committed]
    runs = [known for known in committed if known.is_of(run) and not known.is_ahead]
    if num_ahead := sum(known.is_ahead for known in committed):
        logger.warning("%d runs with a date in the future are left out", num_ahead)
    series = known_series(run.ledger, {known.run_id for known in runs})
    # A run with a limit has not listed all folders.
    whole = [known.run_id for known in runs if not known.description.get("limit")]
    folders = read_folders(run.work_root, whole[-1]) if whole else {}
    logger.info("%d series are known from %d runs", len(series), len(runs))
    return PreviousRuns(series=series, folders=folders)


def known_series(ledger: str, run_ids: set[str]) -> dict[str, KnownSeries]:
    """Return the newest row of each series of these runs by series key."""
    known = {}
    for table in iter_newest_rows(ledger, KNOWN_COLUMNS, run_ids):
        columns = [column.to_pylist() for column in table.columns]
        for key, version, status, software, series_uid in zip(*columns, strict=True):
            # Few distinct texts, each kept once for all series.
            shared = (sys.intern(status), sys.intern(software))
            known[key] = KnownSeries(version, *shared, series_uid)
    return known
