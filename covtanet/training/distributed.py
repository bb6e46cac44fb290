"""Both phases on Ray: Ray Data decodes and prepares volumes from storage and feeds Ray Train, which optimizes.

Volumes are prepared once into storage (``data.prepared``). Phase 1 trains TA-SegNet on their slices. Phase 2 takes its
weights frozen: an actor turns every volume into pooled fusion features once, and the workers train the joint
classifier on those; or, without that cache, the workers compute them every epoch.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch
import torch

from covtanet import ray_data, storage, tracking
from covtanet.ct.window import WindowConfig
from covtanet.data import prepared
from covtanet.data.folds import Split
from covtanet.data.labels import LabelledVolume
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError, TrainingError
from covtanet.model.covtanet import CovTANet
from covtanet.model.encoder import pretrained_state
from covtanet.training import worker
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Sampling, assign_lanes
from covtanet.training.loop import Progress, State
from covtanet.training.phase2 import frozen_features
from covtanet.training.state import STATE, load_progress
from covtanet.training.worker import Assignment, LaneSpec, slice_name

logger = logging.getLogger(__name__)

Row = dict[str, Any]
REPORT_EVERY = 50
NUM_FETCH_THREADS = 16
SNAPSHOT = "checkpoint_manager_snapshot.json"
SILENT_S = 300.0
NUM_CHECKPOINTS = 2  # the newest and, should it be damaged, the one before


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one phase of one fold keeps its checkpoints, and how it is logged.

    num_at_once: trainings that share the machines, and so the threads.
    """

    storage_uri: str
    name: str
    run: tracking.RunAddress
    num_at_once: int = 1


class MetricsToMlflow(ray.train.UserCallback):  # type: ignore[misc]
    """Logs every epoch; lives in the train controller, so that workers may restart.

    What cannot be logged now is logged with a later epoch, or when the phase ends: checkpoints hold the whole history.
    """

    def __init__(self, run: tracking.RunAddress, label: str) -> None:
        self.run, self.label, self.silent_until = run, label, 0.0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Log the checkpoint's history, which is reduced over ranks. Nothing that goes wrong here ends a training."""
        with tracking.tolerated("an epoch's metrics"):
            with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/{STATE}") as file:
                history = json.loads(file.read())["history"]
            shown = ", ".join(
                f"{name} {value:.4g}"
                for name, value in history[-1].items()
                if name.startswith(("train_", "val_"))
            )
            print(f"{self.label} epoch {len(history)}: {shown}", flush=True)  # noqa: T201 - the controller's log
            if time.monotonic() < self.silent_until:
                return
            # The workers wait meanwhile, so a store that does not answer is left alone for a while.
            self.silent_until = time.monotonic() + SILENT_S
            tracking.log_history(tracking.open_run(self.run), history, self.run.uri)
            self.silent_until = 0.0


def prepare_volumes(
    volumes: Sequence[LabelledVolume],
    data_uri: str,
    prepared_uri: str,
    window: WindowConfig,
    slice_step_mm: float,
    *,
    refuses_unread: bool = False,
) -> list[PreparedVolume]:
    """Read every volume and its masks, write what the networks read, return what was found; those done are kept.

    refuses_unread: a volume that storage does not give is refused with ``storage``, and the others go on; for an
    evaluation, not for a training, whose folds would be others the next time.
    """
    keys = volume_keys(volumes, data_uri, window, slice_step_mm)
    done = set(storage.list_names(prepared_uri))
    pairs = list(zip(keys, volumes, strict=True))
    known = [key for key in keys if f"{key}.json" in done]
    with ThreadPoolExecutor(
        NUM_FETCH_THREADS
    ) as pool:  # a restart reads what is known, not the pixels
        texts = pool.map(
            lambda key: storage.read_bytes(storage.join(prepared_uri, f"{key}.json")), known
        )
        found = [prepared.from_json(text) for text in texts]
    rows = [{"key": key, **vars(volume)} for key, volume in pairs if f"{key}.json" not in done]
    logger.info("preparing %d volumes, %d are done already", len(rows), len(known))
    if rows:
        prepare = partial(
            _prepare_row,
            data_uri=data_uri,
            prepared_uri=prepared_uri,
            window=window,
            slice_step_mm=slice_step_mm,
            refuses_unread=refuses_unread,
        )
        for number, row in enumerate(_items(rows).map(prepare, num_cpus=1).iter_rows(), start=1):
            found.append(prepared.from_json(row["found"]))
            if number % REPORT_EVERY == 0:
                logger.info("prepared %d of %d volumes", number, len(rows))
    return sorted(found, key=lambda each: each.key)


