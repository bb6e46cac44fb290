"""Pictures of a series at a DICOMweb server, as its server renders them, and a study's labels.

For a person who waits: few retries and short time limits. Nothing here is stored or logged.

Not covered: a series whose server renders no PNG or JPEG.
"""

import os
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from covtanet.archive.source_slices import ROWS, SourceSlice, check_count, order_slices, slices_of
from covtanet.ct.dicom_image_type import is_localizer_type
from covtanet.storage.dicomweb import (
    IMAGE_TYPE,
    STUDY_UID,
    series_path,
    text_of,
    values_of,
)
from covtanet.storage.dicomweb_server import Attributes, DicomwebServer

# A person waits: a scheduled run may be more patient.
MAX_RETRIES, READ_TIMEOUT_S = 1, 20.0
MAX_SERVERS = 16
# A PNG of 512 x 512 has about 100 kB.
MAX_IMAGE_BYTES = 16 << 20
MAX_LABEL_CHARACTERS = 64
PNG = "image/png"
SIGNATURES = {b"\x89PNG\r\n\x1a\n": PNG, b"\xff\xd8\xff": "image/jpeg"}

# Tags of PS3.6.
STUDY_KEYWORD = "StudyInstanceUID"
STUDY_DATE, ACCESSION_NUMBER = "00080020", "00080050"


@dataclass(frozen=True, kw_only=True)
class StudyLabels:
    """Names by which a hospital knows a study; None if the server has none."""

    accession_number: str | None
    study_date: str | None
    """ISO 8601."""


def find_study_labels(root: str, study_uid: str) -> StudyLabels:
    """Return accession number and date of a study, by QIDO-RS.

    Raises:
        FileNotFoundError: the server does not have the study.
        OSError: it does not answer as it should.
    """
    query = [(STUDY_KEYWORD, study_uid), ("includefield", ACCESSION_NUMBER)]
    query += [("includefield", STUDY_DATE), ("limit", "1")]
    found = _server(root).get_json("studies", query)
    # A server that ignores the filter would name another patient.
    studies = [study for study in found if text_of(study, STUDY_UID) == study_uid]
    if not studies:
        raise FileNotFoundError("the DICOMweb server has no such study")
    accession_number = text_of(studies[0], ACCESSION_NUMBER).strip()[:MAX_LABEL_CHARACTERS]
    return StudyLabels(
        accession_number=accession_number or None,
        study_date=_as_date(text_of(studies[0], STUDY_DATE)),
    )


def _as_date(text: str) -> str | None:
    try:
        return datetime.strptime(text.strip(), "%Y%m%d").date().isoformat()
    except ValueError:
        return None


def find_slices(root: str, study_uid: str, series_uid: str) -> tuple[SourceSlice, ...]:
    """Return the images of a series from base to apex, without localizers among them.

    Raises:
        FileNotFoundError: the server does not have the series, or the series has no image.
        OSError: the server does not answer as it should.
    """
    instances = _server(root).get_json(f"{series_path(study_uid, series_uid)}/metadata")
    images = [instance for instance in instances if values_of(instance, ROWS)]
    # A series of localizers alone is shown.
    images = [image for image in images if not _is_localizer(image)] or images
    slices: list[SourceSlice] = []
    for image in images:
        slices += slices_of(image)
        check_count(len(slices))
    if not slices:
        raise FileNotFoundError("the DICOMweb server has no image of the series")
    return order_slices(slices)


def _is_localizer(image: Attributes) -> bool:
    return is_localizer_type([str(value) for value in values_of(image, IMAGE_TYPE)])


def render_slice(root: str, series: str, path: str, low_hu: int, high_hu: int) -> tuple[bytes, str]:
    """Return the picture of a slice and its media type, PNG or JPEG, by WADO-RS.

    series: path of the series. path: of the slice, as ``SourceSlice`` has it. HU from ``low_hu`` to
    ``high_hu`` have greys from black to white.

    Raises:
        FileNotFoundError: the server does not have the slice.
        OSError: it does not answer as it should.
    """
    # PS3.3 C.11.2.1.2: a linear window of centre c and width w is black at c - w / 2 and white at
    # c + w / 2 - 1. Orthanc 1.10 renders linear-exact wrongly.
    window = f"{(low_hu + high_hu + 1) / 2:g},{high_hu - low_hu + 1},linear"
    content = _server(root).get_bytes(
        f"{series}/{path}/rendered", PNG, [("window", window)], MAX_IMAGE_BYTES
    )
    return content, media_type_of(content)


def media_type_of(content: bytes) -> str:
    """Return the media type of a PNG or JPEG, by its first bytes.

    Raises:
        OSError: it is neither.
    """
    for signature, media_type in SIGNATURES.items():
        if content.startswith(signature):
            return media_type
    raise OSError("the DICOMweb server rendered neither PNG nor JPEG")


@lru_cache(MAX_SERVERS)
def _server(root: str) -> DicomwebServer:
    """Return the impatient connections of this process to a server."""
    return DicomwebServer(root, os.environ, max_retries=MAX_RETRIES, read_timeout_s=READ_TIMEOUT_S)
