"""Copies beside computing, and recorded kernels, on a GPU; on a CPU plain calls in order.

Three CUDA streams: the next batch is copied to the device and the last one's answer back while one
is computed.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from covtanet.inference.levels_network import Answer

logger = logging.getLogger(__name__)

# Runs before a graph is recorded: libraries choose kernels and take memory in the first ones.
WARM_RUNS = 3
# Levels by which a recorded graph may differ from plain kernels, which may add in another order.
MAX_LEVELS_APART = 1


class Streams:
    """Streams of one device; tensors that cross them are marked for the allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            streams = [torch.cuda.Stream(device) for _ in range(3)]  # type: ignore[no-untyped-call]
            self.loading, self.running, self.storing = streams
            # Weights were copied by the stream of the caller.
            torch.cuda.synchronize(device)

    def load(self, *tensors: Tensor) -> list[Tensor]:
        """Begin to copy page-locked tensors to the device, for ``computing``."""
        if not self.is_cuda:
            return list(tensors)
        with torch.cuda.stream(self.loading):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        self.running.wait_stream(self.loading)
        for loaded in copies:
            loaded.record_stream(self.running)
        return copies

    def computing(self) -> AbstractContextManager[object]:
        """Return the context in which kernels go to the computing stream."""
        return torch.cuda.stream(self.running) if self.is_cuda else nullcontext()

    def own(self, *tensors: Tensor) -> list[Tensor]:
        """Return copies that the next batch does not overwrite, as a graph does with its output."""
        return [tensor.clone() for tensor in tensors] if self.is_cuda else list(tensors)

    def store(self, *tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
        """Begin to copy tensors to the host; return them and a function that waits for them."""
        if not self.is_cuda:
            return list(tensors), lambda: None
        self.storing.wait_stream(self.running)
        with torch.cuda.stream(self.storing):
            # To page-locked memory, which torch takes for such copies.
            copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self.storing)
        for tensor in tensors:
            tensor.record_stream(self.storing)
        return copies, done.synchronize


def capture(
    run: Callable[[Tensor], Answer], example: Tensor, streams: Streams
) -> Callable[[Tensor], Answer]:
    """Return a function that replays the kernels of ``run`` at the shape of an example.

    Many small kernels take longer to start than to run; a graph starts all of them at once. If they
    cannot be recorded, or the graph gives other levels, ``run`` itself is returned with a warning.
    Input and output of a graph are its own: the next call overwrites the answer.
    """
    try:
        replay = _record(run, example, streams)
        apart = _levels_apart(run, replay, example, streams)
    except RuntimeError as error:
        logger.warning("no CUDA graph, kernels are started singly: %s", type(error).__name__)
        return run
    if apart > MAX_LEVELS_APART:
        logger.warning("the CUDA graph differs by %d levels, kernels are started singly", apart)
        return run
    return replay


def _record(
    run: Callable[[Tensor], Answer], example: Tensor, streams: Streams
) -> Callable[[Tensor], Answer]:
    with torch.inference_mode():
        own_input = example.clone()
        torch.cuda.synchronize(streams.device)
        with torch.cuda.stream(streams.running):
            for _ in range(WARM_RUNS):
                run(own_input)
        torch.cuda.synchronize(streams.device)
        # The graph has memory of its own, so that of the warm runs is given back.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Another thread may run another model meanwhile, which the default mode refuses.
        with torch.cuda.graph(graph, stream=streams.running, capture_error_mode="thread_local"):
            answer = run(own_input)

    def replay(stored: Tensor) -> Answer:
        own_input.copy_(stored)
        graph.replay()
        return answer

    return replay


def _levels_apart(
    run: Callable[[Tensor], Answer],
    replay: Callable[[Tensor], Answer],
    example: Tensor,
    streams: Streams,
) -> int:
    """Return the largest difference of levels on noise."""
    with torch.inference_mode(), torch.cuda.stream(streams.running):
        generator = torch.Generator(example.device).manual_seed(0)
        noise = torch.randint(
            -32768,
            32767,
            example.shape,
            generator=generator,
            dtype=example.dtype,
            device=example.device,
        )
        recorded, plain = replay(noise).levels.int(), run(noise).levels.int()
        return int((recorded - plain).abs().max())
