"""Small saved models for tests: untrained, from a seed."""

import torch

from covtanet.model.checkpoint import SavedModel
from covtanet.model.covtanet import SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing


def small_model(seed: int = 0) -> SavedModel:
    """Return an untrained small network whose lesion map and diagnosis are not all one class."""
    torch.manual_seed(seed)
    network = CovTANet(SIZES["small"]).eval().requires_grad_(False)
    return SavedModel(
        network=network,
        preprocessing=Preprocessing(size_px=128),
        capabilities=Capabilities(segments=True, diagnoses=True),
    )
