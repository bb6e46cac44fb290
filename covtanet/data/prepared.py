"""Volumes as the networks read them, made once: folds, phases, ablations and restarts all train on the same files.

A prepared volume is one Parquet file, a row per slice, named by a digest of everything that went into it; its metadata
say what was found, or why the volume was refused. Pure functions of bytes; who calls them decides where and when.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from covtanet.ct import nifti
from covtanet.ct.lung import find_lungs, measure_involvement
from covtanet.ct.volume import Volume
from covtanet.ct.window import (
    WindowConfig,
    mask_to_input,
    pixel_aspect,
    spread_slices,
    thin_slices,
    to_input,
)
from covtanet.data.folds import Case
from covtanet.data.labels import LabelledVolume, grade_of, label_values, severity_of
from covtanet.errors import Reason, StudyError

FORMAT_VERSION = 2
KEY_DIGITS = 16
GREY8 = (0.0, 255.0)
DESCRIPTION = b"covtanet.prepared"
# Why a volume or its mask is refused, beside the reasons of screening.
REASONS = (
    "missing",
    "storage",
    "internal_error",
    "mask_unreadable",
    "mask_mismatch",
    "not_grey8",
    "empty_lung_mask",
    "unlabelled",
)

SLICE_SCHEMA = pa.schema([
    pa.field("volume", pa.string(), nullable=False),
    pa.field("slice", pa.int32(), nullable=False),
    pa.field("levels", pa.binary(), nullable=False),
    pa.field("lesion", pa.binary()),
    pa.field("lesion_px", pa.int32()),
])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PreparedVolume:
    """One row of the data report. lesion_px: lesion pixels of each prepared slice, null without a lesion mask.

    involvement: of the lung by the masks, null where a mask is missing. spacing_mm: z, y, x; null where unknown.
    """

    key: str
    volume_path: str
    patient: str
    intensity: str
    diagnosis: str | None = None
    severity: str | None = None
    reason: str | None = None
    reason_detail: str | None = None
    num_slices: int | None = None
    spacing_mm: tuple[float, float, float] | None = None
    slices: tuple[int, ...] = ()
    lesion_px: tuple[int, ...] | None = None
    involvement: float | None = None
    source_digest: str | None = None
    size_px: int = 0

    @property
    def grade(self) -> str | None:
        """Normal, mild or severe; null where neither label nor masks say."""
        return grade_of(self.diagnosis, self.severity)

    @property
    def case(self) -> Case:
        """What the split needs to know."""
        return Case(
            key=self.key,
            patient=self.patient,
            grade=self.grade,
            has_lesion_mask=self.lesion_px is not None,
        )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Slices of one volume. levels: (S, H, W) uint16; lesion: (S, H, W) uint8 of 0 and 1, or null without a mask."""

    levels: NDArray[np.uint16]
    lesion: NDArray[np.uint8] | None


