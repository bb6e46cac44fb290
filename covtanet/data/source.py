"""A labelled volume in its own grid: its voxels and its masks, from the bytes of their files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct import nifti, picture
from covtanet.ct.masks import Mask
from covtanet.ct.volume import Volume
from covtanet.data.labels import GREY_STEPS, LabelledVolume, hu_of_greys, label_values
from covtanet.errors import Reason, StudyError


@dataclass(frozen=True, kw_only=True)
class SourceVolume:
    """A volume with its masks, which are (z, y, x) bool in the grid of the volume."""

    ct: Volume
    intensity: str
    """``hu``, or ``grey8`` if the values of ``ct`` are grey values without a line to HU."""
    lesion: Mask | None
    """Null without a lesion mask."""
    lung: Mask | None
    """Null without a lung mask."""


def paths_of(volume: LabelledVolume) -> list[str]:
    """Return the paths of a volume and of the masks that it has."""
    paths = (volume.volume_path, volume.lesion_mask_path, volume.lung_mask_path)
    return [path for path in paths if path]


def read_source(volume: LabelledVolume, contents: Mapping[str, bytes]) -> SourceVolume:
    """Read a volume and its masks.

    contents: bytes by path.

    Raises:
        StudyError: as ``nifti.read`` does, and ``not_grey8``, ``mask_unreadable`` or
            ``mask_mismatch``.
    """
    intensity, ct = _read(volume, contents[volume.volume_path])
    return SourceVolume(
        ct=ct,
        intensity=intensity,
        lesion=_mask(volume.lesion_mask_path, volume.lesion_labels, contents, ct),
        lung=_mask(volume.lung_mask_path, volume.lung_labels, contents, ct),
    )


def _is_picture(path: str) -> bool:
    return path.lower().endswith(picture.SUFFIXES)


def _read(volume: LabelledVolume, data: bytes) -> tuple[str, Volume]:
    """Return the kind of values, hu or grey8, and the volume."""
    intensity = volume.intensity
    ends = hu_of_greys(intensity)
    if _is_picture(volume.volume_path):
        if ends is None:
            raise StudyError(
                Reason.NOT_HU, f"a picture with intensity {intensity}, expected grey8:LOW:HIGH"
            )
        return "hu", picture.read(data, ends[0], _hu_per_grey(*ends))
    if ends is not None:
        return "hu", _read_by_line(data, *ends)
    if intensity == "hu":
        return "hu", nifti.read(data)
    try:
        # Grey values first: their reader refuses values outside 0..255, which HU have.
        return "grey8", nifti.read_grey8(data)
    except StudyError:
        if intensity == "grey8":
            raise
        return "hu", nifti.read(data)


def _hu_per_grey(low_hu: float, high_hu: float) -> float:
    return (high_hu - low_hu) / GREY_STEPS


def _read_by_line(data: bytes, low_hu: float, high_hu: float) -> Volume:
    """Read grey values and return the HU that they stand for."""
    volume = nifti.read_grey8(data)
    hu = volume.hu.astype(np.float32)
    hu *= np.float32(_hu_per_grey(low_hu, high_hu))
    hu += np.float32(low_hu)
    return replace(volume, hu=hu)


def _mask(path: str | None, labels: str, contents: Mapping[str, bytes], ct: Volume) -> Mask | None:
    if path is None:
        return None
    try:
        values = _read_mask(path, contents[path])
    except StudyError as error:
        raise StudyError(Reason.MASK_UNREADABLE, f"the mask: {error}") from error
    # Both (z, y, x).
    if values.shape != ct.hu.shape:
        raise StudyError(
            Reason.MASK_MISMATCH,
            f"the mask has {values.shape} voxels (z, y, x), expected {ct.hu.shape}",
        )
    selected = label_values(labels)
    return np.isin(values, selected) if selected else values > 0


def _read_mask(path: str, data: bytes) -> NDArray[Any]:
    return picture.read_grey(data) if _is_picture(path) else nifti.read_labels(data)
