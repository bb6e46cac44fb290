"""A phantom as files: its NIfTI grid and its DICOM objects."""

import numpy as np
from pydicom.uid import generate_uid

from covtanet.ct.volume import SourceGrid
from covtanet.phantoms.dicom_writer import write_series
from covtanet.phantoms.phantom import Phantom

UID_PREFIX = "1.2.826.0.1.3680043.10.1471."
# Of the 64 characters of a UID: leaves room for a dot and the number of a slice.
MAX_UID_CHARACTERS = 58


def nifti_grid(phantom: Phantom) -> SourceGrid:
    """Return a phantom's grid in the usual order of NIfTI: x to the right, y to the front, z up."""
    num_slices, height, width = phantom.hu.shape
    affine = np.eye(4)
    affine[:3, 0] = -phantom.affine[:3, 2]
    affine[:3, 1] = -phantom.affine[:3, 1]
    affine[:3, 2] = phantom.affine[:3, 0]
    affine[:, 3] = phantom.affine @ np.array([0, height - 1, width - 1, 1.0])
    return SourceGrid(shape=(width, height, num_slices), affine=affine)


def dicom_objects(phantom: Phantom, seed: int) -> list[bytes]:
    """Return a phantom as a DICOM series, with UIDs that follow from the seed."""
    study_uid, series_uid = (
        generate_uid(prefix=UID_PREFIX, entropy_srcs=[f"phantom {seed}", kind])
        for kind in ("study", "series")
    )
    return write_series(
        phantom.hu,
        phantom.affine,
        study_uid=study_uid[:MAX_UID_CHARACTERS],
        series_uid=series_uid[:MAX_UID_CHARACTERS],
    )
