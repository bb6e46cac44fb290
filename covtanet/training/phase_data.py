"""Data of a phase: the lanes of a split, and the Ray datasets that feed them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from covtanet.model.covtanet import CovTANet
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Sampling, assign_lanes
from covtanet.training.lanes import LaneSpec, fit_in_memory, slice_name
from covtanet.training.loop import State
from covtanet.training.phase2 import frozen_features

Row = dict[str, Any]
PARTS = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class PhaseData:
    """Lanes of a phase and the Ray datasets that feed them.

    Lanes that fit in memory in phase 1 have no dataset.
    """

    lanes: Mapping[str, Sequence[LaneSpec]]
    """Of the parts ``train`` and ``validation``."""
    datasets: dict[str, ray.data.Dataset]
    """By shard."""


def slice_data(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
) -> PhaseData:
    """Return phase 1's data: slices of the volumes that have a lesion mask.

    Raises:
        ConfigError: a lane has too few samples to train on.
    """
    ray_data.configure(preserve_order=True)
    lanes = {
        part: _slice_lanes(config, volumes, keys, part, prepared_uri)
        for part, keys in _keys(split).items()
    }
    _refuse_streamed_neighbours(config, lanes)
    sampling = config.sampling(config.phase1)
    _refuse_small(config, lanes, "phase 1", "volumes with lesion masks", sampling)
    return PhaseData(lanes=lanes, datasets=_slice_datasets(config, lanes, prepared_uri))


def _all(lanes: Mapping[str, Sequence[LaneSpec]]) -> list[LaneSpec]:
    return [spec for part in PARTS for spec in lanes[part]]


def _keys(split: Split) -> dict[str, tuple[str, ...]]:
    return {"train": split.train, "validation": split.validation}


def _slice_lanes(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    keys: Sequence[str],
    part: str,
    prepared_uri: str,
) -> list[LaneSpec]:
    """Return the lanes of phase 1 for one part of the split."""
    masked = {key: len(volumes[key].slices) for key in keys if volumes[key].lesion_px is not None}
    # A slice takes two bytes per pixel, its mask one.
    num_bytes = 3 * config.window.size_px**2
    single = tuple(key for key in masked if not volumes[key].is_continuous)
    specs = []
    for number, lane in enumerate(assign_lanes(masked, config.phase1.micro_batches)):
        samples = [sample for key in lane for sample in _slice_samples(volumes[key])]
        uris = tuple(prepared_file.file_uri(prepared_uri, key) for key in lane)
        specs.append(replace(_spec(f"{part}-{number}", samples, num_bytes, uris), single=single))
    return specs


def _slice_samples(volume: PreparedVolume) -> Iterator[tuple[str, bool]]:
    for index, pixels in zip(volume.slices, volume.lesion_px or (), strict=True):
        yield slice_name(volume.key, index), pixels > 0


def _slice_datasets(
    config: TrainingConfig, lanes: Mapping[str, Sequence[LaneSpec]], prepared_uri: str
) -> dict[str, ray.data.Dataset]:
    """Return the datasets of lanes that are streamed; empty if all samples fit in memory."""
    specs = _all(lanes)
    if fit_in_memory(config, specs):
        return {}
    filesystem, _ = storage.filesystem(prepared_uri)
    datasets = {}
    for spec in specs:
        if spec.uris:
            paths = [storage.filesystem(uri)[1] for uri in spec.uris]
            datasets[spec.shard] = ray.data.read_parquet(paths, filesystem=filesystem)
    return datasets


def volume_data(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
    segnet_state: State,
) -> PhaseData:
    """Return phase 2's data: volumes that have a grade, or features of them if these are cached.

    Raises:
        ConfigError: a lane has too few samples to train on.
    """
    lanes = {
        part: _volume_lanes(config, volumes, keys, part) for part, keys in _keys(split).items()
    }
    sampling = config.sampling(config.phase2)
    _refuse_small(config, lanes, "phase 2", "volumes with a grade", sampling)
    # Only lanes with volumes have a dataset.
    rows = {
        spec.shard: [_volume_item(volumes[key], prepared_uri) for key in spec.names]
        for part in PARTS
        for spec in lanes[part]
        if spec.names
    }
    load = partial(
        _load_volume,
        num_slices=config.architecture.num_slices,
        num_neighbours=config.num_neighbours,
    )
    if config.cache_features:
        datasets = _cached_datasets(config, rows, load, segnet_state)
    else:
        datasets = {shard: _items(items).map(load, num_cpus=1) for shard, items in rows.items()}
    return PhaseData(lanes=lanes, datasets=datasets)


def _volume_lanes(
    config: TrainingConfig, volumes: Mapping[str, PreparedVolume], keys: Sequence[str], part: str
) -> list[LaneSpec]:
    """Return the lanes of phase 2 for one part of the split."""
    graded = {key: 1 for key in keys if volumes[key].grade}
    # Two bytes a value: uint16 slices or float16 features.
    num_bytes = 2 * _values_per_volume(config)
    lanes = assign_lanes(graded, config.phase2.micro_batches)
    return [
        _spec(f"{part}-{number}", [(key, True) for key in lane], num_bytes)
        for number, lane in enumerate(lanes)
    ]


def _values_per_volume(config: TrainingConfig) -> int:
    network = config.architecture
    values_per_slice = (1 + 2 * config.num_neighbours) * config.window.size_px**2
    if config.cache_features and not network.backbone:
        values_per_slice = network.segnet.fused_channels * network.pooled_px**2
    return network.num_slices * values_per_slice


def _cached_datasets(
    config: TrainingConfig,
    rows: Mapping[str, list[Row]],
    load: Any,
    segnet_state: State,
) -> dict[str, ray.data.Dataset]:
    """Return datasets whose volumes, or features of them, Ray keeps.

    All shards pass through one actor, which loads TA-SegNet once. Ray keeps the rows in its object
    store and spills the rest.
    """
    dataset = _items([row for items in rows.values() for row in items]).map(load, num_cpus=1)
    if not config.architecture.backbone:
        dataset = dataset.map(
            _FrozenSegNet,
            fn_constructor_kwargs={"config": config, "segnet_state": segnet_state},
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
            num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
        )
    # Ends of the shards in the one dataset, in the order of its rows.
    ends: list[int] = []
    for items in rows.values():
        ends.append((ends[-1] if ends else 0) + len(items))
    # Materialized once: every epoch then reads the kept features.
    kept = dataset.materialize()
    # Ray refuses an empty list of indices, which one lane without validation gives.
    shards = kept.split_at_indices(ends[:-1]) if ends[:-1] else [kept]
    return dict(zip(rows, shards, strict=True))


def _volume_item(volume: PreparedVolume, prepared_uri: str) -> Row:
    return {
        "name": volume.key,
        "uri": prepared_file.file_uri(prepared_uri, volume.key),
        "has_lesion": True,
        "is_continuous": volume.is_continuous,
        "is_infected": volume.diagnosis == "infected",
        "is_severe": volume.severity == "severe",
    }


def _load_volume(row: Row, num_slices: int, num_neighbours: int) -> Row:
    samples = prepared_file.read_samples(storage.read_bytes(row.pop("uri")))
    is_continuous = row.pop("is_continuous")
    levels = diagnosis_slices(samples, num_slices, num_neighbours, is_continuous=is_continuous)
    return {**row, "levels": levels}


class _FrozenSegNet:
    """TA-SegNet in eval mode: a volume's slices to its pooled fusion vectors."""

    def __init__(self, config: TrainingConfig, segnet_state: State) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = CovTANet(config.architecture)
        network.segnet.load_state_dict(segnet_state)
        network.eval().requires_grad_(False)
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = frozen_features(network.segment, device, config.phase2)

    def __call__(self, row: Row) -> Row:
        levels = row.pop("levels")
        # (S, C, H, W) -> (1, S, C, H, W) -> (S, C, P, P)
        return {**row, "pooled": self.features(levels[None])[0].cpu().numpy()}


