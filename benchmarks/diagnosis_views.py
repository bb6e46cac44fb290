"""Slices of mosmed-mid on one device as inputs of the networks of Table IV."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.diagnosis_networks import AUGMENT, COVTANET, SCALE, Scale
from benchmarks.diagnosis_slices import BOX_PX, CANVAS_PX, Slices
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.feed import seed_of

# That of the shipped model, fixed before any result here.
THRESHOLD = 0.3
TEST_BATCH = 64
# Pixels of context on each side of the lung box.
EDGE_PX = (CANVAS_PX - BOX_PX) // 2
# Views of the slices that are tested.
PLAIN, MIRRORED = 0, 1
Rows = NDArray[np.int64]
# Slices and a seed, for training, or the number of a tested view, to the input of a joint
# classifier (B, 1, C, P, P).
Training = Callable[[Rows, int], Tensor]
Testing = Callable[[Rows, int], Tensor]


@dataclass(frozen=True)
class Inputs:
    """Input of a row's network."""

    training: Training
    testing: Testing


def frozen_segmenter(path: Path, device: torch.device) -> TASegNet:
    """Return V8 on the lung box with its weights, in eval mode on the device."""
    config = SCALE.covtanet.segnet
    assert isinstance(config, TASegNetConfig)
    network = TASegNet(config)
    stored = load_file(path)
    # Kernels are stored in 16 bits; counters of batches, which eval mode never reads, are not.
    state = {
        name: stored[name].to(value.dtype) if name in stored else value
        for name, value in network.state_dict().items()
    }
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


@dataclass
class Views:
    """Slices on the device, changed at random or not, and the frozen segmenter."""

    slices: Slices
    scale: Scale
    device: torch.device
    segmenter: TASegNet
    grey: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.grey = torch.from_numpy(self.slices.grey).to(self.device)
        self.augmenter = BatchAugmenter(AUGMENT, self.device)
        self.cropper = BatchAugmenter(BatchAugmentConfig(), self.device)

    def crop(self, rows: Rows, seed: int | None) -> Tensor:
        """Return the lung boxes of slices, (B, 1, size, size); changed at random with a seed."""
        grey = self.grey[torch.from_numpy(rows).to(self.device)][:, None].float() / 255
        box = torch.tensor([EDGE_PX, EDGE_PX, BOX_PX, BOX_PX], device=self.device).float()
        augmenter = self.cropper if seed is None else self.augmenter
        boxes = box.expand(len(rows), 4)
        changed, _ = augmenter(grey, torch.zeros_like(grey), seed or 0, boxes, self.scale.size_px)
        return changed.contiguous(memory_format=torch.channels_last)

    def inputs_of(self, name: str) -> Inputs:
        """Return the input of a row's network: slices, or CovTANet's features of them."""
        if name == COVTANET:
            return self._feature_inputs()
        return Inputs(
            training=lambda rows, seed: self.crop(rows, seed)[:, None],
            testing=lambda rows, view: self.view(rows, view)[:, None],
        )

    def view(self, rows: Rows, view: int) -> Tensor:
        """Return slices without random changes, or their mirror images."""
        slices = self.crop(rows, None)
        return slices.flip(3) if view == MIRRORED else slices

    def _feature_inputs(self) -> Inputs:
        """Compute the frozen segmenter's features once: plain, mirrored, and of changed copies."""
        started_s = time.perf_counter()
        num_slices = len(self.grey)
        config = self.scale.covtanet
        shape = (config.segnet.fused_channels, config.pooled_px, config.pooled_px)
        num_views = 2 + self.scale.num_copies
        features = torch.empty((num_views, num_slices, *shape), dtype=torch.half)
        features = features.to(self.device)
        for view in range(num_views):
            for start in range(0, num_slices, TEST_BATCH):
                rows = np.arange(start, min(start + TEST_BATCH, num_slices))
                is_plain = view in (PLAIN, MIRRORED)
                seed = seed_of(view, start)
                slices = self.view(rows, view) if is_plain else self.crop(rows, seed)
                features[view, start : start + len(rows)] = self._pooled(slices).half()
        print(f"{num_views} views of features in {time.perf_counter() - started_s:.1f} s")

        def training(rows: Rows, seed: int) -> Tensor:
            views = np.random.default_rng(seed).integers(0, num_views, len(rows))
            return features[torch.from_numpy(views), torch.from_numpy(rows)].float()[:, None]

        def testing(rows: Rows, view: int) -> Tensor:
            return features[view, torch.from_numpy(rows)].float()[:, None]

        return Inputs(training=training, testing=testing)

    def _pooled(self, slices: Tensor) -> Tensor:
        """Return pooled fusion vectors; neighbours of a single slice are copies of it."""
        with torch.no_grad():
            _, fused = self.segmenter.segment(slices.expand(-1, 3, -1, -1))
        return F.adaptive_avg_pool2d(fused, self.scale.covtanet.pooled_px)

    def shares(self) -> NDArray[np.float64]:
        """Return lesion over lung of each slice, as screening measures it."""
        shares = []
        for start in range(0, len(self.grey), TEST_BATCH):
            rows = np.arange(start, min(start + TEST_BATCH, len(self.grey)))
            grey = self.grey[rows][:, None].float() / 255
            with torch.no_grad():
                inner = grey[..., EDGE_PX:-EDGE_PX, EDGE_PX:-EDGE_PX].expand(-1, 3, -1, -1)
                logits = self.segmenter(inner)
            # No lesion is looked for outside the box.
            marked = F.pad(torch.sigmoid(logits.float())[:, 0], (EDGE_PX,) * 4) >= THRESHOLD
            lesion = marked.cpu().numpy() & self.slices.inside[rows]
            lung = self.slices.lung[rows] | lesion
            shares.append(lesion.sum((1, 2)) / lung.sum((1, 2)))
        return np.concatenate(shares)
