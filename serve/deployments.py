"""Replicas that hold the model, behind the replicas of the API."""

import asyncio
import logging
import tempfile
import time
from collections import OrderedDict
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
from covtanet.machine import num_cores
from covtanet.model.saved_model import load_model
from covtanet.screening.config import ScreeningConfig

logger = logging.getLogger("ray.serve")

# Slices of several callers' studies that the network gets together.
BATCH_SLICES = 64
BATCH_WAIT_S = 0.005
# The newest version and the one before it.
MODELS_KEPT = 2
# How long a health check waits for a reload. Ray Serve ends a replica whose check takes 30 s, and a
# request to a registry that does not answer takes longer than that.
RELOAD_WAIT_S = 10.0


def count_slices(requests: list[tuple[str, SliceChunk]]) -> int:
    """Return the size of a batch of requests, in slices."""
    return sum(len(part.slices) for _, part in requests)


@ray_serve.deployment(max_ongoing_requests=64, max_queued_requests=256, health_check_period_s=5)
class Segmenter:
    """Serves the model behind ``ref`` and keeps the previous version loaded.

    So a request in flight finishes on the version that it started with, and no study mixes two
    versions.
    """

    def __init__(self, ref: str, reload_every_s: float, config: ScreeningConfig) -> None:
        self.ref, self.reload_every_s, self.config = ref, reload_every_s, config
        self.models: OrderedDict[str, tuple[Predictor, dict[str, Any]]] = OrderedDict()
        self.checked_ref_at = 0.0
        self.reloading: asyncio.Task[None] | None = None
        self._load()
        self._infer()
        self.answered_at = time.monotonic()

    def _load(self) -> None:
        """Load the version that ``ref`` names now.

        Raises:
            CovtanetError: it is not a model of this software, or its digest does not match.
        """
        with tempfile.TemporaryDirectory() as folder:
            resolved = tracking.resolve_model(self.ref, Path(folder))
            model = load_model(resolved.folder, resolved.digest)
        # Before the engine is built, so that a model that cannot screen costs no conversion.
        refuse_without_segmentation(model)
        predictor = Predictor(
            model,
            engine=self.config.engine,
            # The CPUs that this process may use, which may be fewer than those of the machine.
            num_threads=num_cores(),
            max_batch_slices=self.config.max_batch_slices,
            flips=self.config.flips,
        )
        described = {
            "name": resolved.name,
            "version": resolved.version,
            "digest": resolved.digest,
            "num_slices": predictor.num_slices,
            "preprocessing": model.preprocessing,
            "readout": model.readout,
            "window": predictor.window,
        }
        # The newest stands last; the oldest is dropped first.
        self.models[resolved.digest] = (predictor, described)
        while len(self.models) > MODELS_KEPT:
            self.models.popitem(last=False)
        logger.info(
            "model %s version %s, digest %s", resolved.name, resolved.version, resolved.digest[:12]
        )

    def describe(self) -> dict[str, Any]:
        """Return name, version, digest and preprocessing of the newest model."""
        return next(reversed(self.models.values()))[1]

    async def check_health(self) -> None:
        """Run a real inference; and check now and then whether ``ref`` names another version.

        Only the inference decides about the health of this replica: a fault of a new version leaves
        this one serving.
        """
        # In a thread: the event loop goes on answering requests.
        await asyncio.to_thread(self._infer)
        self.answered_at = time.monotonic()
        if self.reloading is not None and self.reloading.done():
            self.reloading = None
        if self._is_reload_due() and self.reloading is None:
            # Noted before the reload: a registry that hangs is not asked again at the next check.
            self.checked_ref_at = time.monotonic()
            self.reloading = asyncio.create_task(self._reload())
            await asyncio.wait({self.reloading}, timeout=RELOAD_WAIT_S)

    def _is_reload_due(self) -> bool:
        is_alias = "@" in self.ref  # a version or a folder never changes
        return is_alias and time.monotonic() - self.checked_ref_at >= self.reload_every_s

    async def _reload(self) -> None:
        """Load another version if ``ref`` names one; after any error the present one serves on."""
        try:
            digest = await asyncio.to_thread(tracking.digest_of, self.ref)
            if digest in self.models:
                # The alias went back to the version before, which is still loaded.
                self.models.move_to_end(digest)
            else:
                await asyncio.to_thread(self._load)
        except Exception as error:  # a wrong description of a model raises errors of many kinds
            logger.error(
                "the model stays as it is, another one cannot be loaded: %s", type(error).__name__
            )

    def _infer(self) -> None:
        predictor, _ = next(reversed(self.models.values()))
        size = predictor.window.size_px
        # The smallest real inference: one slice of zeros, (1, C, size, size), which the diagnosis
        # reads.
        zeros = np.zeros((1, 1 + 2 * predictor.num_neighbours, size, size), np.uint16)
        next(predictor.segment([SliceChunk(zeros, [0])]))

    def seconds_since_answer(self) -> float:
        """Return the seconds since the model last passed a health check."""
        return time.monotonic() - self.answered_at

    async def segment(self, digest: str, part: SliceChunk) -> SegmentedChunk | None:
        """Segment a chunk of slices with this version; None if this replica does not hold it."""
        answer: SegmentedChunk | None = await self._segment((digest, part))
        return answer

    @ray_serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=BATCH_SLICES, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=count_slices
    )
    async def _segment(self, requests: list[tuple[str, SliceChunk]]) -> list[SegmentedChunk | None]:
        return await asyncio.to_thread(self._segment_all, requests)

    def _segment_all(self, requests: list[tuple[str, SliceChunk]]) -> list[SegmentedChunk | None]:
        """Segment chunks of several studies, those of one version together."""
        answers: list[SegmentedChunk | None] = [None] * len(requests)
        # Studies of two versions may share a batch while a new version is taken over.
        digests = {digest for digest, _ in requests}
        for digest in digests & self.models.keys():
            indices = [index for index, request in enumerate(requests) if request[0] == digest]
            parts = [requests[index][1] for index in indices]
            segmented = self.models[digest][0].segment_together(parts)
            for index, answer in zip(indices, segmented, strict=True):
                answers[index] = answer
        return answers

    async def diagnose(self, digest: str, pooled: NDArray[np.float32]) -> Probabilities | None:
        """Diagnose a volume with this version; None if this replica does not hold it.

        pooled: fusion vectors of the volume, (W, C, P, P).
        """
        model = self.models.get(digest)
        if model is None:
            return None
        return await asyncio.to_thread(model[0].diagnose, pooled)
