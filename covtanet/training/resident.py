"""Phase 1 on slices that lie on the device as 8 bits: sampling, crop, augmentation and step there.

Used by ``benchmarks/train_gpu.py`` and ``compare_gpu.py``; no command calls it. For data sets that
fit on a GPU. A step reads nothing back to the host; the loss is read once in ``REPORT_STEPS``. One
process, one device. Not covered: several devices and resuming (``loop``).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covtanet.data.slice_file import GREY_STEPS, SliceFile
from covtanet.model.baselines.blocks import Outputs
from covtanet.model.losses import LossTerms
from covtanet.training.batch_augment import BatchAugmenter
from covtanet.training.feed import seed_of
from covtanet.training.neighbours import REPEAT_SHARE
from covtanet.training.optimizer import WeightAverage, clip_gradients, make_optimizer, set_rate
from covtanet.training.phase1 import supervised_loss, supervised_sums
from covtanet.training.phase_config import PhaseConfig

# Reading the loss makes the host wait for the device.
REPORT_STEPS = 100
# Largest distance of neighbours in z, in slices: 1 to 4 mm in a scan of thin slices. Screening
# takes slices 2.5 mm apart or, of thick ones, all.
FARTHEST_NEIGHBOUR = 4


@dataclass(frozen=True, kw_only=True)
class ResidentSlices:
    """All training slices on one device, N in total."""

    grey: Tensor
    """(N, H, W) uint8, 0 to ``GREY_STEPS``."""
    lesion: Tensor
    """(N, H, W) uint8, 0 or 1."""
    boxes: Tensor
    """(N, 4), top, left, height and width of the lung box in pixels."""
    first: Tensor
    """(N,), index of the first slice that may be a neighbour."""
    last: Tensor
    """(N,), index of the last slice that may be a neighbour."""
    weight: Tensor
    """(N,), relative frequency with which a slice is drawn."""

    @classmethod
    def of(cls, series: Sequence[SliceFile], device: torch.device) -> "ResidentSlices":
        """Put series on the device.

        Choice: a series is drawn in proportion to the root of its number of lung slices, so that a
        long scan does not outweigh a short one, nor fifty single slices a patient. Slices of one
        series are equally frequent.
        """
        counts = [len(slices.grey) for slices in series]
        # Index of the first slice of each series in the joined arrays.
        starts = np.cumsum([0, *counts[:-1]])
        spans = [
            _neighbour_span(slices, start) for slices, start in zip(series, starts, strict=True)
        ]
        boxes = np.concatenate(
            [np.tile(_box_row(slices), (len(slices.grey), 1)) for slices in series]
        )
        weight = np.concatenate([_draw_weight(slices) for slices in series])
        grey = np.concatenate([slices.grey for slices in series])
        lesion = np.concatenate([slices.lesion for slices in series]).astype(np.uint8)
        return cls(
            grey=torch.from_numpy(grey).to(device),
            lesion=torch.from_numpy(lesion).to(device),
            boxes=torch.from_numpy(boxes).float().to(device),
            first=torch.from_numpy(np.concatenate([first for first, _ in spans])).to(device),
            last=torch.from_numpy(np.concatenate([last for _, last in spans])).to(device),
            weight=torch.from_numpy(weight).float().to(device),
        )

    def draw(self, count: int, channels: int, generator: torch.Generator) -> Tensor:
        """Draw slices with their neighbours in z, indices (count, channels).

        The middle channel is the slice whose mask is learned.
        """
        middle = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        if channels == 1:
            return middle[:, None]
        device = self.grey.device
        distance = torch.randint(
            1, FARTHEST_NEIGHBOUR + 1, (count,), generator=generator, device=device
        )
        chance = torch.rand((count, 2), generator=generator, device=device)
        # Distance 0 repeats the slice itself.
        distance = distance * (chance[:, 0] >= REPEAT_SHARE)
        # A volume may be read from either end.
        distance = torch.where(chance[:, 1] < 0.5, distance, -distance)
        # (count, 3); at the ends of a series the outermost slice is repeated.
        rows = torch.stack([middle - distance, middle, middle + distance], 1)
        return rows.clamp(self.first[middle, None], self.last[middle, None])


def _neighbour_span(slices: SliceFile, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first and last possible neighbour of each slice, the slice itself if it is single."""
    count = len(slices.grey)
    if not slices.is_continuous:
        indices = np.arange(start, start + count)
        return indices, indices
    return np.full(count, start), np.full(count, start + count - 1)


