"""Small saved models for tests: untrained, from a seed."""

import torch

from covtanet.model.checkpoint import SavedModel
from covtanet.model.covtanet import SIZES, CovTANet


def small_model(seed: int = 0) -> SavedModel:
    """Return an untrained small network whose lesion map and diagnosis are not all one class."""
    torch.manual_seed(seed)
    network = CovTANet(SIZES["small"]).eval().requires_grad_(False)
    return SavedModel(network=network, preprocessing={"window": {"size_px": 128}})
