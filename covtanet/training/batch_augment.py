"""Random changes of a whole batch of slices and masks in torch, on the device that holds them.

One interpolation does crop, flips, rotation, scale, shift and elastic deformation, so that a slice
is blurred only once. The same seed gives the same changes on the same kind of device. Off by
default, as in the paper. Not covered: changes along z, pasting of lesions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class BatchAugmentConfig:
    """Ranges of the changes; each probability is that of one slice.

    Choice: all values. The geometry is that of a trial on six scans which, together with lung box,
    loss and optimizer, raised the mean Dice per slice of two folds from 0.535 to 0.634. Intensities
    change less than in that trial: slices are in HU, whose zero and scale have a meaning.
    """

    is_on: bool = False
    """Whether training changes its slices."""
    all_off_probability: float = 0.1
    """Share of slices without any change: the network must see undistorted slices too."""
    flip_probability: float = 0.5
    """Probability of a flip left to right."""
    flip_vertical_probability: float = 0.5
    """Probability of a flip top to bottom; it also makes predictions over four flips agree."""
    affine_probability: float = 0.9
    """Of rotation, scale, shift and change of aspect together."""
    rotation_deg: float = 25.0
    """Largest rotation in either direction, in degrees."""
    scale_low: float = 0.6
    """Smallest side of the crop over that of the box: the whole slice in training, the lung box in
    benchmarks/train_gpu.py. Small crops show a part of the lungs, so patients with many lesions
    also give slices without lesion."""
    scale_high: float = 1.2
    """Largest side of the crop over that of the box."""
    shift: float = 0.12
    """Largest shift along each axis over the side of the box."""
    aspect: float = 0.14
    """Largest logarithm of the change of height over width."""
    elastic_probability: float = 0.5
    """Probability of a smooth random deformation."""
    elastic_nodes: int = 5
    """Nodes of the deformation along a side."""
    elastic_deviation: float = 0.03
    """Standard deviation of a node's displacement over the side."""
    gamma_probability: float = 0.5
    """Probability of a change of gamma."""
    gamma: float = 0.3
    """Largest logarithm of gamma."""
    contrast_probability: float = 0.5
    """Probability of a change of contrast about the mean."""
    contrast_low: float = 0.8
    """Smallest factor of contrast."""
    contrast_high: float = 1.25
    """Largest factor of contrast."""
    brightness_probability: float = 0.5
    """Probability of a shift of all intensities."""
    brightness: float = 0.06
    """Largest shift of the intensities, which are in [0, 1]."""
    blur_probability: float = 0.3
    """Probability of a Gaussian blur."""
    blur_px: float = 1.0
    """Largest standard deviation of the blur, in pixels."""
    low_resolution_probability: float = 0.2
    """Probability of half the resolution."""
    noise_probability: float = 0.5
    """Probability of white noise."""
    noise: float = 0.04
    """Largest standard deviation of the noise; intensities are in [0, 1]."""

    def __post_init__(self) -> None:
        names = [name for name in vars(self) if name.endswith("_probability")]
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for name in ("scale", "contrast"):
            low = getattr(self, f"{name}_low")
            high = getattr(self, f"{name}_high")
            if not 0 < low <= high:
                raise ValueError(
                    f"{name}_low is {low} and {name}_high {high}, expected 0 < low <= high"
                )
        if self.elastic_nodes < 2:
            raise ValueError(f"elastic_nodes is {self.elastic_nodes}, expected at least 2")


