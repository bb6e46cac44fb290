"""A saved model: weights in safetensors, its description in JSON. Nothing is ever unpickled.

A model is a folder with ``weights.safetensors`` and ``model.json``. It is written under another
name and renamed, so that it is there whole or not at all. Its digest covers both files' content.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from covtanet.errors import CheckpointError
from covtanet.model.covtanet import CovTANet, CovTANetConfig
from covtanet.model.description import (
    Capabilities,
    Preprocessing,
    Readout,
    read_capabilities,
    read_preprocessing,
    read_readout,
)
from covtanet.model.registry import BaselineConfig, NoSegmenterConfig, SegmenterConfig
from covtanet.model.segnet import TASegNetConfig

WEIGHTS = "weights.safetensors"
DESCRIPTION = "model.json"
# All files of a saved model, each with the most bytes that it may have. The paper's network takes
# 86 MiB; a description a few kB, and some 80 kB with the digests of a thousand training volumes.
MODEL_FILES = {DESCRIPTION: 4 << 20, WEIGHTS: 2 << 30}
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
    digest: str = ""
    """SHA-256 of the description the model was read from; empty for a new model."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as configuration and weights.

        Pickled as it is, the network would name classes of timm or MONAI, whose import needs the
        preparations of ``model.libraries``.
        """
        state = self.network.state_dict()
        parts = (self.preprocessing, self.capabilities, self.readout, self.provenance)
        return _rebuild, (self.network.config, state, *parts, self.digest)


def _rebuild(
    config: CovTANetConfig,
    state: dict[str, torch.Tensor],
    preprocessing: Preprocessing,
    capabilities: Capabilities,
    readout: Readout,
    provenance: dict[str, Any],
    digest: str,
) -> SavedModel:
    network = CovTANet(config)
    network.load_state_dict(state)
    return SavedModel(
        network=network.eval().requires_grad_(False),
        preprocessing=preprocessing,
        capabilities=capabilities,
        readout=readout,
        provenance=provenance,
        digest=digest,
    )


def save_model(folder: Path, model: SavedModel) -> str:
    """Write a model to a folder that does not exist yet; return its digest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_weights(partial / WEIGHTS, model.network)
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
        # The weights are written first, so that the description's digest stands for both files.
        "weights_sha256": file_sha256(folder / WEIGHTS),
    }
    # Sorted: equal models have equal digests.
    text = json.dumps(description, indent=2, sort_keys=True)
    (folder / DESCRIPTION).write_text(f"{text}\n")


def model_digest(folder: Path) -> str:
    """Return the SHA-256 of the description, which holds that of the weights."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"no {DESCRIPTION} in the model's folder, expected a saved model")
    return file_sha256(path)


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
    config = network_config(description["network"], version)
    state = load_file(folder / WEIGHTS)
    # Shapes are compared on the meta device first: a description may ask for a huge network.
    with torch.device("meta"):
        _check_fits(CovTANet(config), state)
    return _rebuild(
        config,
        state,
        read_preprocessing(description, version),
        read_capabilities(description, version),
        read_readout(description),
        dict(description["provenance"]),
        digest,
    )


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
