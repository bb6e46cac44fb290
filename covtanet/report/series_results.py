"""All DICOM objects of one screened series: key images, SEG and SR."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from covtanet.archive.manifest import Series
from covtanet.ct.masks import Mask
from covtanet.decoding.child_process import Child
from covtanet.decoding.slices import GreyWindow, read_grey_slices
from covtanet.errors import Reason, StudyError
from covtanet.report import dicom_results
from covtanet.report.dicom_results import Finding, to_bytes
from covtanet.report.dicom_source import quiet
from covtanet.report.key_images import key_images
from covtanet.report.key_slices import KeySlices
from covtanet.report.mask_frames import frames_of
from covtanet.report.source_series import SourceSlice, read_source

SEG = "lesion.seg.dcm"
SR = "measurements.sr.dcm"
KEY_IMAGE_PREFIX = "key-"
FIRST_KEY_IMAGE = f"{KEY_IMAGE_PREFIX}01.sc.dcm"
# As radiologists look at lungs: level -600, width 1500.
LUNG_WINDOW = GreyWindow(low_hu=-1350, high_hu=150)


@dataclass(frozen=True, kw_only=True)
class ScreenedMasks:
    """Masks of a series, in any axis order. affine: their index -> LPS mm."""

    lesion: Mask
    lung: Mask
    affine: NDArray[np.float64]


@quiet()
def result_objects(
    archive: str,
    series: Series,
    source_digest: str | None,
    masks: ScreenedMasks,
    finding: Finding,
    child: Child,
) -> list[tuple[str, bytes]]:
    """Return name and bytes of every object of a series, some 25 MB.

    The first key image comes after the others, then SEG, then SR: if they are written in this order
    and these three are there, all are. child: decodes the slices of key images.

    Raises:
        StudyError: source and masks do not belong together, or a slice cannot be decoded.
        NotExportedError: the series is gone, or has several slices in an object.
        OSError: storage fails, or the series is another than was screened.
    """
    key_slices = KeySlices(masks.lesion, masks.lung, masks.affine)
    slices = read_source(archive, series, source_digest, key_slices.is_key)
    headers = [item.header for item in slices]
    _check_count(headers, masks.lesion)
    lesion, lung = (frames_of(headers, mask, masks.affine) for mask in (masks.lesion, masks.lung))
    images = _key_images(slices, lesion, lung, finding, child)
    # The report refers to the segmentation, which therefore comes first.
    seg = dicom_results.segmentation(headers, lesion, lung, finding)
    report = dicom_results.structured_report(headers, seg, finding)
    return [*images, (SEG, to_bytes(seg)), (SR, to_bytes(report))]


def finding_of(row: dict[str, Any], run_id: str, series_key: str) -> Finding:
    """Return the values of a row that the objects hold.

    run_id, series_key: the UIDs of the objects follow from them.
    """
    return Finding(
        run_id=run_id,
        series_key=series_key,
        software_version=row["software_version"],
        model=f"{row['model_name']} {row['model_version']} {row['model_digest'][:12]}",
        lesion_volume_ml=row["lesion_volume_ml"],
        lung_volume_ml=row["lung_volume_ml"],
        involvement=row["involvement"],
        p_infected=row["p_infected"],
    )


def _check_count(headers: Sequence[pydicom.Dataset], mask: Mask) -> None:
    """Compare the number of slices with the mask, whatever the order of its axes.

    Raises:
        StudyError: ``missing_slices``.
    """
    num_slices = mask.size // (int(headers[0].Rows) * int(headers[0].Columns)) if headers else 0
    if not headers or len(headers) != num_slices:
        message = f"{len(headers)} slices, expected {num_slices} as in the mask"
        raise StudyError(Reason.MISSING_SLICES, message)


def _key_images(
    slices: Sequence[SourceSlice], lesion: Mask, lung: Mask, finding: Finding, child: Child
) -> list[tuple[str, bytes]]:
    """Return the key images of a series, the last first. lesion, lung: frames of all slices."""
    kept = [index for index, item in enumerate(slices) if item.data is not None]
    if not kept:
        raise StudyError(Reason.MISSING_POSITION, "no slice lies on the planes of its mask")
    headers = [item.header for item in slices]
    kept.sort(key=lambda index: _height_mm(headers[index]))
    objects = [item for index in kept if (item := slices[index].data) is not None]
    shape = (int(headers[0].Rows), int(headers[0].Columns))
    grey = read_grey_slices(child, objects, shape, LUNG_WINDOW)
    images = key_images(headers, kept, grey, lesion[kept], lung[kept], finding)
    return [(_name_of(image.InstanceNumber), to_bytes(image)) for image in reversed(images)]


def _name_of(number: int) -> str:
    return f"{KEY_IMAGE_PREFIX}{number:02d}.sc.dcm"


def _height_mm(header: pydicom.Dataset) -> float:
    """Return the position of a slice along its normal."""
    across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    return float(np.array(header.ImagePositionPatient, float) @ np.cross(across, down))
