"""Quantization of a network to 8 bits with NNCF: from prepared slices to ``Quantizers``.

NNCF is an extra (``pip install 'covtanet[quantize]'``) that only calibration imports; screening
reads the parameters it left.

Choice: post-training quantization with the preset ``MIXED`` (weights symmetric, activations
asymmetric) of all but depthwise convolutions, which have few weights and channels of very different
ranges. In 8 bits they cost the shipped V8 most: on a patient of another collection the involvement
differs from float32's by 0.0039 with them in float32, by 0.0072 without, at the same speed. All of
the encoder, all attention units, all maps of the slice's full size or the last layers in float32
gain nothing. NNCF's accuracy control is not used; the difference is measured afterwards, and an
engine that leaves its bounds is not taken unasked.
"""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.errors import ConfigError
from covtanet.inference.openvino_engine import INT8, compile_options
from covtanet.inference.openvino_graph import (
    convert,
    insert_quantizers,
    number_nodes,
    read_quantizers,
)
from covtanet.inference.openvino_runtime import core, import_openvino
from covtanet.inference.segmenter import EngineInput
from covtanet.model.quantizers import Quantizers

# OpenVINO's type of a depthwise convolution.
DEPTHWISE = "GroupConvolution"
# Largest difference of probability between NNCF's graph and the one that is put together again.
REBUILD_TOLERANCE = 1e-6


def has_nncf() -> bool:
    """Return whether NNCF is installed."""
    try:
        import_nncf()
    except ConfigError:
        return False
    return True


def quantize(source: EngineInput, slices: NDArray[np.float32]) -> Quantizers:
    """Return the parameters of a network in 8 bits.

    slices: intensity in [0, 1] that the ranges are taken from, (S, C, H, W), as screening makes it.

    Raises:
        ConfigError: NNCF is not installed.
        ValueError: NNCF changed the graph in a way that the parameters do not describe.
    """
    nncf = import_nncf()
    graph, copy = (convert(source.segmenter(), source.size_px) for _ in range(2))
    # Equal graphs have equal names after this, which NNCF keeps.
    if number_nodes(graph) != number_nodes(copy):
        raise ValueError("two conversions of the network differ")
    quantized = nncf.quantize(
        copy,
        # One slice at a time: ranges do not depend on the batch.
        nncf.Dataset([slices[index : index + 1] for index in range(len(slices))]),
        preset=nncf.QuantizationPreset.MIXED,
        # A network without such layers is no error.
        ignored_scope=nncf.IgnoredScope(types=[DEPTHWISE], validate=False),
        subset_size=len(slices),
        # Weights stay in float32 in the graph: their ranges are kept, not a second copy of them.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            backend_params={"compress_weights": False}
        ),
    )
    quantizers = read_quantizers(graph, quantized)
    insert_quantizers(graph, quantizers)
    _check_equal(graph, quantized, slices[:1], source.num_threads)
    return quantizers


def import_nncf() -> Any:
    """Import NNCF without its telemetry.

    Raises:
        ConfigError: it is not installed.
    """
    # Before NNCF, which reports its use to a server on the internet if OpenVINO's module for that
    # is there.
    import_openvino()
    try:
        import nncf
    except ImportError:
        raise ConfigError(
            "NNCF is missing, which calibration for 8 bits needs: pip install 'covtanet[quantize]'"
        ) from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _check_equal(graph: Any, quantized: Any, slices: NDArray[np.float32], num_threads: int) -> None:
    options = compile_options(INT8, num_threads)
    first, second = (
        core().compile_model(each, "CPU", options)(slices)[0] for each in (graph, quantized)
    )
    difference = float(np.abs(first - second).max())
    if not difference <= REBUILD_TOLERANCE:
        raise ValueError(
            f"the network put together from its quantization differs by {difference:.2g} from "
            f"NNCF's, expected at most {REBUILD_TOLERANCE:g}"
        )
