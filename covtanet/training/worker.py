"""What a Ray Train worker does: its lanes of the data, its rank of the model, a checkpoint after every epoch."""

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from torch import nn

from covtanet import storage
from covtanet.data.prepared import samples_of
from covtanet.errors import CheckpointError
from covtanet.model.covtanet import CovTANet, JointClassifier
from covtanet.model.registry import build_segmenter
from covtanet.model.segnet import TASegNet
from covtanet.training.augment import Augmenter
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Lane, MemoryLane, Rows, Sampling, seed_of
from covtanet.training.loop import Phase, Progress, fit
from covtanet.training.phase1 import phase1
from covtanet.training.phase2 import frozen_features, phase2
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import Ranks
from covtanet.training.state import FILES, load_progress, save_progress

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint_[\d_.-]+")
SHUFFLE_ROWS, SHUFFLE_BYTES = 512, 1 << 30
READ_SLICES, READ_VOLUMES = 32, 2
NUM_FETCH_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class LaneSpec:
    """A lane as the driver describes it. shard: name of its Ray dataset. names, has_lesion: of all its samples.

    uris: in phase 1 the prepared volumes whose slices these are; in phase 2 rows are whole volumes.
    """

    shard: str
    names: tuple[str, ...]
    has_lesion: tuple[bool, ...]
    bytes_per_sample: int
    uris: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is told.

    checkpoints_uri: where Ray Train keeps this phase's checkpoints. segnet_state: the frozen TA-SegNet of phase 2 where
    features are not cached. encoder_state: what phase 1's encoder starts from where it is pretrained.
    """

    config: TrainingConfig
    phase: int
    train: tuple[LaneSpec, ...]
    validation: tuple[LaneSpec, ...]
    num_threads: int
    checkpoints_uri: str
    segnet_state: dict[str, torch.Tensor] | None = None
    encoder_state: dict[str, torch.Tensor] | None = None

    @property
    def phase_config(self) -> PhaseConfig:
        """Settings of the phase at hand."""
        return self.config.phase1 if self.phase == 1 else self.config.phase2


def train(loop_config: dict[str, Any]) -> dict[str, str]:
    """The training function of both phases.

    Returns the message of a loss that is no number rather than raising it: Ray would start the same epoch again.
    """
    told: Assignment = loop_config["assignment"]
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would repeat every report
    torch.set_num_threads(told.num_threads)
    torch.manual_seed(
        seed_of(told.config.seed, told.phase)
    )  # the same initial weights on every rank
    context = ray.train.get_context()
    device = torch.device(ray.train.torch.get_device())
    ranks = Ranks(index=context.get_world_rank(), count=context.get_world_size(), device=device)
    lanes = {number: _lane(told, number, told.train) for number in _own(told.train, ranks)}
    validation = [_lane(told, number, told.validation) for number in _own(told.validation, ranks)]
    network = told.config.architecture
    module: nn.Module = (
        build_segmenter(network.segnet) if told.phase == 1 else JointClassifier(network)
    )
    if told.encoder_state is not None and isinstance(module, TASegNet):
        module.encoder.load_state_dict(told.encoder_state)
    if told.phase == 1:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = ray.train.torch.prepare_model(
        module, parallel_strategy_kwargs={"forward_sync_buffers": False}
    )
    phase = _phase(told, module, model, validation, ranks)
    settings, seed = told.phase_config, told.config.seed
    try:
        fit(
            settings,
            phase,
            lanes,
            ranks,
            seed,
            _resume(told, ranks),
            lambda progress: _report(progress, ranks),
        )
    except FloatingPointError as error:
        logger.error("phase %d stops: %s", told.phase, error)
        return {"not_finite": str(error)}
    return {}


def _own(lanes: tuple[LaneSpec, ...], ranks: Ranks) -> range:
    return range(ranks.index, len(lanes), ranks.count)


def _phase(
    told: Assignment, module: nn.Module, model: nn.Module, validation: list[Lane], ranks: Ranks
) -> Phase[Any]:
    config = told.config
    if told.phase == 1:
        augmenter = Augmenter(config.augment) if config.augment.is_on else None
        return phase1(module, model, config.phase1, config.loss, validation, ranks, augmenter)
    features = None
    if told.segnet_state is not None:
        network = CovTANet(config.architecture)
        network.segnet.load_state_dict(told.segnet_state)
        network.classifier = nn.Identity()  # type: ignore[assignment] # module is the one that learns
        network.eval().requires_grad_(False).to(ranks.device)
        features = frozen_features(network.segment, ranks.device, config.phase2)
    return phase2(module, model, config.phase2, config.joint_loss, validation, ranks, features)


def _lane(told: Assignment, number: int, specs: tuple[LaneSpec, ...]) -> Lane:
    """A lane in memory where all of the phase fit there, else streamed anew every epoch."""
    spec, config = specs[number], told.config
    sampling = config.sampling(told.phase_config)
    if not fit_in_memory(config, (*told.train, *told.validation)):
        return StreamLane(spec, sampling, number, config.window.size_px)
    # Prepared slices that fit are read once, without a plan of Ray Data whose start costs more than the reading.
    rows = (
        _fetch(spec, config.window.size_px)
        if told.phase == 1
        else _load(spec, config.window.size_px)
    )
    return MemoryLane(rows, sampling, number)


def fit_in_memory(config: TrainingConfig, lanes: Sequence[LaneSpec]) -> bool:
    """Whether the workers together may keep all samples of a phase."""
    return sum(len(each.names) * each.bytes_per_sample for each in lanes) <= config.cache_bytes


def _fetch(spec: LaneSpec, size_px: int) -> Rows:
    with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
        tables = pool.map(lambda uri: pq.read_table(BytesIO(storage.read_bytes(uri))), spec.uris)
        return _joined([slice_rows(table, size_px) for table in tables])


def _read(spec: LaneSpec, size_px: int, **shuffle: int) -> Iterator[Rows]:
    """A lane's rows from its Ray dataset, some at a time; none where there are too few volumes for every lane."""
    if not spec.names:
        return
    shard = ray.train.get_dataset_shard(spec.shard)
    if shard is None:
        raise RuntimeError("Ray Train has no such dataset")
    if not spec.uris:
        for batch in shard.iter_batches(batch_size=READ_VOLUMES, batch_format="numpy", **shuffle):
            yield {**batch, "name": batch["name"].astype(str)}
        return
    for table in shard.iter_batches(batch_size=READ_SLICES, batch_format="pyarrow", **shuffle):
        yield slice_rows(table, size_px)


