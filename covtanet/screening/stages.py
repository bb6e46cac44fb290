"""The stages of screening one series: prepare, predict, measure. Only the first reads storage.

prepare_series   manifest row -> PreparedSeries: bytes are fetched, decoded, lungs found
predict_series   PreparedSeries -> PredictedSeries: the network marks lesions and diagnoses
measure_series   PredictedSeries -> MeasuredSeries: volumes, involvement, diagnosis, severity

A stage raises only errors that concern every series; any other error ends the series with a status
and a reason, and the later stages pass the series on.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from covtanet import storage
from covtanet.archive.fetch import fetch_series
from covtanet.archive.manifest import Series, series_from_row
from covtanet.ct import lung
from covtanet.ct.limits import MAX_SLICES
from covtanet.ct.window import WindowConfig
from covtanet.decoding import prepare
from covtanet.decoding.prepare import Prepared
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
    UnreachableError,
    WeakSandboxError,
    error_location,
)
from covtanet.inference.lesion_mask import lesion_in_source
from covtanet.ledger.record import Refusal, ScreeningRecord
from covtanet.screening.conclusion import conclude
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.records import MeasuredSeries, PredictedSeries, PreparedSeries
from covtanet.storage import ContentDigest

# Workers that decode or measure do without torch, whose import takes seconds.
if TYPE_CHECKING:
    from covtanet.inference.predictor import VolumePredictor

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]
# Source format and objects in chunks -> the prepared volume.
Decoder = Callable[[str, Iterable[Iterable[bytes]]], Prepared]

WORKER_DIED = Refusal(
    status=Status.FAILED,
    reason=Reason.WORKER_DIED,
    detail="the worker died or hung in each attempt",
)
# The listing itself rejects a series for these.
LISTING_DETAILS = {
    Reason.CONTAINER: "an archive file, expected its members as objects",
    Reason.UNREADABLE: "no DICOM header that names a series",
}


def in_process(window: WindowConfig, config: ScreeningConfig) -> Decoder:
    """Return a decoder without a sandbox, for trusted bytes and to compare with."""

    def decode(source_format: str, objects: Iterable[Iterable[bytes]]) -> Prepared:
        contents = (b"".join(chunks) for chunks in objects)
        return prepare.prepare(source_format, contents, window, config.slice_step_mm)

    return decode


def prepare_series(
    row: Row, *, archive: str, window: WindowConfig, config: ScreeningConfig, decoder: Decoder
) -> PreparedSeries:
    """Fetch one series of the manifest, decode it, find its lungs and make the network's input."""
    series = series_from_row(row)
    record = new_record(row, archive)
    started = time.perf_counter()
    digest = ContentDigest()
    work = partial(_fetch_and_decode, series, archive, config, decoder, digest)
    result = refuse_on_error(record.series_key, work)
    # Also of a refused series: the time was spent.
    record = replace(record, decode_s=time.perf_counter() - started)
    # A digest of some of the objects would be taken for that of the series.
    if series.objects and digest.num_objects == len(series.objects):
        record = replace(record, source_digest=digest.hexdigest(), num_bytes=digest.num_bytes)
    if isinstance(result, Refusal):
        return ended_before_prediction(record.refused(result), window)
    spacing_z_mm, spacing_y_mm, spacing_x_mm = result.spacing_mm
    record = replace(
        record,
        num_slices=result.num_slices,
        num_slices_segmented=len(result.chosen),
        spacing_z_mm=spacing_z_mm,
        spacing_y_mm=spacing_y_mm,
        spacing_x_mm=spacing_x_mm,
        qc_flags=(*record.qc_flags, *result.qc_flags),
    )
    return PreparedSeries(
        record=record, slices=result.slices, chosen=result.chosen, masks=result.masks
    )


