"""State that the routes of one API replica share."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from covtanet.decoding.child_process import refuse_weak_sandbox
from serve.batches import Batches
from serve.readiness import Readiness
from serve.refusals import RefusedError
from serve.settings import Caller, ServeConfig
from serve.sources import Sources
from serve.studies import Studies
from serve.uploads import Uploads

T = TypeVar("T")

READY_FOR_S = 5.0
# Threads wait for storage and Ray's job server; they compute nothing.
BATCH_THREADS = 4


class ReplicaState:
    """Decoders, uploads and batches of one API replica."""

    def __init__(self, segmenter: DeploymentHandle, settings: ServeConfig) -> None:
        # When the replica starts, not when the first study comes.
        refuse_weak_sandbox(settings.screening.decode_limits)
        self.settings = settings
        self.studies = Studies(segmenter, settings)
        self.uploads = Uploads(settings)
        self.batches = Batches(settings) if settings.ledger else None
        # Batches wait for storage and for Ray's job server; with threads of their own they delay no
        # study.
        self.batch_threads = ThreadPoolExecutor(BATCH_THREADS, "batches")
        self.sources = Sources()
        self.readiness = Readiness(segmenter, READY_FOR_S)

    def open_batches(self) -> Batches:
        """Return the batches.

        Raises:
            RefusedError: 404, the endpoint has no ledger.
        """
        if self.batches is None:
            raise RefusedError(404, "no_ledger", "this endpoint has no ledger for batches")
        return self.batches

    async def in_batch_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work that waits for storage or for Ray's job server."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.batch_threads, work, *arguments)

    async def of_batch(self, work: Callable[[str, Caller], T], batch_id: str, caller: Caller) -> T:
        """Run work on one batch of a caller.

        Raises:
            RefusedError: 404, the caller has no such batch, or its ledger or file is missing.
        """
        try:
            return await self.in_batch_thread(work, batch_id, caller)
        except KeyError:
            raise RefusedError(404, "no_such_batch", "this caller has no such batch") from None
        except FileNotFoundError:
            raise RefusedError(404, "not_there", "missing, or not written yet") from None


async def current_state() -> ReplicaState:
    """Return the state of the replica that runs this process."""
    state: ReplicaState = ray_serve.get_replica_context().servable_object.state
    return state


State = Annotated[ReplicaState, Depends(current_state)]
