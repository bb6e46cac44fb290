"""The two tiny series with which the decoder's child process warms up, as one zip.

``covtanet/decoding/warm_up.zip`` holds them, made once by ``warm_up_zip``; a test compares. The
decoder reads package data, since it may not depend on phantoms.
"""

import io
import zipfile

import numpy as np

from covtanet.ct import nifti
from covtanet.ct.volume import SourceGrid
from covtanet.phantoms.dicom_writer import write_series

NUM_SLICES, SIDE_PX = 10, 64
SLICE_MM, PIXEL_MM = 10.0, 6.0


def warm_up_files() -> dict[str, bytes]:
    """Return a chest with two lungs as DICOM objects and as a NIfTI file, by name."""
    hu = np.full((NUM_SLICES, SIDE_PX, SIDE_PX), -1000, np.int16)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    body = ((y - 32) / 24) ** 2 + ((x - 32) / 28) ** 2 < 1
    left, right = (((y - 32) / 14) ** 2 + ((x - middle) / 9) ** 2 < 1 for middle in (20, 44))
    hu[:, body] = 40
    hu[:, left | right] = -850
    # Index (z, y, x) -> LPS mm.
    affine = np.array(
        [[0, 0, PIXEL_MM, 0], [0, PIXEL_MM, 0, 0], [SLICE_MM, 0, 0, 0], [0, 0, 0, 1]], float
    )
    objects = write_series(hu, affine, study_uid="1.2", series_uid="1.2.3")
    files = {f"{index}.dcm": data for index, data in enumerate(objects)}
    files["chest.nii.gz"] = nifti.write(hu, SourceGrid(shape=hu.shape, affine=affine))
    return files


def warm_up_zip() -> bytes:
    """Return the files as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in warm_up_files().items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
