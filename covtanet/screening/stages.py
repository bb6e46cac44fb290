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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from covtanet import storage
from covtanet.archive.manifest import Series, series_from_row
from covtanet.ct import lung
from covtanet.ct.limits import MAX_SLICES
from covtanet.ct.window import WindowConfig, from_input, pixel_aspect
from covtanet.decoding import prepare as decode
from covtanet.decoding.prepare import Prepared
from covtanet.decoding.process import Limits
from covtanet.decoding.stored_masks import StoredMasks
from covtanet.errors import (
    DecoderError,
    QcFlag,
    Reason,
    SandboxClosedError,
    Status,
    StudyError,
    StudyTimeoutError,
    UnavailableError,
    WeakSandboxError,
    error_location,
)
from covtanet.inference.quantization import PROBABILITY_STEPS

if (
    TYPE_CHECKING
):  # workers that only decode or measure do without torch, whose import costs them seconds
    from covtanet.inference.predictor import Answers

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Decoder = Callable[[str, Iterable[Iterable[bytes]]], Prepared]
NUM_FETCH_THREADS = 8
SMALL_OBJECT_BYTES = 8 << 20
WORKER_DIED = {
    "status": Status.FAILED, "reason": "worker_died", "reason_detail": "worker_died: as often as a series is tried"
}  # fmt: skip
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
    decode_memory_mib, decode_timeout_s: what decoding one series may take; 3 GiB hold the largest volume that is read,
    60 s come on top of what its size explains.
    max_series_mib: a series of more bytes is refused unread. worker_timeout_s: a worker that a series takes this
    long is ended.
    deidentify: the ledger has keyed digests in place of names and UIDs.
    allow_weak_sandbox: decode even if the kernel cannot shut the decoder in; no part of the run's
    identity, since it changes no prediction.
    """

    group_by: str = "folder"
    slice_step_mm: float = 2.5
    max_batch_slices: int = 16
    lesion_threshold: float = 0.5
    infected_threshold: float = 0.5
    severe_threshold: float = 0.5
    severe_involvement: float = 0.25
    engine: str = "auto"
    decode_memory_mib: int = 3072
    decode_timeout_s: float = 60.0
    max_series_mib: int = 1024
    worker_timeout_s: float = 1800.0
    deidentify: bool = False
    allow_weak_sandbox: bool = False

    @property
    def decode_limits(self) -> Limits:
        """Limits of the decoder's child process."""
        return Limits(
            memory_mib=self.decode_memory_mib,
            timeout_s=self.decode_timeout_s,
            allow_weak=self.allow_weak_sandbox,
        )

    def __post_init__(self) -> None:
        if self.group_by not in ("folder", "uid"):
            raise ValueError(f"group_by is {self.group_by}, expected folder or uid")
        if self.slice_step_mm < 0 or self.max_batch_slices < 1:
            raise ValueError("slice_step_mm must be at least 0 and max_batch_slices at least 1")
        if self.worker_timeout_s <= 0:
            raise ValueError("worker_timeout_s must be above 0")
        if self.decode_memory_mib < 256 or self.decode_timeout_s <= 0 or self.max_series_mib < 1:
            raise ValueError(
                "decode_memory_mib must be at least 256, decode_timeout_s above 0, max_series_mib above 0"
            )


def for_model(config: ScreeningConfig, preprocessing: dict[str, Any]) -> ScreeningConfig:
    """The configuration with the distance of slices that a model was trained with, where the model says."""
    return replace(config, slice_step_mm=preprocessing.get("slice_step_mm", config.slice_step_mm))


def in_process(window: WindowConfig, config: ScreeningConfig) -> Decoder:
    """A decoder without a sandbox, for bytes that are trusted, and to compare with."""

    def prepare(source_format: str, objects: Iterable[Iterable[bytes]]) -> Prepared:
        contents = (b"".join(chunks) for chunks in objects)
        return decode.prepare(source_format, contents, window, config.slice_step_mm)

    return prepare


def decode_and_prepare(
    row: Row, *, archive: str, window: WindowConfig, config: ScreeningConfig, decoder: Decoder
) -> Row:
    """Fetch one series, decode it, find its lungs and make what the network reads."""
    series = series_from_row(row)
    record = _identity(series, row, archive)
    record["started_at"] = time.time()
    started = time.perf_counter()

    def prepare() -> Row:
        if series.reason:
            raise StudyError(Reason(series.reason), DETAILS[series.reason])
        if row["num_bytes"] > config.max_series_mib << 20:
            raise StudyError(
                Reason.TOO_LARGE,
                f"{row['num_bytes']} bytes, expected at most {config.max_series_mib} MiB",
            )
        if row["num_objects"] > MAX_SLICES:
            raise StudyError(
                Reason.TOO_LARGE, f"{row['num_objects']} objects, expected at most {MAX_SLICES}"
            )
        digest = storage.ContentDigest()
        objects = fetch(series, archive, digest)
        prepared, is_awaited = None, True
        try:
            prepared = decoder(series.source_format, objects)
        except StudyError as error:
            if error.reason != Reason.DECODE_CRASH:
                raise
        except SandboxClosedError:
            is_awaited = False
            raise
        finally:
            rest = objects if is_awaited else ()
            for chunks in rest:  # a refusal may come before the end; the digest is of all bytes
                for _ in chunks:
                    pass
            if digest.num_objects == len(series.objects):
                record["source_digest"] = digest.hexdigest()
        if prepared is None:  # once more: the machine may have killed the decoder, not the series
            prepared = decoder(
                series.source_format, fetch(series, archive, storage.ContentDigest())
            )
        record["num_slices"], record["num_slices_segmented"] = (
            prepared.num_slices,
            len(prepared.chosen),
        )
        record["spacing_z_mm"], record["spacing_y_mm"], record["spacing_x_mm"] = prepared.spacing_mm
        record["qc_flags"] += prepared.qc_flags
        return {"chosen": prepared.chosen, "slices": prepared.slices, "masks": prepared.masks}

    filled = at_boundary(record, prepare)
    record["decode_s"] = time.perf_counter() - started
    return {**_nothing_prepared(record, window), **filled, "record": json.dumps(record)}


