"""Readiness of the model, for probes that come from anywhere and cost no inference."""

import asyncio
import math
import time

from ray.serve.handle import DeploymentHandle

READY_TIMEOUT_S = 10.0
# Four health checks; Serve ends a replica that fails three.
ANSWERED_WITHIN_S = 40.0


class Readiness:
    """Result of the model's last health checks, asked for at most once per ``keep_s``."""

    def __init__(self, segmenter: DeploymentHandle, keep_s: float) -> None:
        self.segmenter, self.keep_s = segmenter, keep_s
        self._lock = asyncio.Lock()
        self._asked_at = -math.inf
        self._is_ready = False

    async def is_ready(self) -> bool:
        """Return an answer that is at most ``keep_s`` old."""
        if not self._is_stale():
            return self._is_ready
        # One question at a time, however many requests ask.
        async with self._lock:
            # Another request may have asked while this one waited for the lock.
            if self._is_stale():
                self._is_ready = await self._ask()
                self._asked_at = time.monotonic()
        return self._is_ready

    def _is_stale(self) -> bool:
        return time.monotonic() - self._asked_at > self.keep_s

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                # Asks for the time of the last health check instead of an inference, which costs
                # the model nothing.
                seconds: float = await self.segmenter.seconds_since_answer.remote()
        except Exception:  # any error means that the model does not answer
            return False
        return seconds < ANSWERED_WITHIN_S
