"""Key images of a screened series: DICOM Secondary Capture with lung and lesion drawn over slices.

Many viewers show neither SEG nor SR; every viewer shows these. The pixels come from the sandbox.
"""

from collections.abc import Sequence

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from covtanet import drawing
from covtanet.report.dicom_results import DEVICE, MAKER, Finding
from covtanet.report.dicom_source import LOSSY, completed, quiet

WARNING = "Research use only"
LEGEND = "orange: lesion, blue: lung"
# Of the image's height.
FONT_SHARE, MIN_FONT_PX = 1 / 36, 9
# Letters of PatientOrientation along +x, +y, +z of LPS, and against them.
ALONG, AGAINST = "LPH", "RAF"


@quiet()
def key_images(
    headers: Sequence[pydicom.Dataset],
    indices: Sequence[int],
    grey: NDArray[np.uint8],
    lesion: NDArray[np.bool_],
    lung: NDArray[np.bool_],
    finding: Finding,
) -> list[hd.sc.SCImage]:
    """Return a Secondary Capture for each of some slices.

    headers: of all slices. indices: of the slices to show. grey, lesion, lung: of these slices,
    (slices, rows, columns).
    """
    described, *_ = sources = completed(headers)
    images = []
    for number, index in enumerate(indices, 1):
        shown = number - 1
        picture = with_warning(drawing.draw(grey[shown], lesion[shown], lung[shown]))
        image = hd.sc.SCImage.from_ref_dataset(
            ref_dataset=described,
            pixel_array=picture,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=patient_orientation(described),
            pixel_spacing=tuple(map(float, described.PixelSpacing)),
            series_instance_uid=finding.uid("key image series"),
            series_number=9003,
            sop_instance_uid=finding.uid(f"key image {number}"),
            instance_number=number,
            manufacturer=MAKER,
            manufacturer_model_name=DEVICE,
            software_versions=finding.software_version,
            series_description="Research use only: key images",
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
        image.copy_patient_and_study_information(described)
        _describe(image, headers[index], sources[index], finding)
        images.append(image)
    return images


def with_warning(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a coloured slice with the warning and the legend written into it."""
    image = Image.fromarray(picture)
    pen = ImageDraw.Draw(image)
    font_px = max(MIN_FONT_PX, round(image.height * FONT_SHARE))
    lines = (WARNING, LEGEND)
    for line, text in enumerate(lines):
        place = (font_px // 2, font_px // 2 + round(1.3 * line * font_px))
        # With an edge, which is readable on soft tissue, too.
        pen.text(
            place, text, fill=drawing.TEXT_RGB, font_size=font_px, stroke_width=1,
            stroke_fill=drawing.BACKGROUND_RGB,
        )  # fmt: skip
    return np.asarray(image)


def patient_orientation(header: pydicom.Dataset) -> tuple[str, str]:
    """Return the nearest directions of the patient along a row and down a column."""
    cosines = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    nearest = np.abs(cosines).argmax(axis=1)
    along_row, along_column = (
        (ALONG if cosine[axis] > 0 else AGAINST)[axis]
        for cosine, axis in zip(cosines, nearest, strict=True)
    )
    return along_row, along_column


def _describe(image: Dataset, header: Dataset, source: Dataset, finding: Finding) -> None:
    """Say of an image how it was made and from which slice.

    header: of the slice, as it is; source: the same, completed.
    """
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.BodyPartExamined = "CHEST"  # not paired, so that no Laterality is needed
    image.DerivationDescription = (
        f"Research use only. Lesion and lung drawn over a slice by {DEVICE}, {finding.model}"
    )[:1024]
    # It asks whether the pixels identify the patient, which the warning does not.
    has_annotation = str(header.get("BurnedInAnnotation", "")).strip() == "YES"
    image.BurnedInAnnotation = "YES" if has_annotation else "NO"
    if source.get("LossyImageCompression") == "01":
        for name in LOSSY:
            if name in source:
                setattr(image, name, source[name].value)
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    image.SourceImageSequence = [reference]
    series = Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ReferencedInstanceSequence = [reference]
    image.ReferencedSeriesSequence = [series]
