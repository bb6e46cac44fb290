"""The training function of a Ray Train worker, for both phases.

A worker has its lanes of the data, which it reads from storage itself, and its rank of the model;
rank 0 writes checkpoints. The lanes are dealt out over as many workers as there are, and results do
not depend on their number.
"""

import logging
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from covtanet.cluster import nodes_with_cpus
from covtanet.machine import num_cores
from covtanet.model.covtanet import CovTANet, JointClassifier
from covtanet.model.registry import build_segmenter
from covtanet.model.segnet import TASegNet
from covtanet.training.augment import Augmenter
from covtanet.training.batch_augment import BatchAugmenter
from covtanet.training.callbacks import summary
from covtanet.training.checkpoint_store import CheckpointWriter, newest_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Lane, seed_of
from covtanet.training.lanes import (
    fit_in_memory,
    phase_config,
    training_lanes,
    validation_lanes,
)
from covtanet.training.loop import Phase, Progress, State, fit, is_finished
from covtanet.training.optimizer import set_final_bias
from covtanet.training.phase1 import Augment, phase1
from covtanet.training.phase2 import frozen_features, phase2
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.phase_data import PhaseData
from covtanet.training.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Everything the driver sends to a Ray Train worker."""

    config: TrainingConfig
    phase: int
    data: PhaseData
    num_at_once: int
    """Trainings that share the machines, and so the threads."""
    checkpoints_uri: str
    """Folder in which Ray Train keeps this phase's checkpoints."""
    segnet_state: State | None = None
    """The frozen TA-SegNet of phase 2, if features are not cached."""
    encoder_state: State | None = None
    """Weights that phase 1's encoder starts from, if it is pretrained."""

    @property
    def phase_config(self) -> PhaseConfig:
        """Settings of the job's phase."""
        return phase_config(self.config, self.phase)

    @property
    def fits_in_memory(self) -> bool:
        """Whether every worker keeps all samples of the phase."""
        return fit_in_memory(self.config, self.data.files)


def train(loop_config: dict[str, Any]) -> dict[str, str]:
    """Train a phase on this worker's lanes.

    A loss that is not finite is returned as ``not_finite`` rather than raised: Ray would start the
    same epoch again.
    """
    job: WorkerJob = loop_config["job"]
    # It would repeat every report.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    # On a GPU the fastest convolution for the sizes at hand; an epoch has micro-batches of at most
    # two sizes.
    torch.backends.cudnn.benchmark = True
    # The same initial weights on every rank.
    torch.manual_seed(seed_of(job.config.seed, job.phase))
    ranks = _ranks()
    # Of the workers that there are: an elastic training has fewer after a lost node.
    torch.set_num_threads(num_threads(ranks.count * job.num_at_once))
    lanes = _training_lanes(job, ranks)
    phase = _phase(job, _build_module(job), _validation_lanes(job, ranks), ranks)
    resumed = _resume(job, ranks)
    try:
        fit(
            job.phase_config,
            phase,
            lanes,
            ranks,
            job.config.seed,
            resumed,
            _Reporter(job, ranks),
        )
    except FloatingPointError as error:
        logger.error("phase %d stops: %s", job.phase, error)
        return {"not_finite": str(error)}
    return {}


def _ranks() -> Ranks:
    context = ray.train.get_context()
    device = torch.device(ray.train.torch.get_device())
    return Ranks(index=context.get_world_rank(), count=context.get_world_size(), device=device)


