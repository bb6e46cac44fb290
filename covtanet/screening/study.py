"""One study screened in this process, by the same stages as an archive: a file or a folder to rows of the ledger.

Headers and series are read in one sandbox.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from covtanet import storage
from covtanet.archive import manifest
from covtanet.ct.window import WindowConfig
from covtanet.decoding import headers as heads
from covtanet.decoding.child_process import refuse_weak_sandbox
from covtanet.decoding.sandbox import Sandbox
from covtanet.errors import NoSeriesError, UploadError
from covtanet.inference.predictor import Answers
from covtanet.ledger.run import digest_of
from covtanet.ledger.schema import LEDGER_SCHEMA, SCHEMA_VERSION
from covtanet.screening import stages
from covtanet.screening.stages import ScreeningConfig


@dataclass(frozen=True, kw_only=True)
class StudyLimits:
    """Limits of one study. max_bytes: of the objects as they are stored."""

    max_series: int = 16
    max_objects: int = 8192
    max_bytes: int = 1 << 30


class Screener:
    """Screens one study after the other with one model, decoding in a sandbox of its own.

    One thread may use it at a time; ``close`` is for any other, too.

    software_version: for the rows, so that they can be traced; null if the caller does not know it.

    Raises:
        WeakSandboxError: if the kernel cannot shut the sandbox.
    """

    def __init__(
        self,
        predictor: Answers,
        window: WindowConfig,
        config: ScreeningConfig,
        model_digest: str,
        software_version: str | None = None,
    ) -> None:
        self.predictor, self.window, self.config, self.model_digest = (
            predictor,
            window,
            config,
            model_digest,
        )
        self.traced_by = {
            "schema_version": SCHEMA_VERSION,
            "model_digest": model_digest,
            "config_digest": digest_of(stages.config_values(window, config)),
            "software_version": software_version,
        }
        refuse_weak_sandbox(config.decode_limits)
        self.decoder = Sandbox(window, config.slice_step_mm, config.decode_limits)

    def __call__(self, place: str, limits: StudyLimits | None = None) -> Iterator[dict[str, Any]]:
        """Screen the series at a path or s3:// URI, a NIfTI file or a folder; one row each, in the ledger's columns.

        What belongs to a run of the screening job (run, registry version) is null. The digest of the configuration is
        that of a run with the same window and configuration.

        Raises:
            NoSeriesError: the input holds no series.
            UploadError: ``too_large``, with more series, objects or bytes than the limits; nothing is decoded then.
            SandboxClosedError: once it is closed, as soon as no read of storage is under way.
        """
        root, objects = _listing(storage.absolute(place), limits)

        def read_head(path: str, num_bytes: int) -> bytes:
            self.decoder.child.check_open()
            return storage.read_bytes(storage.join(root, path), num_bytes)

        identify = partial(heads.read_identities, self.decoder.child)
        found: list[manifest.Series] = []
        for folder, items in objects:
            found += manifest.scan_folder(folder, items, read_head, identify)[0]
        if not found:
            raise NoSeriesError(
                "the input holds no series, expected a NIfTI file or a folder with CT"
            )
        if limits is not None and len(found) > limits.max_series:
            raise UploadError(
                "too_large",
                f"{len(found)} series, expected at most {limits.max_series} in a request",
            )
        for series in found:
            row = stages.decode_and_prepare(
                series.to_row(),
                archive=root,
                window=self.window,
                config=self.config,
                decoder=self.decoder,
            )
            self.decoder.child.check_open()  # a series that was refused before asks the child nothing
            record = stages.measure(stages.predict(row, self.predictor), self.config).record
            known = {**self.traced_by, "screened_at": datetime.now(UTC)}
            yield {name: known.get(name, record.get(name)) for name in LEDGER_SCHEMA.names}

    def close(self) -> None:
        """End the decoder's child process and with it the study under way; from any thread, for good."""
        self.decoder.close()


def _listing(
    place: str, limits: StudyLimits | None
) -> tuple[str, list[tuple[str, list[storage.ObjectInfo]]]]:
    """Return root and objects: a file with its folder as the root, or a folder with all below it.

    Raises:
        UploadError: ``too_large``, with more objects or bytes than the limits.
    """
    item = storage.describe(place)
    if item is not None:
        listed = [("", [item])]
        root = place.rpartition("/")[0]
    else:
        listed = _folders(place, limits)
        root = place
    num_bytes = sum(item.num_bytes for _, items in listed for item in items)
    if limits is not None and num_bytes > limits.max_bytes:
        raise UploadError(
            "too_large", f"{num_bytes} bytes, expected at most {limits.max_bytes} in a request"
        )
    return root, listed


def _folders(place: str, limits: StudyLimits | None) -> list[tuple[str, list[storage.ObjectInfo]]]:
    if limits is None:
        return list(storage.walk(place))
    try:
        return list(storage.walk(place, max_objects=limits.max_objects))
    except storage.TooManyObjectsError:
        raise UploadError(
            "too_large", f"more than {limits.max_objects} objects, the most in a request"
        ) from None