def _box_row(slices: SliceFile) -> NDArray[np.int64]:
    box = slices.box
    return np.array([box.top, box.left, box.height, box.width])


def _draw_weight(slices: SliceFile) -> NDArray[np.float64]:
    weight: NDArray[np.float64] = slices.has_lung / math.sqrt(max(1, slices.has_lung.sum()))
    return weight


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training on resident slices."""

    phase: PhaseConfig
    num_steps: int
    size_px: int
    """Side of the network's input."""
    channels: int
    """1, or 3 with both neighbours in z."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Outcome of a training."""

    weights: dict[str, Tensor]
    """Averaged weights if the recipe averages."""
    losses: list[float]
    """Mean loss of every ``REPORT_STEPS`` steps."""
    num_steps: int
    seconds: float
    was_cut: bool
    """Whether the deadline came before the last step."""


def batch_of(
    slices: ResidentSlices, recipe: Recipe, augmenter: BatchAugmenter, step: int
) -> tuple[Tensor, Tensor]:
    """Return slices (B, channels, size, size) in [0, 1] and masks (B, 1, size, size) of one step.

    Seed and step determine the batch.
    """
    seed = seed_of(recipe.seed, step)
    generator = augmenter.generator
    # Seed and step alone determine the draw.
    generator.manual_seed(seed)
    rows = slices.draw(recipe.phase.batch_size, recipe.channels, generator)
    middle = rows[:, rows.shape[1] // 2]
    # (B, channels, H, W), in [0, 1]
    grey = slices.grey[rows].float() / GREY_STEPS
    # (B, 1, H, W), of the middle slice
    lesion = slices.lesion[middle][:, None].float()
    # A seed unlike that of the draw, or the same random numbers would choose and deform.
    changed, mask = augmenter(grey, lesion, seed + 1, slices.boxes[middle], recipe.size_px)
    return changed.contiguous(memory_format=torch.channels_last), mask


class _LossReport:
    """Sum of the losses on the device, read by the host once in ``REPORT_STEPS``."""

    def __init__(self, num_steps: int, device: torch.device, say: Callable[[str], None]) -> None:
        self.num_steps = num_steps
        self.say = say
        self.total = torch.zeros((), device=device)
        self.means: list[float] = []
        self.started_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started_s

    def add(self, loss: Tensor, done: int) -> None:
        # Added up on the device: the host does not wait for this step.
        self.total += loss
        if done % REPORT_STEPS and done != self.num_steps:
            return
        mean = float(self.total) / (done - len(self.means) * REPORT_STEPS)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is NaN or infinite before step {done}")
        self.means.append(mean)
        self.total.zero_()
        self.say(f"step {done}: loss {mean:.4f}, {self.seconds:.1f} s")


def train(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor | Outputs],
    slices: ResidentSlices,
    recipe: Recipe,
    augmenter: BatchAugmenter,
    terms: LossTerms,
    deadline_s: float = math.inf,
    say: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train a module in place. forward: the module itself, or its compiled form.

    deadline_s: of ``time.perf_counter``; the training ends there.

    Raises:
        FloatingPointError: the mean loss of ``REPORT_STEPS`` steps is NaN or infinite.
    """
    config = recipe.phase
    device = slices.grey.device
    optimizer = make_optimizer(config, module, fused=device.type == "cuda")
    average = WeightAverage(module, config.average_decay) if config.average_decay else None
    module.train()
    report = _LossReport(recipe.num_steps, device, say)
    done = 0
    while done < recipe.num_steps and time.perf_counter() < deadline_s:
        # The schedule is in epochs; the steps are mapped onto them.
        set_rate(optimizer, config.rate(config.num_epochs * done / recipe.num_steps))
        images, mask = batch_of(slices, recipe, augmenter, done)
        with config.autocast(device):
            outputs = forward(images)
        loss = supervised_loss(supervised_sums(outputs, mask, terms), terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(config, module.parameters())
        optimizer.step()
        if average:
            average.update()
        done += 1
        report.add(loss.detach(), done)
    if average and done:
        module.load_state_dict(average.state(), strict=False)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return Trained(
        weights=weights,
        losses=report.means,
        num_steps=done,
        seconds=report.seconds,
        was_cut=done < recipe.num_steps,
    )
