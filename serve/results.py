"""DICOM results of a request's series: made in its thread, kept in a file, sent to its server."""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from covtanet.decoding.child_process import Child
from covtanet.errors import Reason, Status, StudyError
from covtanet.report.outcomes import outcome_of_work
from covtanet.report.sending import send_objects
from covtanet.report.series_results import ScreenedMasks, finding_of, result_objects
from covtanet.screening.study import ScreenedSeries

logger = logging.getLogger("ray.serve")

MADE = "made"
# A SEG takes 12 bytes of memory for each voxel of its series, 1.6 GB for these, which the slot's
# decoder does not need meanwhile: 512 slices of 512 x 512.
MAX_VOXELS = 1 << 27
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ResultsRequest:
    """The results that a request asks for."""

    in_answer: bool
    """Whether the answer carries the objects."""
    server: str
    """Root of the DICOMweb server that the objects are sent to; empty for none."""
    folder: Path
    """Folder of this replica for files; theirs have no name, so they go with the process."""


@dataclass
class Results:
    """Outcomes of a request's DICOM series, and their objects one after the other in a file."""

    outcomes: list[dict[str, Any]] = field(default_factory=list)
    file: IO[bytes] | None = None
    sizes: list[int] = field(default_factory=list)

    def objects(self) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Yield size and chunks of every object; the chunks must be read before the next one."""
        if self.file is None:
            return
        self.file.seek(0)
        for size in self.sizes:
            yield size, _read(self.file, size)

    def close(self) -> None:
        """Remove the file."""
        if self.file is not None:
            self.file.close()


class ResultsMaker:
    """Makes the results of the series of one study, as the screener hands them over.

    model: that of the rows. child: of the screener, which decodes slices for key images. lock: one
    study of a replica makes results at a time. check: raises once the request has ended.
    """

    def __init__(
        self,
        request: ResultsRequest,
        model: dict[str, Any],
        child: Child,
        lock: threading.Lock,
        check: Callable[[], None],
    ) -> None:
        self.request, self.model, self.child = request, model, child
        self.lock, self.check = lock, check
        self.results = Results()
        if request.in_answer:
            # Without a context: the answer is streamed from it when the thread has ended.
            self.results.file = TemporaryFile(dir=request.folder)  # noqa: SIM115

    def receive(self, screened: ScreenedSeries) -> None:
        """Make and send the objects of one series, if it is a screened DICOM series."""
        row = screened.row
        if row["status"] != Status.SCREENED or row["source_format"] != "dicom":
            return
        made: list[tuple[str, bytes]] = []
        with self.lock:
            self.check()
            outcome = outcome_of_work(row["series_key"], partial(self._make, screened, made))
        self.check()
        if made and self.request.server:
            send = partial(send_objects, made, self.request.server)
            outcome = outcome_of_work(row["series_key"], send)
        if outcome["detail"]:
            logger.warning("series %(series_key)s: %(outcome)s, %(detail)s", outcome)
        self.results.outcomes.append(outcome)

    def _make(self, screened: ScreenedSeries, made: list[tuple[str, bytes]]) -> tuple[str, str]:
        """Add the objects of a series to ``made``, and to the file if the answer carries them."""
        masks = masks_of(screened)
        if masks.lesion.size > MAX_VOXELS:
            message = f"{masks.lesion.size} voxels, expected at most {MAX_VOXELS} for results"
            raise StudyError(Reason.TOO_LARGE, message)
        row = screened.row
        model = {f"model_{name}": self.model[name] for name in ("name", "version")}
        made += result_objects(
            screened.archive,
            screened.series,
            row["source_digest"],
            masks,
            finding_of(row | model, identity_of(row), str(row["source_digest"])),
            self.child,
        )
        if self.request.in_answer:
            self._keep([data for _, data in made])
        return MADE, ""

    def _keep(self, objects: list[bytes]) -> None:
        assert self.results.file is not None
        for data in objects:
            self.results.file.write(data)
            self.results.sizes.append(len(data))


def masks_of(screened: ScreenedSeries) -> ScreenedMasks:
    """Return the masks of a screened series in the grid of its source."""
    measured = screened.measured
    assert measured.masks is not None
    assert measured.involvement is not None
    source = measured.masks.source
    return ScreenedMasks(
        lesion=source.from_canonical(measured.involvement.lesion_mask),
        lung=source.from_canonical(measured.involvement.lung_mask),
        affine=source.affine,
    )


def identity_of(row: dict[str, Any]) -> str:
    """Return what stands for the run id, which a single study does not have.

    With the digest of the source the UIDs follow from it: the same source, model and configuration
    give the same objects.
    """
    text = f"{row['model_digest']}\n{row['config_digest']}"
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: IO[bytes], num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        chunk = file.read(min(CHUNK_BYTES, num_bytes))
        if not chunk:
            raise OSError("the file of the results ends early")
        num_bytes -= len(chunk)
        yield chunk