def _nothing_prepared(record: Row, window: WindowConfig) -> Row:
    """The row behind ``decode_and_prepare`` of a series that it does not hand on."""
    return {
        "series_key": record["series_key"],
        "slices": np.empty((0, window.size_px, window.size_px), np.uint16),
        "chosen": np.empty(0, np.int64),
        "masks": b"",
        "record": json.dumps(record),
    }


def gave_up(row: Row, window: WindowConfig, archive: str) -> Row:
    """The row of a series whose worker died of it as often as is tried, in place of decoding it."""
    record = _identity(series_from_row(row), row, archive)
    record.update(started_at=time.time(), **WORKER_DIED)
    return _nothing_prepared(record, window)


def without_answer(row: Row) -> Row:
    """The row of a prepared series whose worker died of it as often as is tried, in place of predicting it."""
    return {
        **row,
        "lesion_levels": _no_levels(row),
        "record": json.dumps({**json.loads(row["record"]), **WORKER_DIED}),
    }


def _no_levels(row: Row) -> NDArray[np.uint8]:
    return np.empty((0, *row["slices"].shape[1:]), np.uint8)


def predict(row: Row, predictor: "Answers") -> Row:
    """Segment and diagnose one prepared series; a refused one passes through."""
    record = json.loads(row["record"])
    started = time.perf_counter()

    def answer() -> Row:
        prediction = predictor.predict(row["slices"])
        record["p_infected"], record["p_severe"] = prediction.p_infected, prediction.p_severe
        if prediction.p_infected is None:
            record["qc_flags"].append(QcFlag.NO_DIAGNOSIS)
        return {"lesion_levels": prediction.lesion_levels}

    filled = at_boundary(record, answer) if len(row["slices"]) else {}
    record["predict_s"] = time.perf_counter() - started if filled else None
    return {**row, "lesion_levels": _no_levels(row), **filled, "record": json.dumps(record)}


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
        lesion_mask, lesion_slices = lesion_in_source(
            row["lesion_levels"], row["chosen"], masks, config
        )
        found = lung.measure_involvement(masks.lungs, lesion_mask, masks.voxel_ml)
        if found.is_implausible and QcFlag.IMPLAUSIBLE_LUNGS not in record["qc_flags"]:
            record["qc_flags"].append(QcFlag.IMPLAUSIBLE_LUNGS)
        record.update(conclude(record["p_infected"], record["p_severe"], found.involvement, config))
        record.update(
            lesion_volume_ml=found.lesion_volume_ml,
            lung_volume_ml=found.lung_volume_ml,
            involvement=found.involvement,
            lesion_slices=lesion_slices,
        )
        kept.append((masks, found))
        return {"status": Status.SCREENED}

    record.update(at_boundary(record, evaluate))
    if not kept:
        return Measured(record=_without_measurements(record))
    return Measured(record=record, masks=kept[0][0], involvement=kept[0][1])


def conclude(
    p_infected: float | None,
    p_severe: float | None,
    involvement: float | None,
    config: ScreeningConfig,
) -> dict[str, str | float | None]:
    """Diagnosis and severity from the network, and severity by the paper's rule.

    Severity of a normal one is null, and so is all that a network without a trained diagnosis would have to say.
    """
    severe_by_rule = None if involvement is None else involvement > config.severe_involvement
    infected = None if p_infected is None else p_infected >= config.infected_threshold
    severe = p_severe >= config.severe_threshold if infected and p_severe is not None else None
    return {
        "diagnosis": _either(infected, "infected", "normal"),
        "p_severe": p_severe if infected else None,
        "severity": _either(severe, "severe", "mild"),
        "severity_by_involvement": _either(severe_by_rule, "severe", "mild"),
    }


def _either(known: bool | None, yes: str, no: str) -> str | None:
    return None if known is None else yes if known else no


