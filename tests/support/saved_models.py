"""Small saved models for tests: untrained, from a seed."""

import json
from pathlib import Path
from typing import Any

import torch

from covtanet.model.covtanet import SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.model.saved_model import SavedModel


def small_model(seed: int = 0) -> SavedModel:
    """Return an untrained small network whose lesion map and diagnosis are not all one class."""
    torch.manual_seed(seed)
    network = CovTANet(SIZES["small"]).eval().requires_grad_(False)
    return SavedModel(
        network=network,
        preprocessing=Preprocessing(size_px=128),
        capabilities=Capabilities(segments=True, diagnoses=True),
    )


def model_of_distinct_involvement(added_logit: float = 0.0) -> SavedModel:
    """Return the small network with a lesion map that follows the grey values of phantoms.

    added_logit: makes another model, which marks more. Without the change all of a phantom would be
    lesion, and all phantoms would have the same involvement.
    """
    model = small_model()
    last: torch.nn.Conv2d = model.network.get_submodule("segnet.filter.3")  # type: ignore[assignment]
    assert last.bias is not None
    # Its logits of phantoms lie between 0.081 and 0.118, with a median of 0.107.
    last.bias.copy_((last.bias - 0.1068) * 300)
    last.weight.mul_(300)
    last.bias.add_(added_logit)
    return model


def rewrite_as_version_1(
    folder: Path, preprocessing: Any, provenance: dict[str, Any] | None = None
) -> None:
    """Rewrite a saved model's description as version 1 had it, given its free-form parts."""
    path = folder / "model.json"
    description = json.loads(path.read_text())
    del description["capabilities"]
    segnet = description["network"]["segnet"]
    kind = segnet.pop("type")
    segnet["network"] = {"ta-segnet": "TA-SegNet", "none": "slices"}.get(kind) or segnet.pop("name")
    description |= {
        "format_version": 1,
        "preprocessing": preprocessing,
        "provenance": provenance or {},
    }
    path.write_text(json.dumps(description))
