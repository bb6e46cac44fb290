"""Engines of OpenVINO on CPUs: float32, bfloat16, and 8 bits.

``openvino``       float32, within 1e-4 of eager PyTorch
``openvino-bf16``  products in bfloat16, sums in float32; on processors with such instructions
``openvino-int8``  8-bit numbers in the ranges of a calibration; the rest in float32
"""

import hashlib
import logging
import math
import threading
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from covtanet.errors import EngineUnavailableError
from covtanet.inference import compiled_cache
from covtanet.inference.float_engine import FloatEngine, RunSlices
from covtanet.inference.openvino_graph import convert, insert_quantizers
from covtanet.inference.openvino_runtime import (
    core,
    cpu_flags,
    has_bfloat16,
    has_int8,
    import_openvino,
)
from covtanet.inference.segmenter import EngineInput

logger = logging.getLogger(__name__)

FLOAT32, BFLOAT16, INT8 = "openvino", "openvino-bf16", "openvino-int8"
NAMES = (FLOAT32, BFLOAT16, INT8)
# Slices of one request to a stream. CPU time per slice is the same from 2 to 16; small requests
# keep all streams busy to the end of a chunk.
MAX_REQUEST_SLICES = 4
# f32 by name: on processors with bfloat16 the plug-in would choose that and leave the tolerance.
PRECISIONS = {FLOAT32: "f32", BFLOAT16: "bf16", INT8: "f32"}


def missing_instructions(name: str) -> str:
    """Return which instructions of the processor an engine lacks; empty if none."""
    if name == BFLOAT16 and not has_bfloat16():
        return "the processor has no bfloat16 instructions (avx512_bf16 or amx_bf16)"
    if name == INT8 and not has_int8():
        return "the processor has no 8-bit dot products (avx512_vnni, avx_vnni or amx_int8)"
    return ""


def build(name: str, source: EngineInput) -> FloatEngine:
    """Make a network ready to run.

    Raises:
        EngineUnavailableError: the processor lacks instructions, or the model was not calibrated
            for 8 bits or not as this OpenVINO converts it.
    """
    missing = missing_instructions(name)
    if missing:
        raise EngineUnavailableError(f"engine {name}: {missing}")
    if name == INT8 and source.quantizers is None:
        raise EngineUnavailableError(
            f"engine {name}: the model has no quantization; covtanet calibrate makes it"
        )
    options = compile_options(name, source.num_threads)
    compiled = _compiled(name, source, options)
    return FloatEngine.of(name, "cpu", _run(compiled, source.num_threads), source)


def compile_options(name: str, num_threads: int) -> dict[str, Any]:
    """Return OpenVINO's options of an engine."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[name],
        "INFERENCE_NUM_THREADS": num_threads,
        # Streams of one thread each instead of one stream of all threads: the shipped V8 takes 0.92
        # of the CPU time per slice in 8 bits and 0.94 in bfloat16 with two threads, since threads
        # do not wait for each other after every layer.
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": num_threads,
    }


def _compiled(name: str, source: EngineInput, options: dict[str, Any]) -> Any:
    """Return the compiled network, from the cache if it is there."""
    # A network that is not saved will not be asked for again.
    folder = compiled_cache.cache_folder() if source.is_saved else None
    if folder is None:
        return core().compile_model(_graph(name, source), "CPU", options)
    entry = _entry_name(name, source, options)
    data = compiled_cache.read_entry(folder, entry)
    if data is not None:
        try:
            # With the options once more: precision and threads are not part of what is kept.
            return core().import_model(BytesIO(data), "CPU", options)
        except RuntimeError:
            logger.warning("a compiled network on disk cannot be read; it is converted anew")
    compiled = core().compile_model(_graph(name, source), "CPU", options)
    compiled_cache.write_entry(folder, entry, compiled.export_model().getvalue())
    return compiled


def _graph(name: str, source: EngineInput) -> Any:
    graph = convert(source.segmenter(), source.size_px)
    if name == INT8:
        assert source.quantizers is not None
        insert_quantizers(graph, source.quantizers)
    return graph


def _entry_name(name: str, source: EngineInput, options: dict[str, Any]) -> str:
    """Return the name of a cache entry: everything that the compiled network depends on."""
    return compiled_cache.entry_name(
        source.content_sha256(),
        _source_sha256(),
        name,
        source.size_px,
        sorted(options.items()),
        import_openvino().get_version(),
        torch.__version__,
        # A home folder may be shared by machines with different processors.
        core().get_property("CPU", "FULL_DEVICE_NAME"),
        sorted(cpu_flags()),
    )


@cache
def _source_sha256() -> str:
    """Return the digest of the code that makes a graph of weights."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for part in ("inference", "model"):
        for path in sorted((package / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(compiled: Any, num_streams: int) -> RunSlices:
    requests = import_openvino().AsyncInferQueue(compiled, num_streams)
    # One caller at a time: requests belong to the call that started them.
    one_at_a_time = threading.Lock()
    answers: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def keep(request: Any, start: int) -> None:
        # Copied: the request's own arrays are those of the next slices soon.
        first, second = (request.get_output_tensor(port).data for port in range(2))
        answers[start] = np.array(first), np.array(second)

    requests.set_callback(keep)

    def run(slices: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        size = min(MAX_REQUEST_SLICES, math.ceil(len(slices) / num_streams))
        with one_at_a_time:
            answers.clear()
            for start in range(0, len(slices), size):
                requests.start_async([slices[start : start + size]], start)
            requests.wait_all()
            in_order = [answers[start] for start in sorted(answers)]
        probability, pooled = zip(*in_order, strict=True)
        return np.concatenate(probability), np.concatenate(pooled)

    return run