def predict_series(series: PreparedSeries, predictor: "VolumePredictor") -> PredictedSeries:
    """Let the network mark lesions and diagnose; a series that has ended passes."""
    if not len(series.slices):
        return without_prediction(series)
    started = time.perf_counter()
    work = partial(predictor.predict, series.slices)
    prediction = refuse_on_error(series.record.series_key, work)
    if isinstance(prediction, Refusal):
        return without_prediction(replace(series, record=series.record.refused(prediction)))
    record = replace(
        series.record,
        p_infected=prediction.p_infected,
        p_severe=prediction.p_severe,
        predict_s=time.perf_counter() - started,
        engine=prediction.engine,
    )
    if prediction.p_infected is None:
        record = record.with_flag(QcFlag.NO_DIAGNOSIS)
    return PredictedSeries(
        prepared=replace(series, record=record), lesion_levels=prediction.lesion_levels
    )


def measure_series(
    series: PredictedSeries, window: WindowConfig, config: ScreeningConfig
) -> MeasuredSeries:
    """Measure lesion and lung in the source's grid, and conclude diagnosis and severity.

    window: that of ``prepare_series``. config: with the model's values, see ``for_model``.
    """
    record = series.record
    if not len(series.lesion_levels):
        return MeasuredSeries(record=record)
    result = refuse_on_error(record.series_key, partial(_measure, series, window, config))
    if isinstance(result, Refusal):
        return MeasuredSeries(record=record.refused(result))
    masks, involvement, lesion_slices = result
    # A flag, not a refusal: the volumes are reported, the involvement is null.
    if involvement.is_implausible:
        record = record.with_flag(QcFlag.IMPLAUSIBLE_LUNGS)
    record = replace(
        record,
        status=Status.SCREENED,
        lesion_volume_ml=involvement.lesion_volume_ml,
        lung_volume_ml=involvement.lung_volume_ml,
        involvement=involvement.involvement,
        lesion_slices=lesion_slices,
    )
    return MeasuredSeries(record=conclude(record, config), masks=masks, involvement=involvement)


def new_record(row: Row, archive: str) -> ScreeningRecord:
    """Return the record of a series of the manifest on which work begins now."""
    path = row["source_path"]
    return ScreeningRecord(
        series_key=row["series_key"],
        source_uri=storage.join(archive, path) if path else f"{archive}/",
        source_format=row["source_format"],
        source_version=row["source_version"],
        num_objects=row["num_objects"],
        num_bytes=row["num_bytes"],
        # Time of day: it is compared with that of other machines.
        started_at=time.time(),
        study_uid=row["study_uid"],
        series_uid=row["series_uid"],
        qc_flags=tuple(map(QcFlag, row["qc_flags"])),
    )


def ended_before_prediction(record: ScreeningRecord, window: WindowConfig) -> PreparedSeries:
    """Return a series that is not decoded: its record alone."""
    return PreparedSeries(
        record=record,
        # An empty array of the same type: all blocks of a stage have one schema.
        slices=np.empty((0, window.size_px, window.size_px), np.uint16),
        chosen=np.empty(0, np.int64),
        masks=b"",
    )


def without_prediction(series: PreparedSeries) -> PredictedSeries:
    """Return a series that the network does not read."""
    no_levels = np.empty((0, *series.slices.shape[1:]), np.uint8)
    return PredictedSeries(prepared=series, lesion_levels=no_levels)


def refuse_on_error(series_key: str, work: Callable[[], T]) -> T | Refusal:
    """Do the work of a stage on one series; return a refusal if it fails.

    StudyError is the input's fault, OSError the storage's. Errors that concern every series are not
    caught and end the job or the request: credentials that the store refuses, a server that cannot
    be reached, a model that does not answer, a sandbox that cannot be confined or that another
    thread closed. Any other error is a fault of this software: its type and location are logged,
    never its text, which may quote the input.
    """
    try:
        return work()
    except StudyError as error:
        return Refusal(status=Status.REJECTED, reason=error.reason, detail=str(error))
    except StudyTimeoutError as error:
        return _failure(Reason.TIMEOUT, str(error))
    # Before OSError, since they concern every series and not this one.
    except (
        storage.AccessError,
        UnreachableError,
        UnavailableError,
        WeakSandboxError,
        SandboxClosedError,
    ):
        raise
    except FileNotFoundError:
        return _failure(Reason.VANISHED, "an object is gone since it was listed")
    except storage.ObjectChangedError:
        return _failure(Reason.CHANGED, "an object is another since it was listed")
    except OSError as error:
        return _failure(Reason.STORAGE, f"storage: {type(error).__name__}")
    except Exception as error:
        return internal_error(series_key, error)


