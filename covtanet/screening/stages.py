"""The stages of screening, row to row: decode and prepare, predict, measure. Pure but for reading the archive.

Between stages a series is one row:

decode_and_prepare  in: a manifest row; out: series_key, record, slices, chosen, masks
predict             in: that; out: series_key, record, slices, chosen, masks, lesion_levels
measure             in: that; out: a row of the ledger, and the masks where results are kept

``record`` is the ledger row so far and when work on it began, as JSON; it alone is filled where a series is refused.
``slices`` is what the network reads, (S, size, size) uint16, on the z indices ``chosen``. ``masks`` packs lung and
chest cavity in the source's grid. The raw volume never leaves ``decode_and_prepare``.
"""

import json
import logging
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from covtanet import storage
from covtanet.ct import dicom, lung, nifti
from covtanet.ct.volume import SourceGrid, Volume
from covtanet.ct.window import WindowConfig, from_input, thin_slices, to_input
from covtanet.data.manifest import Series, series_from_row
from covtanet.errors import StudyError
from covtanet.screening.records import FAILED, PROBABILITY_STEPS, REJECTED, SCREENED

if TYPE_CHECKING:  # workers that only decode or measure do without torch, whose import costs them seconds
    from covtanet.screening.predictor import Predictor

logger = logging.getLogger(__name__)

Row = dict[str, Any]
NUM_FETCH_THREADS = 8
PACKAGE = Path(__file__).parents[1]
DETAILS = {
    "container": "an archive file, expected its members as objects",
    "unreadable": "no DICOM header that names a series",
}


@dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """What steers a screening beside the model; part of the run's identity.

    group_by: ``folder``, or ``uid`` for archives that spread a series over folders.
    slice_step_mm: segmented slices lie at least this far apart.
    severe_involvement: the paper's rule, severe above a quarter of the lung.
    """

    group_by: str = "folder"
    slice_step_mm: float = 2.5
    max_batch_slices: int = 16
    lesion_threshold: float = 0.5
    infected_threshold: float = 0.5
    severe_threshold: float = 0.5
    severe_involvement: float = 0.25
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.group_by not in ("folder", "uid"):
            raise ValueError(f"group_by is {self.group_by}, expected folder or uid")
        if self.slice_step_mm < 0 or self.max_batch_slices < 1:
            raise ValueError("slice_step_mm must be at least 0 and max_batch_slices at least 1")


def for_model(config: ScreeningConfig, preprocessing: dict[str, Any]) -> ScreeningConfig:
    """The configuration with the distance of slices that a model was trained with, where the model says."""
    return replace(config, slice_step_mm=preprocessing.get("slice_step_mm", config.slice_step_mm))


@dataclass(frozen=True, kw_only=True)
class StoredMasks:
    """Lung and cavity of one volume with its grid, small enough to travel."""

    lungs: lung.Lungs
    source: SourceGrid
    spacing_mm: tuple[float, float, float]

    def pack(self) -> bytes:
        """Compress to a few bytes per slice."""
        header = {
            "shape": self.lungs.lung_mask.shape,
            "is_partial": self.lungs.is_partial,
            "source_shape": self.source.shape,
            "source_affine": self.source.affine.tolist(),
            "spacing_mm": self.spacing_mm,
        }
        bits = np.packbits(np.stack([self.lungs.lung_mask, self.lungs.cavity_mask]))
        return json.dumps(header).encode() + b"\n" + zlib.compress(bits.tobytes(), 1)

    @classmethod
    def unpack(cls, data: bytes) -> "StoredMasks":
        """The inverse of ``pack``."""
        line, _, packed = data.partition(b"\n")
        header = json.loads(line)
        shape = tuple(header["shape"])
        bits = np.frombuffer(zlib.decompress(packed), np.uint8)
        masks = np.unpackbits(bits, count=2 * int(np.prod(shape))).view(bool).reshape(2, *shape)
        return cls(
            lungs=lung.Lungs(lung_mask=masks[0], cavity_mask=masks[1], is_partial=header["is_partial"]),
            source=SourceGrid(shape=tuple(header["source_shape"]), affine=np.array(header["source_affine"])),
            spacing_mm=tuple(header["spacing_mm"]),
        )