def volume_keys(
    volumes: Sequence[LabelledVolume], data_uri: str, window: WindowConfig, slice_step_mm: float
) -> list[str]:
    """Keys of the prepared volumes, from the listing alone."""
    roots = {_folder(path, data_uri) for volume in volumes for path in _paths(volume)}
    versions = {
        storage.join(root, item.path): f"{item.num_bytes} {item.version}"
        for root in roots
        for _, objects in storage.walk(root, leaves_root=True)
        for item in objects
    }
    return [
        prepared.volume_key(
            volume,
            [versions.get(storage.resolve(data_uri, path), "missing") for path in _paths(volume)],
            window,
            slice_step_mm,
        )
        for volume in volumes
    ]


def _folder(path: str, data_uri: str) -> str:
    """What to list for a path's version: the data set, or the folder of an absolute path."""
    resolved = storage.resolve(data_uri, path)
    return resolved.rpartition("/")[0] if resolved == path else data_uri


def _paths(volume: LabelledVolume) -> list[str]:
    return [
        path
        for path in (volume.volume_path, volume.lesion_mask_path, volume.lung_mask_path)
        if path
    ]


def _prepare_row(
    row: Row,
    data_uri: str,
    prepared_uri: str,
    window: WindowConfig,
    slice_step_mm: float,
    refuses_unread: bool,
) -> Row:
    """Prepare one volume. Whatever its bytes do to us, it becomes a row, and no text of theirs an error's.

    Raises:
        AccessError: storage refuses us altogether.
        OSError: storage fails, unless that refuses the volume; its text, which may name a study, is left out.
    """
    key, target = row["key"], prepared_uri_of(prepared_uri, row["key"])
    volume = LabelledVolume(**{name: row[name] for name in LabelledVolume.__dataclass_fields__})
    try:
        contents = {
            path: storage.read_bytes(storage.resolve(data_uri, path)) for path in _paths(volume)
        }
        found, samples = prepared.prepare(volume, key, contents, window, slice_step_mm)
        storage.write_bytes(target, prepared.to_parquet(found, samples))
        storage.write_bytes(
            storage.join(prepared_uri, f"{key}.json"), prepared.to_json(found).encode()
        )
    except FileNotFoundError:
        found = prepared.refused(volume, key, window, "missing", "not where the data set says")
    except storage.AccessError:
        raise storage.AccessError("the store refuses our credentials") from None
    except OSError as error:
        if not refuses_unread:
            raise OSError(f"volume {key}: storage: {type(error).__name__}") from None
        found = prepared.refused(volume, key, window, "storage", type(error).__name__)
    except Exception as error:
        logger.error("volume %s: internal error, %s", key, type(error).__name__)
        found = prepared.refused(volume, key, window, "internal_error", type(error).__name__)
    return {"found": prepared.to_json(found)}


def prepared_uri_of(prepared_uri: str, key: str) -> str:
    """Where a prepared volume lies."""
    return storage.join(prepared_uri, f"{key}.parquet")


def train_phase1(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
    place: Place,
    encoder_weights: Path | None = None,
) -> Progress:
    """Train TA-SegNet on the slices of the split's volumes that have a lesion mask.

    encoder_weights: a local file that a pretrained encoder starts from; without one its library fetches them.
    """
    ray_data.configure(preserve_order=True)
    datasets: dict[str, ray.data.Dataset] = {}
    specs: dict[str, list[LaneSpec]] = {"train": [], "validation": []}
    filesystem, _ = storage.filesystem(prepared_uri)
    for part, keys in (("train", split.train), ("validation", split.validation)):
        masked = {
            key: len(volumes[key].slices) for key in keys if volumes[key].lesion_px is not None
        }
        for number, lane in enumerate(assign_lanes(masked, config.phase1.micro_batches)):
            samples = [
                (slice_name(key, index), pixels > 0)
                for key in lane
                for index, pixels in zip(
                    volumes[key].slices, volumes[key].lesion_px or (), strict=True
                )
            ]
            uris = tuple(prepared_uri_of(prepared_uri, key) for key in lane)
            specs[part].append(
                _spec(f"{part}-{number}", samples, 3 * config.window.size_px**2, uris)
            )
    if not worker.fit_in_memory(config, [*specs["train"], *specs["validation"]]):
        for spec in (*specs["train"], *specs["validation"]):
            if spec.uris:
                paths = [storage.filesystem(uri)[1] for uri in spec.uris]
                datasets[spec.shard] = ray.data.read_parquet(paths, filesystem=filesystem)
    _refuse_small(
        specs["train"], "phase 1", "volumes with lesion masks", config.sampling(config.phase1)
    )
    segnet = config.architecture.segnet
    encoder = None
    if segnet.encoder != "plain":
        encoder = pretrained_state(segnet.encoder, segnet.in_channels, encoder_weights)
    return _run(config, 1, specs, datasets, place, encoder_state=encoder)


