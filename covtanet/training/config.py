"""Settings of a training; the defaults are the paper's values or documented choices."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from covtanet.ct.window import WindowConfig
from covtanet.data.datasets import DATASETS
from covtanet.errors import ConfigError
from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANetConfig, architecture
from covtanet.model.encoder import EFFICIENTNETS, V8_ENCODER
from covtanet.model.losses import CrossEntropyDiceConfig, FocalTverskyConfig, JointLossConfig
from covtanet.model.registry import CLASSIFIERS, NAMES, SEGMENTERS
from covtanet.training.augment import AugmentConfig
from covtanet.training.batch_augment import BatchAugmentConfig
from covtanet.training.feed import Sampling
from covtanet.training.phase_config import PhaseConfig

# Settings that may differ between two starts of one experiment: its part, and its machine.
NOT_IDENTITY = (
    "network",
    "folds",
    "phases",
    "num_workers",
    "min_workers",
    "cache_bytes",
    "max_failures",
    "checkpoint_epochs",
)
# By default: few enough that writing them costs nothing, and up to 39 epochs have one each.
CHECKPOINTS_PER_PHASE = 20
# Fields that may be 0 and not less.
COUNTS = (
    "seed",
    "num_workers",
    "min_workers",
    "stem_channels",
    "fusion_channels",
    "num_slices",
    "slices_per_volume",
    "cache_bytes",
    "max_failures",
    "checkpoint_epochs",
)
SEGMENTATION_LOSSES = ("focal_tversky", "cross_entropy_dice")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """An experiment: data, network, folds, and the optimization of both phases."""

    dataset: str = "manifest"
    """Layout of the data set: ``mosmed``, ``mosmed-mid``, ``covid20``, ``stacks`` or
    ``manifest``."""
    size: str = "paper"
    """Widths of the network: ``paper`` or ``small``."""
    size_px: int = 0
    """Side of the square slices; 0 for the size's own."""
    network: str = "V7"
    """A row of Tables I to IV (``python -m covtanet.model list``)."""
    encoder: str = V8_ENCODER
    """V8's pretrained encoder."""
    stem_channels: int = 0
    """Channels of a level of the slice's full size in V8; 0 leaves it out, as in the paper."""
    fusion_channels: int = 0
    """Channels of each level in TA-SegNet's fusion; 0 for the size's own."""
    num_slices: int = 0
    """Slices of a volume that the diagnosis reads; 0 for the size's own. 1 for data sets of one
    slice per study."""
    phase1_model: str = ""
    """Folder of a saved model whose segmenter phase 2 is trained on, if ``phases`` is 2 alone."""
    low_hu: float = -1000.0
    """HU that become intensity 0."""
    high_hu: float = 400.0
    """HU that become intensity 1."""
    slice_step_mm: float = 2.5
    """Smallest distance of the slices that are read, as in screening."""
    crops_to_lungs: bool = False
    """Crop slices to the box of the lungs, as screening then does; the paper's are whole."""
    num_neighbours: int = 0
    """Slices on either side that the network reads as further channels, 0 or 1; in training from up
    to three slices away."""
    lesion_threshold: float = 0.5
    """Probability from which a pixel is lesion, in validation and in the saved model."""
    num_folds: int = 5
    """Folds by patient, as in the paper."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Folds that this start trains."""
    phases: tuple[int, ...] = (1, 2)
    """1 alone trains the segmentation; a classifier of Table IV has phase 2 alone."""
    validation_share: float = 0.15
    """Share of the training patients that are held back for early stopping."""
    exclude_rejected: bool = False
    """Go on without volumes that cannot be read; the data report lists them."""
    lesion_free_share: float = 1.0
    """Share of the slices without lesion that an epoch of phase 1 draws."""
    slices_per_volume: int = 0
    """Slices of a volume that an epoch of phase 1 draws; 0 draws all."""
    cache_features: bool = True
    """Compute TA-SegNet's features once for phase 2, not every epoch, and store them until it is
    finished."""
    cache_bytes: int = 4 << 30
    """Largest set of a phase's samples that every worker keeps in memory; larger ones are read from
    storage every epoch."""
    num_workers: int = 0
    """Training workers; must divide ``micro_batches`` of both phases. 0 for one on every GPU, or
    one without a GPU."""
    min_workers: int = 0
    """Workers with which a training goes on if nodes are lost; it grows again when others join. 0
    for ``num_workers``: the training waits for nodes that replace them."""
    checkpoint_epochs: int = 0
    """Epochs between two checkpoints of a phase; 0 for a twentieth of its epochs, so that a crash
    costs at most that much. The last epoch always has one."""
    max_failures: int = 3
    """Worker deaths after which a training ends."""
    seed: int = 0
    """Seed of folds, weights, order of samples and augmentation."""
    segmentation_loss: str = "focal_tversky"
    """Loss of phase 1: ``focal_tversky`` (the paper's, ``loss``) or ``cross_entropy_dice``."""
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
        if self.size_px < 0 or self.size_px % 32:
            raise ValueError(
                f"size_px is {self.size_px}, expected a multiple of 32, or 0 for that of "
                f"{self.size}"
            )
        self._check_folds()
        self._check_phases()
        self._check_ranges()
        if self.augment.is_on and self.batch_augment.is_on:
            raise ValueError("augment and batch_augment are both on, expected at most one of them")
        # Refuses an empty window and other numbers of neighbours.
        _ = self.window

    def _check_folds(self) -> None:
        possible = range(self.num_folds)
        if self.num_folds < 2 or not self.folds or not set(self.folds) <= set(possible):
            raise ValueError(
                f"folds are {list(self.folds)}, expected some of 0 .. {self.num_folds - 1}"
            )

    def _check_phases(self) -> None:
        possible: tuple[tuple[int, ...], ...] = ((1,), (1, 2))
        if self.network in CLASSIFIERS:
            possible = ((2,),)
        elif self.network in SEGMENTERS:
            possible = ((1,),)
        elif self.phase1_model:
            # The saved segmenter is never trained further.
            possible = ((2,),)
        if self.phases not in possible:
            expected = " or ".join(str(list(phases)) for phases in possible)
            raise ValueError(
                f"phases of {self.network} are {list(self.phases)}, expected {expected}"
            )
        if self.network in CLASSIFIERS and self.phase2.batch_size < 2:
            raise ValueError(
                f"phase2.batch_size is 1, expected at least 2: {self.network} has batch norm on "
                "maps of few pixels"
            )
        for name in ("phase1", "phase2"):
            micro_batches = getattr(self, name).micro_batches
            if self.num_workers and micro_batches % self.num_workers:
                raise ValueError(
                    f"{name}.micro_batches is {micro_batches}, expected a multiple of "
                    f"{self.num_workers} workers"
                )
        if 0 < self.num_workers < self.min_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, expected at most {self.num_workers} workers"
            )

    def _check_ranges(self) -> None:
        for name, low, high in (
            ("validation_share", 0, 0.9),
            ("lesion_free_share", 0, 1),
            ("slice_step_mm", 0, 100),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} .. {high}")
        if not 0 < self.lesion_threshold < 1:
            raise ValueError(f"lesion_threshold is {self.lesion_threshold}, expected 0..1")
        for name in COUNTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")

    def resolved(self, num_gpus: int) -> "TrainingConfig":
        """Return the configuration with the workers and micro-batches of a cluster filled in.

        Micro-batches that are set decide how many of the GPUs are used: their number of workers
        must divide them.

        Raises:
            ConfigError: fewer than ``min_workers``.
        """
        set_counts = (self.phase1.micro_batches, self.phase2.micro_batches)
        # 0, which is not set, has no remainder.
        possible = [
            count
            for count in range(1, max(1, num_gpus) + 1)
            if not any(micro_batches % count for micro_batches in set_counts)
        ]
        num_workers = self.num_workers or max(possible)
        if self.min_workers > num_workers:
            raise ConfigError(
                f"min_workers is {self.min_workers}, expected at most the {num_workers} workers "
                "of this cluster"
            )
        return replace(
            self,
            num_workers=num_workers,
            phase1=_with_micro_batches(self.phase1, num_workers),
            phase2=_with_micro_batches(self.phase2, num_workers),
        )

    @property
    def fewest_workers(self) -> int:
        """Workers below which a training waits for nodes."""
        return self.min_workers or self.num_workers

    def sampling(self, phase: PhaseConfig) -> Sampling:
        """Return how an epoch of a phase draws its samples."""
        return Sampling(
            batch_size=phase.batch_size,
            seed=self.seed,
            lesion_free_share=self.lesion_free_share,
            slices_per_volume=self.slices_per_volume,
        )

    def epochs_per_checkpoint(self, phase: PhaseConfig) -> int:
        """Return the number of epochs between two checkpoints of a phase."""
        return self.checkpoint_epochs or max(1, phase.num_epochs // CHECKPOINTS_PER_PHASE)

    @property
    def keeps_features(self) -> bool:
        """Whether phase 2 reads stored features; a backbone of Table IV reads the slices."""
        return self.cache_features and not self.architecture.backbone

    @property
    def phase1_loss(self) -> FocalTverskyConfig | CrossEntropyDiceConfig:
        """Configuration of phase 1's loss."""
        if self.segmentation_loss == "cross_entropy_dice":
            return self.cross_entropy_dice
        return self.loss

    @property
    def architecture(self) -> CovTANetConfig:
        """The network that is trained."""
        return architecture(
            self.network,
            self._sizes,
            self._input_px,
            self.encoder,
            self.stem_channels,
            in_channels=1 + 2 * self.num_neighbours,
            fusion_channels=self.fusion_channels,
        )

    @property
    def window(self) -> WindowConfig:
        """Its preprocessing."""
        return WindowConfig(
            low_hu=self.low_hu,
            high_hu=self.high_hu,
            size_px=self._input_px,
            crops_to_lungs=self.crops_to_lungs,
            num_neighbours=self.num_neighbours,
        )

    @property
    def _sizes(self) -> CovTANetConfig:
        """The size's widths, with the number of slices that the configuration names."""
        size = SIZES[self.size]
        return replace(size, num_slices=self.num_slices or size.num_slices)

    @property
    def _input_px(self) -> int:
        return self.size_px or INPUT_PX[self.size]

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that all networks and starts of one experiment share."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IDENTITY}

    def key(self, data: Sequence[str]) -> str:
        """Return the experiment's identity, twelve hex digits. data: keys of all its volumes."""
        values = json.dumps([self.identity, sorted(data)], sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:12]


def _with_micro_batches(phase: PhaseConfig, num_workers: int) -> PhaseConfig:
    return replace(phase, micro_batches=phase.micro_batches or num_workers)


def _one_of(name: str, value: str, names: Iterable[str]) -> None:
    if value not in names:
        raise ValueError(f"{name} is {value}, expected one of {', '.join(names)}")
