"""Phase 1 on slices that lie on the device as 8 bits: sampling, crop, augmentation and step there.

For sets that fit a GPU. Nothing crosses to the host in a step, so the device never waits; the loss
is read once in ``REPORT_STEPS``. One process, one device; ``loop`` trains on many and resumes.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from covtanet.data.slice_file import GREY_STEPS, SliceFile
from covtanet.model.baselines.blocks import Outputs
from covtanet.model.losses import LossTerms
from covtanet.training.batch_augment import BatchAugmenter
from covtanet.training.feed import seed_of
from covtanet.training.optimizer import (
    WeightAverage,
    clip_gradients,
    make_optimizer,
    set_rate,
)
from covtanet.training.phase1 import supervised_loss, supervised_sums
from covtanet.training.phase_config import PhaseConfig

REPORT_STEPS = 100
# Slices apart that neighbours in z may be in training: 1 to 4 mm in a scan of thin slices, since
# screening takes slices 2.5 mm apart or, of thick ones, all.
FARTHEST_NEIGHBOUR = 4
# A slice without neighbours repeats itself; so do these many in training, lest that be unknown.
REPEAT_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class ResidentSlices:
    """All training slices on one device, N in all.

    grey, lesion: (N, H, W) uint8. boxes: (N, 4) of top, left, height, width. first, last: (N,) of the
    series' own slices. weight: (N,), how often a slice is drawn.
    """

    grey: Tensor
    lesion: Tensor
    boxes: Tensor
    first: Tensor
    last: Tensor
    weight: Tensor

    @classmethod
    def of(cls, series: Sequence[SliceFile], device: torch.device) -> "ResidentSlices":
        """Put series on the device.

        Choice: a series is drawn as often as the root of its number of lung slices, so that a long
        scan does not outweigh a short one, nor fifty single slices a patient; its slices alike.
        """
        boxes, first, last, weight = [], [], [], []
        start = 0
        for slices in series:
            count = len(slices.grey)
            box = slices.box
            boxes += [[box.top, box.left, box.height, box.width]] * count
            own = np.arange(start, start + count)
            first.append(np.full(count, start) if slices.is_continuous else own)
            last.append(np.full(count, start + count - 1) if slices.is_continuous else own)
            weight.append(slices.has_lung / math.sqrt(max(1, slices.has_lung.sum())))
            start += count
        grey = np.concatenate([slices.grey for slices in series])
        lesion = np.concatenate([slices.lesion for slices in series]).astype(np.uint8)
        return cls(
            grey=torch.from_numpy(grey).to(device),
            lesion=torch.from_numpy(lesion).to(device),
            boxes=torch.tensor(boxes, dtype=torch.float32, device=device),
            first=torch.from_numpy(np.concatenate(first)).to(device),
            last=torch.from_numpy(np.concatenate(last)).to(device),
            weight=torch.from_numpy(np.concatenate(weight)).float().to(device),
        )

    def draw(self, count: int, channels: int, generator: torch.Generator) -> Tensor:
        """Indices of random slices with their neighbours in z, (count, channels); the middle counts."""
        middle = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        if channels == 1:
            return middle[:, None]
        device = self.grey.device
        distance = torch.randint(
            1, FARTHEST_NEIGHBOUR + 1, (count,), generator=generator, device=device
        )
        lots = torch.rand((count, 2), generator=generator, device=device)
        distance = distance * (lots[:, 0] >= REPEAT_SHARE)
        # A volume may be met from either end.
        distance = torch.where(lots[:, 1] < 0.5, distance, -distance)
        rows = torch.stack([middle - distance, middle, middle + distance], 1)
        return rows.clamp(self.first[middle, None], self.last[middle, None])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training on resident slices is told. channels: 1, or 3 with both neighbours in z."""

    phase: PhaseConfig
    num_steps: int
    size_px: int
    channels: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The outcome. weights: averaged if the recipe averages. losses: mean of every REPORT_STEPS steps.

    was_cut: whether the deadline came before the last step.
    """

    weights: dict[str, Tensor]
    losses: list[float]
    num_steps: int
    seconds: float
    was_cut: bool


def batch_of(
    slices: ResidentSlices, recipe: Recipe, augmenter: BatchAugmenter, step: int
) -> tuple[Tensor, Tensor]:
    """Slices (B, channels, size, size) in [0, 1] and masks of one step; follows from seed and step."""
    seed = seed_of(recipe.seed, step)
    generator = augmenter.generator
    generator.manual_seed(seed)
    rows = slices.draw(recipe.phase.batch_size, recipe.channels, generator)
    middle = rows[:, rows.shape[1] // 2]
    grey = slices.grey[rows].float() / GREY_STEPS
    lesion = slices.lesion[middle][:, None].float()
    # Another seed than that of the draw, or the same random numbers would choose and deform.
    changed, mask = augmenter(grey, lesion, seed + 1, slices.boxes[middle], recipe.size_px)
    return changed.contiguous(memory_format=torch.channels_last), mask


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

    deadline_s: of ``time.perf_counter``.

    Raises:
        FloatingPointError: if the mean loss of REPORT_STEPS steps is NaN or infinite.
    """
    config, device = recipe.phase, slices.grey.device
    optimizer = make_optimizer(config, module, fused=device.type == "cuda")
    average = WeightAverage(module, config.average_decay) if config.average_decay else None
    module.train()
    losses: list[float] = []
    total = torch.zeros((), device=device)
    started = time.perf_counter()
    done = 0
    while done < recipe.num_steps and time.perf_counter() < deadline_s:
        set_rate(optimizer, config.rate(config.num_epochs * done / recipe.num_steps))
        images, mask = batch_of(slices, recipe, augmenter, done)
        with config.autocast(device):
            found = forward(images)
        loss = supervised_loss(supervised_sums(found, mask, terms), terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(config, module.parameters())
        optimizer.step()
        if average:
            average.update()
        total += loss.detach()
        done += 1
        if done % REPORT_STEPS == 0 or done == recipe.num_steps:
            mean = float(total) / (done - len(losses) * REPORT_STEPS)
            if not math.isfinite(mean):
                raise FloatingPointError(f"the loss is NaN or infinite before step {done}")
            losses.append(mean)
            total.zero_()
            say(f"step {done}: loss {mean:.4f}, {time.perf_counter() - started:.1f} s")
    if average:
        module.load_state_dict(average.state(), strict=False)
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return Trained(
        weights=weights,
        losses=losses,
        num_steps=done,
        seconds=time.perf_counter() - started,
        was_cut=done < recipe.num_steps,
    )
