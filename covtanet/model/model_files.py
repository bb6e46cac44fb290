"""Files of a saved model and its description, without torch.

A process that plans, fetches or decodes reads a model here: the import of torch and of the networks
takes seconds.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from covtanet.errors import CheckpointError
from covtanet.model.description import (
    Capabilities,
    Preprocessing,
    Readout,
    read_capabilities,
    read_preprocessing,
    read_readout,
)
from covtanet.model.quantizers import MAX_BYTES as MAX_QUANTIZATION_BYTES

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
WEIGHTS_SHA256 = "weights_sha256"


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A saved model without its network."""

    preprocessing: Preprocessing
    capabilities: Capabilities
    readout: Readout
    in_channels: int
    """Channels of a slice that the network reads."""


def describe_model(folder: Path, expected_digest: str) -> ModelDescription:
    """Read a model's description and compare its files with the digests in it.

    Whether the weights fit the network is not checked: ``saved_model.load_model`` does.

    Raises:
        CheckpointError: files missing or too large, another digest than expected, or an unknown
            format.
    """
    check_sizes(folder)
    check_digest(model_digest(folder), expected_digest)
    description = read_description(folder)
    try:
        version = check_format(description)
        check_contents(folder, description)
        return ModelDescription(
            preprocessing=read_preprocessing(description, version),
            capabilities=read_capabilities(description, version),
            readout=read_readout(description),
            in_channels=int(description["network"]["segnet"].get("in_channels", 1)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the saved model cannot be read: {type(error).__name__}") from error


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
    if QUANTIZATION_SHA256 in read_description(folder):
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


def read_description(folder: Path) -> dict[str, Any]:
    """Return the description as plain values.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
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


def check_digest(digest: str, expected: str) -> None:
    """Refuse another model than that of the expected digest.

    Raises:
        CheckpointError: with the first digits of both.
    """
    if digest != expected:
        raise CheckpointError(
            f"model digest {digest[:12]}, expected {expected[:12]}: not the registered model"
        )


def check_format(description: Mapping[str, Any]) -> int:
    """Return the format's version, if it is one that is read.

    Raises:
        CheckpointError: another version.
        KeyError: the description has none.
    """
    version = description["format_version"]
    if version not in READABLE_VERSIONS:
        expected = " or ".join(str(number) for number in READABLE_VERSIONS)
        raise CheckpointError(f"model format {version}, expected {expected}")
    return int(version)


def check_contents(folder: Path, description: Mapping[str, Any]) -> None:
    """Compare weights and quantization with the digests in the description, before they are parsed.

    Raises:
        CheckpointError: either is another file, or the quantization is missing.
        OSError, KeyError: the weights or their digest are missing.
    """
    if file_sha256(folder / WEIGHTS) != description[WEIGHTS_SHA256]:
        raise CheckpointError("the weights differ from the digest in the model's description")
    expected = description.get(QUANTIZATION_SHA256)
    if expected is None:
        return
    path = folder / QUANTIZATION
    if not path.is_file():
        raise CheckpointError(f"{QUANTIZATION} is missing, and the model's description names it")
    if file_sha256(path) != expected:
        raise CheckpointError("the quantization differs from the digest in the description")


def check_sizes(folder: Path) -> None:
    """Refuse a model with a file that is larger than any model's, before it is read.

    Raises:
        CheckpointError: with its size and the bound.
    """
    for name, max_bytes in MODEL_FILES.items():
        path = folder / name
        if path.is_file() and path.stat().st_size > max_bytes:
            raise CheckpointError(
                f"{name} has {path.stat().st_size} bytes, expected at most {max_bytes}"
            )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
