"""A saved model: weights in safetensors, its configuration and provenance in JSON; nothing is ever unpickled.

A model is a folder with ``weights.safetensors`` and ``model.json``. It is written beside its place and renamed, so it
is there whole or not at all. Its digest covers both files' content.
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
from covtanet.model.segnet import SegNetConfig

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
# All files of a saved model, each with the most bytes that it may have. The paper's network takes 86 MiB; a description
# is a few kB, and some 80 kB with the digests of a thousand training volumes.
MODEL_FILES = {DESCRIPTION: 4 << 20, WEIGHTS: 2 << 30}
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A network with all that is needed to use it.

    preprocessing: how volumes become its input, as plain values. provenance: data set digest, recipe, software.
    """

    network: CovTANet
    preprocessing: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as configuration and weights: a library's own classes would import it unguarded."""
        state = self.network.state_dict()
        return _rebuild, (
            asdict(self.network.config),
            state,
            self.preprocessing,
            self.provenance,
            self.digest,
        )


def _rebuild(
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    preprocessing: dict[str, Any],
    provenance: dict[str, Any],
    digest: str,
) -> SavedModel:
    network = CovTANet(network_config(config))
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    return SavedModel(
        network=network, preprocessing=preprocessing, provenance=provenance, digest=digest
    )


def save_model(folder: Path, model: SavedModel) -> str:
    """Write a model to a folder that does not exist yet; returns its digest."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        state = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in model.network.state_dict().items()
        }
        save_file(state, partial / WEIGHTS)
        description = {
            "format_version": FORMAT_VERSION,
            "network": asdict(model.network.config),
            "preprocessing": model.preprocessing,
            "provenance": model.provenance,
            "weights_sha256": _sha256(partial / WEIGHTS),
        }
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")
        digest = model_digest(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return digest


def model_digest(folder: Path) -> str:
    """SHA-256 of the description, which holds that of the weights."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"no {DESCRIPTION} in the model's folder, expected a saved model")
    return _sha256(path)


def load_model(folder: Path, expected_digest: str | None = None) -> SavedModel:
    """Read a model, in eval mode on the CPU.

    Raises:
        CheckpointError: files missing or too large, digests other than expected, or weights that do not fit the
            network.
    """
    _check_sizes(folder)
    digest = model_digest(folder)
    if expected_digest and digest != expected_digest:
        raise CheckpointError(
            f"model digest {digest[:12]}, expected {expected_digest[:12]}: not the registered model"
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        if description["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"model format {description['format_version']}, expected {FORMAT_VERSION}"
            )
        if _sha256(folder / WEIGHTS) != description["weights_sha256"]:
            raise CheckpointError("the weights differ from the digest in the model's description")
        preprocessing, provenance = (
            dict(description["preprocessing"]),
            dict(description["provenance"]),
        )
        config = network_config(description["network"])
        state = load_file(folder / WEIGHTS)
        # Shapes are compared on the meta device, before a description that asks for a huge network gets memory for it.
        with torch.device("meta"):
            _check_fits(CovTANet(config), state)
        network = CovTANet(config)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the saved model cannot be read: {type(error).__name__}") from error
    network.load_state_dict(state)
    return SavedModel(
        network=network.eval().requires_grad_(False),
        preprocessing=preprocessing,
        provenance=provenance,
        digest=digest,
    )


def _check_sizes(folder: Path) -> None:
    for name, max_bytes in MODEL_FILES.items():
        path = folder / name
        if path.is_file() and path.stat().st_size > max_bytes:
            raise CheckpointError(
                f"{name} has {path.stat().st_size} bytes, expected at most {max_bytes}"
            )


def network_config(values: dict[str, Any]) -> CovTANetConfig:
    """Rebuild a configuration from plain values; an unknown name is an error."""
    return CovTANetConfig(**{**values, "segnet": SegNetConfig(**values["segnet"])})


def _check_fits(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    wanted = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in network.state_dict().items()
    }
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise CheckpointError(f"{len(odd)} tensors do not fit the network, first {odd[0]}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
