"""Screening of one study: a decoder slot reads it, model replicas answer its slices."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from covtanet.errors import NoSeriesError, UnavailableError
from covtanet.screening.config import for_model
from covtanet.screening.study import StudyLimits
from covtanet.tracking import software_version
from serve.current_model import CurrentModel
from serve.decoders import BusyError, DeadlineError, Decoders, Slot
from serve.refusals import RefusedError, busy
from serve.remote_network import RemoteNetwork, StudyScreener
from serve.results import Results, ResultsMaker, ResultsRequest
from serve.settings import ServeConfig

SECONDS_BUCKETS = [0.5, 1, 2, 5, 10, 30, 60, 120]

Check = Callable[[], None]
# The rows of a study, and its results if they were asked for.
Read = tuple[list[dict[str, Any]], Results | None]


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """A study to screen."""

    locate: Callable[[Check], str]
    """Return the location of the study's objects; called in the study's thread.

    Its argument raises ``DeadlineError`` once the request has ended.
    """
    limits: StudyLimits
    source: str = ""
    """Replaces that location in the rows if it is not empty, as for an upload."""
    results: ResultsRequest | None = None
    """The DICOM results to make of its series; None for the rows alone."""


@dataclass(frozen=True, kw_only=True)
class ScreenedStudy:
    """The rows of a study's series and the version of the model that answered."""

    rows: list[dict[str, Any]]
    model: dict[str, Any]
    results: Results | None = None


class Studies:
    """Screens studies, each in a decoder slot and with one version of the model."""

    def __init__(self, segmenter: DeploymentHandle, settings: ServeConfig) -> None:
        self.segmenter = segmenter
        self.current_model = CurrentModel(segmenter, settings.reload_every_s)
        self.settings = settings
        self.screening = settings.screening
        self.software_version = software_version()
        self.decoders = Decoders(
            settings.num_decoders, settings.max_waiting, settings.request_timeout_s
        )
        # Results take memory that a replica has for one study at a time.
        self.results_lock = threading.Lock()
        self.answered = Counter(
            "covtanet_http_studies", "Series answered over HTTP.", ("status", "reason")
        )
        self.seconds = Histogram(
            "covtanet_http_study_seconds", "From body to answer.", SECONDS_BUCKETS
        )

    async def describe_model(self) -> dict[str, Any]:
        """Return name, version, digest and preprocessing of the model that answers now.

        Raises:
            RefusedError: 503, no model replica answers.
        """
        described = await self.current_model.describe()
        if described is None:
            raise busy(self.settings.retry_after_s)
        return described

    async def screen(self, study: StudyRequest, resources: ExitStack) -> ScreenedStudy:
        """Screen all series of a study with one version of the model.

        resources: files that the study's thread reads; the thread takes them over and closes them.

        Raises:
            RefusedError: 422, there is no series; 503, busy; 504, the deadline has passed.
        """
        # First, so that all series of the study get one version.
        model = await self.describe_model()
        # Not the time of day, which may be set back.
        started = time.monotonic()
        rows, results = await self._run(partial(self._read, study, model), resources)
        self.seconds.observe(time.monotonic() - started)
        for row in rows:
            self.answered.inc(tags={"status": row["status"], "reason": row["reason"] or ""})
            row["source_uri"] = study.source or row["source_uri"]
            row["model_name"] = model["name"]
            row["model_version"] = model["version"]
        return ScreenedStudy(rows=rows, model=model, results=results)

    async def _run(self, work: Callable[[Slot], Read], resources: ExitStack) -> Read:
        try:
            return await self.decoders.run(work, resources)
        # Some DICOMweb servers answer 404 about a study that they do not have, others nothing.
        except (NoSeriesError, FileNotFoundError):
            raise RefusedError(422, "no_series", "no series in it, expected a chest CT") from None
        except (UnavailableError, BusyError):
            raise busy(self.settings.retry_after_s) from None
        except DeadlineError:
            limit_s = self.settings.request_timeout_s
            message = f"the study took over {limit_s:g} s; submit an archive as a batch"
            raise RefusedError(504, "deadline", message) from None

    def _read(self, study: StudyRequest, model: dict[str, Any], slot: Slot) -> Read:
        """Read and screen a study in the thread that holds this slot."""
        location = study.locate(slot.check)
        screener = slot.screener(model["digest"], partial(self._make_screener, model))
        if study.results is None:
            return list(screener(location, study.limits)), None
        child = screener.decoder.child
        maker = ResultsMaker(study.results, model, child, self.results_lock, slot.check)
        try:
            return list(screener(location, study.limits, maker.receive)), maker.results
        except BaseException:
            maker.results.close()
            raise

    def _make_screener(self, model: dict[str, Any]) -> StudyScreener:
        config = for_model(self.screening, model["preprocessing"], model["readout"])
        network = RemoteNetwork(self.segmenter, model)
        return StudyScreener(
            network, model["window"], config, model["digest"], self.software_version
        )
