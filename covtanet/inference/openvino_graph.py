"""OpenVINO's graph of a network: conversion, numbered nodes, and quantizers put into it.

Names that OpenVINO gives to nodes count up within a process, so that two conversions of one network
differ. Nodes are numbered in topological order instead, and a digest over types, shapes and
connections tells whether two graphs have the same nodes under the same numbers.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from covtanet.errors import EngineUnavailableError
from covtanet.inference.openvino_runtime import import_openvino
from covtanet.inference.segmenter import Segmenter
from covtanet.model.quantizers import Quantizers

FAKE_QUANTIZE, CONSTANT = "FakeQuantize", "Constant"


def convert(segmenter: Segmenter, size_px: int) -> Any:
    """Return the graph of a network for any number of slices (B, C, size_px, size_px)."""
    openvino = import_openvino()
    example = torch.zeros(1, segmenter.network.config.segnet.in_channels, size_px, size_px)
    # Converted within the process in seconds; an export to ONNX takes up to a minute.
    graph = openvino.convert_model(segmenter, example_input=example)
    # Any number of slices at a fixed size, since the last chunk of a volume is smaller.
    graph.reshape({0: [-1, *example.shape[1:]]})
    _use_fixed_windows(graph)
    return graph


def _use_fixed_windows(graph: Any) -> None:
    """Replace adaptive averages by averages of fixed windows, if they are the same.

    OpenVINO computes the former without vector instructions: a sixth of the time of the shipped V8
    in 8 bits.
    """
    from openvino import opset13

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "AdaptiveAvgPool":
            continue
        inside, outside = (
            value.get_partial_shape() for value in (node.input_value(0), node.output(0))
        )
        # (H, W) without and with the pool.
        sides = [inside[axis] for axis in (2, 3)], [outside[axis] for axis in (2, 3)]
        if any(side.is_dynamic for side in (*sides[0], *sides[1])):
            continue
        (height, width), (rows, columns) = ([side.get_length() for side in pair] for pair in sides)
        if height % rows or width % columns:
            continue
        window = [height // rows, width // columns]
        average = opset13.avg_pool(
            node.input_value(0), window, [0, 0], [0, 0], window, exclude_pad=True
        )
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(average.output(0))
    graph.validate_nodes_and_infer_types()


def number_nodes(graph: Any) -> str:
    """Name every node by its number in topological order; return the digest of the graph.

    The digest covers types, inputs, shapes and element types, not the values of constants.
    """
    digest = hashlib.sha256()
    nodes = graph.get_ordered_ops()
    for number, node in enumerate(nodes):
        node.set_friendly_name(_name(number))
    for node in nodes:
        inputs = [
            (value.get_node().get_friendly_name(), value.get_index())
            for value in node.input_values()
        ]
        outputs = [
            (str(value.get_partial_shape()), str(value.get_element_type()))
            for value in node.outputs()
        ]
        digest.update(repr((node.get_type_name(), inputs, outputs)).encode())
    return digest.hexdigest()


def insert_quantizers(graph: Any, quantizers: Quantizers) -> None:
    """Put the quantizers of a calibration into a graph; OpenVINO runs it in 8 bits then.

    Raises:
        EngineUnavailableError: it is not the graph that was calibrated, as another version of
            OpenVINO or PyTorch may convert it.
    """
    if number_nodes(graph) != quantizers.graph_sha256:
        raise EngineUnavailableError(
            "the converted graph is not the calibrated one: another version of OpenVINO or "
            "PyTorch; run covtanet calibrate again"
        )
    nodes = graph.get_ordered_ops()
    try:
        _replace_constants(nodes, quantizers)
        _insert(nodes, quantizers)
        graph.validate_nodes_and_infer_types()
    except (IndexError, ValueError, RuntimeError) as error:
        raise EngineUnavailableError(
            f"the quantization does not fit the graph: {type(error).__name__}"
        ) from error


def _insert(nodes: list[Any], quantizers: Quantizers) -> None:
    from openvino import opset13

    rounded = []
    levels = quantizers.levels.tolist()
    sources = quantizers.source.tolist()
    for (node, output), (low, high), count in zip(
        sources, quantizers.ranges(), levels, strict=True
    ):
        limits = [opset13.constant(values) for values in (low, high, low, high)]
        rounded.append(opset13.fake_quantize(nodes[node].output(output), *limits, levels=count))
    for quantizer, node, port in quantizers.consumer.tolist():
        nodes[node].input(port).replace_source_output(rounded[quantizer].output(0))


def _replace_constants(nodes: list[Any], quantizers: Quantizers) -> None:
    """Replace constants that calibration corrected, such as biases."""
    from openvino import opset13

    for (node, _), values in zip(quantizers.constant.tolist(), quantizers.values(), strict=True):
        old = nodes[node]
        if old.get_type_name() != CONSTANT:
            raise ValueError("a corrected node is not a constant")
        new = opset13.constant(values.reshape(tuple(old.output(0).get_shape())))
        for target in list(old.output(0).get_target_inputs()):
            target.replace_source_output(new.output(0))


def read_quantizers(graph: Any, quantized: Any) -> Quantizers:
    """Return the quantizers that were put into a graph.

    graph: as ``number_nodes`` left it. quantized: the same graph with quantizers, whose other nodes
    keep their names.

    Raises:
        ValueError: the quantized graph differs by more than quantizers and constants.
    """
    number_of = {node.get_friendly_name(): n for n, node in enumerate(graph.get_ordered_ops())}
    constants = _changed_constants(graph, quantized, number_of)
    found = [node for node in quantized.get_ordered_ops() if node.get_type_name() == FAKE_QUANTIZE]
    sources, levels, shapes, lows, highs, consumers = [], [], [], [], [], []
    for quantizer, node in enumerate(found):
        value = node.input_value(0)
        low, high, out_low, out_high = (
            np.array(node.input_value(port).get_node().data, np.float32) for port in range(1, 5)
        )
        if not (np.array_equal(low, out_low) and np.array_equal(high, out_high)):
            raise ValueError("a quantizer's output has another range than its input")
        if low.shape != high.shape:
            raise ValueError("a quantizer's limits differ in shape")
        sources.append((_number(number_of, value.get_node()), value.get_index()))
        levels.append(node.get_attributes()["levels"])
        shapes.append((low.ndim, *low.shape, *[0] * (5 - low.ndim)))
        lows.append(low.ravel())
        highs.append(high.ravel())
        consumers += [
            (quantizer, _number(number_of, target.get_node()), target.get_index())
            for target in node.output(0).get_target_inputs()
        ]
    return Quantizers(
        graph_sha256=number_nodes(graph),
        source=np.array(sources, np.int32).reshape(-1, 2),
        levels=np.array(levels, np.int32),
        shape=np.array(shapes, np.int32).reshape(-1, 6),
        low=np.concatenate([*lows, np.empty(0, np.float32)]),
        high=np.concatenate([*highs, np.empty(0, np.float32)]),
        # Sorted: equal calibrations give equal files.
        consumer=np.array(sorted(consumers), np.int32).reshape(-1, 3),
        constant=np.array([(n, len(value)) for n, value in constants], np.int32).reshape(-1, 2),
        value=np.concatenate([*(value for _, value in constants), np.empty(0, np.float32)]),
    )


def _changed_constants(graph: Any, quantized: Any, number_of: dict[str, int]) -> Any:
    """Return numbers and flat values of the constants that differ from those of the graph."""
    nodes = graph.get_ordered_ops()
    changed = []
    for node in quantized.get_ordered_ops():
        number = number_of.get(node.get_friendly_name())
        if number is None or node.get_type_name() != CONSTANT:
            continue
        if not np.array_equal(node.data, nodes[number].data):
            changed.append((number, np.array(node.data, np.float32).ravel()))
    return changed


def _number(number_of: dict[str, int], node: Any) -> int:
    name = node.get_friendly_name()
    if name not in number_of:
        raise ValueError("a quantizer stands beside a node that the graph lacks")
    return number_of[name]


def _name(number: int) -> str:
    return f"node_{number:06d}"
