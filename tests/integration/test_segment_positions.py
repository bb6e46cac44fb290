"""Patient positions of the segments of a DICOM SEG."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from export_rows import keep_masks, screened_row, write_objects
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy.spatial import KDTree

from covtanet.ct.volume import canonical_volume
from covtanet.phantoms.dicom_writer import write_series
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom
from covtanet.report import dicom_results, export, series_results


@pytest.fixture(scope="module")
def chest() -> Phantom:
    """Sparse, but with plausible steps along all axes, so that its coronal and sagittal slices are
    a series too.
    """
    return make_phantom(
        PhantomConfig(seed=5, involvement=0.1, size_px=96, num_slices=34, pixel_mm=3.7, slice_mm=8)
    )


def turned(chest: Phantom, plane: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """HU and mask of the left lung, (slices, rows, columns), in a plane, and the affine of their
    index -> LPS mm.
    """
    axes, flips, shear = {
        "axial": ((0, 1, 2), (), 1),
        "downwards": ((0, 1, 2), (0,), 1),
        "non-square": ((0, 1, 2), (), 2),
        "coronal": ((1, 0, 2), (1,), 1),
        "coronal-backwards": ((1, 0, 2), (0, 1), 1),
        "sagittal": ((2, 0, 1), (1,), 1),
        "sagittal-backwards": ((2, 0, 1), (0, 1), 1),
        "prone": ((0, 1, 2), (), 1),
        "oblique": ((0, 1, 2), (0,), 1),
    }[plane]
    half = chest.lung_mask.copy()
    half[:, :, : half.shape[2] // 2] = False  # one lung alone, so that a flip shows
    hu, mask = (np.flip(array.transpose(axes), flips)[:, ::shear] for array in (chest.hu, half))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = chest.affine[:3, axes], chest.affine[:3, 3]
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (chest.hu.shape[axes[axis]] - 1)
        affine[:3, axis] *= -1
    affine[:3, 1] *= shear
    cos, sin = np.cos(np.radians(8)), np.sin(np.radians(8))
    turn = {
        "prone": np.diag([-1.0, -1, 1]),
        "oblique": np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]]),
    }
    affine[:3] = turn.get(plane, np.eye(3)) @ affine[:3]
    return hu, mask, affine


def points_mm(seg: Dataset, segment: int) -> NDArray[np.float64]:
    """Centres of a segment's voxels in the patient, from the attributes of the SEG alone."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    across, down = np.array(
        shared.PlaneOrientationSequence[0].ImageOrientationPatient, float
    ).reshape(2, 3)
    down_mm, across_mm = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    found = []
    for pixels, frame in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            corner = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            rows, columns = np.nonzero(pixels)
            found.append(
                corner + rows[:, None] * down * down_mm + columns[:, None] * across * across_mm
            )
    return np.concatenate(found)


@pytest.mark.parametrize(
    "plane",
    [
        "axial",
        "downwards",
        "non-square",
        "coronal",
        "coronal-backwards",
        "sagittal",
        "sagittal-backwards",
        "prone",
        "oblique",
    ],
)
def test_segment_has_the_patient_positions_of_its_mask(
    plane: str, chest: Phantom, tmp_path: Path
) -> None:
    hu, mask, affine = turned(chest, plane)
    objects = write_series(hu, affine, study_uid="1.2.3", series_uid="1.2.3.4")
    shuffled = [objects[k] for k in np.random.default_rng(0).permutation(len(objects))]
    write_objects(tmp_path / "archive" / "scan", shuffled)
    row = screened_row(tmp_path / "archive")
    canonical = canonical_volume(mask.astype(np.int16), affine).hu > 0
    folder = keep_masks(row, tmp_path / "results", canonical, objects)
    assert export.export_series(row, str(tmp_path / "results"))["outcome"] == "written"
    found = points_mm(pydicom.dcmread(folder / series_results.SEG), dicom_results.LUNG)
    truth = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    distances_mm, nearest = map(np.asarray, KDTree(truth).query(found))
    assert len(set(nearest.tolist())) == len(found) == len(truth) > 1000
    assert distances_mm.max() < 0.05