def volume_key(
    volume: LabelledVolume, versions: Sequence[str], window: WindowConfig, slice_step_mm: float
) -> str:
    """Digest of labels, source versions and preprocessing: what changes it makes another prepared volume."""
    parts = [
        FORMAT_VERSION,
        sorted(vars(volume).items()),
        list(versions),
        asdict(window),
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
    """Read a volume and its masks and make the network's input; a refused one comes back with its reason.

    contents: bytes by path.
    """
    found = PreparedVolume(
        key=key,
        volume_path=volume.volume_path,
        patient=volume.patient,
        intensity=volume.intensity,
        diagnosis=volume.diagnosis,
        severity=volume.severity,
        source_digest=hashlib.sha256(contents[volume.volume_path]).hexdigest(),
        size_px=window.size_px,
    )
    try:
        return _prepare(volume, found, contents, window, slice_step_mm)
    except StudyError as error:
        return replace(found, reason=error.reason, reason_detail=str(error)), None


def refused(
    volume: LabelledVolume, key: str, window: WindowConfig, reason: str, detail: str
) -> PreparedVolume:
    """The report row of a volume that could not be read at all; nothing is kept of it."""
    return PreparedVolume(
        key=key,
        volume_path=volume.volume_path,
        patient=volume.patient,
        intensity=volume.intensity,
        diagnosis=volume.diagnosis,
        severity=volume.severity,
        reason=reason,
        reason_detail=detail,
        size_px=window.size_px,
    )


def _prepare(
    volume: LabelledVolume,
    found: PreparedVolume,
    contents: dict[str, bytes],
    window: WindowConfig,
    slice_step_mm: float,
) -> tuple[PreparedVolume, Samples]:
    data = contents[volume.volume_path]
    intensity, ct = _read(data, volume.intensity)
    lesion = _mask(volume.lesion_mask_path, volume.lesion_labels, contents, ct)
    lung = _mask(volume.lung_mask_path, volume.lung_labels, contents, ct)
    shown, involvement = _lung_slices(ct, lesion, lung, intensity)
    has_spacing = nifti.has_spacing(data)
    # Nominal millimetres are none to thin slices by.
    chosen = thin_slices(shown, ct.spacing_mm[0], slice_step_mm if has_spacing else 0.0)[0]
    diagnosis, severity = _label(volume, lesion, involvement)
    low, high = GREY8 if intensity == "grey8" else (window.low_hu, window.high_hu)
    aspect = pixel_aspect(ct.spacing_mm)
    levels = to_input(ct.hu[chosen], replace(window, low_hu=low, high_hu=high), aspect)
    masks = None if lesion is None else mask_to_input(lesion[chosen], window, aspect)
    found = replace(
        found,
        intensity=intensity,
        diagnosis=diagnosis,
        severity=severity,
        num_slices=len(ct.hu),
        spacing_mm=ct.spacing_mm if has_spacing else None,
        slices=tuple(int(index) for index in chosen),
        lesion_px=None if masks is None else tuple(int(mask.sum()) for mask in masks),
        involvement=involvement,
    )
    return found, Samples(levels=levels, lesion=masks)


def _read(data: bytes, intensity: str) -> tuple[str, Volume]:
    if intensity == "hu":
        return "hu", nifti.read(data)
    try:
        return "grey8", nifti.read_grey8(data)
    except StudyError:
        if intensity == "grey8":
            raise
        return "hu", nifti.read(data)


def _mask(
    path: str | None, labels: str, contents: dict[str, bytes], ct: Volume
) -> NDArray[np.bool_] | None:
    if path is None:
        return None
    try:
        values = nifti.read_labels(contents[path])
    except StudyError as error:
        raise StudyError(Reason.MASK_UNREADABLE, f"the mask: {error}") from error
    if values.shape != ct.hu.shape:
        raise StudyError(
            Reason.MASK_MISMATCH,
            f"the mask has {values.shape} voxels (z, y, x), expected {ct.hu.shape}",
        )
    wanted = label_values(labels)
    return np.isin(values, wanted) if wanted else values > 0


def _lung_slices(
    ct: Volume, lesion: NDArray[np.bool_] | None, lung: NDArray[np.bool_] | None, intensity: str
) -> tuple[NDArray[np.intp], float | None]:
    """Slices that show lung, and involvement where both masks are known or can be found.

    Choice: grey values without a lung mask are taken whole, since lungs are found by their HU.
    """
    if lung is not None:
        whole = lung if lesion is None else lung | lesion
        if not whole.any():
            raise StudyError(Reason.EMPTY_LUNG_MASK, "the lung mask is empty")
        share = (
            None if lesion is None else float(np.count_nonzero(lesion) / np.count_nonzero(whole))
        )
        return np.flatnonzero(whole.any(axis=(1, 2))), share
    if intensity == "grey8":
        return np.arange(len(ct.hu)), None
    lungs = find_lungs(ct)
    voxel_ml = ct.voxel_ml if ct.has_known_spacing else None
    share = None if lesion is None else measure_involvement(lungs, lesion, voxel_ml).involvement
    return np.flatnonzero(lungs.lung_mask.any(axis=(1, 2))), share


def _label(
    volume: LabelledVolume, lesion: NDArray[np.bool_] | None, involvement: float | None
) -> tuple[str | None, str | None]:
    """The data set's label; where it has none, what the masks say."""
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


def to_parquet(found: PreparedVolume, samples: Samples | None) -> bytes:
    """A prepared volume as one file; a refused one has no rows."""
    table = SLICE_SCHEMA.empty_table()
    if samples is not None:
        masks = samples.lesion
        rows: dict[str, list[Any]] = {
            "volume": [found.key] * len(samples.levels),
            "slice": list(found.slices),
            "levels": [level.tobytes() for level in samples.levels],
            "lesion": [None] * len(samples.levels)
            if masks is None
            else [np.packbits(m).tobytes() for m in masks],
            "lesion_px": [None] * len(samples.levels)
            if found.lesion_px is None
            else list(found.lesion_px),
        }
        table = pa.Table.from_pydict(rows, schema=SLICE_SCHEMA)
    buffer = BytesIO()
    described = table.replace_schema_metadata({DESCRIPTION: to_json(found).encode()})
    pq.write_table(described, buffer, compression="zstd", compression_level=1)
    return buffer.getvalue()


def describe(data: bytes) -> PreparedVolume:
    """What a prepared file says of its volume."""
    return from_json(pq.read_schema(BytesIO(data)).metadata[DESCRIPTION])


def to_json(found: PreparedVolume) -> str:
    """A report row as text."""
    return json.dumps(asdict(found))


def from_json(text: str | bytes) -> PreparedVolume:
    """The inverse of ``to_json``."""
    values = json.loads(text)
    for name in ("slices", "lesion_px", "spacing_mm"):
        values[name] = None if values[name] is None else tuple(values[name])
    return PreparedVolume(**values)


def read_samples(data: bytes) -> Samples:
    """All slices of a prepared file."""
    found = describe(data)
    return samples_of(pq.read_table(BytesIO(data)), found.size_px)


def samples_of(table: pa.Table, size_px: int) -> Samples:
    """Rows of SLICE_SCHEMA to arrays; every row has a lesion mask, or none has."""
    shape = (size_px, size_px)
    levels = np.empty((table.num_rows, *shape), np.uint16)
    for index, packed in enumerate(table["levels"]):
        levels[index] = np.frombuffer(packed.as_buffer(), np.uint16).reshape(shape)
    if table["lesion"].null_count:
        return Samples(levels=levels, lesion=None)
    lesion = np.empty((table.num_rows, *shape), np.uint8)
    for index, packed in enumerate(table["lesion"]):
        bits = np.frombuffer(packed.as_buffer(), np.uint8)
        lesion[index] = np.unpackbits(bits, count=size_px * size_px).reshape(shape)
    return Samples(levels=levels, lesion=lesion)


def diagnosis_slices(samples: Samples, num_slices: int) -> NDArray[np.uint16]:
    """(num_slices, H, W): the prepared slices spread evenly, as the diagnosis reads them in screening."""
    return samples.levels[spread_slices(len(samples.levels), num_slices)]