def train_phase2(
    config: TrainingConfig,
    volumes: Mapping[str, PreparedVolume],
    split: Split,
    prepared_uri: str,
    place: Place,
    segnet_state: State,
) -> Progress:
    """Train the joint classifier on the split's volumes that have a grade, TA-SegNet frozen."""
    network = config.architecture
    pixels = network.num_slices * (
        network.segnet.fused_channels * network.pooled_px**2
        if config.cache_features
        and not network.backbone  # what a backbone reads are the slices themselves
        else config.window.size_px**2
    )
    specs: dict[str, list[LaneSpec]] = {"train": [], "validation": []}
    rows: list[Row] = []
    ends: dict[str, int] = {}
    for part, keys in (("train", split.train), ("validation", split.validation)):
        graded = {key: 1 for key in keys if volumes[key].grade}
        for number, lane in enumerate(assign_lanes(graded, config.phase2.micro_batches)):
            spec = _spec(f"{part}-{number}", [(key, True) for key in lane], 2 * pixels)
            specs[part].append(spec)
            rows += [_volume_item(volumes[key], prepared_uri) for key in lane]
            ends[spec.shard] = len(rows)
    _refuse_small(specs["train"], "phase 2", "volumes with a grade", config.sampling(config.phase2))
    dataset = _items(rows).map(partial(_load_volume, num_slices=network.num_slices), num_cpus=1)
    if config.cache_features:
        if not network.backbone:
            dataset = dataset.map(
                _FrozenSegNet,
                fn_constructor_kwargs={"config": config, "segnet_state": segnet_state},
                compute=ray.data.ActorPoolStrategy(size=1),
                num_cpus=1,
                num_gpus=1 if ray.cluster_resources().get("GPU", 0) else 0,
            )
        dataset = (
            dataset.materialize()
        )  # Ray keeps it in its object store and spills what does not fit
        parts = dataset.split_at_indices([end for end in ends.values() if 0 < end < len(rows)])
        datasets = dict(zip(_distinct(ends), parts, strict=True))
        return _run(config, 2, specs, datasets, place, segnet_state if network.backbone else None)
    starts = dict(zip(ends, [0, *ends.values()], strict=False))
    datasets = {
        shard: _items(rows[starts[shard] : end]).map(
            partial(_load_volume, num_slices=network.num_slices), num_cpus=1
        )
        for shard, end in ends.items()
        if end > starts[shard]
    }
    return _run(config, 2, specs, datasets, place, segnet_state)


def _distinct(ends: Mapping[str, int]) -> list[str]:
    """Shards that are not empty, given where each ends."""
    starts = dict(zip(ends, [0, *ends.values()], strict=False))
    return [shard for shard, end in ends.items() if end > starts[shard]]


def _volume_item(volume: PreparedVolume, prepared_uri: str) -> Row:
    return {
        "name": volume.key,
        "uri": prepared_uri_of(prepared_uri, volume.key),
        "has_lesion": True,
        "is_infected": volume.diagnosis == "infected",
        "is_severe": volume.severity == "severe",
    }


def _load_volume(row: Row, num_slices: int) -> Row:
    samples = prepared.read_samples(storage.read_bytes(row.pop("uri")))
    return {**row, "levels": prepared.diagnosis_slices(samples, num_slices)}


class _FrozenSegNet:
    """TA-SegNet in eval mode: a volume's slices to its pooled fusion vectors."""

    def __init__(self, config: TrainingConfig, segnet_state: State) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = CovTANet(config.architecture)
        network.segnet.load_state_dict(segnet_state)
        network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.features = frozen_features(network.segment, device, config.phase2)

    def __call__(self, row: Row) -> Row:
        levels = row.pop("levels")
        return {**row, "pooled": self.features(levels[None])[0].cpu().numpy()}


