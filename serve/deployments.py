"""Replicas that hold the model, behind the replicas of the API.

A version of the model has an identifier: its digest, and a location that does not move. Every
request names the identifier of its version, and a replica that does not hold that version loads it.
So no request fails because another version becomes the champion, however many replicas there are
and whichever of them notices first.
"""

import asyncio
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve as ray_serve

from covtanet import tracking
from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.inference.predictor import (
    Predictor,
    Probabilities,
    refuse_without_segmentation,
)
from covtanet.model.saved_model import load_model
from covtanet.screening.config import ScreeningConfig

logger = logging.getLogger("ray.serve")

# Slices of several callers' studies that the network gets together.
BATCH_SLICES = 64
BATCH_WAIT_S = 0.005
# The newest version and the one before it.
MODELS_KEPT = 2
HEALTH_CHECK_PERIOD_S = 10.0


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A version of the model that is ready to run."""

    predictor: Predictor
    described: dict[str, Any]
    """Identifier, name, version, digest, window and preprocessing, for the replicas of the API."""


def identify(ref: str) -> str:
    """Return the identifier of the version that ``ref`` names now.

    Raises:
        CovtanetError, OSError: there is none, or the registry or the store does not answer.
    """
    if ref.startswith("models:"):
        location, digest = tracking.pinned(ref)
    else:
        with tempfile.TemporaryDirectory() as folder:
            location, digest = ref, tracking.resolve_model(ref, Path(folder)).digest
    return f"{digest}:{location}"


def load_version(model_id: str, config: ScreeningConfig, num_threads: int) -> LoadedModel:
    """Load the version with this identifier.

    Raises:
        CovtanetError: it is not a model of this software, or its digest does not match.
        OSError: the registry or the store does not answer.
    """
    digest, _, location = model_id.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(location, Path(folder))
        model = load_model(resolved.folder, digest)
    # Before the engine is built, so that a model that cannot screen costs no conversion.
    refuse_without_segmentation(model)
    predictor = Predictor(
        model,
        engine=config.engine,
        num_threads=num_threads,
        max_batch_slices=config.max_batch_slices,
        flips=config.flips,
    )
    described = {
        "model_id": model_id,
        "name": resolved.name,
        "version": resolved.version,
        "digest": digest,
        "num_slices": predictor.num_slices,
        "preprocessing": model.preprocessing,
        "readout": model.readout,
        "window": predictor.window,
    }
    logger.info("model %s version %s, digest %s", resolved.name, resolved.version, digest[:12])
    return LoadedModel(predictor=predictor, described=described)


def count_slices(requests: list[tuple[LoadedModel, SliceChunk]]) -> int:
    """Return the size of a batch of requests, in slices."""
    return sum(len(part.slices) for _, part in requests)


@ray_serve.deployment(
    max_ongoing_requests=64, max_queued_requests=256, health_check_period_s=HEALTH_CHECK_PERIOD_S
)
class Segmenter:
    """Serves every version of the model that a request names.

    The newest, and the last two that were asked for, stay loaded.

    ``newest`` is the version behind ``ref``, which new studies get. A request in flight finishes on
    the version that it started with, so no study mixes two versions.
    """

    async def __init__(  # type: ignore[misc]
        self, ref: str, reload_every_s: float, config: ScreeningConfig, num_threads: int
    ) -> None:
        self.ref, self.reload_every_s = ref, reload_every_s
        self.config, self.num_threads = config, num_threads
        self.newest: LoadedModel = await self.load(await asyncio.to_thread(identify, ref))
        await asyncio.to_thread(self._infer)
        self.answered_at = self.checked_at = time.monotonic()
        # Apart from the health checks, which Serve ends after 30 s and which every replica needs.
        is_alias = "@" in ref  # a version or a folder never changes
        self.following = asyncio.create_task(self._follow_alias()) if is_alias else None

    @ray_serve.multiplexed(max_num_models_per_replica=MODELS_KEPT)  # type: ignore[untyped-decorator]
    async def load(self, model_id: str) -> LoadedModel:
        """Return the version with this identifier; load it if this replica does not hold it."""
        # In a thread: the event loop goes on answering requests of the other version.
        return await asyncio.to_thread(load_version, model_id, self.config, self.num_threads)

    async def _follow_alias(self) -> None:
        while True:
            await asyncio.sleep(self.reload_every_s)
            await self.reload()

    async def reload(self) -> None:
        """Load another version if ``ref`` names one; after any error the present one serves on."""
        try:
            self.newest = await self.load(await asyncio.to_thread(identify, self.ref))
        except Exception as error:  # a wrong description of a model raises errors of many kinds
            logger.error(
                "the model stays as it is, another one cannot be loaded: %s", type(error).__name__
            )

    async def _find(self, model_id: str) -> LoadedModel | None:
        newest = self.newest
        if model_id == newest.described["model_id"]:
            return newest  # held apart from the versions that Serve drops in turn
        try:
            # A caller who hangs up does not end the load: it would begin once more beside it.
            model: LoadedModel = await asyncio.shield(asyncio.ensure_future(self.load(model_id)))
        except Exception as error:
            logger.error("a version in use cannot be loaded: %s", type(error).__name__)
            return None
        return model

    def describe(self) -> dict[str, Any]:
        """Return identifier, name, version, digest and preprocessing of the newest version."""
        return self.newest.described

    async def check_health(self) -> None:
        """Run a real inference if the model has answered no caller since the last check."""
        checked_at, self.checked_at = self.checked_at, time.monotonic()
        if self.answered_at <= checked_at:
            # In a thread: the event loop goes on answering requests.
            await asyncio.to_thread(self._infer)
            self.answered_at = time.monotonic()

    def _infer(self) -> None:
        predictor = self.newest.predictor
        size = predictor.window.size_px
        # The smallest real inference: one slice of zeros, (1, C, size, size), which the diagnosis
        # reads.
        zeros = np.zeros((1, 1 + 2 * predictor.num_neighbours, size, size), np.uint16)
        next(predictor.segment([SliceChunk(zeros, [0])]))

    def seconds_since_answer(self) -> float:
        """Return the seconds since the model last answered a caller or a health check."""
        return time.monotonic() - self.answered_at

    async def segment(self, model_id: str, part: SliceChunk) -> SegmentedChunk | None:
        """Segment a chunk of slices with this version; None if it cannot be loaded any more."""
        model = await self._find(model_id)
        if model is None:
            return None
        answer: SegmentedChunk = await self._segment((model, part))
        self.answered_at = time.monotonic()
        return answer

    @ray_serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=BATCH_SLICES, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=count_slices
    )
    async def _segment(
        self, requests: list[tuple[LoadedModel, SliceChunk]]
    ) -> list[SegmentedChunk | None]:
        return await asyncio.to_thread(segment_all, requests)

    async def diagnose(self, model_id: str, pooled: NDArray[np.float32]) -> Probabilities | None:
        """Diagnose a volume with this version; None if it cannot be loaded any more.

        pooled: fusion vectors of the volume, (W, C, P, P).
        """
        model = await self._find(model_id)
        if model is None:
            return None
        return await asyncio.to_thread(model.predictor.diagnose, pooled)


def segment_all(requests: list[tuple[LoadedModel, SliceChunk]]) -> list[SegmentedChunk | None]:
    """Segment chunks of several studies, those of one version together."""
    answers: list[SegmentedChunk | None] = [None] * len(requests)
    # Serve gives a batch of one version; a mixture would be a wrong result, so it is not relied on.
    models = {id(model): model for model, _ in requests}
    for key, model in models.items():
        indices = [index for index, request in enumerate(requests) if id(request[0]) == key]
        segmented = model.predictor.segment_together([requests[index][1] for index in indices])
        for index, answer in zip(indices, segmented, strict=True):
            answers[index] = answer
    return answers