def _items(rows: list[Row]) -> ray.data.Dataset:
    """Return a dataset of small rows, one per block, that keeps its order for every start."""
    ray_data.configure(preserve_order=True)
    # One row per block spreads the reads over all CPUs.
    return ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))


def _spec(
    shard: str, samples: list[tuple[str, bool]], num_bytes: int, uris: tuple[str, ...] = ()
) -> LaneSpec:
    return LaneSpec(
        shard=shard,
        names=tuple(name for name, _ in samples),
        has_lesion=tuple(has_lesion for _, has_lesion in samples),
        bytes_per_sample=num_bytes,
        uris=uris,
    )


def _refuse_streamed_neighbours(
    config: TrainingConfig, lanes: Mapping[str, Sequence[LaneSpec]]
) -> None:
    if config.num_neighbours and not fit_in_memory(config, _all(lanes)):
        raise ConfigError(
            f"the slices take more than cache_bytes, {config.cache_bytes}, expected less with "
            f"num_neighbours = {config.num_neighbours}: a stream has no neighbours"
        )


def _refuse_small(
    config: TrainingConfig,
    lanes: Mapping[str, Sequence[LaneSpec]],
    phase: str,
    kind: str,
    sampling: Sampling,
) -> None:
    """Refuse data without one whole step, before any worker is started."""
    train = lanes["train"]
    # Of the first epoch; the others draw about as many.
    drawn = [len(sampling.drawn(lane.names, lane.has_lesion, 0)) for lane in train]
    if fit_in_memory(config, _all(lanes)):
        # Samples in memory are mixed over the lanes.
        expected = sampling.batch_size * len(train)
        if sum(drawn) < expected:
            raise ConfigError(
                f"{phase} draws {sum(drawn)} samples of {kind}, expected at least micro_batches "
                f"times batch_size, {expected}"
            )
        return
    if not all(lane.names for lane in train):
        raise ConfigError(f"{phase} has fewer {kind} to train on than micro_batches, {len(train)}")
    if min(drawn) < sampling.batch_size:
        raise ConfigError(
            f"{phase}: a lane of the {len(train)} micro_batches has {min(drawn)} samples, "
            f"expected at least batch_size, {sampling.batch_size}"
        )
