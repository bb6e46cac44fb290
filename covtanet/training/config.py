"""Configuration of an experiment; the defaults are the paper's values or documented choices."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from covtanet.ct.window import WindowConfig
from covtanet.data.datasets import DATASETS
from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANetConfig, architecture
from covtanet.model.encoder import EFFICIENTNETS, V8_ENCODER
from covtanet.model.losses import CrossEntropyDiceConfig, FocalTverskyConfig, JointLossConfig
from covtanet.model.registry import CLASSIFIERS, NAMES, SEGMENTERS
from covtanet.training.augment import AugmentConfig
from covtanet.training.batch_augment import BatchAugmentConfig
from covtanet.training.feed import Sampling
from covtanet.training.phase_config import PhaseConfig

# Settings that may differ between two starts of one experiment: the part that a start runs, and its
# resources.
NOT_IDENTITY = ("network", "folds", "phases", "num_workers", "cache_bytes", "max_failures")
SEGMENTATION_LOSSES = ("focal_tversky", "cross_entropy_dice")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """An experiment: data, network and optimization of both phases."""

    dataset: str = "manifest"
    """Data set, a name of ``DATASETS``."""
    size: str = "paper"
    """Size of the networks: ``paper``, ``small`` or ``tiny``."""
    size_px: int = 0
    """Side of the slices, a multiple of 32; 0 for that of ``size``."""
    network: str = "V7"
    """Row of Tables I to IV, see ``model.registry``."""
    encoder: str = V8_ENCODER
    """V8's encoder, a key of ``EFFICIENTNETS``."""
    stem_channels: int = 0
    """Channels of a level of the slice's full size in V8; 0 leaves it out, as in the paper."""
    low_hu: float = -1000.0
    """HU that become intensity 0."""
    high_hu: float = 400.0
    """HU that become intensity 1."""
    slice_step_mm: float = 2.5
    """Smallest distance of the slices that are read, in mm; 0 reads all."""
    num_folds: int = 5
    """Folds by patient."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Folds that this start trains."""
    phases: tuple[int, ...] = (1, 2)
    """Phases to train: 1 only for a segmentation, 2 only for a classifier of Table IV."""
    validation_share: float = 0.15
    """Share of the training patients that choose the best epoch."""
    exclude_rejected: bool = False
    """Continue without volumes that cannot be read; the data report lists them."""
    lesion_free_share: float = 1.0
    """Share of the slices without lesion that an epoch of phase 1 draws."""
    slices_per_volume: int = 0
    """Largest number of slices of a volume in an epoch of phase 1; 0 for all."""
    cache_features: bool = True
    """Compute TA-SegNet's features once for phase 2, not in every epoch."""
    cache_bytes: int = 4 << 30
    """Memory in which all workers together hold a phase's samples; larger phases are streamed."""
    num_workers: int = 2
    """Training processes; a divisor of ``micro_batches`` of both phases."""
    max_failures: int = 3
    """Restarts of the workers before a fold counts as failed."""
    seed: int = 0
    """Seed of folds, initial weights, draws and augmentation."""
    segmentation_loss: str = "focal_tversky"
    """Loss of phase 1: ``focal_tversky`` (the paper's) or ``cross_entropy_dice``."""
    phase1: PhaseConfig = field(default_factory=PhaseConfig)
    phase2: PhaseConfig = field(default_factory=PhaseConfig)
    loss: FocalTverskyConfig = field(default_factory=FocalTverskyConfig)
    cross_entropy_dice: CrossEntropyDiceConfig = field(default_factory=CrossEntropyDiceConfig)
    joint_loss: JointLossConfig = field(default_factory=JointLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch_augment: BatchAugmentConfig = field(default_factory=BatchAugmentConfig)

    def __post_init__(self) -> None:
        _one_of("dataset", self.dataset, DATASETS)
        _one_of("size", self.size, SIZES)
        _one_of("network", self.network, NAMES)
        _one_of("encoder", self.encoder, EFFICIENTNETS)
        _one_of("segmentation_loss", self.segmentation_loss, SEGMENTATION_LOSSES)
        self._check_folds_and_phases()
        self._check_ranges()
        self._check_workers()
        if self.augment.is_on and self.batch_augment.is_on:
            raise ValueError("augment and batch_augment are both on, expected at most one of them")
        # Refuses an empty window.
        WindowConfig(low_hu=self.low_hu, high_hu=self.high_hu, size_px=self._input_px)

    def _check_folds_and_phases(self) -> None:
        all_folds = set(range(self.num_folds))
        if self.num_folds < 2 or not self.folds or not set(self.folds) <= all_folds:
            raise ValueError(
                f"folds are {list(self.folds)}, expected some of 0 .. {self.num_folds - 1}"
            )
        possible = _possible_phases(self.network)
        if self.phases not in possible:
            expected = " or ".join(str(list(phases)) for phases in possible)
            raise ValueError(
                f"phases of {self.network} are {list(self.phases)}, expected {expected}"
            )

    def _check_ranges(self) -> None:
        if self.size_px < 0 or self.size_px % 32:
            raise ValueError(
                f"size_px is {self.size_px}, expected a multiple of 32, "
                f"or 0 for that of {self.size}"
            )
        ranges = {
            "validation_share": (0, 0.9),
            "lesion_free_share": (0, 1),
            "slice_step_mm": (0, 100),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected {low} .. {high}")
        if self.stem_channels < 0:
            raise ValueError(f"stem_channels is {self.stem_channels}, expected at least 0")
        if min(self.seed, self.max_failures, self.cache_bytes, self.slices_per_volume) < 0:
            raise ValueError(
                "seed, max_failures, cache_bytes and slices_per_volume must be at least 0"
            )

    def _check_workers(self) -> None:
        if self.network in CLASSIFIERS and self.phase2.batch_size < 2:
            raise ValueError(
                f"phase2.batch_size is 1, expected at least 2: "
                f"{self.network} leaves one value per volume"
            )
        for name in ("phase1", "phase2"):
            micro_batches = getattr(self, name).micro_batches
            if self.num_workers < 1 or micro_batches % self.num_workers:
                raise ValueError(
                    f"{name}.micro_batches is {micro_batches}, "
                    f"expected a multiple of {self.num_workers} workers"
                )

    def sampling(self, phase: PhaseConfig) -> Sampling:
        """Return the draws of samples of a phase."""
        return Sampling(
            batch_size=phase.batch_size,
            seed=self.seed,
            lesion_free_share=self.lesion_free_share,
            slices_per_volume=self.slices_per_volume,
        )

    @property
    def phase1_loss(self) -> FocalTverskyConfig | CrossEntropyDiceConfig:
        """Configuration of the loss of phase 1."""
        if self.segmentation_loss == "cross_entropy_dice":
            return self.cross_entropy_dice
        return self.loss

    @property
    def architecture(self) -> CovTANetConfig:
        """Network that is trained."""
        size = SIZES[self.size]
        return architecture(self.network, size, self._input_px, self.encoder, self.stem_channels)

    @property
    def window(self) -> WindowConfig:
        """Preprocessing of the network."""
        return WindowConfig(low_hu=self.low_hu, high_hu=self.high_hu, size_px=self._input_px)

    @property
    def _input_px(self) -> int:
        return self.size_px or INPUT_PX[self.size]

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that all networks and starts of one experiment have in common."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IDENTITY}

    def key(self, data: Sequence[str]) -> str:
        """Return the experiment's key, twelve hex digits. data: keys of all its volumes."""
        text = json.dumps([self.identity, sorted(data)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _possible_phases(network: str) -> tuple[tuple[int, ...], ...]:
    if network in CLASSIFIERS:
        return ((2,),)
    if network in SEGMENTERS:
        return ((1,),)
    return ((1,), (1, 2))


def _one_of(name: str, value: str, names: Iterable[str]) -> None:
    if value not in names:
        raise ValueError(f"{name} is {value}, expected one of {', '.join(names)}")
