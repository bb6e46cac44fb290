"""Two learning rates, weight decay, clipping, schedule and the average of the weights, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.training.loop import _load_optimizer, _optimizer_state
from covtanet.training.optimizer import (
    WeightAverage,
    clip_gradients,
    make_optimizer,
    set_final_bias,
    set_rate,
)
from covtanet.training.phase_config import PhaseConfig

SEGNET = TASegNetConfig(widths=(4, 8), fusion_channels=4)


class Pair(nn.Module):
    """An encoder and a head of one weight and one bias each, all 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1)
        for parameter in self.parameters():
            nn.init.ones_(parameter)


def values(module: Pair) -> list[float]:
    return [float(parameter.detach()) for parameter in module.parameters()]


def step(module: Pair, config: PhaseConfig, gradient: float) -> None:
    optimizer = make_optimizer(config, module)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def test_encoder_learns_at_its_share_of_the_rate() -> None:
    """Adam's first step has the length of the rate: 0.1, and 0.02 in the encoder."""
    module = Pair()
    config = PhaseConfig(learning_rate=0.1, encoder_rate_share=0.2)
    optimizer = make_optimizer(config, module)
    set_rate(optimizer, config.learning_rate)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert values(module) == pytest.approx([0.98, 0.98, 0.9, 0.9], abs=1e-6)


def test_weight_decay_spares_biases() -> None:
    """AdamW multiplies weights by 1 - 0.1 * 0.5 before a step of zero gradient."""
    module = Pair()
    step(module, PhaseConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.5), 0.0)
    assert values(module) == pytest.approx([0.95, 1, 0.95, 1], abs=1e-6)


def test_default_optimizer_equals_adam_over_all_weights() -> None:
    ours = Pair()
    theirs = Pair()
    config = PhaseConfig(learning_rate=0.1)
    step(ours, config, 2.0)
    for parameter in theirs.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    torch.optim.Adam(theirs.parameters(), lr=0.1).step()
    assert values(ours) == values(theirs)


@pytest.mark.parametrize(("clip_norm", "expected"), [(5.0, 2.5), (100.0, 5.0), (0.0, 5.0)])
def test_gradients_are_scaled_down_to_the_clip_norm(clip_norm: float, expected: float) -> None:
    """Four gradients of 5 have a norm of 10."""
    module = Pair()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    clip_gradients(PhaseConfig(clip_norm=clip_norm), module.parameters())
    gradients: list[Any] = [parameter.grad for parameter in module.parameters()]
    assert [float(gradient) for gradient in gradients] == pytest.approx([expected] * 4, rel=1e-5)


def test_cosine_with_warm_up_by_hand() -> None:
    """10 epochs, 2 of them warm-up: half the cosine's rate after 1, half the peak after 5."""
    config = PhaseConfig(num_epochs=10, learning_rate=1.0, schedule="cosine", warmup_share=0.2)
    assert config.rate(0) == 0
    assert config.rate(1) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 10)))
    assert config.rate(5) == pytest.approx(0.5)
    assert config.rate(10) == pytest.approx(0)


def test_average_weighs_states_by_powers_of_the_decay() -> None:
    """States 3 and 7 at a decay of 0.5: (0.5 * 3 + 7) / 1.5. The initial 1 has no share."""
    module = Pair()
    average = WeightAverage(module, 0.5)
    for value in (3.0, 7.0):
        with torch.no_grad():
            module.head.bias.fill_(value)
        average.update()
    assert float(average.state()["head.bias"]) == pytest.approx(8.5 / 1.5)


def test_average_continues_from_a_checkpoint() -> None:
    module = Pair()
    whole = WeightAverage(module, 0.9)
    module.head.bias.data.fill_(2.0)
    whole.update()
    resumed = WeightAverage(module, 0.9)
    resumed.restore(whole.checkpoint())
    module.head.bias.data.fill_(5.0)
    whole.update()
    resumed.update()
    assert torch.equal(whole.state()["head.bias"], resumed.state()["head.bias"])


def test_averaged_parameters_have_no_batch_norm_statistics() -> None:
    average = WeightAverage(TASegNet(SEGNET), 0.9)
    names = set(average.state()) - set(average.parameters())
    assert names
    assert all(name.endswith(("running_mean", "running_var")) for name in names)


def test_final_bias_is_set_in_ta_segnet_only() -> None:
    segnet = TASegNet(SEGNET)
    layer = segnet.filter[-1]
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    set_final_bias(PhaseConfig(final_bias=-2.0), segnet)
    assert layer.bias.tolist() == [-2.0]
    module = Pair()
    set_final_bias(PhaseConfig(final_bias=-2.0), module)
    assert values(module) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is sgd, expected one of adam, adamw"),
        ({"schedule": "linear"}, "schedule is linear, expected one of step, cosine"),
        ({"warmup_share": 1.0}, "warmup_share is 1.0"),
        ({"average_decay": -0.1}, "average_decay is -0.1"),
        ({"encoder_rate_share": 0.0}, "encoder_rate_share above 0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0"),
    ],
)
def test_impossible_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhaseConfig(**settings)


@pytest.mark.parametrize("fused", [False, True])
def test_restored_optimizer_takes_the_step_of_an_undisturbed_one(fused: bool) -> None:
    """Also a fused one, whose count of steps torch keeps beside the weights."""
    config = PhaseConfig(learning_rate=0.1)
    module = Pair()
    optimizer = make_optimizer(config, module, fused=fused)
    for gradient in (2.0, 1.0):
        set_gradients(module, gradient)
        optimizer.step()
    named = dict(module.named_parameters())
    stored = _optimizer_state(optimizer, named)
    kept = {name: value.clone() for name, value in stored.items()}
    other = Pair()
    other.load_state_dict(module.state_dict())
    restored = make_optimizer(config, other, fused=fused)
    _load_optimizer(restored, dict(other.named_parameters()), stored)
    for each, own in ((module, optimizer), (other, restored)):
        set_gradients(each, -3.0)
        own.step()
    assert values(other) == values(module)
    # A progress is never changed.
    assert all(torch.equal(stored[name], kept[name]) for name in kept)


def set_gradients(module: Pair, gradient: float) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
