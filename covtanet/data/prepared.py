"""Prepared volumes: labelled volumes as the networks read them, made once.

Folds, phases, ablations and restarts train on the same files. A prepared volume is named by a
digest of everything that went into it; a refused one has its reason. Pure functions of bytes:
reading and writing storage is left to the caller, the file's layout to ``prepared_file``.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.lung import Lungs, find_lungs, measure_involvement
from covtanet.ct.lung_box import SliceBox
from covtanet.ct.volume import Volume
from covtanet.ct.window import (
    WindowConfig,
    box_of,
    mask_to_input,
    pixel_aspect,
    spread_slices,
    thin_slices,
    to_input,
    with_neighbours,
)
from covtanet.data.folds import Case
from covtanet.data.labels import GREY_STEPS, LabelledVolume, grade_of, severity_of
from covtanet.data.source import read_source
from covtanet.errors import Reason, StudyError

# Part of every key: another version prepares all volumes again.
FORMAT_VERSION = 3
# Hexadecimal: 64 bits of the digest.
KEY_DIGITS = 16
# Mapped to 0..1 without a window: half of the paper's second data set is windowed at its source.
GREY8 = (0.0, float(GREY_STEPS))


@dataclass(frozen=True, kw_only=True)
class PreparedVolume:
    """Description of a prepared or refused volume; one row of the data report."""

    key: str
    volume_path: str
    patient: str
    intensity: str
    """``hu`` or ``grey8``; as the data set has it for a volume that was refused before it was
    read."""
    diagnosis: str | None = None
    severity: str | None = None
    reason: str | None = None
    """Code of the refusal; null of a prepared volume."""
    reason_detail: str | None = None
    num_slices: int | None = None
    spacing_mm: tuple[float, float, float] | None = None
    """Spacing along z, y and x; null if the file does not say."""
    slices: tuple[int, ...] = ()
    """Indices of the prepared slices in the volume."""
    lesion_px: tuple[int, ...] | None = None
    """Lesion pixels of each prepared slice; null without a lesion mask."""
    involvement: float | None = None
    """Involvement by the masks; null if a mask is missing."""
    source_digest: str | None = None
    size_px: int = 0
    is_continuous: bool = True
    """Whether successive slices are neighbours in one patient."""

    @property
    def grade(self) -> str | None:
        """Normal, mild or severe; null if neither label nor masks say."""
        return grade_of(self.diagnosis, self.severity)

    @property
    def case(self) -> Case:
        """The values that the split into folds reads."""
        return Case(
            key=self.key,
            patient=self.patient,
            grade=self.grade,
            has_lesion_mask=self.lesion_px is not None,
            is_continuous=self.is_continuous,
        )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Slices of one volume."""

    levels: NDArray[np.uint16]
    """Intensities (S, H, W) in steps of 1/65535."""
    lesion: NDArray[np.uint8] | None
    """Lesion masks (S, H, W) of 0 and 1; null without a mask."""


def volume_key(
    volume: LabelledVolume, versions: Sequence[str], window: WindowConfig, slice_step_mm: float
) -> str:
    """Return a digest of labels, source versions and preprocessing.

    Neighbours have no part in it: they are gathered from the prepared slices.
    """
    parts = [
        FORMAT_VERSION,
        sorted(vars(volume).items()),
        list(versions),
        asdict(replace(window, num_neighbours=0)),
        slice_step_mm,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:KEY_DIGITS]


def prepare(
    volume: LabelledVolume,
    key: str,
    contents: dict[str, bytes],
    window: WindowConfig,
    slice_step_mm: float,
) -> tuple[PreparedVolume, Samples | None]:
    """Read a volume and its masks and make the network's input.

    contents: bytes by path. A refused volume has a reason and no samples.
    """
    digest = hashlib.sha256(contents[volume.volume_path]).hexdigest()
    description = replace(_unread(volume, key, window), source_digest=digest)
    try:
        return _prepare(volume, description, contents, window, slice_step_mm)
    except StudyError as error:
        return replace(description, reason=error.reason, reason_detail=str(error)), None


def refused(
    volume: LabelledVolume, key: str, window: WindowConfig, reason: str, detail: str
) -> PreparedVolume:
    """Return the description of a volume that could not be read at all."""
    return replace(_unread(volume, key, window), reason=reason, reason_detail=detail)


def _unread(volume: LabelledVolume, key: str, window: WindowConfig) -> PreparedVolume:
    """Return the data set's entries of a volume, before its bytes are read."""
    return PreparedVolume(
        key=key,
        volume_path=volume.volume_path,
        patient=volume.patient,
        intensity=volume.intensity,
        diagnosis=volume.diagnosis,
        severity=volume.severity,
        size_px=window.size_px,
        is_continuous=volume.slice_order == "continuous",
    )


