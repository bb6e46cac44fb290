"""The version of the model that an API replica gives to new studies."""

import asyncio
from typing import Any

import ray
from ray.serve.exceptions import ReplicaUnavailableError

from serve.current_model import CurrentModel


class Handle:
    """The part of a deployment's handle that is used; it answers with these, one after the other.

    An exception is raised.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers, self.num_asked = list(answers), 0

    @property
    def describe(self) -> "Handle":
        return self

    async def remote(self) -> Any:
        answer = self.answers[self.num_asked]
        self.num_asked += 1
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_hundred_studies_at_once_ask_for_the_model_once() -> None:
    async def scenario() -> set[str]:
        current = CurrentModel(handle, keep_s=60)
        described = await asyncio.gather(*(current.describe() for _ in range(100)))
        return {each["version"] for each in described if each}

    handle = Handle({"version": "1"})
    assert asyncio.run(scenario()) == {"1"}
    assert handle.num_asked == 1


def test_study_does_not_change_back_to_the_version_of_a_late_replica() -> None:
    """The second replica that is asked has not noticed the new champion yet."""

    async def scenario() -> list[Any]:
        current = CurrentModel(Handle({"version": "2"}, {"version": "1"}), keep_s=60)
        return [await current.describe() for _ in range(3)]

    assert asyncio.run(scenario()) == [{"version": "2"}] * 3


def test_known_version_serves_on_if_no_model_replica_answers() -> None:
    async def scenario() -> list[Any]:
        current = CurrentModel(handle, keep_s=-1)
        return [await current.describe() for _ in range(3)]

    error = ray.exceptions.RayActorError()
    handle = Handle(error, {"version": "1"}, ReplicaUnavailableError("replica"))
    assert asyncio.run(scenario()) == [None, {"version": "1"}, {"version": "1"}]


def test_caller_who_hangs_up_leaves_the_question_to_the_others() -> None:
    async def scenario() -> Any:
        current = CurrentModel(handle, keep_s=60)
        first, second = (asyncio.create_task(current.describe()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    handle = Handle({"version": "1"})
    assert asyncio.run(scenario()) == {"version": "1"}
    assert handle.num_asked == 1
