"""A saved model: weights in safetensors, its description in JSON. Nothing is ever unpickled.

A model is a folder with ``weights.safetensors``, ``model.json`` and, if it was calibrated for 8
bits, ``quantization.safetensors``. It is written under another name and renamed, so that it is
there whole or not at all. Its digest covers the content of all files.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from covtanet.errors import CheckpointError
from covtanet.model.covtanet import CovTANet, CovTANetConfig
from covtanet.model.description import (
    Capabilities,
    EngineDifference,
    Preprocessing,
    Readout,
    read_capabilities,
    read_engines,
    read_preprocessing,
    read_readout,
)
from covtanet.model.quantizers import MAX_BYTES as MAX_QUANTIZATION_BYTES
from covtanet.model.quantizers import Quantizers, load_quantizers, save_quantizers
from covtanet.model.registry import BaselineConfig, NoSegmenterConfig, SegmenterConfig
from covtanet.model.segnet import TASegNetConfig

WEIGHTS = "weights.safetensors"
DESCRIPTION = "model.json"
QUANTIZATION = "quantization.safetensors"
# All files of a saved model, each with the most bytes that it may have. The paper's network takes
# 86 MiB; a description a few kB, and some 80 kB with the digests of a thousand training volumes.
# A model that was not calibrated for 8 bits has no quantization.
MODEL_FILES = {DESCRIPTION: 4 << 20, WEIGHTS: 2 << 30, QUANTIZATION: MAX_QUANTIZATION_BYTES}
QUANTIZATION_SHA256 = "quantization_sha256"
FORMAT_VERSION = 2
# Version 1 kept capabilities in the provenance, the window in an object of its own, and one type of
# segmenter whose name could be a baseline's.
READABLE_VERSIONS = (1, 2)
SEGMENTER_TYPES: dict[str, type[SegmenterConfig]] = {
    "ta-segnet": TASegNetConfig,
    "baseline": BaselineConfig,
    "none": NoSegmenterConfig,
}


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A network with all that is needed to use it."""

    network: CovTANet
    preprocessing: Preprocessing
    capabilities: Capabilities
    readout: Readout = field(default_factory=Readout)
    provenance: dict[str, Any] = field(default_factory=dict)
    """Data digest, recipe, software and the like; read by people and by evaluations."""
    engines: Mapping[str, EngineDifference] = field(default_factory=dict)
    """Measured difference of each engine from float32; empty without a calibration."""
    quantizers: Quantizers | None = None
    """Parameters of the network in 8 bits; null without a calibration."""
    digest: str = ""
    """SHA-256 of the description the model was read from; empty for a new model."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as configuration and weights.

        Pickled as it is, the network would name classes of timm or MONAI, whose import needs the
        preparations of ``model.libraries``.
        """
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        del parts["network"]
        return _rebuild, (self.network.config, self.network.state_dict(), parts)


def _rebuild(
    config: CovTANetConfig,
    state: dict[str, torch.Tensor],
    parts: Mapping[str, Any],
) -> SavedModel:
    network = CovTANet(config)
    network.load_state_dict(state)
    return SavedModel(network=network.eval().requires_grad_(False), **parts)


def save_model(folder: Path, model: SavedModel) -> str:
    """Write a model to a folder that does not exist yet; return its digest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_weights(partial / WEIGHTS, model.network)
        if model.quantizers is not None:
            save_quantizers(partial / QUANTIZATION, model.quantizers)
        _write_description(partial, model)
        digest = model_digest(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return digest


def _write_weights(path: Path, network: CovTANet) -> None:
    state = network.state_dict()
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)


def _write_description(folder: Path, model: SavedModel) -> None:
    description = {
        "format_version": FORMAT_VERSION,
        "network": network_values(model.network.config),
        "preprocessing": asdict(model.preprocessing),
        "capabilities": asdict(model.capabilities),
        "readout": asdict(model.readout),
        "provenance": model.provenance,
        # The other files are written first, so that the description's digest stands for all.
        "weights_sha256": file_sha256(folder / WEIGHTS),
    }
    # Left out of models without them, whose digests stay as they were.
    if model.engines:
        description["engines"] = {name: asdict(value) for name, value in model.engines.items()}
    if model.quantizers is not None:
        description[QUANTIZATION_SHA256] = file_sha256(folder / QUANTIZATION)
    # Sorted: equal models have equal digests.
    text = json.dumps(description, indent=2, sort_keys=True)
    (folder / DESCRIPTION).write_text(f"{text}\n")


def model_digest(folder: Path) -> str:
    """Return the SHA-256 of the description, which holds those of the other files."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"no {DESCRIPTION} in the model's folder, expected a saved model")
    return file_sha256(path)


def model_files(folder: Path) -> dict[str, int]:
    """Return the files that a model in a folder has by its description, each with its most bytes.

    Raises:
        CheckpointError: there is no description, or it cannot be read.
    """
    names = [DESCRIPTION, WEIGHTS]
    if QUANTIZATION_SHA256 in _read_description(folder):
        names.append(QUANTIZATION)
    return {name: MODEL_FILES[name] for name in names}


