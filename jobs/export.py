"""Write a run's results as DICOM: for every screened DICOM series a segmentation and a structured report.

python jobs/export.py --ledger URI [--run RUN_ID] [--results URI] [--series SERIES_KEY ...]

The run must have kept results (jobs/screen.py --results), and its archive must be where and as it was: a series that
was changed or replaced since is refused, by the digest of its content. Written beside them:
RESULTS/RUN_ID/SERIES_KEY/lesion.seg.dcm (segments lesion and lung) and measurements.sr.dcm (TID 1500). Objects that are
there are left alone. What the source leaves out, as after de-identification, is empty in them. Enhanced multi-frame CT
is not exported.

Every series has an outcome, and the last line counts them: written, there already, a reason of docs/input.md, or

enhanced_multi_frame  not exported, see above
no_masks              the run kept no masks of the series
vanished, changed     the series is gone, or another than was screened
hidden                the ledger hides where the series lies (deidentify = true)
storage               an object could not be read or written, after retries
worker_died           the series ended its worker, twice
internal_error        a fault of this software; type and place are in the log, under the series key

Exit codes:

0  all written, now or before
2  usage
3  refused to start, or nothing to export
4  some could not be exported, the others are
1  storage refuses us or does not answer, or anything else; the same command continues

Research use only, not a medical device.
"""

import gzip
import hashlib
import logging
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import ray
from cluster import connect, parser, place, start_logging

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct.dicom_frames import ENHANCED_CLASSES
from covtanet.ct.dicom_headers import (
    DEFLATED,
    MAGIC,
    MAGIC_AT,
    data_start,
    has_magic,
    transfer_syntax,
)
from covtanet.ct.dicom_image_type import is_localizer
from covtanet.ct.volume import LPS_TO_RAS
from covtanet.decoding import headers as heads
from covtanet.decoding.child_process import header_reader
from covtanet.decoding.process import Limits
from covtanet.errors import ConfigError, Reason, Status, StudyError, error_location
from covtanet.ledger.read import committed_files, find_run_file, read_run
from covtanet.report import dicom_results
from covtanet.report.dicom_source import quiet

logger = logging.getLogger("covtanet.export")
SEG, SR = "lesion.seg.dcm", "measurements.sr.dcm"
SAFE_NAME = re.compile(r"[0-9A-Za-z]+")
# If the kernel cannot shut it in, the run has decoded all the same, as its site decided.
READER_LIMITS = Limits(memory_mib=512, timeout_s=60, allow_weak=True)
DONE = {"written", "there already"}
ROWS_PER_CPU = 2


class NotExportedError(Exception):
    """A series is not exported, by no fault of its own; the message is its outcome."""


def main() -> int:
    """Export what was asked for."""
    options = parser(__doc__)
    options.add_argument("--ledger", required=True, help="folder or s3:// prefix of the ledger")
    options.add_argument("--run", default="", help="run id; default: the newest committed run")
    options.add_argument(
        "--results", default="", help="where the run wrote results; default: LEDGER/_results"
    )
    options.add_argument(
        "--series", action="append", default=[], help="series key; default: every DICOM series"
    )
    arguments = options.parse_args()
    start_logging()
    try:
        ledger = place(arguments.ledger, "--ledger")
        results = (
            place(arguments.results, "--results")
            if arguments.results
            else storage.join(ledger, "_results")
        )
        rows = chosen(ledger, arguments.run, arguments.series)
        connect()
        return concluded(export_all(rows, results))
    except ConfigError as error:
        logger.error("%s", error)
        return 3
    except OSError as error:  # its text may name a study
        logger.error("storage: %s; the same command continues", kind_of(error))
        return 1
    except ray.exceptions.RayError as error:  # as may that of a worker's error
        logger.error("Ray: %s; the same command continues", kind_of(error))
        return 1
    finally:
        ray.shutdown()


def kind_of(error: BaseException) -> str:
    """The type of an error, or of the worker's error within it."""
    return type(getattr(error, "cause", None) or error).__name__


