"""The attention units (Eq. 1-6) against the equations written out, and identities."""

import pytest
import torch

from covtanet.model.attention import (
    ChannelAttention,
    PixelAttention,
    SpatialAttention,
    TriLevelAttention,
)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 16, 12, 10, generator=torch.Generator().manual_seed(0))


def test_channel_attention_follows_eq_1_to_3(features: torch.Tensor) -> None:
    unit = ChannelAttention(16)
    recalibrated = features * unit.recalibrate(features.mean((2, 3), keepdim=True))
    expected = unit.generalize(recalibrated.mean((2, 3), keepdim=True))
    assert unit(features).shape == (2, 16, 1, 1)
    torch.testing.assert_close(unit(features), expected)


def test_spatial_attention_follows_eq_1_to_3(features: torch.Tensor) -> None:
    unit = SpatialAttention(16)
    recalibration = torch.sigmoid(unit.restore(torch.relu(unit.expand(unit.describe(features)))))
    squeezed = torch.relu(unit.squeeze(unit.describe_recalibrated(features * recalibration)))
    back = torch.nn.functional.interpolate(
        squeezed, size=(12, 10), mode="bilinear", align_corners=False
    )
    assert unit(features).shape == (2, 1, 12, 10)
    torch.testing.assert_close(unit(features), torch.sigmoid(unit.restore_squeezed(back)))


def test_pixel_attention_follows_eq_1_to_3_and_sees_one_pixel(features: torch.Tensor) -> None:
    unit = PixelAttention(16)
    attention = unit(features)
    assert attention.shape == features.shape
    moved = features.clone()
    moved[:, :, 3, 4] += 1
    changed = ((unit(moved) - attention).abs() > 1e-6).any(1)
    assert changed.sum() == 2
    assert changed[:, 3, 4].all()


def test_attention_is_the_product_of_three_maps(features: torch.Tensor) -> None:
    """Eq. 4."""
    tau = TriLevelAttention(16)
    torch.testing.assert_close(
        tau.attention(features), tau.pixel(features) * tau.spatial(features) * tau.channel(features)
    )


def test_output_is_the_weighted_sum_of_input_and_attended_input(features: torch.Tensor) -> None:
    """Eq. 5-6."""
    tau = TriLevelAttention(16)
    attended = features * tau.attention(features)
    torch.testing.assert_close(tau(features), 0.5 * features + 0.5 * attended)
    with torch.no_grad():
        tau.alpha.fill_(1.0)
    torch.testing.assert_close(tau(features), features)
    with torch.no_grad():
        tau.alpha.fill_(0.0)
    torch.testing.assert_close(tau(features), attended)


def test_maps_lie_between_zero_and_one(features: torch.Tensor) -> None:
    attention = TriLevelAttention(16).attention(100 * features)
    assert float(attention.detach().min()) >= 0
    assert float(attention.detach().max()) <= 1
