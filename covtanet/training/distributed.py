"""Both phases on Ray: Ray Data decodes and prepares volumes from storage, Ray Train optimizes.

Phase 1 trains TA-SegNet on slices. Phase 2 takes its weights frozen: an actor turns every volume into pooled fusion
features once, and the workers train the joint classifier on those.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from safetensors.torch import load_file

from covtanet import storage, tracking
from covtanet.ct import nifti
from covtanet.ct.window import INTENSITY_STEPS, WindowConfig
from covtanet.data.labels import LabelledVolume, split_validation
from covtanet.data.slices import phase1_samples, phase2_sample
from covtanet.errors import ConfigError
from covtanet.model.checkpoint import SavedModel
from covtanet.model.covtanet import INPUT_PX, SIZES, CovTANet, CovTANetConfig
from covtanet.model.losses import FocalTverskyConfig
from covtanet.model.segnet import TABLE_I
from covtanet.training import worker
from covtanet.training.loop import PhaseConfig

logger = logging.getLogger(__name__)

Row = dict[str, Any]
SLICES_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training. size: a key of SIZES; ablation: a row of Table I; the window is that of the size."""

    size: str = "paper"
    ablation: str = "V7"
    low_hu: float = -1000.0
    high_hu: float = 400.0
    slice_step_mm: float = 2.5
    validation_share: float = 0.2
    num_workers: int = 2
    seed: int = 0
    phase1: PhaseConfig = field(default_factory=PhaseConfig)
    phase2: PhaseConfig = field(default_factory=PhaseConfig)
    loss: FocalTverskyConfig = field(default_factory=FocalTverskyConfig)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size}, expected one of {', '.join(SIZES)}")
        if self.ablation not in TABLE_I:
            raise ValueError(f"ablation is {self.ablation}, expected one of {', '.join(TABLE_I)}")

    @property
    def network(self) -> CovTANetConfig:
        """The network that is trained."""
        size = SIZES[self.size]
        return replace(size, segnet=size.segnet.row_of_table_i(self.ablation))

    @property
    def window(self) -> WindowConfig:
        """Its preprocessing."""
        return WindowConfig(low_hu=self.low_hu, high_hu=self.high_hu, size_px=INPUT_PX[self.size])


class MetricsToMlflow(ray.train.UserCallback):  # type: ignore[misc]
    """Logs every epoch of a phase to the run; lives in the train controller, so that workers may restart."""

    def __init__(self, run_id: str, tracking_uri: str, phase: str) -> None:
        self.run_id, self.tracking_uri, self.phase = run_id, tracking_uri, phase

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Log rank 0's metrics, which are reduced over ranks."""
        epoch = int(metrics[0]["epoch"])
        named = {f"{self.phase}/{name}": value for name, value in metrics[0].items() if name != "epoch"}
        tracking.log_metrics(self.run_id, named, epoch, self.tracking_uri)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics[0].items() if name != "epoch")
        print(f"{self.phase} epoch {epoch + 1}: {shown}", flush=True)  # noqa: T201 - the controller's log


def train(
    config: TrainingConfig, volumes: Sequence[LabelledVolume], data_uri: str, storage_uri: str, run_id: str
) -> SavedModel:
    """Run both phases and return the network. data_uri: what the volumes' paths are relative to."""
    training, validation = split_validation(volumes, config.validation_share, config.seed)
    masked = [[volume for volume in part if volume.lesion_mask_path] for part in (training, validation)]
    if not all(masked):
        raise ConfigError("phase 1 needs volumes with lesion masks in training and in validation")
    logger.info("%d volumes to train, %d to validate; %d with masks", len(training), len(validation), len(masked[0]))
    ray.data.DataContext.get_current().enable_progress_bars = False
    slices = {name: _slices(part, data_uri, config) for name, part in zip(("train", "validation"), masked, strict=True)}
    logger.info("phase 1: %d slices to train, %d to validate", slices["train"].count(), slices["validation"].count())
    segnet_state = _run_phase(config, "phase1", _phase1_loop, slices, storage_uri, run_id)
    del slices
    volumes_by_part = {
        name: _features(part, data_uri, config, segnet_state)
        for name, part in (("train", training), ("validation", validation))
    }
    logger.info("phase 2: %d volumes to train", volumes_by_part["train"].count())
    classifier_state = _run_phase(config, "phase2", _phase2_loop, volumes_by_part, storage_uri, run_id)
    network = CovTANet(config.network)
    network.segnet.load_state_dict(segnet_state)
    network.classifier.load_state_dict(classifier_state)
    return SavedModel(network=network.eval(), preprocessing={"window": asdict(config.window)})