def concluded(found: Iterable[dict[str, Any]]) -> int:
    """Log every series that was not written and the count of outcomes; return the exit code."""
    counts: Counter[str] = Counter()
    for row in found:
        key, outcome = row["series_key"], row["outcome"]
        counts[outcome] += 1
        if outcome not in DONE:
            detail = f", {row['detail']}" if row["detail"] else ""
            logger.warning(
                "series %s: %s%s",
                key,
                outcome,
                detail,
                extra={"series_key": key, "reason": outcome},
            )
    logger.info("%s", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 0 if set(counts) <= DONE else 4


def export_all(rows: Sequence[dict[str, Any]], results: str) -> Iterator[dict[str, Any]]:
    """The outcome of every row, as it ends; a series that ends its worker twice is one of them.

    Raises:
        OSError, RayError: an error that is no matter of one series, as ``export`` raises it.
    """
    task = ray.remote(num_cpus=1, max_retries=1)(export)
    num_at_a_time = ROWS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0)))
    waiting, running = iter(rows), {}
    while True:
        for row in islice(waiting, num_at_a_time - len(running)):
            running[task.remote(row, results)] = row["series_key"]
        if not running:
            return
        (ended,), _ = ray.wait(list(running), num_returns=1)
        key = running.pop(ended)
        try:
            yield ray.get(ended)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            yield outcome_of(key, "worker_died")


def chosen(ledger: str, run_id: str, keys: list[str]) -> list[dict[str, Any]]:
    """Screened DICOM series of a run.

    Raises:
        ConfigError: where there is none.
    """
    committed = committed_files(ledger)
    if not committed:
        raise ConfigError("no run is committed in this ledger")
    rows = read_run(find_run_file(ledger, run_id) if run_id else committed[-1]).to_pylist()
    found = [
        row
        for row in rows
        if row["status"] == Status.SCREENED
        and row["source_format"] == "dicom"
        and (not keys or row["series_key"] in keys)
    ]
    if not found:
        raise ConfigError("this run has no screened DICOM series of those asked for")
    return found


def export(row: dict[str, Any], results: str) -> dict[str, Any]:
    """Write one series' objects; return its outcome, which names nobody.

    Raises:
        AccessError: storage refuses us altogether, which is no matter of one series.
    """
    if not all(
        SAFE_NAME.fullmatch(row[name]) for name in ("run_id", "series_key")
    ):  # they become a place on a disk
        return outcome_of("", "run_id or series_key is not of letters and digits")
    key = row["series_key"]
    try:
        return outcome_of(key, write(row, storage.join(results, row["run_id"], key)))
    except StudyError as error:
        return outcome_of(key, error.reason, str(error))
    except NotExportedError as error:
        return outcome_of(key, str(error))
    except storage.AccessError:
        raise
    except storage.ObjectChangedError:
        return outcome_of(key, "changed")
    except OSError as error:
        return outcome_of(key, "storage", type(error).__name__)
    except Exception as error:  # ours; its text may quote the source
        return outcome_of(key, "internal_error", place_of(error))


def place_of(error: Exception) -> str:
    """Type of an error and the line of ours that it came through, in the package or here; not its text."""
    found = error_location(error)
    here = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.endswith("export.py")
    ]
    if not found.endswith("no line of covtanet") or not here:
        return found
    return f"{type(error).__name__} at jobs/export.py:{here[-1].lineno}"


def outcome_of(series_key: str, outcome: str, detail: str = "") -> dict[str, Any]:
    """A series' outcome, and what the log says beside it."""
    return {"series_key": series_key, "outcome": outcome, "detail": detail}


def write(row: dict[str, Any], folder: str) -> str:
    """Write a row's objects unless they are there; ``written`` or ``there already``."""
    targets = [storage.join(folder, name) for name in (SEG, SR)]
    if all(storage.exists(target) for target in targets):
        return "there already"
    with quiet():
        objects = made(row, folder)
    for target, data in zip(targets, objects, strict=True):
        storage.write_bytes(target, data)
    return "written"


def made(row: dict[str, Any], folder: str) -> tuple[bytes, bytes]:
    """SEG and SR of a row.

    Raises:
        StudyError: source and masks do not belong together.
        NotExportedError: there are no masks, or no slices of the kind that is exported.
        OSError: storage fails.
    """
    masks = [read_mask(storage.join(folder, f"{name}_mask.nii.gz")) for name in ("lesion", "lung")]
    headers = source_headers(row)
    num_slices = math.prod(masks[0].shape) // (int(headers[0].Rows) * int(headers[0].Columns))
    if len(headers) != num_slices:
        raise StudyError(
            Reason.MISSING_SLICES, f"{len(headers)} slices, expected {num_slices} as in the mask"
        )
    affine = LPS_TO_RAS @ masks[0].affine
    lesion, lung = (
        dicom_results.frames_of(headers, np.asarray(mask.dataobj) > 0, affine) for mask in masks
    )
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
    return dicom_results.to_bytes(seg), dicom_results.to_bytes(
        dicom_results.structured_report(headers, seg, finding)
    )