def _items(rows: list[Row]) -> ray.data.Dataset:
    """A dataset of small rows, one per block, that keeps its order: reruns then see the same."""
    ray_data.configure(preserve_order=True)
    return ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))


def _spec(
    shard: str, samples: list[tuple[str, bool]], num_bytes: int, uris: tuple[str, ...] = ()
) -> LaneSpec:
    names, has_lesion = (
        (tuple(column) for column in zip(*samples, strict=True)) if samples else ((), ())
    )
    return LaneSpec(
        shard=shard, names=names, has_lesion=has_lesion, bytes_per_sample=num_bytes, uris=uris
    )


def _refuse_small(lanes: Sequence[LaneSpec], phase: str, wanted: str, sampling: Sampling) -> None:
    """Refuse lanes without one whole micro-batch, before any worker is started."""
    if not all(lane.names for lane in lanes):
        raise ConfigError(
            f"{phase} has fewer {wanted} to train on than micro_batches, {len(lanes)}"
        )
    for lane in lanes:
        if (drawn := len(sampling.drawn(lane.names, lane.has_lesion, 0))) < sampling.batch_size:
            raise ConfigError(
                f"{phase}: a lane of the {len(lanes)} micro_batches has {drawn} samples, "
                f"expected at least batch_size, {sampling.batch_size}"
            )


def _run(
    config: TrainingConfig,
    phase: int,
    specs: Mapping[str, Sequence[LaneSpec]],
    datasets: dict[str, ray.data.Dataset],
    place: Place,
    segnet_state: State | None = None,
    encoder_state: State | None = None,
) -> Progress:
    """Train one phase under its own name, under which a killed one goes on; returns its newest state."""
    filesystem, path = storage.filesystem(place.storage_uri)
    checkpoints_uri = storage.join(place.storage_uri, place.name)
    # Ray's list of checkpoints is rewritten in place, and torn by a crash it could not be read again. The checkpoints
    # themselves say what they are.
    storage.delete(storage.join(checkpoints_uri, SNAPSHOT))
    options = ray.data.ExecutionOptions(preserve_order=True)
    trainer = ray.train.torch.TorchTrainer(
        worker.train,
        train_loop_config={
            "assignment": Assignment(
                config=config,
                phase=phase,
                train=tuple(specs["train"]),
                validation=tuple(specs["validation"]),
                num_threads=_num_threads(config.num_workers * place.num_at_once),
                checkpoints_uri=checkpoints_uri,
                segnet_state=segnet_state,
                encoder_state=encoder_state,
            )
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=_check_resources(config),
            resources_per_worker={"CPU": 1},
        ),
        dataset_config=ray.train.DataConfig(datasets_to_split=[], execution_options=options),
        run_config=ray.train.RunConfig(
            name=place.name,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=NUM_CHECKPOINTS),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            callbacks=[MetricsToMlflow(place.run, place.run.name)],
        ),
        datasets=datasets,
    )
    with tracking.system_metrics(place.run):
        result = _fit(trainer, place)
    if message := (result.return_value or {}).get("not_finite"):
        raise FloatingPointError(f"{place.run.name}: {message}")
    if result.checkpoint is None:
        raise TrainingError(f"{place.run.name} ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        return load_progress(Path(folder))


def _num_threads(num_workers: int) -> int:
    """Threads of a worker where so many share the cluster, as far as this node tells."""
    nodes, cores = (
        len([node for node in ray.nodes() if node["Alive"]]),
        len(os.sched_getaffinity(0)),
    )
    return max(1, min(cores, nodes * cores // num_workers))


def _check_resources(config: TrainingConfig) -> bool:
    """Whether workers get a GPU each.

    Raises:
        ConfigError: where the cluster cannot hold the workers and feed them.
    """
    resources = ray.cluster_resources()
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if num_cpus <= config.num_workers:
        raise ConfigError(
            f"the cluster has {num_cpus} CPUs, expected more than num_workers, {config.num_workers}: each worker holds "
            "one, and their data needs one too (ray start --num-cpus)"
        )
    if 0 < num_gpus < config.num_workers:
        raise ConfigError(
            f"the cluster has {num_gpus} GPUs, expected one for each of num_workers, {config.num_workers}"
        )
    return num_gpus > 0


def _fit(trainer: ray.train.torch.TorchTrainer, place: Place) -> ray.train.Result:
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"{place.run.name} failed too often; its last checkpoint is kept"
        ) from error