def _prepare(
    volume: LabelledVolume,
    description: PreparedVolume,
    contents: dict[str, bytes],
    window: WindowConfig,
    slice_step_mm: float,
) -> tuple[PreparedVolume, Samples]:
    source = read_source(volume, contents)
    ct = source.ct
    lesion = source.lesion
    lung = source.lung
    intensity = source.intensity
    lungs = None
    # Neither grey values nor slices of several patients show lungs that could be found. Labelled
    # lungs are searched for the box alone.
    is_searched = intensity == "hu" and description.is_continuous
    if is_searched and (lung is None or window.crops_to_lungs):
        lungs = find_lungs(ct)
    lung_slices, involvement = _lung_slices(ct, lesion, lung, lungs)
    # A spacing without a unit is no distance: then every slice is taken.
    step_mm = slice_step_mm if ct.has_known_spacing else 0.0
    # Slices as in screening, a step apart at least.
    chosen = thin_slices(lung_slices, ct.spacing_mm[0], step_mm)[0]
    diagnosis, severity = _label(volume, lesion, involvement)
    # Chosen slices alone are resized, (S, size, size).
    aspect = pixel_aspect(ct.spacing_mm)
    box = _box(lungs, lung, lesion, window, aspect)
    samples = _samples(ct, chosen, lesion, intensity, window, aspect, box)
    lesion_px = None
    if samples.lesion is not None:
        lesion_px = tuple(int(mask.sum()) for mask in samples.lesion)
    description = replace(
        description,
        intensity=intensity,
        diagnosis=diagnosis,
        severity=severity,
        num_slices=len(ct.hu),
        spacing_mm=ct.spacing_mm if ct.has_known_spacing else None,
        slices=tuple(int(index) for index in chosen),
        lesion_px=lesion_px,
        involvement=involvement,
    )
    return description, samples


def _samples(
    ct: Volume,
    chosen: NDArray[np.intp],
    lesion: NDArray[np.bool_] | None,
    intensity: str,
    window: WindowConfig,
    aspect: float,
    box: SliceBox | None,
) -> Samples:
    low, high = GREY8 if intensity == "grey8" else (window.low_hu, window.high_hu)
    levels = to_input(ct.hu[chosen], replace(window, low_hu=low, high_hu=high), aspect, box)
    if lesion is None:
        return Samples(levels=levels, lesion=None)
    return Samples(levels=levels, lesion=mask_to_input(lesion[chosen], window, aspect, box))


def _box(
    lungs: Lungs | None,
    lung: NDArray[np.bool_] | None,
    lesion: NDArray[np.bool_] | None,
    window: WindowConfig,
    aspect: float,
) -> SliceBox | None:
    """Return the box that slices are cropped to; null for whole slices.

    Of HU the box of the lungs that screening finds, so that the network sees the same in both; of
    grey values and single slices that of the labelled lungs. Choice: without a lung mask these are
    taken whole.
    """
    if lungs is not None:
        return box_of(lungs.lung_mask, window, aspect)
    if lung is None:
        return None
    return box_of(lung if lesion is None else lung | lesion, window, aspect)


def _lung_slices(
    ct: Volume,
    lesion: NDArray[np.bool_] | None,
    lung: NDArray[np.bool_] | None,
    lungs: Lungs | None,
) -> tuple[NDArray[np.intp], float | None]:
    """Return the slices that show lung, and the involvement if a lesion mask is there.

    lung: the labelled lungs; null without a label. lungs: those found by their HU; null of grey
    values and single slices. Choice: without a lung mask all slices of these are taken.
    """
    if lung is not None:
        return _slices_of_mask(lung, lesion)
    if lungs is None:
        # No lung is found and no involvement is measured.
        return np.arange(len(ct.hu)), None
    voxel_ml = ct.voxel_ml if ct.has_known_spacing else None
    involvement = None
    if lesion is not None:
        involvement = measure_involvement(lungs, lesion, voxel_ml).involvement
    return np.flatnonzero(lungs.lung_mask.any(axis=(1, 2))), involvement


def _slices_of_mask(
    lung: NDArray[np.bool_], lesion: NDArray[np.bool_] | None
) -> tuple[NDArray[np.intp], float | None]:
    # Some data sets leave lesions out of their lung masks.
    whole = lung if lesion is None else lung | lesion
    if not whole.any():
        raise StudyError(Reason.EMPTY_LUNG_MASK, "the lung mask is empty")
    involvement = None
    if lesion is not None:
        involvement = float(np.count_nonzero(lesion) / np.count_nonzero(whole))
    # (z, y, x) -> (z,)
    return np.flatnonzero(whole.any(axis=(1, 2))), involvement


def _label(
    volume: LabelledVolume, lesion: NDArray[np.bool_] | None, involvement: float | None
) -> tuple[str | None, str | None]:
    """Return diagnosis and severity: the data set's labels, or those that the masks give."""
    diagnosis, severity = volume.diagnosis, volume.severity
    if diagnosis is None and lesion is not None:
        diagnosis = "infected" if lesion.any() else "normal"
    if diagnosis == "infected" and severity is None and involvement is not None:
        severity = severity_of(involvement)
    if diagnosis is None and lesion is None:
        raise StudyError(
            Reason.UNLABELLED, "neither a diagnosis nor a lesion mask, expected one of them"
        )
    return diagnosis, severity


def diagnosis_slices(
    samples: Samples, num_slices: int, num_neighbours: int = 0, *, is_continuous: bool = True
) -> NDArray[np.uint16]:
    """Return the prepared slices spread evenly, as screening diagnoses them.

    Returns (num_slices, 1 + 2 n, H, W): with their neighbours as channels, or n copies of the slice
    itself on either side if successive slices are not neighbours in one patient.
    """
    chosen = spread_slices(len(samples.levels), num_slices)
    if is_continuous:
        return with_neighbours(samples.levels, chosen, num_neighbours)
    return np.repeat(samples.levels[chosen][:, None], 1 + 2 * num_neighbours, axis=1)