def fetch_model(folder: Path, fetch: Callable[[Mapping[str, int]], None]) -> None:
    """Fetch a model's files into a folder: the description, then the files that it names.

    No file is tried that a model may lack: some stores answer as if access were denied.

    fetch: copies files by name, each with the most bytes that it may have.

    Raises:
        CheckpointError: the description cannot be read.
    """
    fetch({DESCRIPTION: MODEL_FILES[DESCRIPTION]})
    sizes = model_files(folder)
    del sizes[DESCRIPTION]
    fetch(sizes)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"no {DESCRIPTION} in the model's folder, expected a saved model")
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{DESCRIPTION} cannot be read: {type(error).__name__}") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{DESCRIPTION} holds no JSON object")
    return description


def load_model(folder: str | Path, expected_digest: str | None = None) -> SavedModel:
    """Read a model, in eval mode on the CPU.

    Raises:
        CheckpointError: files missing or too large, another digest than expected, an unknown
            format, or weights that do not fit the network.
    """
    folder = Path(folder)
    # Before anything is read into memory.
    _check_sizes(folder)
    digest = model_digest(folder)
    if expected_digest and digest != expected_digest:
        raise CheckpointError(
            f"model digest {digest[:12]}, expected {expected_digest[:12]}: not the registered model"
        )
    try:
        return _load(folder, digest)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the saved model cannot be read: {type(error).__name__}") from error


def _load(folder: Path, digest: str) -> SavedModel:
    description = json.loads((folder / DESCRIPTION).read_text())
    version = description["format_version"]
    if version not in READABLE_VERSIONS:
        expected = " or ".join(str(number) for number in READABLE_VERSIONS)
        raise CheckpointError(f"model format {version}, expected {expected}")
    # Before the weights are parsed.
    if file_sha256(folder / WEIGHTS) != description["weights_sha256"]:
        raise CheckpointError("the weights differ from the digest in the model's description")
    quantizers = _load_quantizers(folder, description)
    config = network_config(description["network"], version)
    state = load_file(folder / WEIGHTS)
    # Shapes are compared on the meta device first: a description may ask for a huge network.
    with torch.device("meta"):
        _check_fits(CovTANet(config), state)
    parts = {
        "preprocessing": read_preprocessing(description, version),
        "capabilities": read_capabilities(description, version),
        "readout": read_readout(description),
        "provenance": dict(description["provenance"]),
        "engines": read_engines(description),
        "quantizers": quantizers,
        "digest": digest,
    }
    return _rebuild(config, state, parts)


def _load_quantizers(folder: Path, description: Mapping[str, Any]) -> Quantizers | None:
    """Return the quantization that the description names.

    Raises:
        CheckpointError: the file is missing, or another than that of the description.
    """
    path = folder / QUANTIZATION
    expected = description.get(QUANTIZATION_SHA256)
    if expected is None:
        # The model's digest would not cover it: it is never read.
        return None
    if not path.is_file():
        raise CheckpointError(f"{QUANTIZATION} is missing, and the model's description names it")
    # Before it is parsed.
    if file_sha256(path) != expected:
        raise CheckpointError("the quantization differs from the digest in the description")
    return load_quantizers(path)


def _check_sizes(folder: Path) -> None:
    for name, max_bytes in MODEL_FILES.items():
        path = folder / name
        if path.is_file() and path.stat().st_size > max_bytes:
            raise CheckpointError(
                f"{name} has {path.stat().st_size} bytes, expected at most {max_bytes}"
            )


def network_values(config: CovTANetConfig) -> dict[str, Any]:
    """Return a configuration as plain values, its segmenter with its type."""
    names = {kind: name for name, kind in SEGMENTER_TYPES.items()}
    segnet = {"type": names[type(config.segnet)], **asdict(config.segnet)}
    return {**asdict(config), "segnet": segnet}


def network_config(values: dict[str, Any], format_version: int) -> CovTANetConfig:
    """Return the configuration that plain values describe; an unknown name is an error."""
    segnet = dict(values["segnet"])
    if format_version == 1:
        return CovTANetConfig(**{**values, "segnet": _segmenter_of_version_1(segnet)})
    kind = SEGMENTER_TYPES[segnet.pop("type")]
    return CovTANetConfig(**{**values, "segnet": kind(**segnet)})


def _segmenter_of_version_1(values: dict[str, Any]) -> SegmenterConfig:
    name = values.pop("network", "TA-SegNet")
    if name == "TA-SegNet":
        return TASegNetConfig(**values)
    if name == "slices":
        return NoSegmenterConfig(in_channels=values["in_channels"])
    return BaselineConfig(name=name, in_channels=values["in_channels"], widths=values["widths"])


def _check_fits(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    expected = _shapes(network.state_dict())
    actual = _shapes(state)
    if expected != actual:
        names = {*expected, *actual}
        odd = sorted(name for name in names if expected.get(name) != actual.get(name))
        raise CheckpointError(f"{len(odd)} tensors do not fit the network, first {odd[0]}")


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
