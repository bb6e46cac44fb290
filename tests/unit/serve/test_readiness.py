"""Readiness of the model, and requests to the model of studies that have ended."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from covtanet.ct.window import WindowConfig
from covtanet.errors import UnavailableError
from covtanet.inference.chunks import SliceChunk
from serve.readiness import Readiness
from serve.remote_network import RemoteNetwork


class Handle:
    """The part of a deployment's handle that readiness uses."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.num_asked = seconds, 0

    @property
    def seconds_since_answer(self) -> "Handle":
        return self

    async def remote(self) -> float:
        self.num_asked += 1
        await asyncio.sleep(0)
        return self.seconds


@pytest.mark.parametrize(("seconds", "is_ready"), [(1.0, True), (300.0, False)])
def test_two_hundred_readyz_at_once_ask_the_model_once(seconds: float, is_ready: bool) -> None:
    async def scenario() -> list[bool]:
        readiness = Readiness(handle, keep_s=60)
        return list(await asyncio.gather(*(readiness.is_ready() for _ in range(200))))

    handle = Handle(seconds)
    assert asyncio.run(scenario()) == [is_ready] * 200
    assert handle.num_asked == 1


def network_of(segment: Any, diagnose: Any) -> RemoteNetwork:
    """A network whose handle has these methods."""

    class Segmenter:
        def options(self, multiplexed_model_id: str) -> Any:
            assert multiplexed_model_id == "d:models:/covtanet/1"
            return self

    Segmenter.segment, Segmenter.diagnose = segment, diagnose  # type: ignore[attr-defined]
    described = {"model_id": "d:models:/covtanet/1", "num_slices": 2, "window": WindowConfig()}
    return RemoteNetwork(Segmenter(), described)


def test_error_of_one_chunk_cancels_those_in_flight() -> None:
    class Answer:
        def __init__(self) -> None:
            self.is_cancelled = False

        def result(self, timeout_s: float) -> Any:
            raise TimeoutError

        def cancel(self) -> None:
            self.is_cancelled = True

    asked: list[Answer] = []

    class Method:
        def remote(self, *arguments: object) -> Answer:
            asked.append(Answer())
            return asked[-1]

    network = network_of(Method(), Method())
    parts = [SliceChunk(np.zeros((1, 1, 2, 2), np.uint16), [0])] * 4
    with pytest.raises(UnavailableError, match="TimeoutError"):
        list(network.segment(parts))
    assert [answer.is_cancelled for answer in asked] == [True, True]
    assert not network._in_flight


def test_cancelled_network_cancels_its_requests_and_sends_no_more() -> None:
    class Answer:
        is_cancelled = False

        def cancel(self) -> None:
            self.is_cancelled = True

    asked: list[Any] = []

    class Method:
        def remote(self, *arguments: object) -> Answer:
            asked.append(Answer())
            return asked[-1]  # type: ignore[no-any-return]

    network = network_of(Method(), Method())
    network._ask(network.segmenter.segment, None)
    thread = threading.Thread(target=network.cancel)
    thread.start()
    thread.join()
    assert [each.is_cancelled for each in asked] == [True]
    with pytest.raises(UnavailableError, match="the request ended"):
        network._ask(network.segmenter.segment, None)


def test_request_that_is_sent_while_another_thread_cancels_is_cancelled() -> None:
    class Answer:
        is_cancelled = False

        def cancel(self) -> None:
            self.is_cancelled = True

    answer = Answer()

    class Method:
        def remote(self, *arguments: object) -> Answer:
            network.cancel()  # which does not know of this request yet
            return answer

    network = network_of(Method(), Method())
    with pytest.raises(UnavailableError, match="the request ended"):
        network.diagnose(np.zeros(1, np.float32))
    assert answer.is_cancelled
    assert not network._in_flight


def test_late_answer_is_never_given_to_the_next_study() -> None:
    """A study whose diagnosis failed leaves no answer for the next study."""

    class Answer:
        def __init__(self, value: Any) -> None:
            self.value = value

        def result(self, timeout_s: float) -> Any:
            if isinstance(self.value, Exception):
                raise self.value
            return self.value

        def cancel(self) -> None:
            pass

    class Method:
        def __init__(self, *values: Any) -> None:
            self.values = list(values)

        def remote(self, *arguments: object) -> Answer:
            return Answer(self.values.pop(0))

    network = network_of(Method(("levels", "pooled")), Method(TimeoutError()))
    with pytest.raises(UnavailableError, match="TimeoutError"):
        network.diagnose(np.zeros(1, np.float32))
    segmented: list[Any] = list(
        network.segment([SliceChunk(np.zeros((1, 1, 2, 2), np.uint16), [0])])
    )
    assert segmented == [("levels", "pooled", "")]
