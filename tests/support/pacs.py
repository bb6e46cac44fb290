"""A PACS for tests: its password, the phantoms in it, and series that are no chest CT."""

from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.uid import (
    CTImageStorage,
    EncapsulatedPDFStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.services import write_private
from infra.pacs.orthanc import USER, Orthanc

# It must not be found in any log.
PASSWORD = "canary-of-the-pacs"
# Of a caller of the endpoint who may not store results.
READER_TOKEN = "token-of-the-reader"
SEED = 61
NUM_SERIES = 4
# Kinds that a run counts and does not screen.
IGNORED = ["CT localizer", "CT, but no CT images", "DOC"]


def credentials(folder: Path) -> dict[str, str]:
    """Return the variables by which jobs reach the PACS; the password lies in a file."""
    path = folder / "pacs_password"
    write_private(path, PASSWORD)
    return {"COVTANET_DICOMWEB_USER": USER, "COVTANET_DICOMWEB_PASSWORD_FILE": str(path)}


def phantom_series(number: int) -> list[bytes]:
    """Return the objects of one of the phantoms, 20 slices of 128 x 128."""
    (config,) = configs(1, SEED + number, size_px=128, num_slices=20)
    return dicom_objects(make_phantom(config), SEED + number)


def uids_of(content: bytes) -> tuple[str, str, str]:
    """Return study, series and instance UID of an object."""
    header = pydicom.dcmread(BytesIO(content), stop_before_pixels=True)
    return header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID


def edited(content: bytes, series: str, **values: object) -> bytes:
    """Return an object as that of another series of its study, with other values.

    series: name of the series, which its UID follows from; that of the instance from both.
    """
    dataset = pydicom.dcmread(BytesIO(content))
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[dataset.SeriesInstanceUID, series])
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[dataset.SOPInstanceUID, series])
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def fill(orthanc: Orthanc) -> None:
    """Load the phantoms, and one series of each ignored kind."""
    for number in range(NUM_SERIES):
        orthanc.load(phantom_series(number))
    content = phantom_series(0)[0]
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    orthanc.load([
        edited(content, "localizer", ImageType=localizer, SOPClassUID=CTImageStorage),
        edited(content, "dose", SOPClassUID=SecondaryCaptureImageStorage),
        edited(content, "report", Modality="DOC", SOPClassUID=EncapsulatedPDFStorage),
    ])  # fmt: skip