def fetch(series: Series, archive: str, digest: storage.ContentDigest) -> Iterator[Iterator[bytes]]:
    """The bytes of a series' objects, one after the other and each in chunks; adds them to the digest as they pass.

    Small objects are read ahead by a few threads; of a large one there is never more than a chunk.
    """
    folder = series.source_path[: series.source_path.rfind("/") + 1]

    def read_whole(item: storage.ObjectInfo) -> list[bytes]:
        return list(storage.read_chunks(storage.join(archive, item.path), item))

    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        ahead: deque[tuple[storage.ObjectInfo, Future[list[bytes]] | None]] = deque()
        waiting = iter(series.objects)
        try:
            while True:
                for item in islice(waiting, NUM_FETCH_THREADS - len(ahead)):
                    is_small = item.num_bytes <= SMALL_OBJECT_BYTES and len(series.objects) > 1
                    ahead.append((item, pool.submit(read_whole, item) if is_small else None))
                if not ahead:
                    return
                item, future = ahead.popleft()
                uri = storage.join(archive, item.path)
                chunks = storage.read_chunks(uri, item) if future is None else iter(future.result())
                yield digest.tee(item.path.removeprefix(folder), chunks)
        finally:
            for _, future in ahead:
                if future is not None:
                    future.cancel()


def lesion_in_source(
    lesion_levels: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    masks: StoredMasks,
    config: ScreeningConfig,
) -> tuple[NDArray[np.bool_], int]:
    """The lesion mask on the volume's grid, and in how many segmented slices it shows within the chest.

    Each slice between segmented ones repeats the nearest of them, which weights every segmented slice by the extent
    it stands for.
    """
    shape = masks.lungs.lung_mask.shape
    aspect = pixel_aspect(masks.spacing_mm)
    threshold = np.float32(config.lesion_threshold * PROBABILITY_STEPS)
    by_slice = np.empty((len(chosen), *shape[1:]), bool)
    for index, level in enumerate(lesion_levels):
        by_slice[index] = from_input(level.astype(np.float32), shape[1:], aspect) >= threshold
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
        "source_uri": storage.join(archive, series.source_path)
        if series.source_path
        else f"{archive}/",
        "source_format": series.source_format,
        "source_version": row["source_version"],
        "source_digest": None,
        "num_objects": row["num_objects"],
        "num_bytes": row["num_bytes"],
        "study_uid": series.study_uid,
        "series_uid": series.series_uid,
        "qc_flags": list(series.qc_flags),
        "status": Status.SCREENED,
    }


def at_boundary(record: Row, work: Callable[[], Row]) -> Row:
    """Do one stage's work; turn what goes wrong into the record's status and reason.

    A StudyError is the input's fault. An OSError is the storage's. Storage that refuses us altogether, a sandbox that
    cannot be shut in, and one that was closed because nobody waits any more, are no matter of one series: they are not
    caught here and end the job or the request. Anything else is ours: its type and place are logged under the
    series key, never its text, which may quote the input.
    """
    try:
        return work()
    except StudyError as error:
        record.update(status=Status.REJECTED, reason=error.reason, reason_detail=str(error))
    except StudyTimeoutError as error:
        record.update(status=Status.FAILED, reason=Reason.TIMEOUT, reason_detail=str(error))
    except (storage.AccessError, UnavailableError, WeakSandboxError, SandboxClosedError):
        raise
    except FileNotFoundError:
        record.update(
            status=Status.FAILED,
            reason=Reason.VANISHED,
            reason_detail="an object is gone since it was listed",
        )
    except storage.ObjectChangedError:
        record.update(
            status=Status.FAILED,
            reason=Reason.CHANGED,
            reason_detail="an object is another since it was listed",
        )
    except OSError as error:
        record.update(
            status=Status.FAILED,
            reason=Reason.STORAGE,
            reason_detail=f"storage: {type(error).__name__}",
        )
    except Exception as error:
        _internal_error(record, error)
    return {}


def not_storable(record: Row, error: Exception) -> Row:
    """Return the row of a series whose own row cannot be stored: its identity and ``internal_error``."""
    kept = {name: record[name] for name in IDENTITY}
    _internal_error(kept, error)
    return {**kept, "qc_flags": [], "started_at": record["started_at"]}


def _internal_error(record: Row, error: Exception) -> None:
    where = str(error) if isinstance(error, DecoderError) else error_location(error)
    key = record["series_key"]
    logger.error("series %s: internal error, %s", key, where, extra={"series_key": key})
    record.update(status=Status.FAILED, reason=Reason.INTERNAL_ERROR, reason_detail=where)


IDENTITY = (
    "series_key", "source_uri", "source_format", "source_version", "num_objects", "num_bytes",
    "study_uid", "series_uid",
)  # fmt: skip
PREDICTIONS = (
    "num_slices", "num_slices_segmented", "spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "p_infected", "p_severe",
)  # fmt: skip


def _without_measurements(record: Row) -> Row:
    """A series that was not screened carries no measurement."""
    return {**record, **dict.fromkeys(PREDICTIONS)}


def config_values(window: WindowConfig, config: ScreeningConfig) -> dict[str, Any]:
    """Everything that can change a prediction, as plain values, for the configuration's digest."""
    screening = asdict(config)
    del screening["allow_weak_sandbox"]  # changes where a series is decoded, not how
    return {"window": asdict(window), "screening": screening}
