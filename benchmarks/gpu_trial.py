"""One training with its evaluation, and the files that train_gpu.py writes."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.gpu_networks import AIR_GREY, Scale, initial_state, networks, phase_config
from covtanet.data.slice_file import SliceFile, load_slices
from covtanet.evaluation.overlap import by_lesion_size, overlap
from covtanet.evaluation.slice_maps import predict_maps, slice_counts
from covtanet.model.losses import CrossEntropyDiceConfig, loss_terms
from covtanet.model.registry import build_segmenter
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.resident import Recipe, ResidentSlices, Trained, train

# Fixed before any result: Dice is largest near half of itself, 0.35 for a Dice of 0.7.
THRESHOLD = 0.3
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
VARIANTS = ("plain", "lung mask", "flips", "flips, lung mask")
DEPLOYED = "flips, lung mask"
LESION_PX = (0, 50, 128, 512, 65536)
PICTURES = "slices"
MAX_FILE_BYTES = 15 << 20
# Steps in which cuDNN chooses its kernels, before a step is timed.
WARM_STEPS = 6

Forward = Callable[[Tensor], Any]


def load_all(folder: Path, stride: int) -> dict[str, SliceFile]:
    """Return all prepared series by name, every ``stride``-th slice."""
    series = {}
    for path in sorted(folder.glob("*.npz")):
        slices = load_slices(path, 0 if path.stem == PICTURES else AIR_GREY)
        series[path.stem] = replace(
            slices,
            grey=slices.grey[::stride],
            lesion=slices.lesion[::stride],
            inside=slices.inside[::stride],
            has_lung=slices.has_lung[::stride],
        )
    return series


@dataclass
class Trial:
    """State of a run: data, networks, results so far and the time at which it ends."""

    scale: Scale
    series: dict[str, SliceFile]
    weights: Path
    """ImageNet weights of the encoder."""
    out: Path
    device: torch.device
    deadline_s: float
    """Of ``time.perf_counter``."""
    started_s: float
    modules: dict[str, tuple[nn.Module, Forward]] = field(default_factory=dict)
    """Each network with its forward pass, compiled or not."""
    metrics: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    """TP, FP and FN of every slice at every threshold, by label, series and variant."""

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.perf_counter()

    def say(self, text: str) -> None:
        """Print and log a line."""
        line = f"[{time.perf_counter() - self.started_s:6.1f} s] {text}"
        print(line, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(line + "\n")

    def module_of(self, name: str) -> tuple[nn.Module, Forward]:
        """Return a network on the device; it is built once, so it stays compiled in all folds."""
        if name not in self.modules:
            module: nn.Module = build_segmenter(networks(self.scale)[name].segnet)
            module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.modules[name] = (module, module)
        return self.modules[name]

    def forget(self, name: str) -> None:
        """Free a network's memory."""
        self.modules.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def recipe_of(self, name: str, num_steps: int, seed: int) -> Recipe:
        """Return the settings of one training."""
        network = networks(self.scale)[name]
        return Recipe(
            phase=phase_config(network, self.scale, num_steps),
            num_steps=num_steps,
            size_px=self.scale.size_px,
            channels=network.segnet.in_channels,
            seed=seed,
        )

    def train(
        self, name: str, tested: Sequence[str], num_steps: int, seed: int, *, restart: bool = True
    ) -> Trained:
        """Train on all series that are not tested. restart: from the initial weights."""
        module, forward = self.module_of(name)
        if restart:
            module.load_state_dict(initial_state(networks(self.scale)[name], seed, self.weights))
        chosen = [slices for key, slices in self.series.items() if key not in tested]
        return train(
            module,
            forward,
            ResidentSlices.of(chosen, self.device),
            self.recipe_of(name, num_steps, seed),
            BatchAugmenter(BatchAugmentConfig(is_on=True), self.device),
            loss_terms(CrossEntropyDiceConfig()),
            self.deadline_s,
            lambda text: self.say(f"{name}: {text}") if "00:" in text else None,
        )

    def step_s(self, name: str, num_steps: int = 20) -> float:
        """Return the seconds of a step; the weights are not usable afterwards."""
        self.train(name, (), WARM_STEPS, 0, restart=False)
        return self.train(name, (), num_steps, 0, restart=False).seconds / num_steps

    def evaluate(self, name: str, label: str, tested: Sequence[str]) -> None:
        """Count the tested series in all variants and at all thresholds."""
        module, _ = self.module_of(name)
        module.eval()
        # Batches have many sizes, and choosing kernels for each takes longer than it saves.
        torch.backends.cudnn.benchmark = False
        channels = networks(self.scale)[name].segnet.in_channels
        for key in tested:
            slices = self.series[key]
            maps = predict_maps(module, slices, self.scale.size_px, channels, AIR_GREY)
            truth = torch.from_numpy(slices.lesion[slices.has_lung]).to(self.device)
            inside = torch.from_numpy(slices.inside[slices.has_lung]).to(self.device)
            for variant in VARIANTS:
                chosen = maps.flipped if "flips" in variant else maps.single
                p = torch.from_numpy(chosen).to(self.device)
                if "lung mask" in variant:
                    p = p * inside
                counts = slice_counts(p, truth, THRESHOLDS)
                self.counts[f"{label}/{key}/{variant}"] = counts.astype(np.int32)
        torch.backends.cudnn.benchmark = True
        module.train()

    def summarise(self, label: str) -> None:
        """Write the metrics of all series that a label was tested on."""
        by_variant: dict[str, Any] = {}
        for variant in VARIANTS:
            counts = self._counts_of(label, variant)
            by_threshold = {}
            for index, threshold in enumerate(THRESHOLDS):
                rows = {key: value[index].astype(np.int64) for key, value in counts.items()}
                by_threshold[str(threshold)] = overlap(rows)
                if threshold == THRESHOLD:
                    by_variant[f"{variant}, by lesion size"] = by_lesion_size(rows, LESION_PX)
            by_variant[variant] = by_threshold
        self.metrics.setdefault("segmentation", {})[label] = by_variant
        deployed = by_variant[DEPLOYED][str(THRESHOLD)]
        names = ("per_slice", "per_lesion_slice", "per_volume", "pooled")
        self.say(f"{label}: {json.dumps({name: deployed[name] for name in names})}")
        self.write()

    def _counts_of(self, label: str, variant: str) -> dict[str, NDArray[np.int32]]:
        counts = {}
        for key, value in self.counts.items():
            counted_label, series, counted_variant = key.split("/")
            if (counted_label, counted_variant) == (label, variant):
                counts[series] = value
        return counts

    def write(self) -> None:
        """Write metrics and counts; a run that is cut keeps every finished result."""
        partial = self.out / "figures.partial"
        partial.write_text(json.dumps(self.metrics, indent=1, sort_keys=True) + "\n")
        partial.rename(self.out / "figures.json")
        arrays: dict[str, Any] = dict(self.counts)
        np.savez_compressed(self.out / "counts.partial.npz", **arrays)
        (self.out / "counts.partial.npz").rename(self.out / "counts.npz")

    def save(self, stem: str, weights: dict[str, Tensor], *, is_half: bool) -> None:
        """Write weights in files of at most MAX_FILE_BYTES. is_half: kernels in 16 bits."""
        groups: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, value in weights.items():
            stored = value.half() if is_half and value.ndim == 4 else value
            stored = stored.detach().cpu().contiguous()
            size += stored.nbytes
            if size > MAX_FILE_BYTES:
                groups.append({})
                size = stored.nbytes
            groups[-1][name] = stored
        for index, group in enumerate(groups):
            suffix = f"-{index + 1}of{len(groups)}" if len(groups) > 1 else ""
            save_file(group, self.out / f"{stem}{suffix}.safetensors")

    def note(
        self, label: str, name: str, trained: Trained, recipe_steps: int, *, is_compiled: bool
    ) -> None:
        """Record settings and course of a training."""
        network = networks(self.scale)[name]
        self.metrics.setdefault("trainings", {})[label] = {
            "network": asdict(network),
            "phase": asdict(phase_config(network, self.scale, recipe_steps)),
            "num_steps": trained.num_steps,
            "planned_steps": recipe_steps,
            "seconds": round(trained.seconds, 2),
            "slices_per_s": round(trained.num_steps * self.scale.batch_size / trained.seconds, 1),
            "was_cut": trained.was_cut,
            "is_compiled": is_compiled,
            "losses": [round(loss, 5) for loss in trained.losses],
        }
        self.say(f"{label}: {trained.num_steps} steps in {trained.seconds:.1f} s")
