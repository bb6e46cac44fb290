"""DICOM SEG, SR and key images of one screened series, from its row, its masks and its source."""

import gzip
import re
from typing import Any

import nibabel as nib
import numpy as np

from covtanet import storage
from covtanet.ct.volume import LPS_TO_RAS
from covtanet.decoding.slices import slice_reader
from covtanet.report.outcomes import outcome_of, outcome_of_work
from covtanet.report.sending import send_results
from covtanet.report.series_results import (
    FIRST_KEY_IMAGE,
    SEG,
    SR,
    ScreenedMasks,
    finding_of,
    result_objects,
)
from covtanet.report.source_series import READER_LIMITS, NotExportedError, find_series

WRITTEN = "written"
THERE_ALREADY = "there already"
# run_id and series_key become a folder.
SAFE_NAME = re.compile(r"[0-9A-Za-z]+")


def export_series(row: dict[str, Any], results: str, server: str = "") -> dict[str, Any]:
    """Write one series' objects, and send them; return its outcome, which names nobody.

    server: root of a DICOMweb server; empty sends nothing.

    Raises:
        AccessError, UnreachableError: store or server refuse the credentials, or the server does
            not answer, which concerns every series; so do errors of the sandbox.
    """
    key = row["series_key"]
    # Before any path is made of them.
    if not all(SAFE_NAME.fullmatch(row[name]) for name in ("run_id", "series_key")):
        return outcome_of("", "run_id or series_key is not of letters and digits")
    folder = storage.join(results, row["run_id"], key)

    def work() -> tuple[str, str]:
        outcome = _write(row, folder)
        return send_results(folder, server) if server else (outcome, "")

    return outcome_of_work(key, work)


def _write(row: dict[str, Any], folder: str) -> str:
    """Write a row's objects unless they are there; return ``written`` or ``there already``.

    Raises:
        StudyError: source and masks do not belong together.
        NotExportedError: there are no masks, or no slices of the kind that is exported.
        OSError: storage fails.
    """
    # An export that was killed between them writes all of them again.
    if all(storage.exists(storage.join(folder, name)) for name in (SEG, SR, FIRST_KEY_IMAGE)):
        return THERE_ALREADY
    for name, data in _make_objects(row, folder):
        storage.write_bytes(storage.join(folder, name), data)
    return WRITTEN


def _make_objects(row: dict[str, Any], folder: str) -> list[tuple[str, bytes]]:
    """Return name and bytes of every object of a row."""
    lesion_file, lung_file = (
        _read_mask(storage.join(folder, f"{name}_mask.nii.gz")) for name in ("lesion", "lung")
    )
    lesion, lung = (np.asarray(mask.dataobj) > 0 for mask in (lesion_file, lung_file))
    # The files of masks are NIfTI, in RAS; the matrix is its own inverse.
    affine = LPS_TO_RAS @ lesion_file.affine
    archive, series = find_series(row)
    return result_objects(
        archive,
        series,
        row["source_digest"],
        ScreenedMasks(lesion=lesion, lung=lung, affine=affine),
        finding_of(row, row["run_id"], row["series_key"]),
        slice_reader(READER_LIMITS),
    )


def _read_mask(uri: str) -> nib.Nifti1Image:
    """Return a mask that the run kept.

    Raises:
        NotExportedError: it kept none.
    """
    try:
        return nib.Nifti1Image.from_bytes(gzip.decompress(storage.read_bytes(uri)))
    except FileNotFoundError as error:
        raise NotExportedError("no_masks") from error
