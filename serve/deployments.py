"""What runs behind the routes: replicas that hold the model, and how an API replica speaks to them."""

import asyncio
import logging
import math
import os
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from covtanet import tracking
from covtanet.ct.window import WindowConfig
from covtanet.errors import UnavailableError
from covtanet.inference.predictor import (
    Part,
    Prediction,
    Predictor,
    Probabilities,
    Segmented,
    predict,
    refuse_without_segmentation,
)
from covtanet.model.checkpoint import load_model
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import Screener

logger = logging.getLogger("ray.serve")

# Slices that callers' studies put on the network together, and how a study is cut for it: a long study takes turns
# with a short one that came later.
BATCH_SLICES, PART_SLICES, PARTS_IN_FLIGHT = 64, 16, 2
BATCH_WAIT_S = 0.005
ANSWER_TIMEOUT_S = 120.0
MODELS_KEPT = 2
READY_TIMEOUT_S = 10.0
# Six health checks; Serve ends a replica that fails three.
ANSWERED_WITHIN_S = 30.0
# How long a health check waits for a reload; Ray Serve ends a replica whose check takes 30 s, and a registry that does
# not answer is asked for longer than that.
RELOAD_WAIT_S = 10.0


def count_slices(requests: list[tuple[str, Part]]) -> int:
    """What a batch is measured by."""
    return sum(len(part.slices) for _, part in requests)


@ray_serve.deployment(max_ongoing_requests=64, max_queued_requests=256, health_check_period_s=5)
class Segmenter:
    """Holds the model that its name leads to, and the one before, so that no answer mixes two."""

    def __init__(self, ref: str, reload_every_s: float, config: ScreeningConfig) -> None:
        self.ref, self.reload_every_s, self.config = ref, reload_every_s, config
        self.models: OrderedDict[str, tuple[Predictor, dict[str, Any]]] = OrderedDict()
        self.looked_at = 0.0
        self.reloading: asyncio.Task[None] | None = None
        self._load()
        self._infer()
        self.answered_at = time.monotonic()

    def _load(self) -> None:
        """Take up what the name leads to now.

        Raises:
            CovtanetError: where it is no model of ours, by its digest too.
        """
        with tempfile.TemporaryDirectory() as folder:
            found = tracking.resolve_model(self.ref, Path(folder))
            model = load_model(found.folder, found.digest)
        refuse_without_segmentation(model)
        cores = len(os.sched_getaffinity(0))
        predictor = Predictor(
            model,
            engine=self.config.engine,
            num_threads=cores,
            max_batch_slices=self.config.max_batch_slices,
        )
        described = {
            "name": found.name,
            "version": found.version,
            "digest": found.digest,
            "num_slices": predictor.num_slices,
            "preprocessing": model.preprocessing,
            "window": predictor.window,
        }
        self.models[found.digest] = (predictor, described)
        while len(self.models) > MODELS_KEPT:
            self.models.popitem(last=False)
        logger.info("model %s version %s, digest %s", found.name, found.version, found.digest[:12])

    def describe(self) -> dict[str, Any]:
        """The newest model."""
        return next(reversed(self.models.values()))[1]

    async def check_health(self) -> None:
        """Answer for the model by a real inference; and look now and then if its name leads to another one.

        Only the inference says how this replica is: whatever goes wrong with another model, this one answers on.
        """
        await asyncio.to_thread(self._infer)
        self.answered_at = time.monotonic()
        if self.reloading is not None and self.reloading.done():
            self.reloading = None
        is_due = (
            "@" in self.ref and time.monotonic() - self.looked_at >= self.reload_every_s
        )  # only an alias moves
        if is_due and self.reloading is None:
            self.looked_at = time.monotonic()
            self.reloading = asyncio.create_task(self._reload())
            await asyncio.wait({self.reloading}, timeout=RELOAD_WAIT_S)

    async def _reload(self) -> None:
        """Take up another model if the name leads to one; any error leaves the model that there is."""
        try:
            digest = await asyncio.to_thread(tracking.digest_of, self.ref)
            if digest in self.models:
                self.models.move_to_end(digest)  # a champion that is taken back may still be held
            else:
                await asyncio.to_thread(self._load)
        except Exception as error:  # a description can be wrong in ways of its own
            logger.error(
                "the model stays as it is, another one cannot be loaded: %s", type(error).__name__
            )

    def _infer(self) -> None:
        predictor, _ = next(reversed(self.models.values()))
        size = predictor.window.size_px
        next(predictor.segment([Part(np.zeros((1, size, size), np.uint16), [0])]))

    def seconds_since_answer(self) -> float:
        """How long ago the model last answered a health check."""
        return time.monotonic() - self.answered_at

    async def segment(self, digest: str, part: Part) -> Segmented | None:
        """Answer some slices with this model; null where it is not held here."""
        answer: Segmented | None = await self._segment((digest, part))
        return answer

    @ray_serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=BATCH_SLICES, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=count_slices
    )
    async def _segment(self, requests: list[tuple[str, Part]]) -> list[Segmented | None]:
        return await asyncio.to_thread(self._segment_all, requests)

    def _segment_all(self, requests: list[tuple[str, Part]]) -> list[Segmented | None]:
        found: list[Segmented | None] = [None] * len(requests)
        for digest in {digest for digest, _ in requests} & self.models.keys():
            places = [index for index, (each, _) in enumerate(requests) if each == digest]
            parts = [requests[index][1] for index in places]
            answers = self.models[digest][0].segment_together(parts)
            for index, answer in zip(places, answers, strict=True):
                found[index] = answer
        return found

    async def diagnose(self, digest: str, pooled: NDArray[np.float32]) -> Probabilities | None:
        """Answer a volume's pooled vectors with this model; null where it is not held here."""
        held = self.models.get(digest)
        return None if held is None else await asyncio.to_thread(held[0].diagnose, pooled)


