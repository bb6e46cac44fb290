"""One training of the comparison of all segmenters, with its counts on the tested patients."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.compare_plan import (
    FOLDS,
    FOUR_FLIPS,
    ONE_VIEW,
    RATE_JUDGE,
    RATE_TRAINED,
    Task,
)
from benchmarks.gpu_networks import (
    AIR_GREY,
    Network,
    Scale,
    initial_state,
    networks,
    phase_config,
)
from benchmarks.gpu_trial import THRESHOLD
from covtanet.data.slice_file import SliceFile
from covtanet.evaluation.slice_maps import predict_maps, slice_counts
from covtanet.model.losses import CrossEntropyDiceConfig, loss_terms
from covtanet.model.registry import build_segmenter
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.resident import Recipe, ResidentSlices, Trained, train

# Steps before a step is timed, in which kernels are loaded.
WARM_STEPS = 3
TIMED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Data and device of one process."""

    scale: Scale
    rate_px: int
    """Side of the input when a rate is chosen."""
    series: dict[str, SliceFile]
    weights: Path
    """ImageNet weights of the encoder."""
    device: torch.device

    def run(self, task: Task, deadline_s: float) -> dict[str, Any]:
        """Train and evaluate; return the result. deadline_s: of ``time.perf_counter``."""
        network = replace(networks(self.scale)[task.network], rate=task.rate)
        module: nn.Module = build_segmenter(network.segnet)
        module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        row = self._probe(module, network, task) if task.is_probe else {}
        seed = 1000 * (1 + task.seed) + (task.fold or 0)
        module.load_state_dict(initial_state(network, seed, self.weights))
        is_rate = task.kind == "rate"
        tested = (RATE_JUDGE,) if is_rate else FOLDS[task.fold or 0]
        size_px = self.rate_px if is_rate else self.scale.size_px
        self._reset_peak()
        recipe = self._recipe(network, task.num_steps, size_px, seed)
        trained = self._train(module, self._slices(task, tested), recipe, deadline_s)
        row |= self._course(trained, is_full_size=not is_rate)
        if trained.was_cut:
            return row | {"status": "cut"}
        counts = self._count(module, network, tested, size_px)
        return row | {"status": "done", "counts": counts}

    def _slices(self, task: Task, tested: Sequence[str]) -> ResidentSlices:
        """Return the training slices: all series that are not tested, or those that choose rates.

        In a training that chooses a rate no patient of folds 0 and 2 has any part.
        """
        names = RATE_TRAINED if task.kind == "rate" else tuple(self.series)
        chosen = [self.series[name] for name in names if name not in tested]
        return ResidentSlices.of(chosen, self.device)

    def _recipe(self, network: Network, num_steps: int, size_px: int, seed: int) -> Recipe:
        return Recipe(
            phase=phase_config(network, self.scale, num_steps),
            num_steps=num_steps,
            size_px=size_px,
            channels=network.segnet.in_channels,
            seed=seed,
        )

    def _train(
        self, module: nn.Module, slices: ResidentSlices, recipe: Recipe, deadline_s: float
    ) -> Trained:
        augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), self.device)
        terms = loss_terms(CrossEntropyDiceConfig())
        return train(module, module, slices, recipe, augmenter, terms, deadline_s)

    def _probe(self, module: nn.Module, network: Network, task: Task) -> dict[str, Any]:
        """Measure seconds and memory of a step at full size; the weights are lost."""
        slices = self._slices(task, (RATE_JUDGE,))
        self._reset_peak()
        for num_steps in (WARM_STEPS, TIMED_STEPS):
            recipe = self._recipe(network, num_steps, self.scale.size_px, 0)
            trained = self._train(module, slices, recipe, time.perf_counter() + 60)
        return {
            "step_s": round(trained.seconds / max(1, trained.num_steps), 4),
            "peak_gib": self._peak_gib(),
        }

    def _course(self, trained: Trained, *, is_full_size: bool) -> dict[str, Any]:
        """Return time, loss and memory of a training; at full size for the plan to use."""
        row: dict[str, Any] = {
            "done_steps": trained.num_steps,
            "seconds": round(trained.seconds, 2),
            "losses": [round(loss, 4) for loss in trained.losses],
        }
        if is_full_size:
            row["step_s"] = round(trained.seconds / max(1, trained.num_steps), 4)
            row["peak_gib"] = self._peak_gib()
        return row

    def _count(
        self, module: nn.Module, network: Network, tested: Sequence[str], size_px: int
    ) -> dict[str, dict[str, list[list[int]]]]:
        """Count TP, FP and FN of each slice, (S, 3), by patient and view.

        In float32 at the source's resolution, inside the lung mask of screening.
        """
        module.eval()
        counts: dict[str, dict[str, list[list[int]]]] = {}
        for name in tested:
            slices = self.series[name]
            maps = predict_maps(module, slices, size_px, network.segnet.in_channels, AIR_GREY)
            truth = torch.from_numpy(slices.lesion[slices.has_lung]).to(self.device)
            inside = torch.from_numpy(slices.inside[slices.has_lung]).to(self.device)
            for view, chosen in ((ONE_VIEW, maps.single), (FOUR_FLIPS, maps.flipped)):
                probabilities = torch.from_numpy(chosen).to(self.device) * inside
                rows = slice_counts(probabilities, truth, (THRESHOLD,))[0]
                counts.setdefault(name, {})[view] = rows.tolist()
        return counts

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            # The cache too: memory that an earlier network needed must not count.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak_gib(self) -> float:
        """Return the largest memory that the process reserved, with 0.6 GiB of CUDA itself."""
        if self.device.type != "cuda":
            return 0.1
        return round(torch.cuda.max_memory_reserved() / 2**30 + 0.6, 2)
