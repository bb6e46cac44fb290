"""Augmentation of slices and their masks by MONAI's transforms; off by default, as in the paper."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of a slice; those of its shape also change the mask.

    Choice: all of it; the paper uses none.
    """

    is_on: bool = False
    """Whether slices are changed."""
    flip_probability: float = 0.5
    """Probability of a flip from left to right."""
    flip_vertical_probability: float = 0.0
    """Probability of a flip from front to back, for collections that hold scans upside down."""
    rotation_deg: float = 10.0
    """Largest rotation in degrees."""
    scale: float = 0.1
    """Largest change of the size, as a share."""
    gamma: float = 0.2
    """Largest change of the intensity's exponent, as a share."""
    noise: float = 0.01
    """Standard deviation of added noise, in intensity."""

    def __post_init__(self) -> None:
        flips = (self.flip_probability, self.flip_vertical_probability)
        if min(flips) < 0 or max(flips) > 1 or not 0 <= self.scale < 1 or not 0 <= self.gamma < 1:
            raise ValueError(
                "probabilities of flips must be in 0..1, scale and gamma in 0..1 without 1"
            )
        if self.noise < 0:
            raise ValueError("noise must be at least 0")


class Augmenter:
    """Changes micro-batches; the same seed gives the same changes."""

    def __init__(self, config: AugmentConfig) -> None:
        from monai.transforms import (  # costs seconds, and only where it is used
            Compose,
            RandAdjustContrastd,
            RandAffined,
            RandFlipd,
            RandGaussianNoised,
        )

        both = ("slice", "lesion")
        self.transforms: Any = Compose([
            RandFlipd(both, prob=config.flip_probability, spatial_axis=1),
            RandFlipd(both, prob=config.flip_vertical_probability, spatial_axis=0),
            RandAffined(
                both,
                prob=1.0,
                rotate_range=config.rotation_deg * torch.pi / 180,
                scale_range=(config.scale, config.scale),
                # Nearest for masks, which stay 0 or 1.
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandAdjustContrastd(
                ("slice",), prob=1.0, gamma=(1 - config.gamma, 1 / (1 - config.gamma))
            ),
            RandGaussianNoised(("slice",), prob=1.0, std=config.noise),
        ])  # fmt: skip

    def __call__(self, slices: Tensor, lesion_mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Change a micro-batch. slices: (B, 1, H, W) in [0, 1]; lesion_mask: 0 or 1."""
        self.transforms.set_random_state(seed=seed)
        changed = [
            self.transforms({"slice": image, "lesion": mask})
            for image, mask in zip(slices, lesion_mask, strict=True)
        ]
        # (B, 1, H, W); noise may leave [0, 1], hence the clamp.
        images = torch.stack([torch.as_tensor(pair["slice"]) for pair in changed]).clamp(0, 1)
        masks = torch.stack([torch.as_tensor(pair["lesion"]) for pair in changed])
        # MONAI returns tensors of its own class.
        return images.as_subclass(Tensor), masks.as_subclass(Tensor)
