"""Data of a phase: the files of a split, and the stored features that phase 2 reads."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import ray.data
import torch

from covtanet import ray_data, storage
from covtanet.data import prepared_file
from covtanet.data.folds import Split
from covtanet.data.prepared import PreparedVolume, diagnosis_slices
from covtanet.errors import ConfigError
from covtanet.machine import num_cores
from covtanet.model.covtanet import CovTANet
from covtanet.training.config import TrainingConfig
from covtanet.training.features import FORMAT_VERSION, save_features
from covtanet.training.feed import assign_lanes
from covtanet.training.lanes import fit_in_memory, phase_config
from covtanet.training.loop import State
from covtanet.training.phase2 import frozen_features
from covtanet.training.sample_files import SampleFile, slice_name
from covtanet.training.stream_plan import plan_epoch

Row = dict[str, Any]
# Hexadecimal: 64 bits of the digest.
DIGEST_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """Files of a phase, which the workers read themselves."""

    train: tuple[SampleFile, ...]
    validation: tuple[tuple[SampleFile, ...], ...]
    """Of each lane."""

    @property
    def files(self) -> list[SampleFile]:
        """All files."""
        return [*self.train, *(file for lane in self.validation for file in lane)]


def slice_data(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
) -> PhaseData:
    """Return phase 1's data: slices of the volumes that have a lesion mask.

    Raises:
        ConfigError: there are too few samples to train on.
    """
    # A slice takes two bytes per pixel, its mask one.
    num_bytes = 3 * config.window.size_px**2
    files = {
        key: _slice_file(volume, prepared_uri, num_bytes)
        for key, volume in volumes.items()
        if volume.lesion_px is not None
    }
    data = _phase_data(config, 1, files, split)
    _refuse_small(config, 1, data, "volumes with lesion masks")
    return data


def _slice_file(volume: PreparedVolume, prepared_uri: str, num_bytes: int) -> SampleFile:
    return SampleFile(
        series=volume.key,
        uri=prepared_file.file_uri(prepared_uri, volume.key),
        names=tuple(slice_name(volume.key, index) for index in volume.slices),
        has_lesion=tuple(pixels > 0 for pixels in volume.lesion_px or ()),
        bytes_per_sample=num_bytes,
        is_continuous=volume.is_continuous,
    )


def _phase_data(
    config: TrainingConfig, phase: int, files: Mapping[str, SampleFile], split: Split
) -> PhaseData:
    """Return the files of a split, those for validation dealt out to the lanes."""
    sizes = {key: len(files[key].names) for key in split.validation if key in files}
    lanes = assign_lanes(sizes, phase_config(config, phase).micro_batches)
    return PhaseData(
        train=tuple(files[key] for key in split.train if key in files),
        validation=tuple(tuple(files[key] for key in lane) for lane in lanes),
    )


def volume_data(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
    features_uri: str,
) -> PhaseData:
    """Return phase 2's data: volumes that have a grade, or stored features of them.

    features_uri: folder of the features of ``compute_features``.

    Raises:
        ConfigError: there are too few samples to train on.
    """
    num_bytes = _bytes_per_volume(config)
    folder, suffix = prepared_uri, ".parquet"
    if config.keeps_features:
        folder, suffix = features_uri, FEATURES_SUFFIX
    files = {
        key: SampleFile(
            series=key,
            uri=storage.join(folder, f"{key}{suffix}"),
            names=(key,),
            # Every volume is drawn in every epoch.
            has_lesion=(True,),
            bytes_per_sample=num_bytes,
            is_continuous=volume.is_continuous,
            is_infected=volume.diagnosis == "infected",
            is_severe=volume.severity == "severe",
        )
        for key, volume in volumes.items()
        if volume.grade
    }
    data = _phase_data(config, 2, files, split)
    _refuse_small(config, 2, data, "volumes with a grade")
    return data


def _bytes_per_volume(config: TrainingConfig) -> int:
    network = config.architecture
    values_per_slice = (1 + 2 * config.num_neighbours) * config.window.size_px**2
    if config.keeps_features:
        values_per_slice = network.segnet.fused_channels * network.pooled_px**2
    # Two bytes a value: uint16 slices or float16 features.
    return 2 * network.num_slices * values_per_slice


FEATURES_SUFFIX = ".safetensors"


def features_folder(checkpoints_uri: str, config: TrainingConfig, segnet_state: State) -> str:
    """Return the folder of the features that a segmenter gives, beside the phase's checkpoints.

    It is named by a digest of the weights and of all that decides the features, so that a training
    that continues finds them, and one with another segmenter does not. It is deleted with the
    checkpoints.
    """
    digest = hashlib.sha256(repr((FORMAT_VERSION, asdict(config.architecture))).encode())
    digest.update(config.phase2.precision.encode())
    for name in sorted(segnet_state):
        digest.update(name.encode())
        digest.update(segnet_state[name].cpu().contiguous().numpy().tobytes())
    return storage.join(checkpoints_uri, f"features-{digest.hexdigest()[:DIGEST_DIGITS]}")


def compute_features(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    data: PhaseData,
    prepared_uri: str,
    features_uri: str,
    segnet_state: State,
) -> None:
    """Compute the frozen TA-SegNet's features of all volumes that have none in storage yet."""
    stored = set(storage.list_names(features_uri))
    rows = [
        {
            "uri": prepared_file.file_uri(prepared_uri, file.series),
            "features_uri": file.uri,
            "is_continuous": volumes[file.series].is_continuous,
        }
        for file in data.files
        if f"{file.series}{FEATURES_SUFFIX}" not in stored
    ]
    if not rows:
        return
    load = partial(
        _load_levels,
        num_slices=config.architecture.num_slices,
        num_neighbours=config.num_neighbours,
    )
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    written = _items(rows).map(load, num_cpus=1).map(
        _FrozenSegNet,
        fn_constructor_kwargs={"config": config, "segnet_state": segnet_state},
        # Another training at the same time may hold all GPUs but one.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, num_gpus)),
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
    )  # fmt: skip
    written.materialize()