def internal_error(series_key: str, error: Exception) -> Refusal:
    """Log a fault of this software under the series key, and return the refusal."""
    # The decoder's child sends type and location as the text of its error.
    location = str(error) if isinstance(error, DecoderError) else error_location(error)
    extra = {"series_key": series_key}
    logger.error("series %s: internal error, %s", series_key, location, extra=extra)
    return _failure(Reason.INTERNAL_ERROR, location)


def _failure(reason: Reason, detail: str) -> Refusal:
    return Refusal(status=Status.FAILED, reason=reason, detail=detail)


def _fetch_and_decode(
    series: Series,
    archive: str,
    config: ScreeningConfig,
    decoder: Decoder,
    digest: ContentDigest,
) -> Prepared:
    """Decode a series from its stored bytes. Raises StudyError and errors of storage."""
    _check_listing(series, config)
    max_bytes = config.max_series_mib << 20
    objects = fetch_series(series, archive, digest, max_bytes)
    prepared = None
    is_awaited = True
    try:
        prepared = decoder(series.source_format, objects)
    except StudyError as error:
        if error.reason != Reason.DECODE_CRASH:
            raise
    except SandboxClosedError:
        is_awaited = False  # the caller does not wait for the digest of the rest
        raise
    finally:
        if is_awaited:
            _read_rest(objects)
    if prepared is None:  # once more: the machine may have killed the decoder, not the series
        objects = fetch_series(series, archive, ContentDigest(), max_bytes)
        prepared = decoder(series.source_format, objects)
    return prepared


def _check_listing(series: Series, config: ScreeningConfig) -> None:
    """Refuse a series by its entry in the manifest, before anything is read."""
    # When it was listed. By now there may be more to read than the slice that it may be.
    if series.reason == Reason.VANISHED:
        raise FileNotFoundError(series.reason)
    if series.reason == Reason.STORAGE:
        raise OSError(series.reason)
    if series.reason:
        raise StudyError(series.reason, LISTING_DETAILS[series.reason])
    if (series.num_bytes or 0) > config.max_series_mib << 20:
        message = f"{series.num_bytes} bytes, expected at most {config.max_series_mib} MiB"
        raise StudyError(Reason.TOO_LARGE, message)
    if len(series.objects) > MAX_SLICES:
        message = f"{len(series.objects)} objects, expected at most {MAX_SLICES}"
        raise StudyError(Reason.TOO_LARGE, message)


def _read_rest(objects: Iterator[Iterator[bytes]]) -> None:
    """Read to the end: a refusal may come early, but the digest is of all bytes."""
    for chunks in objects:
        for _ in chunks:
            pass


def _measure(
    series: PredictedSeries, window: WindowConfig, config: ScreeningConfig
) -> tuple[StoredMasks, lung.Involvement, int]:
    """Return masks, involvement and the number of segmented slices that show a lesion."""
    masks = StoredMasks.unpack(series.prepared.masks)
    lesion_mask, lesion_slices = lesion_in_source(
        series.lesion_levels,
        series.prepared.chosen,
        masks.lungs,
        masks.spacing_mm,
        window,
        config.lesion_threshold,
    )
    involvement = lung.measure_involvement(masks.lungs, lesion_mask, masks.voxel_ml)
    return masks, involvement, lesion_slices
