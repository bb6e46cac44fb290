"""Quantization parameters of a network: where its values are rounded to 8 bits, and in which range.

They are a safetensors file beside the weights. The network's graph itself is converted from the
weights each time; the parameters name its nodes by their number in topological order, and the
digest of the graph they belong to tells whether the numbers still mean the same nodes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from covtanet.errors import CheckpointError

# Bytes of the file at most: the shipped V8 takes 0.4 MB.
MAX_BYTES = 16 << 20
# 8 bits; weights use one value less, so that zero lies in the middle.
MAX_LEVELS = 256
MAX_RANK = 5
# Columns of the tensors; None for a vector.
TENSORS: dict[str, tuple[str, int | None]] = {
    "source": ("int32", 2),
    "levels": ("int32", None),
    "shape": ("int32", 1 + MAX_RANK),
    "low": ("float32", None),
    "high": ("float32", None),
    "consumer": ("int32", 3),
    "constant": ("int32", 2),
    "value": ("float32", None),
}


@dataclass(frozen=True, kw_only=True)
class Quantizers:
    """N quantizers, their M consumers, and K constants that take another value with them.

    Nodes are numbers in the topological order of the graph.
    """

    graph_sha256: str
    """Digest of the graph that the numbers of nodes refer to."""
    source: NDArray[np.int32]
    """Node and output that is rounded, (N, 2)."""
    levels: NDArray[np.int32]
    """Number of values that are left, (N,)."""
    shape: NDArray[np.int32]
    """Rank of the range and its dimensions, filled up with zeros, (N, 6)."""
    low: NDArray[np.float32]
    """Lowest values of all quantizers, one quantizer after the other."""
    high: NDArray[np.float32]
    """Highest values, likewise."""
    consumer: NDArray[np.int32]
    """Quantizer, node and input that reads the rounded values, (M, 3)."""
    constant: NDArray[np.int32]
    """Node and number of values of a constant, (K, 2)."""
    value: NDArray[np.float32]
    """Values of all constants, one constant after the other."""

    def ranges(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Return lowest and highest values of each quantizer in the shape of its range."""
        shapes = [tuple(row[1 : 1 + row[0]].tolist()) for row in self.shape]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        lows = np.split(self.low, ends[:-1])
        highs = np.split(self.high, ends[:-1])
        return [
            (low.reshape(shape), high.reshape(shape))
            for shape, low, high in zip(shapes, lows, highs, strict=True)
        ]

    def values(self) -> list[NDArray[np.float32]]:
        """Return the values of each constant, flat."""
        return np.split(self.value, np.cumsum(self.constant[:, 1])[:-1])


def save_quantizers(path: Path, quantizers: Quantizers) -> None:
    """Write the file."""
    tensors = {name: np.ascontiguousarray(getattr(quantizers, name)) for name in TENSORS}
    save_file(tensors, path, metadata={"graph_sha256": quantizers.graph_sha256})


def load_quantizers(path: Path) -> Quantizers:
    """Read the file; what does not depend on the graph is checked.

    Raises:
        CheckpointError: unknown or missing tensors, another type or shape, numbers that do not
            belong together, NaN or infinite values, or an empty range.
        SafetensorError: not a safetensors file.
    """
    with safe_open(path, framework="np") as file:
        names = set(file.keys())
        if names != set(TENSORS):
            raise CheckpointError(
                f"quantization has tensors {', '.join(sorted(names))[:200]}, expected "
                f"{', '.join(sorted(TENSORS))}"
            )
        tensors = {name: file.get_tensor(name) for name in TENSORS}
        metadata = file.metadata() or {}
    for name, (kind, num_columns) in TENSORS.items():
        _check_type(name, tensors[name], kind, num_columns)
    quantizers = Quantizers(graph_sha256=metadata.get("graph_sha256", ""), **tensors)
    _check_sizes(quantizers)
    _check_values(quantizers)
    return quantizers


def _check_type(name: str, tensor: NDArray[np.generic], kind: str, columns: int | None) -> None:
    expected_rank = 1 if columns is None else 2
    fits = tensor.ndim == expected_rank and (columns is None or tensor.shape[1] == columns)
    if tensor.dtype != np.dtype(kind) or not fits:
        raise CheckpointError(
            f"quantization: {name} is {tensor.dtype} {tensor.shape}, expected {kind} of "
            f"{columns or 1} columns"
        )


def _check_sizes(quantizers: Quantizers) -> None:
    rank, dimensions = quantizers.shape[:, 0], quantizers.shape[:, 1:]
    is_used = np.arange(MAX_RANK) < rank[:, None]
    # In 64 bits: a product of 32 bits could wrap around to the expected number.
    num_values = np.prod(np.where(is_used, dimensions, 1).astype(np.int64), axis=1).sum()
    num_constants = quantizers.constant[:, 1].astype(np.int64).sum()
    num_quantizers = len(quantizers.source)
    problems = {
        "no quantizer": num_quantizers == 0,
        "levels": len(quantizers.levels) != num_quantizers,
        "shape": len(quantizers.shape) != num_quantizers,
        "rank": bool(((rank < 0) | (rank > MAX_RANK)).any()),
        "dimension": bool((dimensions[is_used] < 1).any() or (dimensions > 1 << 16).any()),
        "low": len(quantizers.low) != num_values,
        "high": len(quantizers.high) != num_values,
        "constant": bool((quantizers.constant[:, 1] < 1).any()),
        "value": len(quantizers.value) != num_constants,
    }
    _refuse(problems, "sizes do not fit")


def _check_values(quantizers: Quantizers) -> None:
    nodes = (quantizers.source, quantizers.consumer, quantizers.constant)
    is_quantizer = quantizers.consumer[:, 0] < len(quantizers.source)
    problems = {
        "negative node": any(bool((numbers < 0).any()) for numbers in nodes),
        "unknown quantizer": not bool(is_quantizer.all()),
        "levels": bool(((quantizers.levels < 2) | (quantizers.levels > MAX_LEVELS)).any()),
        "NaN or infinite low": not bool(np.isfinite(quantizers.low).all()),
        "NaN or infinite high": not bool(np.isfinite(quantizers.high).all()),
        "NaN or infinite value": not bool(np.isfinite(quantizers.value).all()),
        "low above high": bool((quantizers.low > quantizers.high).any()),
    }
    _refuse(problems, "values are invalid")


def _refuse(problems: dict[str, bool], kind: str) -> None:
    names = [name for name, is_wrong in problems.items() if is_wrong]
    if names:
        raise CheckpointError(f"quantization: {kind}: {', '.join(names)}")