def decode_and_prepare(row: Row, *, archive: str, window: WindowConfig, config: ScreeningConfig) -> Row:
    """Fetch one series, decode it, find its lungs and make what the network reads."""
    series = series_from_row(row)
    record = _identity(series, row, archive)
    record["started_at"] = time.time()
    started = time.perf_counter()
    empty = {
        "series_key": row["series_key"],
        "slices": np.empty((0, window.size_px, window.size_px), np.uint16),
        "chosen": np.empty(0, np.int64),
        "masks": b"",
    }

    def prepare() -> Row:
        if series.reason:
            raise StudyError(series.reason, DETAILS[series.reason])
        contents = fetch(series, archive)
        folder = series.source_path[: series.source_path.rfind("/") + 1]
        record["source_digest"] = storage.content_digest([(p.removeprefix(folder), data) for p, data in contents])
        volume = decode(series, [data for _, data in contents])
        del contents
        _describe(record, volume)
        masks, chosen, slices = prepare_volume(volume, window, config)
        record["qc_flags"] += ["partial_lungs"] if masks.lungs.is_partial else []
        record["num_slices_segmented"] = len(chosen)
        return {"chosen": chosen.astype(np.int64), "slices": slices, "masks": masks.pack()}

    filled = _at_boundary(record, prepare)
    record["decode_s"] = time.perf_counter() - started
    return {**empty, **filled, "record": json.dumps(record)}


def predict(row: Row, predictor: "Predictor") -> Row:
    """Segment and diagnose one prepared series; a refused one passes through."""
    record = json.loads(row["record"])
    started = time.perf_counter()
    lesion_levels = np.empty((0, *row["slices"].shape[1:]), np.uint8)

    def answer() -> Row:
        prediction = predictor.predict(row["slices"])
        record["p_infected"], record["p_severe"] = prediction.p_infected, prediction.p_severe
        return {"lesion_levels": prediction.lesion_levels}

    filled = _at_boundary(record, answer) if len(row["slices"]) else {}
    record["predict_s"] = time.perf_counter() - started if filled else None
    return {**row, "lesion_levels": lesion_levels, **filled, "record": json.dumps(record)}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A finished series: its ledger fields, and its masks where it was screened."""

    record: Row
    masks: StoredMasks | None = None
    involvement: lung.Involvement | None = None


def measure(row: Row, config: ScreeningConfig) -> Measured:
    """Lesion and lung in the source's grid, volumes and involvement, diagnosis and severity."""
    record = json.loads(row["record"])
    if not len(row["lesion_levels"]):
        return Measured(record=_without_measurements(record))
    kept: list[tuple[StoredMasks, lung.Involvement]] = []

    def evaluate() -> Row:
        masks = StoredMasks.unpack(row["masks"])
        lesion_mask, lesion_slices = lesion_in_source(row["lesion_levels"], row["chosen"], masks, config)
        voxel_ml = float(np.prod(masks.spacing_mm)) / 1000.0
        found = lung.measure_involvement(masks.lungs, lesion_mask, voxel_ml)
        record.update(conclude(record["p_infected"], record["p_severe"], found.involvement, config))
        record.update(
            lesion_volume_ml=found.lesion_volume_ml,
            lung_volume_ml=found.lung_volume_ml,
            involvement=found.involvement,
            lesion_slices=lesion_slices,
        )
        kept.append((masks, found))
        return {"status": SCREENED}

    record.update(_at_boundary(record, evaluate))
    if not kept:
        return Measured(record=_without_measurements(record))
    return Measured(record=record, masks=kept[0][0], involvement=kept[0][1])


def conclude(
    p_infected: float, p_severe: float, involvement: float | None, config: ScreeningConfig
) -> dict[str, str | float | None]:
    """Diagnosis and severity from the network, and severity by the paper's rule. Severity of a normal one is null."""
    infected = p_infected >= config.infected_threshold
    return {
        "diagnosis": "infected" if infected else "normal",
        "p_severe": p_severe if infected else None,
        "severity": ("severe" if p_severe >= config.severe_threshold else "mild") if infected else None,
        "severity_by_involvement": None
        if involvement is None
        else ("severe" if involvement > config.severe_involvement else "mild"),
    }


def fetch(series: Series, archive: str) -> list[tuple[str, bytes]]:
    """Read a series' objects: (path relative to the archive, bytes)."""
    uris = [storage.join(archive, item.path) for item in series.objects]
    if len(uris) == 1:
        return [(series.objects[0].path, storage.read_bytes(uris[0]))]
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        return list(zip((item.path for item in series.objects), pool.map(storage.read_bytes, uris), strict=True))


