"""TA-SegNet, the joint classifier and the saved model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import save_file
from saved_models import small_model

from covtanet.errors import CheckpointError, ConfigError
from covtanet.model.covtanet import SIZES, CovTANet, CovTANetConfig, JointClassifier, architecture
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.model.encoder import EfficientNetEncoder, packaged_state, pretrained_state
from covtanet.model.libraries import timm
from covtanet.model.losses import focal_tversky_loss, joint_loss
from covtanet.model.model_files import MODEL_FILES
from covtanet.model.registry import CLASSIFIERS, SEGMENTERS
from covtanet.model.saved_model import SavedModel, load_model, save_model
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.model.table_i import SWITCHES

SMALL = SIZES["small"]


def small_segnet() -> TASegNetConfig:
    segnet = SMALL.segnet
    assert isinstance(segnet, TASegNetConfig)
    return segnet


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("V1", 7.76),
        ("V2", 7.81),
        ("V3", 7.86),
        ("V4", 10.74),
        ("V5", 8.51),
        ("V6", 11.49),
        ("V7", 11.58),
        ("V8", 5.37),
    ],
)
def test_parameter_counts_of_table_i_at_the_papers_widths(row: str, expected: float) -> None:
    assert millions(TASegNet(TASegNetConfig().row_of_table_i(row))) == pytest.approx(
        expected, abs=0.006
    )


def test_stem_gives_v8_logits_of_the_full_size() -> None:
    """The stem's level adds its convolution, 16 * (9 + 2) weights, and a decoder level."""
    plain = TASegNetConfig(fusion_channels=4).row_of_table_i("V8")
    with_stem = replace(plain, stem_channels=16)
    assert (plain.stride, with_stem.stride) == (2, 1)
    assert plain.multiple == with_stem.multiple == 32
    network = TASegNet(with_stem).eval()
    assert network.stem is not None
    assert sum(parameter.numel() for parameter in network.stem.parameters()) == 16 * (9 + 2)
    with torch.inference_mode():
        assert network(torch.rand(1, 1, 64, 64)).shape == (1, 1, 64, 64)


def test_stem_of_a_plain_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="stem_channels is 16 with encoder plain"):
        TASegNetConfig(stem_channels=16)


def test_parameter_counts_of_the_classifier_at_the_papers_size() -> None:
    classifier = JointClassifier(SIZES["paper"])
    assert millions(classifier.regional) == pytest.approx(1.964, abs=0.001)
    assert (
        millions(classifier.diagnosis)
        == millions(classifier.severity)
        == pytest.approx(4.461, abs=0.001)
    )


@pytest.mark.parametrize("row", SWITCHES)
def test_every_segnet_parameter_gets_a_gradient(row: str) -> None:
    torch.manual_seed(0)
    net = TASegNet(small_segnet().row_of_table_i(row))
    focal_tversky_loss(net(torch.randn(2, 1, 64, 64)), torch.rand(2, 1, 64, 64) > 0.5).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_every_classifier_parameter_gets_a_gradient_even_without_infected_volumes() -> None:
    classifier = JointClassifier(SMALL)
    pooled = torch.randn(2, SMALL.num_slices, SMALL.segnet.fused_channels, 32, 32)
    infected, severe = classifier(pooled)
    joint_loss(infected, severe, torch.zeros(2), torch.zeros(2)).backward()
    assert [
        name for name, parameter in classifier.named_parameters() if parameter.grad is None
    ] == []


@pytest.mark.parametrize("row", SWITCHES)
def test_logits_have_the_input_size_and_fusion_the_stated_channels(row: str) -> None:
    config = small_segnet().row_of_table_i(row)
    logits, fused = TASegNet(config).eval().segment(torch.zeros(3, 1, 64, 96))
    assert logits.shape == (3, 1, 64, 96)
    assert fused.shape == (3, config.fused_channels, 64 // config.stride, 96 // config.stride)


def test_pretrained_stem_is_that_of_three_equal_channels(tmp_path: Path) -> None:
    """V8's encoder from a local file of RGB weights: one channel in gives what the slice three
    times would.
    """
    torch.manual_seed(1)
    rgb = EfficientNetEncoder("efficientnet_b0", 3).net
    torch.nn.init.normal_(rgb.conv_stem.weight)
    save_file(
        {name: value.contiguous() for name, value in rgb.state_dict().items()},
        tmp_path / "rgb.safetensors",
    )
    grey = EfficientNetEncoder("efficientnet_b0", 1)
    grey.load_state_dict(pretrained_state("efficientnet_b0", 1, tmp_path / "rgb.safetensors"))
    slices = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        scaled = (slices - grey.mean) / grey.deviation
        ours, theirs = grey.eval()(slices), rgb.eval()(scaled.expand(1, 3, 64, 64))
    for one, three in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-3)


