"""The model in another replica, as a ``Network`` whose answers come through a handle."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from covtanet.ct.window import WindowConfig
from covtanet.errors import UnavailableError
from covtanet.inference.chunks import SegmentedChunk, SliceChunk
from covtanet.inference.predictor import (
    Prediction,
    Probabilities,
    predict,
)
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import Screener

# A long study is cut into chunks, so that a short study that came later takes turns with it.
CHUNK_SLICES = 16
# The model works on one chunk while the next waits for it, so that it does not idle.
CHUNKS_IN_FLIGHT = 2
ANSWER_TIMEOUT_S = 120.0


class RemoteNetwork:
    """One version of the model behind a handle, for one thread of an API replica."""

    def __init__(self, segmenter: DeploymentHandle, described: dict[str, Any]) -> None:
        self.model_id = described["model_id"]
        # Serve prefers a replica that holds this version.
        self.segmenter = segmenter.options(multiplexed_model_id=self.model_id)
        self.num_slices = described["num_slices"]
        self.num_neighbours = described["window"].num_neighbours
        self._is_cancelled = False
        self._in_flight: set[Any] = set()

    def predict(self, slices: NDArray[np.uint16]) -> Prediction:
        """Predict one volume.

        Raises:
            UnavailableError: no replica answers in time, this version cannot be loaded any more, or
                another thread has cancelled.
        """
        return predict(self, slices, CHUNK_SLICES)

    def segment(self, parts: Iterable[SliceChunk]) -> Iterator[SegmentedChunk]:
        """Segment chunks in their order, a few of them in flight at a time."""
        remaining = iter(parts)
        responses = deque[Any]()
        try:
            for part in islice(remaining, CHUNKS_IN_FLIGHT):
                responses.append(self._ask(self.segmenter.segment, part))
            while responses:
                answer = self._wait(responses.popleft())
                # The next chunk is sent before this one is used, so that the model does not idle.
                for part in islice(remaining, 1):
                    responses.append(self._ask(self.segmenter.segment, part))
                yield SegmentedChunk(*answer)
        finally:
            # After an error, requests in flight would take slots of the model's queue.
            for response in responses:
                response.cancel()
                self._in_flight.discard(response)

    def diagnose(self, pooled: NDArray[np.float32]) -> Probabilities:
        """Diagnose a volume by its pooled vectors."""
        probabilities: Probabilities = self._wait(self._ask(self.segmenter.diagnose, pooled))
        return probabilities

    def cancel(self) -> None:
        """Cancel all requests in flight, from another thread; the waiting thread gets an error."""
        # Set before the loop: a request that the loop misses is cancelled by the one who sent it.
        self._is_cancelled = True
        # A copy: the waiting thread changes the set meanwhile.
        for response in tuple(self._in_flight):
            response.cancel()

    def _ask(self, method: Any, argument: Any) -> Any:
        self._check_open()
        response = method.remote(self.model_id, argument)
        self._in_flight.add(response)
        try:
            self._check_open()
        except UnavailableError:
            response.cancel()
            self._in_flight.discard(response)
            raise
        return response

    def _check_open(self) -> None:
        if self._is_cancelled:
            raise UnavailableError("the request ended while its study was read")

    def _wait(self, response: Any) -> Any:
        """Wait for this answer and forget it, so that the next study cannot get it."""
        try:
            return _result(response)
        except Exception:
            response.cancel()
            raise
        finally:
            self._in_flight.discard(response)


def _result(response: Any) -> Any:
    try:
        answer = response.result(timeout_s=ANSWER_TIMEOUT_S)
    except ray.exceptions.RayTaskError:
        raise  # a bug in the model replica, not an outage
    # The exceptions of an outage become a refusal that the caller may retry.
    except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
        raise UnavailableError(f"the model does not answer: {type(error).__name__}") from None
    if answer is None:
        raise UnavailableError("this version of the model cannot be loaded any more")
    return answer


class StudyScreener(Screener):
    """A screener whose model is a handle; closing it also cancels its requests to the model."""

    def __init__(
        self,
        network: RemoteNetwork,
        window: WindowConfig,
        config: ScreeningConfig,
        model_digest: str,
        software_version: str,
    ) -> None:
        super().__init__(network, window, config, model_digest, software_version)
        self.network = network

    def close(self) -> None:
        """End decoding and the requests to the model, from any thread, for good."""
        super().close()
        self.network.cancel()