def num_threads(num_workers: int) -> int:
    """Return the threads of one of so many workers, if all nodes have as many cores as this one."""
    cores = num_cores()
    # Shared by all trainings at once, and no more than a node has.
    return max(1, min(cores, len(nodes_with_cpus()) * cores // num_workers))


def _numbers(num_lanes: int, ranks: Ranks) -> range:
    """Return the numbers of the lanes that belong to this rank."""
    # Whole lanes, dealt out in turn.
    return range(ranks.index, num_lanes, ranks.count)


def _build_module(job: WorkerJob) -> nn.Module:
    network = job.config.architecture
    if job.phase == 2:
        return JointClassifier(network)
    segnet = build_segmenter(network.segnet)
    if job.encoder_state is not None and isinstance(segnet, TASegNet):
        segnet.encoder.load_state_dict(job.encoder_state)
    set_final_bias(job.config.phase1, segnet)
    return segnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _phase(job: WorkerJob, module: nn.Module, validation: list[Lane], ranks: Ranks) -> Phase[Any]:
    config = job.config
    # The lanes' statistics of batch norm are averaged by LaneStatistics, so DDP must not copy
    # those of rank 0 before every forward pass.
    options = {"forward_sync_buffers": False}
    model = ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options)
    if job.phase == 1:
        augment = _augment(config, ranks.device)
        loss = config.phase1_loss
        return phase1(
            module,
            model,
            config.phase1,
            loss,
            validation,
            ranks,
            augment,
            config.lesion_threshold,
        )
    features = None
    if job.segnet_state is not None:
        network = CovTANet(config.architecture)
        network.segnet.load_state_dict(job.segnet_state)
        # The classifier that learns is the module; this one would take memory for nothing.
        network.classifier = nn.Identity()  # type: ignore[assignment]
        # In eval mode batch norm uses its stored statistics.
        network.eval().requires_grad_(False).to(ranks.device)
        features = frozen_features(network.segment, ranks.device, config.phase2)
    return phase2(module, model, config.phase2, config.joint_loss, validation, ranks, features)


def _augment(config: TrainingConfig, device: torch.device) -> Augment | None:
    """Return the augmentation of phase 1; null without any."""
    if config.batch_augment.is_on:
        return BatchAugmenter(config.batch_augment, device).whole
    return Augmenter(config.augment) if config.augment.is_on else None


def _training_lanes(job: WorkerJob, ranks: Ranks) -> dict[int, Lane]:
    """Return this rank's training lanes by number."""
    numbers = _numbers(job.phase_config.micro_batches, ranks)
    return training_lanes(
        job.config, job.phase, job.data.train, numbers, in_memory=job.fits_in_memory
    )


def _validation_lanes(job: WorkerJob, ranks: Ranks) -> list[Lane]:
    """Return this rank's validation lanes, each of whole volumes."""
    numbers = _numbers(len(job.data.validation), ranks)
    lanes = [job.data.validation[number] for number in numbers]
    return validation_lanes(job.config, job.phase, lanes, in_memory=job.fits_in_memory)


def _resume(job: WorkerJob, ranks: Ranks) -> Progress:
    """Return the newest whole checkpoint; an empty progress without a checkpoint.

    Raises:
        OSError: storage does not answer; Ray then starts the workers again.
    """
    progress = newest_progress(job.checkpoints_uri)
    if progress.history:
        logger.warning("phase %d continues after epoch %d", job.phase, len(progress.history))
    # Ranks that start from different epochs would train different networks.
    if ranks.lowest(len(progress.history)) != len(progress.history):
        raise OSError("the workers found different checkpoints")
    return progress


class _Reporter:
    """Reports epochs to the controller; rank 0 writes a checkpoint every few epochs.

    Uploads run in a thread of Ray Train, so that the training goes on meanwhile; Ray Train waits
    for them before the worker ends. Every report is asynchronous, since reports keep their order
    and one without a checkpoint would wait for the upload before it.
    """

    def __init__(self, job: WorkerJob, ranks: Ranks) -> None:
        self.job = job
        self.ranks = ranks
        self.interval = job.config.epochs_per_checkpoint(job.phase_config)
        self.writer = CheckpointWriter(job.checkpoints_uri)

    def __call__(self, progress: Progress) -> None:
        """Report an epoch. Every rank reports, as Ray Train expects; rank 0 alone writes."""
        num_epochs = len(progress.history)
        # The last epoch always: the driver reads the result from its checkpoint.
        is_due = num_epochs % self.interval == 0 or is_finished(self.job.phase_config, progress)
        checkpoint = None
        if is_due and self.ranks.index == 0:
            # Empty: the files are written by the thread that uploads them.
            checkpoint = ray.train.Checkpoint.from_directory(tempfile.mkdtemp())
        ray.train.report(
            {"num_epochs": num_epochs, "summary": summary(progress.history[-1])},
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            # A progress is never changed: its tensors are copies.
            checkpoint_upload_fn=partial(self._upload, progress),
        )

    def _upload(
        self, progress: Progress, _: "ray.train.Checkpoint", name: str
    ) -> "ray.train.Checkpoint":
        self.writer.write(progress, name)
        context = ray.train.get_context().get_storage()
        path = f"{context.experiment_fs_path}/{name}"
        return ray.train.Checkpoint(path, context.storage_filesystem)
