"""Networks, recipe, one training with its evaluation, and the files of train_gpu.py."""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from covtanet.data.slice_file import SliceFile, load_slices
from covtanet.evaluation.overlap import by_lesion_size, overlap
from covtanet.evaluation.slice_maps import predict_maps, slice_counts
from covtanet.model.encoder import pretrained_state
from covtanet.model.losses import CrossEntropyDiceConfig, loss_terms
from covtanet.model.registry import SEGMENTERS, build_segmenter
from covtanet.model.segnet import SegNetConfig, TASegNet
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.optimizer import set_final_bias
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.resident import Recipe, ResidentSlices, Trained, batch_of, train

ENCODER = "tf_efficientnet_lite0"
AIR_GREY = 25  # -1000 HU over -1250..250 in 150 steps
# Fixed before any result: Dice is largest near half of itself, 0.35 for a Dice of 0.7.
THRESHOLD = 0.3
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
VARIANTS = ("plain", "lung mask", "flips", "flips, lung mask")
DEPLOYED = "flips, lung mask"
LESION_PX = (0, 50, 128, 512, 65536)
# Pairs of a scan with much and one with little lesion, so that training sees both in every fold.
FOLDS = (
    ("coronacases-003", "coronacases-005"),
    ("coronacases-001", "coronacases-002"),
    ("coronacases-007", "coronacases-008"),
)
PICTURES = "slices"
MAX_FILE_BYTES = 15 << 20
WARM_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the trial. rate: of all but a pretrained encoder."""

    segnet: SegNetConfig
    is_pretrained: bool = False
    rate: float = 2e-3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the trial. short_steps: of the comparison. long_s: seconds of a long training."""

    size_px: int = 256
    batch_size: int = 32
    short_steps: int = 600
    long_s: float = 48.0
    long_steps: tuple[int, int] = (1000, 3000)
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    fusion_channels: int = 32
    slice_stride: int = 1


TOY = Scale(
    size_px=64, batch_size=2, short_steps=2, long_s=1.0, long_steps=(2, 3),
    widths=(4, 8, 16, 16, 16), fusion_channels=4, slice_stride=48,
)  # fmt: skip


