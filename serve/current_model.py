"""The version of the model that new studies get, as one API replica knows it."""

import asyncio
import math
import time
from typing import Any

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

# A model replica that hangs answers no caller; the request is refused as busy after this time.
DESCRIBE_TIMEOUT_S = 10.0


class CurrentModel:
    """Description of the newest version, asked of a model replica at most once per ``keep_s``.

    Model replicas notice another champion at different times. Since the answer is kept, an API
    replica changes its version at most once in that time, and not from study to study.
    """

    def __init__(self, segmenter: DeploymentHandle, keep_s: float) -> None:
        self.segmenter, self.keep_s = segmenter, keep_s
        self._described: dict[str, Any] | None = None
        self._asked_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def describe(self) -> dict[str, Any] | None:
        """Return the newest version, or the last one known; None if no replica ever answered."""
        if time.monotonic() - self._asked_at > self.keep_s:
            # One question at a time, however many requests wait for its answer; shielded, since
            # they wait on if one of them hangs up.
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
            await asyncio.shield(self._asking)
        return self._described

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                self._described = await self.segmenter.describe.remote()
        except (ray.exceptions.RayError, RayServeException, TimeoutError):
            pass  # the version that was known last serves on, since every replica can load it
        finally:
            self._asking = None
            if self._described is not None:
                self._asked_at = time.monotonic()