@dataclass(frozen=True)
class _Draw:
    """Random numbers of one batch from one generator, so that a seed determines all of them."""

    generator: torch.Generator
    count: int
    is_changed: Tensor

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        size = (self.count, *shape)
        device = self.generator.device
        return torch.rand(size, generator=self.generator, device=device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        size = (self.count, *shape)
        return torch.randn(size, generator=self.generator, device=self.generator.device)

    def happens(self, probability: float) -> Tensor:
        """Draw for every slice whether a change happens, (B,) bool; False without any change."""
        return (self.uniform(0, 1) < probability) & self.is_changed


class BatchAugmenter:
    """Crop slices to their boxes and change them; without ``is_on``, crop only.

    The order of the draws is part of a seed's meaning: another order gives another training.
    """

    def __init__(self, config: BatchAugmentConfig, device: torch.device) -> None:
        self.config = config
        self.generator = torch.Generator(device)

    def __call__(
        self, slices: Tensor, lesion_mask: Tensor, seed: int, boxes: Tensor, size_px: int
    ) -> tuple[Tensor, Tensor]:
        """Return slices (B, C, size, size) in [0, 1] and masks (B, 1, size, size) of 0 and 1.

        slices: (B, C, H, W) in [0, 1]; channels are neighbours in z, changed in the same way.
        lesion_mask: (B, 1, H, W) of 0 and 1. boxes: (B, 4), top, left, height, width in pixels.
        """
        self.generator.manual_seed(seed)
        count = len(slices)
        is_changed = torch.ones(count, dtype=torch.bool, device=slices.device)
        draw = _Draw(self.generator, count, is_changed)
        if not self.config.is_on:
            grid = _affine_grid(_identity(draw), boxes, slices.shape[2:], size_px)
            return _sample(slices, lesion_mask, grid)
        draw = _Draw(self.generator, count, ~draw.happens(self.config.all_off_probability))
        grid = _affine_grid(self._affine(draw), boxes, slices.shape[2:], size_px)
        # Added to the grid, so that slices are interpolated only once.
        grid = grid + self._elastic(draw, boxes, slices.shape[2:], size_px)
        cropped, mask = _sample(slices, lesion_mask, grid)
        return self._change_intensity(cropped, draw), mask

    def whole(self, slices: Tensor, lesion_mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Change slices of square pixels without a box: crops are drawn around the whole slice."""
        size_px = slices.shape[-1]
        box = torch.tensor([0.0, 0.0, *slices.shape[2:]], device=slices.device)
        return self(slices, lesion_mask, seed, box.expand(len(slices), 4), size_px)

    def _affine(self, draw: _Draw) -> Tensor:
        """Draw (B, 2, 3) maps from output to box coordinates, both in [-1, 1]."""
        config = self.config
        is_moved = draw.happens(config.affine_probability).float()
        limit = math.radians(config.rotation_deg)
        angle = draw.uniform(-limit, limit) * is_moved
        scale = 1 + (draw.uniform(config.scale_low, config.scale_high) - 1) * is_moved
        # Half of the change to each side: the area of the crop stays.
        stretch = torch.exp(draw.uniform(-config.aspect, config.aspect) / 2 * is_moved)
        # Coordinates run over 2 along a side, hence the factor of the shift.
        shift = draw.uniform(-config.shift, config.shift, 2) * 2 * is_moved[:, None]
        mirror_x = 1 - 2 * draw.happens(config.flip_probability).float()
        mirror_y = 1 - 2 * draw.happens(config.flip_vertical_probability).float()
        width = scale * mirror_x * stretch
        height = scale * mirror_y / stretch
        cos = torch.cos(angle)
        sin = torch.sin(angle)
        row_x = torch.stack([cos * width, -sin * height, shift[:, 0]], 1)
        row_y = torch.stack([sin * width, cos * height, shift[:, 1]], 1)
        return torch.stack([row_x, row_y], 1)

    def _elastic(self, draw: _Draw, boxes: Tensor, shape: torch.Size, size_px: int) -> Tensor:
        """Draw displacements (B, size, size, 2) in coordinates of the whole slice."""
        config = self.config
        amount = draw.happens(config.elastic_probability).float() * config.elastic_deviation * 2
        nodes = draw.normal(2, config.elastic_nodes, config.elastic_nodes)
        nodes = nodes * amount[:, None, None, None] * _box_share(boxes, shape)[:, :, None, None]
        # (B, 2, nodes, nodes) -> (B, 2, size, size)
        field = F.interpolate(nodes, size=(size_px, size_px), mode="bicubic", align_corners=True)
        # (B, size, size, 2), as grid_sample expects.
        return field.permute(0, 2, 3, 1)

    def _change_intensity(self, slices: Tensor, draw: _Draw) -> Tensor:
        config = self.config
        slices = _mix(slices, _halve(slices), draw.happens(config.low_resolution_probability))
        blurred = _blur(slices, draw.uniform(0.3, config.blur_px))
        slices = _mix(slices, blurred, draw.happens(config.blur_probability))
        is_gamma = draw.happens(config.gamma_probability).float()
        gamma = torch.exp(draw.uniform(-config.gamma, config.gamma) * is_gamma)
        # Held above zero, because the slope of a power below 1 is unbounded there.
        slices = slices.clamp(1e-4, 1) ** gamma[:, None, None, None]
        return self._add_noise(self._change_contrast(slices, draw), draw).clamp(0, 1)

    def _change_contrast(self, slices: Tensor, draw: _Draw) -> Tensor:
        config = self.config
        is_contrast = draw.happens(config.contrast_probability).float()
        contrast = 1 + (draw.uniform(config.contrast_low, config.contrast_high) - 1) * is_contrast
        is_brightness = draw.happens(config.brightness_probability).float()
        shift = draw.uniform(-config.brightness, config.brightness) * is_brightness
        # (B, 1, 1, 1): neighbours in z share one mean.
        mean = slices.mean((1, 2, 3), keepdim=True)
        slices = (slices - mean) * contrast[:, None, None, None] + mean
        return slices + shift[:, None, None, None]

    def _add_noise(self, slices: Tensor, draw: _Draw) -> Tensor:
        is_noisy = draw.happens(self.config.noise_probability).float()
        deviation = draw.uniform(0, self.config.noise) * is_noisy
        return slices + draw.normal(*slices.shape[1:]) * deviation[:, None, None, None]


def _identity(draw: _Draw) -> Tensor:
    theta = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=draw.generator.device)
    return theta.expand(draw.count, 2, 3)


def _box_share(boxes: Tensor, shape: torch.Size) -> Tensor:
    """Return width and height of the boxes over those of the slice, (B, 2)."""
    return torch.stack([boxes[:, 3] / shape[1], boxes[:, 2] / shape[0]], 1)


def _affine_grid(theta: Tensor, boxes: Tensor, shape: torch.Size, size_px: int) -> Tensor:
    """Return the source coordinates in [-1, 1] of each output pixel, (B, size, size, 2)."""
    share = _box_share(boxes, shape)
    middle_x = (2 * boxes[:, 1] + boxes[:, 3]) / shape[1] - 1
    middle_y = (2 * boxes[:, 0] + boxes[:, 2]) / shape[0] - 1
    middle = torch.stack([middle_x, middle_y], 1)
    # From the box's coordinates to those of the whole slice.
    scaled = theta * share[:, :, None]
    in_slice = torch.cat([scaled[:, :, :2], scaled[:, :, 2:] + middle[:, :, None]], 2)
    return F.affine_grid(in_slice, [len(theta), 1, size_px, size_px], align_corners=False)


def _sample(slices: Tensor, lesion_mask: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Sample slices and masks in one pass; a pixel is lesion if half of it is.

    Beyond the slice its border is repeated, which is air.
    """
    # (B, C + 1, H, W): masks cannot drift from their slices.
    both = torch.cat([slices, lesion_mask.to(slices.dtype)], 1)
    sampled = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[:, :-1], (sampled[:, -1:] >= 0.5).to(slices.dtype)


def _mix(slices: Tensor, changed: Tensor, is_changed: Tensor) -> Tensor:
    return torch.where(is_changed[:, None, None, None], changed, slices)


def _halve(slices: Tensor) -> Tensor:
    small = F.avg_pool2d(slices, 2)
    return F.interpolate(small, size=slices.shape[2:], mode="bilinear", align_corners=False)


def _blur(slices: Tensor, deviation_px: Tensor) -> Tensor:
    """Blur with one deviation per slice; 7 x 7 pixels hold three deviations of 1."""
    height, width = slices.shape[2:]
    offsets = torch.arange(-3, 4, device=slices.device, dtype=slices.dtype)
    # (B, 7), one Gaussian for each slice.
    weights = torch.exp(-0.5 * (offsets[None] / deviation_px[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    padded = F.pad(slices, (3, 3, 3, 3), mode="replicate")
    # Seven shifted copies per direction: a grouped convolution with B groups is far slower.
    rows = padded[:, :, :height] * weights[:, 0, None, None, None]
    for shift in range(1, 7):
        rows = rows + padded[:, :, shift : shift + height] * weights[:, shift, None, None, None]
    columns = rows[:, :, :, :width] * weights[:, 0, None, None, None]
    for shift in range(1, 7):
        columns = (
            columns + rows[:, :, :, shift : shift + width] * weights[:, shift, None, None, None]
        )
    return columns
