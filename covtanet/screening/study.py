"""Screening of one study in this process, by the same stages as an archive.

Headers and series are read in one sandbox.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct.window import WindowConfig
from covtanet.decoding import headers
from covtanet.decoding.child_process import refuse_weak_sandbox
from covtanet.decoding.sandbox import Sandbox
from covtanet.errors import NoSeriesError, UploadError
from covtanet.inference.predictor import VolumePredictor
from covtanet.ledger.run import digest_of
from covtanet.ledger.schema import LEDGER_SCHEMA, SCHEMA_VERSION
from covtanet.screening.config import ScreeningConfig, config_values
from covtanet.screening.records import MeasuredSeries
from covtanet.screening.stages import measure_series, predict_series, prepare_series

# A folder and its objects.
FolderObjects = tuple[str, list[storage.ObjectInfo]]


@dataclass(frozen=True, kw_only=True)
class StudyLimits:
    """Limits of one study."""

    max_series: int = 16
    """Series in a study; a chest CT has rarely more than eight."""
    max_objects: int = 8192
    """Files of all series."""
    max_bytes: int = 1 << 30
    """Bytes of all objects as they are stored."""


@dataclass(frozen=True, kw_only=True)
class ScreenedSeries:
    """A finished series: its row, the archive that it lies in, and its masks."""

    row: dict[str, Any]
    archive: str
    series: manifest.Series
    measured: MeasuredSeries


Receive = Callable[[ScreenedSeries], None]


class Screener:
    """Screens one study after the other with one model, decoding in its own sandbox.

    One thread at a time may call it; any thread may close it.
    """

    def __init__(
        self,
        predictor: VolumePredictor,
        window: WindowConfig,
        config: ScreeningConfig,
        model_digest: str,
        software_version: str | None = None,
    ) -> None:
        """Start without a child process; the first study starts it.

        software_version: for the rows; null if the caller does not know it.

        Raises:
            WeakSandboxError: the kernel cannot confine the sandbox.
        """
        self.predictor = predictor
        self.window = window
        self.config = config
        self.model_digest = model_digest
        # Columns by which a row can be traced; those of a run of the job are null.
        self.provenance = {
            "schema_version": SCHEMA_VERSION,
            "model_digest": model_digest,
            "config_digest": digest_of(config_values(window, config)),
            "software_version": software_version,
        }
        refuse_weak_sandbox(config.decode_limits)
        self.decoder = Sandbox(window, config.slice_step_mm, config.decode_limits)

    def __call__(
        self, uri: str, limits: StudyLimits | None = None, receive: Receive | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield one row per series of a NIfTI file or a folder, in the ledger's columns.

        Columns that belong to a run of the screening job are null. The digest of the configuration
        is that of a run with the same window and configuration.

        uri: a path, an s3:// URI, or a study or series of a DICOMweb server. receive: gets every
        series with its masks before its row is yielded.

        Raises:
            NoSeriesError: the input holds no series.
            UploadError: ``too_large``: more series, objects or bytes than the limits; nothing is
                decoded then.
            SandboxClosedError: it was closed; raised as soon as no read of storage is under way.
        """
        root, study = self._find(storage.absolute(uri), limits)
        self._check(study, limits)
        for series in study:
            yield self._screen(series, root, receive)

    def _find(self, uri: str, limits: StudyLimits | None) -> tuple[str, list[manifest.Series]]:
        """Return the root of a study's paths, and its series."""
        if not storage.is_dicomweb(uri):
            root, folders = _list_study(uri, limits)
            return root, self._identify(root, folders)
        # Only here: other studies do without its libraries.
        from covtanet.archive.dicomweb_series import find_study

        root, study = find_study(uri)
        num_objects = sum(len(series.objects) for series in study)
        if limits is not None and num_objects > limits.max_objects:
            message = f"{num_objects} objects, expected at most {limits.max_objects} in a request"
            raise UploadError("too_large", message)
        return root, study

    def _identify(self, root: str, folders: list[FolderObjects]) -> list[manifest.Series]:
        """Read the headers in the sandbox and return the series."""

        def read_head(path: str, num_bytes: int) -> bytes:
            self.decoder.child.check_open()
            return storage.read_bytes(storage.join(root, path), num_bytes)

        identify = partial(headers.read_identities, self.decoder.child)
        study: list[manifest.Series] = []
        for folder, objects in folders:
            series, _ = manifest.scan_folder(folder, objects, read_head, identify)
            study += series
        return study

    @staticmethod
    def _check(study: list[manifest.Series], limits: StudyLimits | None) -> None:
        if not study:
            raise NoSeriesError(
                "the input holds no series, expected a NIfTI file or a folder with CT"
            )
        if limits is not None and len(study) > limits.max_series:
            message = f"{len(study)} series, expected at most {limits.max_series} in a request"
            raise UploadError("too_large", message)

    def _screen(
        self, series: manifest.Series, root: str, receive: Receive | None
    ) -> dict[str, Any]:
        """Return the row of a series. Its masks are gone with the end of this method."""
        prepared = prepare_series(
            series.to_row(),
            archive=root,
            window=self.window,
            config=self.config,
            decoder=self.decoder,
        )
        # A series that was refused by its listing did not use the child and did not notice.
        self.decoder.child.check_open()
        predicted = predict_series(prepared, self.predictor)
        measured = measure_series(predicted, self.window, self.config)
        columns = measured.record.to_columns() | self.provenance
        columns["screened_at"] = datetime.now(UTC)
        row = {name: columns.get(name) for name in LEDGER_SCHEMA.names}
        if receive is not None:
            receive(ScreenedSeries(row=row, archive=root, series=series, measured=measured))
        return row

    def close(self) -> None:
        """End the child process and the study in work, for good; any thread may call it."""
        self.decoder.close()


def _list_study(uri: str, limits: StudyLimits | None) -> tuple[str, list[FolderObjects]]:
    """Return root and objects: a file with its folder as the root, or a folder with its tree.

    Raises:
        UploadError: ``too_large``: more objects or bytes than the limits.
    """
    item = storage.describe(uri)
    if item is None:
        root = uri
        folders = _list_folders(uri, limits)
    else:
        root = uri.rpartition("/")[0]
        folders = [("", [item])]
    num_bytes = sum(item.num_bytes or 0 for _, objects in folders for item in objects)
    if limits is not None and num_bytes > limits.max_bytes:
        message = f"{num_bytes} bytes, expected at most {limits.max_bytes} in a request"
        raise UploadError("too_large", message)
    return root, folders


def _list_folders(uri: str, limits: StudyLimits | None) -> list[FolderObjects]:
    if limits is None:
        return list(storage.walk(uri))
    try:
        return list(storage.walk(uri, max_objects=limits.max_objects))
    except storage.TooManyObjectsError:
        message = f"more than {limits.max_objects} objects, the most in a request"
        raise UploadError("too_large", message) from None
