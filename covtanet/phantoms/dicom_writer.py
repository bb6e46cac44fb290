"""A volume as the objects of a DICOM CT series, for phantoms."""

from io import BytesIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

EMPTY = (
    "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID",
    "ReferringPhysicianName", "PositionReferenceIndicator",
)  # fmt: skip


# As most scanners store CT: the smallest HU becomes 0.
INTERCEPT = -1024


def write_series(
    hu: NDArray[np.int16],
    affine: NDArray[np.float64],
    *,
    study_uid: str,
    series_uid: str,
) -> list[bytes]:
    """Return a volume as DICOM objects, one per slice, Explicit VR Little Endian.

    hu: (z, y, x), whole numbers. affine: index (z, y, x) -> LPS mm.
    """
    objects = []
    for index, slice_hu in enumerate(hu):
        dataset = Dataset()
        _set_identity(dataset, study_uid, series_uid, index + 1)
        _set_position(dataset, affine, index)
        _set_pixels(dataset, slice_hu)
        objects.append(_encode(dataset))
    return objects


def _set_identity(dataset: Dataset, study_uid: str, series_uid: str, number: int) -> None:
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"{series_uid}.{number}"
    dataset.StudyInstanceUID = study_uid
    dataset.SeriesInstanceUID = series_uid
    dataset.FrameOfReferenceUID = f"{study_uid}.0"
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID = "PHANTOM"
    dataset.PatientName = "PHANTOM"
    for name in EMPTY:  # attributes that the standard asks for, even if they are empty
        setattr(dataset, name, "")
    dataset.Manufacturer = "covtanet phantom"
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = number


def _set_position(dataset: Dataset, affine: NDArray[np.float64], index: int) -> None:
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing_mm
    position = (affine @ np.array([index, 0, 0, 1.0]))[:3]
    cosines = (*directions[:, 2], *directions[:, 1])
    # Six digits fit into the 16 characters of a decimal string.
    dataset.ImagePositionPatient = [f"{mm:.6g}" for mm in position]
    dataset.ImageOrientationPatient = [f"{cosine:.6g}" for cosine in cosines]
    dataset.PixelSpacing = [f"{mm:.6g}" for mm in spacing_mm[1:]]
    dataset.SliceThickness = f"{spacing_mm[0]:.6g}"


def _set_pixels(dataset: Dataset, slice_hu: NDArray[np.int16]) -> None:
    dataset.Rows, dataset.Columns = slice_hu.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope = "1"
    dataset.RescaleIntercept = str(INTERCEPT)
    dataset.RescaleType = "HU"
    dataset.PixelData = (slice_hu.astype(np.int32) - INTERCEPT).astype("<i2").tobytes()


def _encode(dataset: Dataset) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()