def read_mask(uri: str) -> nib.Nifti1Image:
    """A mask that the run kept.

    Raises:
        NotExportedError: it kept none.
    """
    try:
        return nib.Nifti1Image.from_bytes(gzip.decompress(storage.read_bytes(uri)))
    except FileNotFoundError as error:
        raise NotExportedError("no_masks") from error


def source_headers(row: dict[str, Any]) -> list[pydicom.Dataset]:
    """The headers of the slices that a row is about, without pixels.

    They are parsed in this process, so only bytes that a sandboxed decoder has screened are: the digest of their
    content must be that of the row. Localizers and repeated objects are left out, as they were when it was screened.

    Raises:
        StudyError: ``unsupported_syntax`` for a deflated object.
        NotExportedError: the series is gone or hidden, or has several slices in an object.
        ObjectChangedError: the series is another than was screened.
    """
    if not is_place(row["source_uri"]):
        raise NotExportedError("hidden")
    root = row["source_uri"].rstrip("/")
    try:
        listed = next((items for folder, items in storage.walk(root) if not folder), [])
        objects = objects_of(row["series_uid"], root, listed)
        headers = [parsed(data) for data in screened_bytes(row, root, objects)]
    except FileNotFoundError as error:
        raise NotExportedError("vanished") from error
    if any(header.get("SOPClassUID") in ENHANCED_CLASSES for header in headers):
        raise NotExportedError("enhanced_multi_frame")
    return [header for header in headers if not is_localizer(header)]


def is_place(uri: str) -> bool:
    """Whether a row says where its series lies, and not only a keyed digest of it."""
    return storage.is_s3(uri) or uri.startswith("/")


def objects_of(
    series_uid: str, root: str, listed: Sequence[storage.ObjectInfo]
) -> Sequence[storage.ObjectInfo]:
    """The objects of a folder that belong to a series.

    Raises:
        NotExportedError: there are none.
    """

    def read_head(path: str, num_bytes: int) -> bytes:
        return storage.read_bytes(storage.join(root, path), num_bytes)

    identify = partial(heads.read_identities, header_reader(READER_LIMITS))
    series, _ = manifest.scan_folder("", listed, read_head, identify)
    found = next((each.objects for each in series if each.series_uid == series_uid), ())
    if not found:
        raise NotExportedError("vanished")
    return found


def screened_bytes(
    row: dict[str, Any], root: str, objects: Sequence[storage.ObjectInfo]
) -> Iterator[bytes]:
    """The bytes of each different object, once all of them were found to be those that were screened.

    They are read twice, since a series may be larger than the memory of a worker, and compared once more.

    Raises:
        ObjectChangedError: if any is another.
    """
    digest, digests = storage.ContentDigest(), []
    for item in objects:
        one = hashlib.sha256()
        for chunk in digest.tee(
            item.path, storage.read_chunks(storage.join(root, item.path), item)
        ):
            one.update(chunk)
        digests.append(one.digest())
    if digest.hexdigest() != row["source_digest"]:
        raise storage.ObjectChangedError("the series is another than was screened, by its content")
    different = dict(
        zip(reversed(digests), reversed(objects), strict=True)
    )  # of equal objects the first
    for expected, item in reversed(different.items()):
        data = b"".join(storage.read_chunks(storage.join(root, item.path), item))
        if hashlib.sha256(data).digest() != expected:
            raise storage.ObjectChangedError("an object changed while it was read")
        yield data


def parsed(data: bytes) -> pydicom.Dataset:
    """One object's header; a deflated object is refused, since a parser would inflate all of it."""
    try:
        syntax, _ = transfer_syntax(data)
    except ValueError as error:
        raise StudyError(Reason.UNREADABLE, "an object has no end of its file meta") from error
    if syntax == DEFLATED:
        raise StudyError(
            Reason.UNSUPPORTED_SYNTAX, "a deflated object, expected uncompressed or lossless CT"
        )
    if not has_magic(data):  # an object that was screened may lack the preamble
        data = bytes(MAGIC_AT) + MAGIC + data[data_start(data) :]
    return pydicom.dcmread(BytesIO(data), stop_before_pixels=True)


if __name__ == "__main__":
    sys.exit(main())
