"""A saved model: weights in safetensors, its description in JSON. Nothing is ever unpickled.

A model is a folder with ``weights.safetensors``, ``model.json`` and, if it was calibrated for 8
bits, ``quantization.safetensors``. It is written under another name and renamed, so that it is
there whole or not at all. Its digest covers the content of all files.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
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
from covtanet.model.model_files import (
    DESCRIPTION,
    FORMAT_VERSION,
    QUANTIZATION,
    QUANTIZATION_SHA256,
    WEIGHTS,
    WEIGHTS_SHA256,
    check_contents,
    check_digest,
    check_format,
    check_sizes,
    file_sha256,
    model_digest,
    read_description,
)
from covtanet.model.quantizers import Quantizers, load_quantizers, save_quantizers
from covtanet.model.registry import BaselineConfig, NoSegmenterConfig, SegmenterConfig
from covtanet.model.segnet import TASegNetConfig

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
        WEIGHTS_SHA256: file_sha256(folder / WEIGHTS),
    }
    # Left out of models without them, whose digests stay as they were.
    if model.engines:
        description["engines"] = {name: asdict(value) for name, value in model.engines.items()}
    if model.quantizers is not None:
        description[QUANTIZATION_SHA256] = file_sha256(folder / QUANTIZATION)
    # Sorted: equal models have equal digests.
    text = json.dumps(description, indent=2, sort_keys=True)
    (folder / DESCRIPTION).write_text(f"{text}\n")


def load_model(folder: str | Path, expected_digest: str | None = None) -> SavedModel:
    """Read a model, in eval mode on the CPU.

    Raises:
        CheckpointError: files missing or too large, another digest than expected, an unknown
            format, or weights that do not fit the network.
    """
    folder = Path(folder)
    # Before anything is read into memory.
    check_sizes(folder)
    digest = model_digest(folder)
    if expected_digest:
        check_digest(digest, expected_digest)
    try:
        return _load(folder, digest)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the saved model cannot be read: {type(error).__name__}") from error


def _load(folder: Path, digest: str) -> SavedModel:
    description = read_description(folder)
    version = check_format(description)
    # Before weights and quantization are parsed.
    check_contents(folder, description)
    config = network_config(description["network"], version)
    state = load_file(folder / WEIGHTS)
    # Shapes are compared on the meta device first: a description may ask for a huge network.
    with torch.device("meta"):
        _check_fits(CovTANet(config), state)
    quantizers = None
    # A file that the description does not name is never read: the digest does not cover it.
    if QUANTIZATION_SHA256 in description:
        quantizers = load_quantizers(folder / QUANTIZATION)
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