def decode(series: Series, contents: list[bytes]) -> Volume:
    """Read a series' bytes as one volume. Raises StudyError."""
    if series.source_format == "nifti":
        return nifti.read(contents[0])
    return dicom.read_series(contents)


def prepare_volume(
    volume: Volume, window: WindowConfig, config: ScreeningConfig
) -> tuple[StoredMasks, NDArray[np.intp], NDArray[np.uint16]]:
    """Find the lungs, choose the slices to segment and make the network's input. Raises StudyError."""
    lungs = lung.find_lungs(volume)
    lung_slices = np.flatnonzero(lungs.lung_mask.any(axis=(1, 2)))
    chosen, _ = thin_slices(lung_slices, volume.spacing_mm[0], config.slice_step_mm)
    masks = StoredMasks(lungs=lungs, source=volume.source, spacing_mm=volume.spacing_mm)
    return masks, chosen, to_input(volume.hu[chosen], window)


def lesion_in_source(
    lesion_levels: NDArray[np.uint8], chosen: NDArray[np.int64], masks: StoredMasks, config: ScreeningConfig
) -> tuple[NDArray[np.bool_], int]:
    """The lesion mask on the volume's grid, and in how many segmented slices it shows within the chest.

    Each slice between segmented ones repeats the nearest of them, which weights every segmented slice by the extent
    it stands for.
    """
    shape = masks.lungs.lung_mask.shape
    threshold = np.float32(config.lesion_threshold * PROBABILITY_STEPS)
    by_slice = np.empty((len(chosen), *shape[1:]), bool)
    for index, level in enumerate(lesion_levels):
        by_slice[index] = from_input(level.astype(np.float32), shape[1:]) >= threshold
    inside = masks.lungs.lung_mask[chosen] | masks.lungs.cavity_mask[chosen]
    lesion_slices = int((by_slice & inside).any(axis=(1, 2)).sum())
    lesion_mask = np.zeros(shape, bool)
    lung_slices = np.flatnonzero(masks.lungs.lung_mask.any(axis=(1, 2)))
    nearest = np.abs(lung_slices[:, None] - chosen[None, :]).argmin(axis=1)
    lesion_mask[lung_slices] = by_slice[nearest]
    return lesion_mask, lesion_slices


def _identity(series: Series, row: Row, archive: str) -> Row:
    return {
        "series_key": row["series_key"],
        "source_uri": storage.join(archive, series.source_path) if series.source_path else f"{archive}/",
        "source_format": series.source_format,
        "source_version": row["source_version"],
        "source_digest": None,
        "num_objects": row["num_objects"],
        "num_bytes": row["num_bytes"],
        "study_uid": series.study_uid,
        "series_uid": series.series_uid,
        "qc_flags": list(series.qc_flags),
        "status": SCREENED,
    }


def _describe(record: Row, volume: Volume) -> None:
    record["num_slices"] = len(volume.hu)
    record["spacing_z_mm"], record["spacing_y_mm"], record["spacing_x_mm"] = volume.spacing_mm
    record["qc_flags"] += volume.qc_flags


def _at_boundary(record: Row, work: Callable[[], Row]) -> Row:
    """Do one stage's work; turn what goes wrong into the record's status and reason.

    A StudyError is the input's fault. An OSError is the storage's. Anything else is ours: its type and place are
    logged under the series key, never its text, which may quote the input.
    """
    try:
        return work()
    except StudyError as error:
        record.update(status=REJECTED, reason=error.reason, reason_detail=str(error))
    except OSError as error:
        record.update(status=FAILED, reason="storage", reason_detail=f"storage: {type(error).__name__}")
    except Exception as error:
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if PACKAGE in Path(frame.filename).parents]
        where = f"{type(error).__name__} at {Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}"
        logger.error("series %s: internal error, %s", record["series_key"], where)
        record.update(status=FAILED, reason="internal_error", reason_detail=where)
    return {}


PREDICTIONS = (
    "num_slices", "num_slices_segmented", "spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "p_infected", "p_severe",
)  # fmt: skip


def _without_measurements(record: Row) -> Row:
    """A series that was not screened carries no measurement."""
    return {**record, **dict.fromkeys(PREDICTIONS)}


def config_values(window: WindowConfig, config: ScreeningConfig) -> dict[str, Any]:
    """Everything that can change a prediction, as plain values, for the configuration's digest."""
    return {"window": asdict(window), "screening": asdict(config)}