def test_packaged_imagenet_weights_classify_a_photograph() -> None:
    """The package's tensors under timm's names: a uniform is a uniform (class 652 of ImageNet)."""
    name = "tf_efficientnet_lite0"
    state = packaged_state(name)
    assert state is not None
    net = timm().create_model(name, pretrained=False).eval()
    net.load_state_dict(state)
    photograph = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    photograph = photograph.crop((0, 0, 512, 512)).resize((224, 224))
    levels = torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1)[None] / 255
    encoder = EfficientNetEncoder(name, 1)
    with torch.inference_mode():
        assert net((levels - encoder.mean) / encoder.deviation).argmax() == 652
    encoder.load_state_dict(pretrained_state(name, 1, None))
    torch.testing.assert_close(
        encoder.net.conv_stem.weight, net.conv_stem.weight.sum(1, keepdim=True)
    )


def test_missing_imagenet_weights_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"timm.create_model\('NAME', pretrained=True\).*--encoder-weights"
    ):
        pretrained_state("efficientnet_b0", 1, tmp_path / "none.safetensors")


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    """A lite EfficientNet has all layers of the other by the same names, but for
    squeeze-and-excitation.
    """
    other = timm().create_model("efficientnet_b0", pretrained=False).state_dict()
    save_file(
        {name: value.contiguous() for name, value in other.items()}, tmp_path / "b0.safetensors"
    )
    pretrained_state("efficientnet_b0", 1, tmp_path / "b0.safetensors")
    with pytest.raises(
        ConfigError, match=r"the file has \d+ tensors that tf_efficientnet_lite0 has not"
    ):
        pretrained_state("tf_efficientnet_lite0", 1, tmp_path / "b0.safetensors")


def test_segnet_refuses_a_size_that_is_not_a_multiple() -> None:
    with pytest.raises(ValueError, match=r"slices are \(60, 64\) pixels, expected multiples of 16"):
        TASegNet(small_segnet())(torch.zeros(1, 1, 60, 64))


def test_logits_of_a_slice_do_not_depend_on_its_batch() -> None:
    net = small_model().network
    slices = torch.rand(5, 1, 128, 128)
    torch.testing.assert_close(
        net.segment(slices)[0][2:3], net.segment(slices[2:3])[0], atol=1e-5, rtol=1e-4
    )


def test_slice_count_of_a_volume_is_checked() -> None:
    with pytest.raises(ValueError, match="15 slices per volume, expected 16"):
        JointClassifier(SMALL)(torch.zeros(1, 15, SMALL.segnet.fused_channels, 32, 32))


def test_covtanet_maps_volumes_to_logits() -> None:
    infected, severe = CovTANet(SMALL).eval()(torch.rand(2, SMALL.num_slices, 1, 64, 64))
    assert infected.shape == severe.shape == (2,)


def test_saved_model_comes_back_with_the_same_answer_and_digest(tmp_path: Path) -> None:
    model = small_model()
    digest = save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model", digest)
    volume = torch.rand(1, SMALL.num_slices, 1, 128, 128)
    assert loaded.digest == digest
    assert loaded.preprocessing == model.preprocessing
    assert loaded.capabilities == model.capabilities
    for one, other in zip(model.network(volume), loaded.network(volume), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    weights = tmp_path / "model" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="the weights differ from the digest"):
        load_model(tmp_path / "model")


def test_other_model_than_registered_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    with pytest.raises(CheckpointError, match="not the registered model"):
        load_model(tmp_path / "model", "0" * 64)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    path = tmp_path / "model" / "model.json"
    description = json.loads(path.read_text())
    description["network"]["path_channels"] = 32
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="tensors do not fit the network"):
        load_model(tmp_path / "model")


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.json"):
        load_model(tmp_path)


def saved(config: CovTANetConfig) -> SavedModel:
    return SavedModel(
        network=CovTANet(config).eval(),
        preprocessing=Preprocessing(size_px=128),
        capabilities=Capabilities(segments=True, diagnoses=True),
    )


def test_description_of_a_huge_network_gets_no_memory(tmp_path: Path) -> None:
    """Its shapes are compared before: this one would take 2 TB."""
    save_model(tmp_path / "model", saved(SIZES["tiny"]))
    path = tmp_path / "model" / "model.json"
    description = json.loads(path.read_text())
    description["network"]["path_channels"] = 1 << 19
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="tensors do not fit the network"):
        load_model(tmp_path / "model")


def test_file_of_a_model_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    save_model(tmp_path / "model", saved(SIZES["tiny"]))
    with (tmp_path / "model" / "weights.safetensors").open("r+b") as file:
        file.truncate(MODEL_FILES["weights.safetensors"] + 1)  # sparse
    with pytest.raises(
        CheckpointError, match=r"weights\.safetensors has \d+ bytes, expected at most"
    ):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", [*SEGMENTERS, *CLASSIFIERS, *SWITCHES])
def test_every_network_is_loaded_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Through the meta device, on which some networks could not be built."""
    model = saved(architecture(name, SIZES["tiny"], 96))
    save_model(tmp_path / "model", model)
    found = load_model(tmp_path / "model").network.state_dict()
    expected = model.network.state_dict()
    assert list(found) == list(expected)
    assert all(
        torch.equal(found[key], expected[key]) and found[key].device.type == "cpu"
        for key in expected
    )
