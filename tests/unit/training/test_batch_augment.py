"""Random changes of a batch: determined by the seed, the same for slices and masks."""

import pytest
import torch

from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter

CPU = torch.device("cpu")
SIZE = 32


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return slices with a bright rectangle, its mask, and the box of the whole slice."""
    slices = torch.full((count, 3, SIZE, SIZE), 0.2)
    slices[:, :, 6:16, 8:22] = 0.9
    boxes = torch.tensor([[0.0, 0.0, SIZE, SIZE]]).repeat(count, 1)
    return slices, (slices[:, :1] > 0.5).float(), boxes


def geometry_only() -> BatchAugmentConfig:
    return BatchAugmentConfig(
        is_on=True,
        all_off_probability=0,
        gamma_probability=0,
        contrast_probability=0,
        brightness_probability=0,
        blur_probability=0,
        low_resolution_probability=0,
        noise_probability=0,
    )


def test_same_seed_gives_the_same_batch_and_another_seed_a_different_one() -> None:
    slices, mask, boxes = batch()
    augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), CPU)
    first, first_mask = augmenter(slices, mask, 5, boxes, SIZE)
    second, second_mask = augmenter(slices, mask, 5, boxes, SIZE)
    other_seed, _ = augmenter(slices, mask, 6, boxes, SIZE)
    assert torch.equal(first, second)
    assert torch.equal(first_mask, second_mask)
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize(
    "config",
    [BatchAugmentConfig(), BatchAugmentConfig(is_on=True, all_off_probability=1)],
    ids=["off", "on, but all slices unchanged"],
)
def test_batch_without_changes_is_the_identity(config: BatchAugmentConfig) -> None:
    slices, mask, boxes = batch()
    changed, changed_mask = BatchAugmenter(config, CPU)(slices, mask, 1, boxes, SIZE)
    assert torch.allclose(changed, slices, atol=1e-5)
    assert torch.equal(changed_mask, mask)


def test_box_is_cropped_and_scaled() -> None:
    """The rectangle's own box holds only bright pixels."""
    slices, mask, boxes = batch(2)
    boxes[:] = torch.tensor([6.0, 8.0, 10.0, 14.0])
    config = BatchAugmentConfig()
    cropped, cropped_mask = BatchAugmenter(config, CPU)(slices, mask, 1, boxes, 16)
    assert cropped.shape == (2, 3, 16, 16)
    assert torch.allclose(cropped[:, :, 2:-2, 2:-2], torch.tensor(0.9))
    assert cropped_mask[:, :, 2:-2, 2:-2].all()


def test_mask_moves_with_the_slices() -> None:
    """Intensity 0.55 is halfway between rectangle and background, so both cuts agree."""
    slices, mask, boxes = batch(16)
    changed, moved = BatchAugmenter(geometry_only(), CPU)(slices, mask, 3, boxes, SIZE)
    is_bright = changed[:, :1] > 0.55
    is_clear = (changed[:, :1] - 0.55).abs() > 1e-3
    assert torch.equal(is_bright[is_clear], moved.bool()[is_clear])
    assert not torch.equal(moved, mask)


def test_channels_are_changed_in_the_same_way() -> None:
    slices, mask, boxes = batch()
    changed, _ = BatchAugmenter(geometry_only(), CPU)(slices, mask, 3, boxes, SIZE)
    assert torch.equal(changed[:, 0], changed[:, 2])


def test_changed_slices_stay_in_range() -> None:
    slices, mask, boxes = batch()
    changed, moved = BatchAugmenter(BatchAugmentConfig(is_on=True), CPU)(
        slices, mask, 2, boxes, SIZE
    )
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert set(moved.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flip_probability": 1.5}, "flip_probability is 1.5, expected 0 to 1"),
        ({"scale_low": 2.0}, "scale_low is 2.0 and scale_high 1.2"),
        ({"contrast_low": 0.0}, "contrast_low is 0.0 and contrast_high 1.25"),
        ({"elastic_nodes": 1}, "elastic_nodes is 1, expected at least 2"),
    ],
)
def test_impossible_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchAugmentConfig(**values)  # type: ignore[arg-type]
