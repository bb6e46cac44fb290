"""Write a run's results as DICOM: for every screened DICOM series a segmentation and a structured report.

python jobs/export.py --ledger URI [--run RUN_ID] [--results URI] [--series SERIES_KEY ...]

The run must have kept results (jobs/screen.py --results), and its archive must be where and as it was: a series that
was changed or replaced since is refused, by the digest of its content. Written beside them:
RESULTS/RUN_ID/SERIES_KEY/lesion.seg.dcm (segments lesion and lung) and measurements.sr.dcm (TID 1500). Objects that are
there are left alone. Enhanced multi-frame CT is not exported. Exit codes: 0 all written, 3 nothing to export, 4 some
could not be.

Research use only, not a medical device.
"""

import gzip
import hashlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import ray
from cluster import connect, parser, place, start_logging

from covtanet import storage
from covtanet.ct.dicom_head import DEFLATED, transfer_syntax
from covtanet.ct.volume import LPS_TO_RAS
from covtanet.data import manifest
from covtanet.errors import ConfigError, StudyError
from covtanet.report import dicom_results
from covtanet.screening import heads, view
from covtanet.screening.child_process import Limits, header_reader

logger = logging.getLogger("covtanet.export")
SEG, SR = "lesion.seg.dcm", "measurements.sr.dcm"
HEX = re.compile(r"[0-9a-f]+")
# If the kernel cannot shut it in, the run has decoded all the same, as its site decided.
READER_LIMITS = Limits(memory_mib=512, timeout_s=60, allow_weak=True)


def main() -> int:
    """Export what was asked for."""
    options = parser(__doc__)
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix of the ledger")
    options.add_argument("--run", default="", help="run id; default: the newest committed run")
    options.add_argument("--results", default="", help="where the run wrote results; default: LEDGER/_results")
    options.add_argument("--series", action="append", default=[], help="series key; default: every DICOM series")
    arguments = options.parse_args()
    start_logging()
    try:
        ledger = place(arguments.ledger, "--ledger")
        results = place(arguments.results, "--results") if arguments.results else storage.join(ledger, "_results")
        rows = chosen(ledger, arguments.run, arguments.series)
        connect()
    except ConfigError as error:
        logger.error("%s", error)
        return 3
    found: Counter[str] = Counter()
    for row in ray.data.from_items(rows).map(partial(export, results=results), num_cpus=1).iter_rows():
        found[row["outcome"]] += 1
        if row["outcome"] not in ("written", "there already"):
            logger.warning("series %s: %s", row["series_key"], row["outcome"])
    logger.info("%s", ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items())))
    return 0 if set(found) <= {"written", "there already"} else 4


def chosen(ledger: str, run_id: str, keys: list[str]) -> list[dict[str, Any]]:
    """Screened DICOM series of a run.

    Raises:
        ConfigError: where there is none.
    """
    committed = view.committed_files(ledger)
    if not committed:
        raise ConfigError("no run is committed in this ledger")
    rows = view.read(view.file_of(ledger, run_id) if run_id else committed[-1]).to_pylist()
    found = [
        row
        for row in rows
        if row["status"] == "screened" and row["source_format"] == "dicom" and (not keys or row["series_key"] in keys)
    ]
    if not found:
        raise ConfigError("this run has no screened DICOM series of those asked for")
    return found


def export(row: dict[str, Any], results: str) -> dict[str, Any]:
    """Write one series' objects; its outcome in a few words that name nobody."""
    if not all(HEX.fullmatch(row[name]) for name in ("run_id", "series_key")):  # they become a place on a disk
        return {"series_key": "", "outcome": "run_id or series_key is not a digest in hex"}
    folder = storage.join(results, row["run_id"], row["series_key"])
    targets = [storage.join(folder, name) for name in (SEG, SR)]
    outcome = "written"
    if all(storage.exists(target) for target in targets):
        outcome = "there already"
    else:
        try:
            for target, data in zip(targets, made(row, folder), strict=True):
                storage.write_bytes(target, data)
        except StudyError as error:
            outcome = error.reason
        except storage.ObjectChangedError:
            outcome = "changed since it was screened"
        except OSError as error:
            outcome = f"storage: {type(error).__name__}"
    return {"series_key": row["series_key"], "outcome": outcome}


