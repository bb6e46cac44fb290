"""Listing of an archive in local files: folders to read, then series and ignored objects.

The files hold everything that grows with the archive, so that the driver's memory does not.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ledger.incremental import PreviousRuns
from covtanet.ledger.row_groups import RowGroupWriter
from covtanet.ledger.run import Run
from covtanet.ledger.work import FOLDERS_SCHEMA, SERIES_PER_BATCH, ListedFolder, batched

FOLDERS_PER_SCAN, FOLDERS_PER_BATCH = 16, 1024
LISTING_SCHEMA = pa.schema([
    pa.field("folder", pa.string(), nullable=False),
    pa.field("objects", pa.list_(manifest.OBJECT_TYPE), nullable=False),
])  # fmt: skip
SCAN_SCHEMA = manifest.MANIFEST_SCHEMA.append(pa.field("is_ignored", pa.bool_(), nullable=False))


def list_folders(
    run: Run, listing: Path, folders: Path, previous_runs: PreviousRuns
) -> tuple[int, int]:
    """Write the folders to read with their objects, and the version of every folder.

    Returns the number of all folders, and of the objects in those to read.
    """
    num_folders = 0
    num_to_read = 0
    with (
        closing(RowGroupWriter(listing, LISTING_SCHEMA)) as to_read,
        closing(RowGroupWriter(folders, FOLDERS_SCHEMA)) as all_folders,
    ):
        for group in batched(storage.walk(run.archive), FOLDERS_PER_SCAN):
            rows = []
            versions = []
            for folder, objects in group:
                version = storage.version_digest(objects)
                versions.append({"folder": folder, "version": version, "series_keys": []})
                # Folders that have not changed are not read again.
                if not previous_runs.settles_folder(folder, version, run.software_version):
                    rows.append({"folder": folder, "objects": [_as_row(item) for item in objects]})
            to_read.write(pa.Table.from_pylist(rows, schema=LISTING_SCHEMA))
            # Every folder, also those that are skipped: the next run compares with them.
            all_folders.write(pa.Table.from_pylist(versions, schema=FOLDERS_SCHEMA))
            num_folders += len(group)
            num_to_read += sum(len(row["objects"]) for row in rows)
    return num_folders, num_to_read


def _as_row(item: storage.ObjectInfo) -> dict[str, Any]:
    return {"path": item.path, "num_bytes": item.num_bytes, "version": item.version}


def list_server(run: Run, series: Path, ignored: Path) -> Counter[str]:
    """Write the series of a DICOMweb server, and those that are ignored, to two files.

    Returns how often each series UID occurs.
    """
    # Only here: other archives do without its libraries.
    from covtanet.archive.dicomweb_series import IgnoredSeries, find_archive

    uid_counts: Counter[str] = Counter()
    num_series = 0
    with (
        closing(RowGroupWriter(series, manifest.MANIFEST_SCHEMA)) as series_file,
        closing(RowGroupWriter(ignored, manifest.IGNORED_SCHEMA)) as ignored_file,
    ):
        for group in batched(find_archive(run.archive, run.filters), SERIES_PER_BATCH):
            found = [item for item in group if not isinstance(item, IgnoredSeries)]
            rows = [item.to_row() for item in found]
            left_out = [asdict(item) for item in group if isinstance(item, IgnoredSeries)]
            series_file.write(pa.Table.from_pylist(rows, schema=manifest.MANIFEST_SCHEMA))
            ignored_file.write(pa.Table.from_pylist(left_out, schema=manifest.IGNORED_SCHEMA))
            uid_counts.update(item.series_uid for item in found)
            num_series += len(found)
            # A run of the new series alone needs more than its limit.
            if run.limit and not run.since_last and num_series >= run.limit:
                break
    return uid_counts


@dataclass(slots=True)
class FolderContent:
    """What a scan found in a folder."""

    series_keys: list[str] = field(default_factory=list)
    num_ignored: int = 0


def split_scan(
    rows: Iterator[dict[str, Any]], series: Path, ignored: Path, limit: int
) -> tuple[Counter[str], dict[str, FolderContent]]:
    """Write series and ignored objects of a scan to two files.

    limit: stop after so many series; 0 reads all. Returns how often each series UID occurs, and
    what is in each folder.
    """
    uid_counts: Counter[str] = Counter()
    scanned: defaultdict[str, FolderContent] = defaultdict(FolderContent)
    num_series = 0
    with (
        closing(RowGroupWriter(series, manifest.MANIFEST_SCHEMA)) as series_file,
        closing(RowGroupWriter(ignored, manifest.IGNORED_SCHEMA)) as ignored_file,
    ):
        for group in batched(rows, SERIES_PER_BATCH):
            series_rows = [row for row in group if not row["is_ignored"]]
            ignored_rows = [row for row in group if row["is_ignored"]]
            left_out = list(map(_as_ignored, ignored_rows))
            series_file.write(pa.Table.from_pylist(series_rows, schema=manifest.MANIFEST_SCHEMA))
            ignored_file.write(pa.Table.from_pylist(left_out, schema=manifest.IGNORED_SCHEMA))
            for row in series_rows:
                if row["series_uid"]:
                    uid_counts[row["series_uid"]] += 1
                scanned[_folder_of(row)].series_keys.append(row["series_key"])
            for row in ignored_rows:
                scanned[_folder_of(row)].num_ignored += 1
            num_series += len(series_rows)
            # After the group is written, hence at least so many series.
            if limit and num_series >= limit:
                break
    return uid_counts, scanned


def _folder_of(row: dict[str, Any]) -> str:
    path: str = row["source_path"]
    return path[: path.rfind("/") + 1]


def _as_ignored(row: dict[str, Any]) -> dict[str, Any]:
    return {"path": row["source_path"], "num_bytes": row["num_bytes"]}


def note_contents(
    run: Run, folders: Path, scanned: Mapping[str, FolderContent], previous_runs: PreviousRuns
) -> Counter[str]:
    """Add to each folder what is in it: by this scan, or by the last run if it was skipped.

    Returns how often each series UID occurs in skipped folders, as ledgers have it: a pseudonym if
    identities are hidden.
    """
    uid_counts: Counter[str] = Counter()
    noted = folders.with_suffix(".noted")
    with closing(RowGroupWriter(noted, FOLDERS_SCHEMA)) as writer:
        for batch in pq.ParquetFile(folders).iter_batches(FOLDERS_PER_BATCH):
            rows = batch.to_pylist()
            for row in rows:
                content = scanned.get(row["folder"])
                if content is not None:
                    row["series_keys"] = list(map(run.pseudonym, content.series_keys))
                    row["num_ignored"] = content.num_ignored
                    row["software_version"] = run.software_version
                    continue
                listed = previous_runs.folders.get(row["folder"], ListedFolder())
                row.update({**listed._asdict(), "version": row["version"]})
                known = (previous_runs.series.get(key) for key in listed.series_keys)
                uid_counts.update(each.series_uid for each in known if each and each.series_uid)
            writer.write(pa.Table.from_pylist(rows, schema=FOLDERS_SCHEMA))
    noted.replace(folders)
    return uid_counts


def read_series(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a local file, some at a time in memory."""
    for batch in pq.ParquetFile(path).iter_batches(SERIES_PER_BATCH):
        yield from batch.to_pylist()
