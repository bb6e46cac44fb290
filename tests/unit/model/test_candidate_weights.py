"""Weights of models/candidates, which no command loads yet."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from covtanet.model.segnet import TASegNet, TASegNetConfig

FOLDER = Path(__file__).resolve().parents[3] / "models" / "candidates" / "v8-lung-box"
WEIGHTS = FOLDER / "weights.safetensors"


def candidate() -> TASegNet:
    plain = TASegNetConfig(in_channels=3, fusion_channels=16, stem_channels=0)
    row = plain.row_of_table_i("V8", "tf_efficientnet_lite0")
    return TASegNet(TASegNetConfig(**vars(row) | {"stem_channels": 16}))


def test_candidate_weights_fit_v8_with_a_stem_and_give_finite_logits() -> None:
    network = candidate()
    network.load_state_dict(load_file(WEIGHTS))
    with torch.inference_mode():
        logits = network.eval()(torch.rand(1, 3, 64, 64))
    assert logits.shape == (1, 1, 64, 64)
    assert torch.isfinite(logits).all()


def test_candidate_weights_mark_nothing_on_air() -> None:
    network = candidate()
    network.load_state_dict(load_file(WEIGHTS))
    with torch.inference_mode():
        probabilities = torch.sigmoid(network.eval()(torch.full((1, 3, 64, 64), 1 / 6)))
    assert float(probabilities.max()) < 0.3


def test_candidate_card_names_the_digest_of_the_weights() -> None:
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert digest in (FOLDER / "README.md").read_text()


def test_candidate_is_not_a_model_that_a_command_could_load() -> None:
    assert not (FOLDER / "model.json").exists()
    assert WEIGHTS.stat().st_size <= 10_000_000