def made(row: dict[str, Any], folder: str) -> tuple[bytes, bytes]:
    """SEG and SR of a row.

    Raises:
        StudyError: where source and masks do not belong together.
        OSError: where either is gone.
    """
    masks = [
        nib.Nifti1Image.from_bytes(gzip.decompress(storage.read_bytes(storage.join(folder, f"{name}_mask.nii.gz"))))
        for name in ("lesion", "lung")
    ]
    headers = source_headers(row)
    affine = LPS_TO_RAS @ masks[0].affine
    lesion, lung = (dicom_results.frames_of(headers, np.asarray(mask.dataobj) > 0, affine) for mask in masks)
    finding = dicom_results.Finding(
        run_id=row["run_id"],
        series_key=row["series_key"],
        software_version=row["software_version"],
        model=f"{row['model_name']} {row['model_version']} {row['model_digest'][:12]}",
        lesion_volume_ml=row["lesion_volume_ml"],
        lung_volume_ml=row["lung_volume_ml"],
        involvement=row["involvement"],
        p_infected=row["p_infected"],
    )
    seg = dicom_results.segmentation(headers, lesion, lung, finding)
    return dicom_results.to_bytes(seg), dicom_results.to_bytes(dicom_results.structured_report(headers, seg, finding))


def source_headers(row: dict[str, Any]) -> list[pydicom.Dataset]:
    """The headers of a row's slices, without pixels.

    They are parsed in this process, so only bytes that a sandboxed decoder has screened are: the digest of their
    content must be that of the row.

    Raises:
        StudyError: ``unreadable`` if the series is not one object a slice, ``unsupported_syntax`` if it is deflated.
        ObjectChangedError: if the series is not there as it was screened.
    """
    root = row["source_uri"].rstrip("/")
    listed = next((items for folder, items in storage.walk(root) if not folder), [])

    def read_head(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(storage.join(root, path), num_bytes)

    series, _ = manifest.scan_folder(
        "", listed, read_head, partial(heads.read_identities, header_reader(READER_LIMITS))
    )
    found = [each for each in series if each.series_uid == row["series_uid"]]
    if len(found) != 1 or len(found[0].objects) != row["num_slices"]:
        raise StudyError("unreadable", "the series is not there as it was screened, one object a slice")
    return [parsed(data) for data in screened_bytes(row, root, found[0].objects)]


def screened_bytes(row: dict[str, Any], root: str, objects: Sequence[storage.ObjectInfo]) -> Iterator[bytes]:
    """The bytes of each object, once all of them were found to be those that were screened.

    They are read twice, since a series may be larger than the memory of a worker, and compared once more.

    Raises:
        ObjectChangedError: if any is another.
    """
    digest, digests = storage.ContentDigest(), []
    for item in objects:
        one = hashlib.sha256()
        for chunk in digest.passing(item.path, storage.read_chunks(storage.join(root, item.path), item)):
            one.update(chunk)
        digests.append(one.digest())
    if digest.hexdigest() != row["source_digest"]:
        raise storage.ObjectChangedError("the series is another than was screened, by its content")
    for item, expected in zip(objects, digests, strict=True):
        data = b"".join(storage.read_chunks(storage.join(root, item.path), item))
        if hashlib.sha256(data).digest() != expected:
            raise storage.ObjectChangedError("an object changed while it was read")
        yield data


def parsed(data: bytes) -> pydicom.Dataset:
    """One object's header; a deflated object is refused, since a parser would inflate all of it."""
    try:
        syntax, _ = transfer_syntax(data)
    except ValueError as error:
        raise StudyError("unreadable", "an object has no end of its file meta") from error
    if syntax == DEFLATED:
        raise StudyError("unsupported_syntax", "a deflated object, expected uncompressed or lossless CT")
    return pydicom.dcmread(BytesIO(data), stop_before_pixels=True)


if __name__ == "__main__":
    sys.exit(main())
