"""Reading of NIfTI against nibabel, and of DICOM against SimpleITK."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK
from numpy.typing import NDArray

from benchmarks.measure import CORES, WORK, Result, side_by_side
from benchmarks.real_archive import real_ct
from covtanet.ct import dicom, nifti
from covtanet.ct.volume import SourceGrid
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import PhantomConfig, make_phantom

# A series of a patient, which may not be published; without it phantoms are measured.
REAL_SERIES = real_ct()
PHANTOM = PhantomConfig(involvement=0.3, size_px=512, num_slices=120, pixel_mm=0.7, slice_mm=2.25)
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Series:
    """A DICOM series on disk, and its volume in HU (z, y, x)."""

    name: str
    folder: Path
    hu: NDArray[np.int16]
    affine: NDArray[np.float64]


def measure() -> list[Result]:
    """(d) our readers against others, one thread."""
    work = WORK / "decode"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    series = _real_series() if REAL_SERIES.exists() else _phantom_series(work / "dicom")
    path = work / "volume.nii.gz"
    path.write_bytes(
        nifti.write(series.hu, SourceGrid(shape=series.hu.shape, affine=series.affine))
    )

    def read_with_itk() -> object:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series.folder)))
        return SimpleITK.GetArrayFromImage(reader.Execute())

    def read_dicom() -> object:
        return dicom.read_series([file.read_bytes() for file in series.folder.iterdir()])

    spent = side_by_side(
        {
            "nibabel": lambda: nib.load(path).get_fdata(),
            "nifti": lambda: nifti.read(path.read_bytes()),
            "itk": read_with_itk,
            "dicom": read_dicom,
        },
        rounds=ROUNDS,
    )
    by_nifti = spent["nibabel"] / spent["nifti"]
    by_dicom = spent["itk"] / spent["dicom"]
    name = f"DICOM ({series.name}), one thread, against SimpleITK"
    return [
        Result("d", ".nii.gz against nibabel get_fdata", f"{by_nifti:.2f} x", ">= 1.7 x"),
        Result("d", name, f"{by_dicom:.2f} x", ">= 1 x"),
    ]


def _real_series() -> Series:
    objects = [path.read_bytes() for path in sorted(REAL_SERIES.iterdir())]
    volume = dicom.read_series(objects, num_threads=CORES)
    return Series(
        name="a real series, JPEG Lossless",
        folder=REAL_SERIES,
        hu=volume.hu,
        affine=volume.affine,
    )


def _phantom_series(folder: Path) -> Series:
    phantom = make_phantom(PHANTOM)
    folder.mkdir()
    for index, data in enumerate(dicom_objects(phantom, 1)):
        (folder / f"{index:04d}.dcm").write_bytes(data)
    return Series(
        name="a phantom, uncompressed", folder=folder, hu=phantom.hu, affine=phantom.affine
    )