def _slices(volumes: Sequence[LabelledVolume], data_uri: str, config: TrainingConfig) -> ray.data.Dataset:
    rows = ray.data.from_items([vars(volume) for volume in volumes])
    prepare = partial(_slice_rows, data_uri=data_uri, window=config.window, slice_step_mm=config.slice_step_mm)
    # Epochs read the prepared samples; Ray keeps them in its object store and spills what does not fit.
    return rows.repartition(target_num_rows_per_block=1).flat_map(prepare, num_cpus=1).materialize()


def _slice_rows(row: Row, data_uri: str, window: WindowConfig, slice_step_mm: float) -> list[Row]:
    volume = nifti.read(storage.read_bytes(storage.join(data_uri, row["volume_path"])))
    lesion = nifti.read_labels(storage.read_bytes(storage.join(data_uri, row["lesion_mask_path"])))
    samples = phase1_samples(volume, lesion > 0, window, slice_step_mm)
    return [{"levels": level, "lesion": mask} for level, mask in zip(samples.levels, samples.lesion, strict=True)]


def _features(
    volumes: Sequence[LabelledVolume], data_uri: str, config: TrainingConfig, segnet_state: dict[str, torch.Tensor]
) -> ray.data.Dataset:
    rows = ray.data.from_items([vars(volume) for volume in volumes]).repartition(target_num_rows_per_block=1)
    prepare = partial(
        _volume_row,
        data_uri=data_uri,
        window=config.window,
        slice_step_mm=config.slice_step_mm,
        num_slices=config.network.num_slices,
    )
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    frozen = {"network": config.network, "segnet_state": segnet_state}
    return (
        rows.map(prepare, num_cpus=1)
        .map(
            _FrozenSegNet,
            fn_constructor_kwargs=frozen,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
            num_gpus=num_gpus,
        )
        .materialize()
    )


def _volume_row(row: Row, data_uri: str, window: WindowConfig, slice_step_mm: float, num_slices: int) -> Row:
    volume = nifti.read(storage.read_bytes(storage.join(data_uri, row["volume_path"])))
    return {
        "slices": phase2_sample(volume, window, slice_step_mm, num_slices),
        "is_infected": np.float32(row["diagnosis"] == "infected"),
        "is_severe": np.float32(row["severity"] == "severe"),
    }


class _FrozenSegNet:
    """TA-SegNet in eval mode: a volume's slices to its pooled fusion vectors."""

    def __init__(self, network: CovTANetConfig, segnet_state: dict[str, torch.Tensor]) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = CovTANet(network)
        self.network.segnet.load_state_dict(segnet_state)
        self.network.eval().requires_grad_(False).to(self.device)

    def __call__(self, row: Row) -> Row:
        intensity = row.pop("slices").astype(np.float32)[:, None] / INTENSITY_STEPS
        pooled = []
        with torch.inference_mode():
            for start in range(0, len(intensity), SLICES_AT_ONCE):  # a whole volume's F_fus would take gigabytes
                batch = torch.from_numpy(intensity[start : start + SLICES_AT_ONCE]).to(self.device)
                pooled.append(self.network.segment(batch)[1].half().cpu())
        return {**row, "pooled": torch.cat(pooled).numpy()}


def _phase1_loop(config: Row) -> None:
    settings: TrainingConfig = config["training"]
    worker.train_phase1(settings.network, settings.phase1, settings.loss, settings.seed, config["num_threads"])


def _phase2_loop(config: Row) -> None:
    settings: TrainingConfig = config["training"]
    worker.train_phase2(settings.network, settings.phase2, settings.seed, config["num_threads"])


def _run_phase(
    config: TrainingConfig,
    phase: str,
    loop: Callable[[Row], None],
    datasets: dict[str, ray.data.Dataset],
    storage_uri: str,
    run_id: str,
) -> dict[str, torch.Tensor]:
    """Train one phase; returns the best epoch's weights."""
    filesystem, path = storage.filesystem(storage_uri)
    use_gpu = ray.cluster_resources().get("GPU", 0) >= config.num_workers
    trainer = ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={
            "training": config,
            "num_threads": max(1, len(os.sched_getaffinity(0)) // config.num_workers),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1}
        ),
        run_config=ray.train.RunConfig(
            name=f"{run_id}-{phase}",
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[MetricsToMlflow(run_id, tracking.tracking_uri(), phase)],
        ),
        datasets=datasets,
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise ConfigError(f"{phase} ended without one epoch whose validation gave a number")
    with result.checkpoint.as_directory() as folder:
        return dict(load_file(Path(folder) / worker.WEIGHTS))