def networks(scale: Scale) -> dict[str, Network]:
    """All networks by name, all with neighbours in z: rows differ in the network alone."""
    plain = SegNetConfig(in_channels=3, widths=scale.widths, fusion_channels=scale.fusion_channels)
    # Half the fusion channels: at full size these cost V8 most of its time on a CPU.
    eight = replace(plain, fusion_channels=max(4, scale.fusion_channels // 2))
    eight = replace(eight.row_of_table_i("V8", ENCODER), stem_channels=16)
    without_tau = replace(eight, encoder_tau=False, decoder_tau=False)
    rows = {
        "V8": Network(segnet=eight, is_pretrained=True, rate=3e-3),
        "Unet": Network(segnet=plain.row_of_table_i("V1")),
        "V7": Network(segnet=plain.row_of_table_i("V7")),
        "V8 without TAU": Network(segnet=without_tau, is_pretrained=True, rate=3e-3),
        "V8, one slice": Network(
            segnet=replace(eight, in_channels=1), is_pretrained=True, rate=3e-3
        ),
        "V8 at half size": Network(
            segnet=replace(eight, stem_channels=0), is_pretrained=True, rate=3e-3
        ),
        "V8, random start": Network(segnet=eight, rate=3e-3),
    }
    for name in SEGMENTERS:
        # FCN has no batch norm and does not bear the others' rate.
        rate = 2e-4 if name == "FCN" else 2e-3
        rows[name] = Network(segnet=replace(plain, network=name), rate=rate)
    return rows


def phase_config(network: Network, scale: Scale, num_steps: int) -> PhaseConfig:
    """Optimization of one training; the average reaches back over a twentieth of it."""
    return PhaseConfig(
        num_epochs=1,
        batch_size=scale.batch_size,
        micro_batches=1,
        optimizer="adamw",
        learning_rate=network.rate,
        encoder_rate_share=0.2 if network.is_pretrained else 1.0,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_share=0.1,
        clip_norm=1.0,
        average_decay=max(0.0, 1 - 20 / num_steps),
        final_bias=-2.0,
    )


def initial_state(network: Network, seed: int, weights: Path) -> dict[str, Tensor]:
    """Weights at the start, from a seed and, if pretrained, ImageNet."""
    torch.manual_seed(seed)
    module = build_segmenter(network.segnet)
    if network.is_pretrained and isinstance(module, TASegNet):
        config = network.segnet
        module.encoder.load_state_dict(
            pretrained_state(config.encoder, config.in_channels, weights)
        )
    set_final_bias(PhaseConfig(final_bias=-2.0), module)
    return dict(module.state_dict())


def load_all(folder: Path, stride: int) -> dict[str, SliceFile]:
    """All prepared series by name. stride: take one slice of so many."""
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
    """State of the run: what is loaded, what came out, when it must end."""

    scale: Scale
    series: dict[str, SliceFile]
    weights: Path
    out: Path
    device: torch.device
    deadline_s: float
    started_s: float
    modules: dict[str, tuple[nn.Module, Callable[[Tensor], Any]]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.perf_counter()

    def say(self, text: str) -> None:
        line = f"[{time.perf_counter() - self.started_s:6.1f} s] {text}"
        print(line, flush=True)
        with (self.out / "log.txt").open("a") as log:
            log.write(line + "\n")

    def module_of(self, name: str) -> tuple[nn.Module, Callable[[Tensor], Any]]:
        """A network on the device, made once: what is compiled stays compiled from fold to fold."""
        if name not in self.modules:
            module = build_segmenter(networks(self.scale)[name].segnet).to(self.device)
            module.to(memory_format=torch.channels_last)
            self.modules[name] = (module, module)
        return self.modules[name]

    def forget(self, name: str) -> None:
        """Free a network's memory."""
        self.modules.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def recipe_of(self, name: str, num_steps: int, seed: int) -> Recipe:
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
        """Train on all series but those of the test. restart: from initial weights."""
        module, forward = self.module_of(name)
        if restart:
            module.load_state_dict(initial_state(networks(self.scale)[name], seed, self.weights))
        chosen = [slices for key, slices in self.series.items() if key not in tested]
        slices = ResidentSlices.of(chosen, self.device)
        recipe = self.recipe_of(name, num_steps, seed)
        augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), self.device)
        terms = loss_terms(CrossEntropyDiceConfig())
        return train(
            module, forward, slices, recipe, augmenter, terms, self.deadline_s,
            lambda text: self.say(f"{name}: {text}") if "00:" in text else None,
        )  # fmt: skip

    def step_s(self, name: str, num_steps: int = 20) -> float:
        """Seconds of a step, after a few that choose kernels; the weights are spoilt by it."""
        self.train(name, (), WARM_STEPS, 0, restart=False)
        return self.train(name, (), num_steps, 0, restart=False).seconds / num_steps

    def evaluate(self, name: str, label: str, tested: Sequence[str]) -> None:
        """Count held-out series in all variants and at all thresholds."""
        module, _ = self.module_of(name)
        module.eval()
        # Batches of many sizes: choosing kernels for each would cost more than it gains.
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
        """Figures of all series that this label was tested on, and the files as they now stand."""
        keys = [key for key in self.counts if key.startswith(f"{label}/")]
        by_variant: dict[str, Any] = {}
        for variant in VARIANTS:
            own = {
                key.split("/")[1]: self.counts[key] for key in keys if key.endswith(f"/{variant}")
            }
            by_threshold = {}
            for index, threshold in enumerate(THRESHOLDS):
                rows = {key: counts[index].astype(np.int64) for key, counts in own.items()}
                by_threshold[str(threshold)] = overlap(rows)
                if threshold == THRESHOLD:
                    by_variant[f"{variant}, by lesion size"] = by_lesion_size(rows, LESION_PX)
            by_variant[variant] = by_threshold
        self.figures.setdefault("segmentation", {})[label] = by_variant
        deployed = by_variant[DEPLOYED][str(THRESHOLD)]
        means = {
            name: deployed[name]
            for name in ("per_slice", "per_lesion_slice", "per_volume", "pooled")
        }
        self.say(f"{label}: {json.dumps(means)}")
        self.write()

    def write(self) -> None:
        """Write figures and counts; a run that is cut keeps all that was finished."""
        partial = self.out / "figures.partial"
        partial.write_text(json.dumps(self.figures, indent=1, sort_keys=True) + "\n")
        partial.rename(self.out / "figures.json")
        np.savez_compressed(self.out / "counts.partial.npz", **self.counts)
        (self.out / "counts.partial.npz").rename(self.out / "counts.npz")

    def save(self, stem: str, weights: dict[str, Tensor], *, is_half: bool) -> None:
        """Write weights as safetensors of at most MAX_FILE_BYTES. is_half: kernels in 16 bits."""
        groups: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, value in weights.items():
            kept = value.half() if is_half and value.ndim == 4 else value
            kept = kept.detach().cpu().contiguous()
            size += kept.nbytes
            if size > MAX_FILE_BYTES:
                groups.append({})
                size = kept.nbytes
            groups[-1][name] = kept
        for index, group in enumerate(groups):
            suffix = f"-{index + 1}of{len(groups)}" if len(groups) > 1 else ""
            save_file(group, self.out / f"{stem}{suffix}.safetensors")

    def note(
        self, label: str, name: str, trained: Trained, recipe_steps: int, is_compiled: bool
    ) -> None:
        """Keep how a training went."""
        config = phase_config(networks(self.scale)[name], self.scale, recipe_steps)
        self.figures.setdefault("trainings", {})[label] = {
            "network": asdict(networks(self.scale)[name]),
            "phase": asdict(config),
            "num_steps": trained.num_steps,
            "planned_steps": recipe_steps,
            "seconds": round(trained.seconds, 2),
            "slices_per_s": round(trained.num_steps * self.scale.batch_size / trained.seconds, 1),
            "was_cut": trained.was_cut,
            "is_compiled": is_compiled,
            "losses": [round(loss, 5) for loss in trained.losses],
        }
        self.say(f"{label}: {trained.num_steps} steps in {trained.seconds:.1f} s")


def compiled_step(trial: Trial, name: str, limit_s: int) -> bool:
    """Compile a network in place of its eager form; False if that fails or takes too long."""
    module, _ = trial.module_of(name)
    forward = torch.compile(module, dynamic=False)

    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not compiled within {limit_s} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(limit_s)
    try:
        trial.modules[name] = (module, forward)
        trial.train(name, (), WARM_STEPS, 0, restart=False)
    except Exception as error:  # whatever the compiler raises, eager goes on
        trial.say(f"{name} stays eager: {type(error).__name__}: {str(error)[:300]}")
        trial.modules[name] = (module, module)
        return False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return True


def warm(data: Path, weights: Path, name: str, scale: Scale, device: torch.device) -> int:
    """Compile a network in a process of its own, so that the main one finds the kernels on disk."""
    network = networks(scale)[name]
    module = build_segmenter(network.segnet).to(device)
    module.to(memory_format=torch.channels_last).train()
    forward = torch.compile(module, dynamic=False)
    # The 50 single slices alone: any batch has the shapes and strides that count.
    slices = ResidentSlices.of([load_slices(data / f"{PICTURES}.npz", 0)], device)
    phase = phase_config(network, scale, 100)
    recipe = Recipe(
        phase=phase, num_steps=1, size_px=scale.size_px, channels=network.segnet.in_channels, seed=0
    )
    augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), device)
    started = time.perf_counter()
    train(module, forward, slices, recipe, augmenter, loss_terms(CrossEntropyDiceConfig()))
    print(f"{name} compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return 0


def inference_rate(trial: Trial, name: str, precision: str, batch_size: int) -> float:
    """Slices a second through a network, one view each."""
    module, _ = trial.module_of(name)
    module.eval()
    channels = networks(trial.scale)[name].segnet.in_channels
    side = trial.scale.size_px
    images = torch.rand(batch_size, channels, side, side, device=trial.device)
    images = images.contiguous(memory_format=torch.channels_last)
    is_bf16 = precision == "bfloat16"
    rounds = 10 if trial.device.type == "cuda" else 1
    with torch.inference_mode(), torch.autocast(trial.device.type, torch.bfloat16, enabled=is_bf16):
        for index in range(2 * rounds):
            if index == rounds:
                _synchronise(trial.device)
                started = time.perf_counter()
            module(images)
        _synchronise(trial.device)
    module.train()
    return rounds * batch_size / (time.perf_counter() - started)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check(trial: Trial) -> None:
    """Refuse a device on which the seed does not name the batch or a step is not finite."""
    slices = ResidentSlices.of(list(trial.series.values()), trial.device)
    recipe = trial.recipe_of("V8", 10, 0)
    augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), trial.device)
    first, mask = batch_of(slices, recipe, augmenter, 5)
    second, _ = batch_of(slices, recipe, augmenter, 5)
    if not torch.equal(first, second):
        raise RuntimeError("the same seed gave two batches")
    module, _ = trial.module_of("V8")
    module.load_state_dict(initial_state(networks(trial.scale)["V8"], 0, trial.weights))
    module.eval()
    with torch.inference_mode():
        exact = torch.sigmoid(module(first))
        with torch.autocast(trial.device.type, torch.bfloat16):
            rounded = torch.sigmoid(module(first).float())
    difference = float((exact - rounded).abs().mean())
    module.train()
    trained = trial.train("V8", (), 10, 0)
    trial.figures["check"] = {
        "mean_difference_of_bfloat16": round(difference, 5),
        "lesion_share_of_a_batch": round(float(mask.mean()), 5),
        "loss_of_ten_steps": [round(loss, 4) for loss in trained.losses],
    }
    trial.say(f"check: {trial.figures['check']}")