def slice_rows(table: pa.Table, size_px: int) -> Rows:
    """A block of prepared slices to the columns of a lane."""
    samples = samples_of(table, size_px)
    if samples.lesion is None:
        raise RuntimeError("phase 1 got slices without lesion masks")
    pairs = zip(table["volume"].to_pylist(), table["slice"].to_pylist(), strict=True)
    return {
        "name": np.array([slice_name(volume, index) for volume, index in pairs]),
        "has_lesion": np.asarray(table["lesion_px"]) > 0,
        "levels": samples.levels,
        "lesion": samples.lesion,
    }


def slice_name(volume: str, index: int) -> str:
    """A sample of phase 1; those of phase 2 bear their volume's name."""
    return f"{volume}:{index:05d}"


def _load(spec: LaneSpec, size_px: int) -> Rows:
    return _joined(list(_read(spec, size_px)))


def _joined(parts: list[Rows]) -> Rows:
    if not parts:
        return {"name": np.array([], dtype=str), "has_lesion": np.array([], dtype=bool)}
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class StreamLane:
    """A lane that is read from its Ray dataset every epoch, through a shuffle buffer.

    Choice: the buffer mixes the slices of neighbouring files only; which those are follows from the volumes' digests.
    """

    def __init__(self, spec: LaneSpec, sampling: Sampling, lane: int, size_px: int) -> None:
        self.spec, self.sampling, self.lane, self.size_px = spec, sampling, lane, size_px

    def num_batches(self, epoch: int) -> int:
        """Whole micro-batches that the epoch has."""
        return len(self._names(epoch)) // self.sampling.batch_size

    def batches(self, epoch: int) -> Iterator[Rows]:
        """The epoch's micro-batches in the buffer's order."""
        seed = seed_of(self.sampling.seed, epoch, self.lane)
        buffer = max(1, min(SHUFFLE_ROWS, SHUFFLE_BYTES // self.spec.bytes_per_sample))
        rows = _read(
            self.spec, self.size_px, local_shuffle_buffer_size=buffer, local_shuffle_seed=seed
        )
        drawn = self._names(epoch)
        yield from regroup((_those(part, drawn) for part in rows), self.sampling.batch_size)

    def _names(self, epoch: int) -> set[str]:
        return self.sampling.drawn(self.spec.names, self.spec.has_lesion, epoch)

    def in_order(self) -> Iterator[Rows]:
        """All samples in the files' order."""
        for rows in _read(self.spec, self.size_px):
            for start in range(0, len(rows["name"]), self.sampling.batch_size):
                yield {
                    name: values[start : start + self.sampling.batch_size]
                    for name, values in rows.items()
                }


def _those(rows: Rows, names: set[str]) -> Rows:
    kept = np.array([name in names for name in rows["name"].tolist()], bool)
    return {name: values[kept] for name, values in rows.items()}


def regroup(parts: Iterator[Rows], batch_size: int) -> Iterator[Rows]:
    """Cut a stream of rows into whole batches; the rest is dropped."""
    pending: Rows = {}
    for part in parts:
        pending = (
            {name: np.concatenate([pending[name], values]) for name, values in part.items()}
            if pending
            else part
        )
        while len(pending["name"]) >= batch_size:
            yield {name: values[:batch_size] for name, values in pending.items()}
            pending = {name: values[batch_size:] for name, values in pending.items()}


def _resume(told: Assignment, ranks: Ranks) -> Progress:
    """The newest checkpoint that is whole; an empty progress where there is none.

    Taken from the listing rather than from Ray's own snapshot of it, which a crash may leave torn.

    Raises:
        OSError: where storage does not answer; Ray then starts the workers again.
    """
    progress = Progress()
    names = [
        name for name in storage.list_names(told.checkpoints_uri) if CHECKPOINT.fullmatch(name)
    ]
    for name in reversed(names):  # they are named by time
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(FileNotFoundError):  # one that was being deleted
                storage.download_files(
                    storage.join(told.checkpoints_uri, name), FILES, Path(folder)
                )
            try:
                progress = load_progress(Path(folder))
            except CheckpointError as error:
                logger.warning("phase %d: a checkpoint is left out: %s", told.phase, error)
                continue
        logger.warning("phase %d continues after epoch %d", told.phase, len(progress.history))
        break
    if ranks.lowest(len(progress.history)) != len(progress.history):
        raise OSError("the workers found different checkpoints")
    return progress


def _report(progress: Progress, ranks: Ranks) -> None:
    """Report to the controller; rank 0 hands over the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ranks.index == 0:
            save_progress(Path(folder), progress)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"num_epochs": len(progress.history)}, checkpoint=checkpoint)