class Readiness:
    """Whether the model has answered lately, asked of its replica once in a while and by one request at a time."""

    def __init__(self, segmenter: DeploymentHandle, keep_s: float) -> None:
        self.segmenter, self.keep_s = segmenter, keep_s
        self._lock = asyncio.Lock()
        self._asked_at, self._is_ready = -math.inf, False

    async def is_ready(self) -> bool:
        """Return what was known at most ``keep_s`` ago."""
        if time.monotonic() - self._asked_at > self.keep_s:
            async with self._lock:
                if (
                    time.monotonic() - self._asked_at > self.keep_s
                ):  # nobody asked while this one waited
                    self._is_ready = await self._ask()
                    self._asked_at = time.monotonic()
        return self._is_ready

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return bool(await self.segmenter.seconds_since_answer.remote() < ANSWERED_WITHIN_S)
        except Exception:  # whatever it is, the model does not answer
            return False


class StudyScreener(Screener):
    """A screener whose model is a handle; closing it ends what was asked of the model, too."""

    def __init__(
        self,
        network: "RemoteNetwork",
        window: WindowConfig,
        config: ScreeningConfig,
        model_digest: str,
        software_version: str,
    ) -> None:
        super().__init__(network, window, config, model_digest, software_version)
        self.network = network

    def close(self) -> None:
        """End decoding and what was asked of the model, from any thread, for good."""
        super().close()
        self.network.cancel()


class RemoteNetwork:
    """One version of the model behind a handle, as a ``Network`` for one thread of an API replica."""

    def __init__(self, segmenter: DeploymentHandle, described: dict[str, Any]) -> None:
        self.segmenter, self.digest, self.num_slices = (
            segmenter,
            described["digest"],
            described["num_slices"],
        )
        self._is_cancelled = False
        self._under_way: set[Any] = set()

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Answer one volume.

        Raises:
            UnavailableError: no replica answers in time, none holds this version any more, or another thread has
                cancelled.
        """
        return predict(self, slices, PART_SLICES)

    def segment(self, parts: Iterable[Part]) -> Iterator[Segmented]:
        """Answer parts in their order, a few of them under way at a time."""
        waiting, asked = iter(parts), deque[Any]()
        try:
            asked.extend(
                self._ask(self.segmenter.segment, part) for part in islice(waiting, PARTS_IN_FLIGHT)
            )
            while asked:
                answer = self._wait(asked.popleft())
                asked.extend(self._ask(self.segmenter.segment, part) for part in islice(waiting, 1))
                yield Segmented(*answer)
        finally:  # after an error, what is still under way would hold a place in the model's queue
            for response in asked:
                response.cancel()
                self._under_way.discard(response)

    def diagnose(self, pooled: NDArray[np.float32]) -> Probabilities:
        """Answer a volume's pooled vectors."""
        probabilities: Probabilities = self._wait(self._ask(self.segmenter.diagnose, pooled))
        return probabilities

    def cancel(self) -> None:
        """End what is asked of the model, from another thread; the waiting thread gets an error."""
        self._is_cancelled = True
        for response in tuple(self._under_way):
            response.cancel()

    def _ask(self, method: Any, argument: Any) -> Any:
        if self._is_cancelled:
            raise UnavailableError("the request ended while its study was read")
        response = method.remote(self.digest, argument)
        self._under_way.add(response)
        return response

    def _wait(self, response: Any) -> Any:
        """Wait for this answer; it is forgotten afterwards, so that the next study cannot get it."""
        try:
            return _result(response)
        except Exception:
            response.cancel()
            raise
        finally:
            self._under_way.discard(response)


def _result(response: Any) -> Any:
    try:
        answer = response.result(timeout_s=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayTaskError:  # an error of ours in the replica
        raise
    except (
        ray.exceptions.RayError,
        RequestCancelledError,
        BackPressureError,
        TimeoutError,
    ) as error:
        raise UnavailableError(f"the model does not answer: {type(error).__name__}") from None
    if answer is None:
        raise UnavailableError("the model was replaced while this study was read")
    return answer