def _load_levels(row: Row, num_slices: int, num_neighbours: int) -> Row:
    samples = prepared_file.read_samples(storage.read_bytes(row["uri"]))
    is_continuous = row["is_continuous"]
    levels = diagnosis_slices(samples, num_slices, num_neighbours, is_continuous=is_continuous)
    return {"features_uri": row["features_uri"], "levels": levels}


class _FrozenSegNet:
    """TA-SegNet in eval mode: a volume's slices to its pooled fusion vectors in storage."""

    def __init__(self, config: TrainingConfig, segnet_state: State) -> None:
        torch.set_num_threads(num_cores())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = CovTANet(config.architecture)
        network.segnet.load_state_dict(segnet_state)
        network.eval().requires_grad_(False)
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = frozen_features(network.segment, device, config.phase2)

    def __call__(self, row: Row) -> Row:
        # (S, C, H, W) -> (1, S, C, H, W) -> (S, C, P, P)
        pooled = self.features(row["levels"][None])[0].cpu().numpy()
        storage.write_bytes(row["features_uri"], save_features(pooled))
        return {"features_uri": row["features_uri"]}


def _items(rows: list[Row]) -> ray.data.Dataset:
    """Return a dataset of small rows, one per block."""
    ray_data.configure(preserve_order=True)
    # One row per block spreads the reads over all CPUs.
    return ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))


def _refuse_small(config: TrainingConfig, phase: int, data: PhaseData, kind: str) -> None:
    """Refuse data without one whole step, before any worker is started."""
    settings = phase_config(config, phase)
    sampling = config.sampling(settings)
    num_lanes = settings.micro_batches
    # Of the first epoch; the others draw about as many.
    plan = plan_epoch(data.train, sampling, num_lanes, 0)
    num_drawn = sum(map(len, plan.rows))
    expected = sampling.batch_size * num_lanes
    if num_drawn < expected:
        raise ConfigError(
            f"phase {phase} draws {num_drawn} samples of {kind}, expected at least micro_batches "
            f"times batch_size, {expected}"
        )
    if not plan.num_steps and not fit_in_memory(config, data.files):
        raise ConfigError(
            f"phase {phase} reads {len(data.train)} {kind} from storage every epoch, too few for "
            f"each of {num_lanes} micro_batches; expected more, or a larger cache_bytes"
        )
