"""Both phases on Ray Train, whose workers read prepared volumes or features from storage.

Phase 1 trains TA-SegNet on the slices of prepared volumes. Phase 2 has its weights frozen: Ray
Data turns every volume into pooled fusion features in storage once, and the workers train the joint
classifier on those; or, without that cache, the workers compute them every epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import ray.train.torch

from covtanet import storage, tracking
from covtanet.data.folds import Split
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError, TrainingError
from covtanet.model.encoder import pretrained_state
from covtanet.model.segnet import TASegNetConfig
from covtanet.training import worker
from covtanet.training.callbacks import MetricsToMlflow
from covtanet.training.checkpoint_store import NUM_CHECKPOINTS, newest_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.loop import Progress, State, is_finished
from covtanet.training.phase_data import (
    PhaseData,
    compute_features,
    features_folder,
    slice_data,
    volume_data,
)
from covtanet.training.torch_backend import NodeNetworkConfig
from covtanet.training.worker import WorkerJob

SNAPSHOT = "checkpoint_manager_snapshot.json"
# glibc keeps freed memory for the next step, which allocates the same tensors again. Elsewhere it
# is returned (``runtime.RETURN_MEMORY``): then a million page faults take 45 % of a float32 step of
# recipes/lung-box.toml, and a third of one in bfloat16. One arena, because only the first one holds
# allocations of more than 64 MiB.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
}


@dataclass(frozen=True, kw_only=True)
class PhaseRun:
    """One phase of one fold: its checkpoints' location and its run."""

    storage_uri: str
    """Folder of checkpoints of all phases."""
    name: str
    """Name of the training in Ray, and of its folder of checkpoints."""
    run: tracking.RunAddress
    num_at_once: int = 1
    """Trainings that share the machines, and so the threads."""

    @property
    def checkpoints_uri(self) -> str:
        """Folder of this phase's checkpoints."""
        return storage.join(self.storage_uri, self.name)


def train_phase1(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
    phase_run: PhaseRun,
    encoder_weights: Path | None = None,
) -> Progress:
    """Train TA-SegNet on the slices of the split's volumes that have a lesion mask.

    encoder_weights: a local file that a pretrained encoder starts from; by default its library
    fetches them.
    """
    data = slice_data(config, volumes, split, prepared_uri)
    segnet = config.architecture.segnet
    encoder = None
    if isinstance(segnet, TASegNetConfig) and segnet.encoder != "plain":
        encoder = pretrained_state(segnet.encoder, segnet.in_channels, encoder_weights)
    return _run(config, 1, data, phase_run, encoder_state=encoder)


def train_phase2(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
    phase_run: PhaseRun,
    segnet_state: State,
) -> Progress:
    """Train the joint classifier on the split's volumes that have a grade, TA-SegNet frozen."""
    features_uri = features_folder(phase_run.checkpoints_uri, config, segnet_state)
    data = volume_data(config, volumes, split, prepared_uri, features_uri)
    if not config.keeps_features:
        # A backbone reads the slices themselves, through a segmenter without weights.
        return _run(config, 2, data, phase_run, segnet_state)
    compute_features(config, volumes, data, prepared_uri, features_uri, segnet_state)
    # The workers have no use for TA-SegNet.
    return _run(config, 2, data, phase_run)


def _run(
    config: TrainingConfig,
    phase: int,
    data: PhaseData,
    phase_run: PhaseRun,
    segnet_state: State | None = None,
    encoder_state: State | None = None,
) -> Progress:
    """Train one phase under its name, under which a killed one goes on; return its newest state."""
    # Ray's list of checkpoints is rewritten in place, and torn by a crash it could not be read
    # again. Every checkpoint holds its own digests and history.
    storage.delete(storage.join(phase_run.checkpoints_uri, SNAPSHOT))
    job = WorkerJob(
        config=config,
        phase=phase,
        data=data,
        num_at_once=phase_run.num_at_once,
        checkpoints_uri=phase_run.checkpoints_uri,
        segnet_state=segnet_state,
        encoder_state=encoder_state,
    )
    name = phase_run.run.name
    trainer = _trainer(job, phase_run)
    with tracking.system_metrics(phase_run.run):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainingError(f"{name} failed too often; its last checkpoint is kept") from error
    if message := (result.return_value or {}).get("not_finite"):
        raise FloatingPointError(f"{name}: {message}")
    progress = newest_progress(phase_run.checkpoints_uri)
    if not is_finished(job.phase_config, progress):
        raise TrainingError(f"{name} ended without a checkpoint of its last epoch")
    return progress


def _trainer(job: WorkerJob, phase_run: PhaseRun) -> "ray.train.torch.TorchTrainer":
    config = job.config
    filesystem, path = storage.filesystem(phase_run.storage_uri)
    return ray.train.torch.TorchTrainer(
        worker.train,
        train_loop_config={"job": job},
        torch_config=NodeNetworkConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(config),
            use_gpu=_check_resources(config),
            resources_per_worker={"CPU": 1},
        ),
        run_config=ray.train.RunConfig(
            name=phase_run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=NUM_CHECKPOINTS),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[MetricsToMlflow(phase_run.run, phase_run.run.name)],
            worker_runtime_env={"env_vars": KEEP_MEMORY},
        ),
    )


def _num_workers(config: TrainingConfig) -> int | tuple[int, int]:
    """Return the number of workers, or the fewest and the most of an elastic training."""
    if config.fewest_workers == config.num_workers:
        return config.num_workers
    return config.fewest_workers, config.num_workers


def _check_resources(config: TrainingConfig) -> bool:
    """Return whether each worker gets a GPU.

    Raises:
        ConfigError: the cluster cannot hold the workers and feed them.
    """
    resources = ray.cluster_resources()
    num_cpus = int(resources.get("CPU", 0))
    num_gpus = int(resources.get("GPU", 0))
    num_workers = config.fewest_workers
    name = "min_workers" if config.min_workers else "num_workers"
    if num_cpus <= num_workers:
        raise ConfigError(
            f"the cluster has {num_cpus} CPUs, expected more than {name}, {num_workers}: "
            "each worker holds a CPU, and their data needs another (ray start --num-cpus)"
        )
    if 0 < num_gpus < num_workers:
        raise ConfigError(
            f"the cluster has {num_gpus} GPUs, expected one for each of {name}, {num_workers}"
        )
    return num_gpus > 0
