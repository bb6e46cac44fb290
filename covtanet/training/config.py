"""What steers a training; the defaults are the paper's values or our documented choices."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from covtanet.ct.window import WindowConfig
from covtanet.data.datasets import DATASETS
from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANetConfig, architecture
from covtanet.model.encoder import EFFICIENTNETS, V8_ENCODER
from covtanet.model.losses import FocalTverskyConfig, JointLossConfig
from covtanet.model.registry import CLASSIFIERS, NAMES, SEGMENTERS
from covtanet.training.augment import AugmentConfig
from covtanet.training.feed import Sampling
from covtanet.training.phase_config import PhaseConfig

# What may differ between two starts of one experiment: which part of it runs, and on what.
NOT_IDENTITY = ("network", "folds", "phases", "num_workers", "cache_bytes", "max_failures")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """An experiment.

    dataset: a name of DATASETS. size: a key of SIZES. size_px: side of the slices, 0 for the size's own. network: a row
    of Tables I to IV (see ``model.registry``). encoder: V8's, a key of EFFICIENTNETS.
    folds: those that this start trains, of ``num_folds``. phases: 1 alone trains the segmentation; a classifier of
    Table IV has phase 2 alone. exclude_rejected: go on without volumes that cannot be
    read; the data report lists them. lesion_free_share, slices_per_volume: see ``Sampling``, of phase 1.
    cache_features: phase 2 computes TA-SegNet's features once, not every epoch. cache_bytes: up to here the
    workers together keep a phase's samples in memory; beyond it every epoch is streamed. num_workers must divide
    micro_batches.
    """

    dataset: str = "manifest"
    size: str = "paper"
    size_px: int = 0
    network: str = "V7"
    encoder: str = V8_ENCODER
    low_hu: float = -1000.0
    high_hu: float = 400.0
    slice_step_mm: float = 2.5
    num_folds: int = 5
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    phases: tuple[int, ...] = (1, 2)
    validation_share: float = 0.15
    exclude_rejected: bool = False
    lesion_free_share: float = 1.0
    slices_per_volume: int = 0
    cache_features: bool = True
    cache_bytes: int = 4 << 30
    num_workers: int = 2
    max_failures: int = 3
    seed: int = 0
    phase1: PhaseConfig = field(default_factory=PhaseConfig)
    phase2: PhaseConfig = field(default_factory=PhaseConfig)
    loss: FocalTverskyConfig = field(default_factory=FocalTverskyConfig)
    joint_loss: JointLossConfig = field(default_factory=JointLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _one_of("dataset", self.dataset, DATASETS)
        _one_of("size", self.size, SIZES)
        _one_of("network", self.network, NAMES)
        _one_of("encoder", self.encoder, EFFICIENTNETS)
        if self.size_px < 0 or self.size_px % 32:
            raise ValueError(
                f"size_px is {self.size_px}, expected a multiple of 32, or 0 for that of {self.size}"
            )
        if (
            self.num_folds < 2
            or not self.folds
            or not set(self.folds) <= set(range(self.num_folds))
        ):
            raise ValueError(
                f"folds are {list(self.folds)}, expected some of 0 .. {self.num_folds - 1}"
            )
        possible = (
            ((2,),)
            if self.network in CLASSIFIERS
            else ((1,),)
            if self.network in SEGMENTERS
            else ((1,), (1, 2))
        )
        if self.phases not in possible:
            raise ValueError(
                f"phases of {self.network} are {list(self.phases)}, "
                f"expected {' or '.join(str(list(each)) for each in possible)}"
            )
        if self.network in CLASSIFIERS and self.phase2.batch_size < 2:
            raise ValueError(
                f"phase2.batch_size is 1, expected at least 2: {self.network} leaves one value per volume"
            )
        for name, low, high in (
            ("validation_share", 0, 0.9),
            ("lesion_free_share", 0, 1),
            ("slice_step_mm", 0, 100),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} .. {high}")
        if min(self.seed, self.max_failures, self.cache_bytes, self.slices_per_volume) < 0:
            raise ValueError(
                "seed, max_failures, cache_bytes and slices_per_volume must be at least 0"
            )
        for name in ("phase1", "phase2"):
            micro_batches = getattr(self, name).micro_batches
            if self.num_workers < 1 or micro_batches % self.num_workers:
                raise ValueError(
                    f"{name}.micro_batches is {micro_batches}, expected a multiple of {self.num_workers} workers"
                )

        WindowConfig(
            low_hu=self.low_hu, high_hu=self.high_hu, size_px=self._input_px
        )  # refuses an empty window

    def sampling(self, phase: PhaseConfig) -> Sampling:
        """How an epoch of a phase draws its samples."""
        return Sampling(
            batch_size=phase.batch_size,
            seed=self.seed,
            lesion_free_share=self.lesion_free_share,
            slices_per_volume=self.slices_per_volume,
        )

    @property
    def architecture(self) -> CovTANetConfig:
        """The network that is trained."""
        return architecture(self.network, SIZES[self.size], self._input_px, self.encoder)

    @property
    def window(self) -> WindowConfig:
        """Its preprocessing."""
        return WindowConfig(low_hu=self.low_hu, high_hu=self.high_hu, size_px=self._input_px)

    @property
    def _input_px(self) -> int:
        return self.size_px or INPUT_PX[self.size]

    @property
    def identity(self) -> dict[str, Any]:
        """What all networks and starts of one experiment have in common."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_IDENTITY}

    def key(self, data: Sequence[str]) -> str:
        """The experiment's identity, twelve hex digits. data: keys of all its volumes."""
        return hashlib.sha256(
            json.dumps([self.identity, sorted(data)], sort_keys=True).encode()
        ).hexdigest()[:12]


def _one_of(name: str, value: str, names: Iterable[str]) -> None:
    if value not in names:
        raise ValueError(f"{name} is {value}, expected one of {', '.join(names)}")
