"""An experiment from data set to registered model: prepare, split, train fold by fold, evaluate, publish.

All it knows lies in storage, under a folder named by the digest of configuration and data. The same command finds what
is finished there and does the rest. MLflow shows the experiment; it is never asked what has been done, so a tracker
that is down loses nothing.

    STORAGE/prepared/                      volumes as the networks read them, shared by all experiments
    STORAGE/NAME-KEY/experiment.json       resolved configuration
                     folds.json            fold of every volume
                     data_report.parquet   one row per volume, refused ones with their reason
                     NETWORK/foldK/        phase1/ phase2/ model/ evaluation.parquet pictures/
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from covtanet import storage, tracking
from covtanet.data.datasets import DATASETS, read_volumes, root_of
from covtanet.data.folds import Split, assign_folds, split
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import CheckpointError, ConfigError
from covtanet.evaluation import figures, gallery, rows
from covtanet.evaluation.pipeline import Task, evaluate
from covtanet.model.checkpoint import MODEL_FILES, SavedModel, load_model, save_model
from covtanet.model.covtanet import CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.report import data_report, plots
from covtanet.training import distributed
from covtanet.training.config import TrainingConfig
from covtanet.training.distributed import Place
from covtanet.training.loop import Progress, State

logger = logging.getLogger(__name__)

WEIGHTS, OUTCOME = "weights.safetensors", "phase.json"
CONFIG, FOLDS, REPORT, EVALUATION = (
    "experiment.json",
    "folds.json",
    "data_report.parquet",
    "evaluation.parquet",
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An opened experiment. uri: its folder. run: its parent run. num_at_once: trainings that share the machines."""

    config: TrainingConfig
    uri: str
    prepared_uri: str
    key: str
    run: tracking.RunAddress
    volumes: dict[str, PreparedVolume]
    folds: dict[str, int]
    data_digest: str
    num_at_once: int = 1

    def split(self, fold: int) -> Split:
        """Volumes of one fold, the same for both phases and every network."""
        cases = [volume.case for volume in self.volumes.values()]
        by_patient = {volume.patient: self.folds[key] for key, volume in self.volumes.items()}
        return split(cases, by_patient, fold, self.config.validation_share, self.config.seed)

    def fold_uri(self, fold: int) -> str:
        """Where a fold of the configured network lies."""
        return storage.join(self.uri, self.config.network, f"fold{fold}")

    def child(self, fold: int, phase: int) -> tracking.RunAddress:
        """The run of one fold and phase."""
        name = f"{self.config.network} fold {fold} phase {phase}"
        return replace(self.run, name=name, key=f"{self.key} {name}", parent=self.run)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished phase: the best epoch's weights, every epoch's metrics, digest of the weights, and of phase 1's."""

    weights: State
    history: list[dict[str, float]]
    digest: str
    phase1_digest: str | None = None


def open_experiment(
    config: TrainingConfig, data_uri: str, storage_uri: str, run: tracking.RunAddress
) -> Experiment:
    """Prepare the data, write its report, and split it, or find all that where it was done before.

    Raises:
        ConfigError: where a volume is refused and the configuration does not exclude it.
    """
    labelled = read_volumes(config.dataset, data_uri)
    prepared_uri, root = storage.join(storage_uri, "prepared"), root_of(data_uri)
    found = distributed.prepare_volumes(
        labelled, root, prepared_uri, config.window, config.slice_step_mm
    )
    data_digest = hashlib.sha256("\n".join(volume.key for volume in found).encode()).hexdigest()
    key = config.key([volume.key for volume in found])
    uri = storage.join(storage_uri, f"{run.experiment}-{key}")
    storage.write_bytes(storage.join(uri, REPORT), data_report.as_parquet(found))
    print(data_report.as_text(found, DATASETS[config.dataset].notes), flush=True)  # noqa: T201 - read before training
    refused = [volume for volume in found if volume.reason]
    for volume in refused:
        logger.warning("volume %s is refused: %s", volume.key, volume.reason)
    if refused and not config.exclude_rejected:
        raise ConfigError(
            f"{len(refused)} of {len(found)} volumes are refused, see {REPORT} in {uri}; mend them, or go on without "
            "them by exclude_rejected = true"
        )
    volumes = {volume.key: volume for volume in found if not volume.reason}
    by_patient = assign_folds(
        [volume.case for volume in volumes.values()], config.num_folds, config.seed
    )
    folds = {each: by_patient[volume.patient] for each, volume in volumes.items()}
    _write_json(storage.join(uri, FOLDS), folds)
    described = {"name": run.experiment, "key": key, "data": data_uri, "data_digest": data_digest}
    _write_json(storage.join(uri, CONFIG), {**described, "config": asdict(config)})
    logger.info(
        "experiment %s, %d volumes in %d folds: %s", key, len(volumes), config.num_folds, uri
    )
    return Experiment(
        config=config,
        uri=uri,
        prepared_uri=prepared_uri,
        key=key,
        run=replace(run, name=f"{run.experiment} {key}", key=key),
        volumes=volumes,
        folds=folds,
        data_digest=data_digest,
    )


def train_fold(experiment: Experiment, fold: int, encoder_weights: Path | None = None) -> None:
    """Train and evaluate one fold of the configured network, as far as that is not done."""
    config, part = experiment.config, experiment.split(fold)
    logger.info(
        "%s fold %d: %d volumes to train, %d to validate, %d to test",
        config.network, fold, len(part.train), len(part.validation), len(part.test),
    )  # fmt: skip
    segnet = read_outcome(experiment, fold, 1) if 1 in config.phases else None
    if segnet is None and 1 in config.phases:
        place = _place(experiment, fold, 1)
        progress = distributed.train_phase1(
            config, experiment.volumes, part, experiment.prepared_uri, place, encoder_weights
        )
        segnet = _keep_outcome(experiment, fold, 1, progress)
    classifier = read_outcome(experiment, fold, 2) if 2 in config.phases else None
    frozen = segnet.digest if segnet else None
    if classifier is not None and classifier.phase1_digest != frozen:
        logger.warning(
            "%s fold %d: phase 2 was trained on another phase 1, and is trained again",
            config.network,
            fold,
        )
        storage.delete(_evaluation_uri(experiment, fold))
        classifier = None
    if classifier is None and 2 in config.phases:
        place = _place(experiment, fold, 2)
        progress = distributed.train_phase2(
            config,
            experiment.volumes,
            part,
            experiment.prepared_uri,
            place,
            segnet.weights if segnet else {},
        )
        classifier = _keep_outcome(experiment, fold, 2, progress, frozen)
    if not storage.exists(_evaluation_uri(experiment, fold)):
        _evaluate_fold(experiment, fold, _model(experiment, fold, segnet, classifier))


def _place(experiment: Experiment, fold: int, phase: int) -> Place:
    name = f"{experiment.key}-{experiment.config.network}-fold{fold}-phase{phase}"
    uri = storage.join(experiment.fold_uri(fold), "checkpoints")
    return Place(
        storage_uri=uri,
        name=name,
        run=experiment.child(fold, phase),
        num_at_once=experiment.num_at_once,
    )


def _keep_outcome(
    experiment: Experiment,
    fold: int,
    phase: int,
    progress: Progress,
    segnet_digest: str | None = None,
) -> Outcome:
    """Write a finished phase, its weights first and then what says that it is finished; checkpoints go."""
    uri = storage.join(experiment.fold_uri(fold), f"phase{phase}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        save_file(progress.best, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        storage.upload(path, storage.join(uri, WEIGHTS))
    described = {"history": progress.history, "sha256": digest, "phase1_sha256": segnet_digest}
    _write_json(storage.join(uri, OUTCOME), described)
    place = _place(experiment, fold, phase)
    storage.delete_folder(storage.join(place.storage_uri, place.name))
    return Outcome(
        weights=progress.best, history=progress.history, digest=digest, phase1_digest=segnet_digest
    )


def read_outcome(experiment: Experiment, fold: int, phase: int) -> Outcome | None:
    """A finished phase, or nothing where it is not finished.

    Raises:
        CheckpointError: where the weights differ from their digest.
    """
    if (described := _described(experiment, fold, phase)) is None:
        return None
    uri = storage.join(experiment.fold_uri(fold), f"phase{phase}")
    data = storage.read_bytes(storage.join(uri, WEIGHTS))
    if hashlib.sha256(data).hexdigest() != described["sha256"]:
        raise CheckpointError(
            f"the weights of phase {phase} differ from their digest; delete {uri} to train it again"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        path.write_bytes(data)
        weights = dict(load_file(path))
    return Outcome(
        weights=weights,
        history=described["history"],
        digest=described["sha256"],
        phase1_digest=described["phase1_sha256"],
    )


def _described(experiment: Experiment, fold: int, phase: int) -> dict[str, Any] | None:
    """What a finished phase says of itself, without its weights; nothing where it is not finished."""
    uri = storage.join(experiment.fold_uri(fold), f"phase{phase}", OUTCOME)
    return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


def _model(
    experiment: Experiment, fold: int, segnet: Outcome | None, classifier: Outcome | None
) -> SavedModel:
    config, part = experiment.config, experiment.split(fold)
    network = CovTANet(config.architecture)
    if segnet is not None:
        network.segnet.load_state_dict(segnet.weights)
    if classifier is not None:
        network.classifier.load_state_dict(classifier.weights)
    trained = [experiment.volumes[key] for key in (*part.train, *part.validation)]
    return SavedModel(
        network=network.eval().requires_grad_(False),
        preprocessing=Preprocessing(
            **asdict(config.window),
            slice_step_mm=config.slice_step_mm,
            intensities=tuple(sorted({volume.intensity for volume in trained})),
        ),
        capabilities=Capabilities(segments=segnet is not None, diagnoses=classifier is not None),
        provenance={
            "experiment": experiment.key,
            "network": config.network,
            "fold": fold,
            "data_digest": experiment.data_digest,
            "phase1_sha256": segnet.digest if segnet else None,
            "recipe": asdict(config),
            "software_version": tracking.software_version(),
            "num_volumes": len(trained),
            # So that an evaluation can tell what the model has seen.
            "seen_sources": sorted(str(volume.source_digest)[:16] for volume in trained),
        },
    )


def _evaluation_uri(experiment: Experiment, fold: int) -> str:
    phases = "" if 2 in experiment.config.phases else "phase1-"
    return storage.join(experiment.fold_uri(fold), f"{phases}{EVALUATION}")


def _evaluate_fold(experiment: Experiment, fold: int, model: SavedModel) -> None:
    """Save the fold's model and predict its test volumes."""
    uri, diagnoses = experiment.fold_uri(fold), 2 in experiment.config.phases
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", model)
        for path in sorted(
            (Path(folder) / "model").iterdir(), reverse=True
        ):  # the description, which counts, last
            storage.upload(
                path, storage.join(uri, "model" if diagnoses else "phase1-model", path.name)
            )
    task = Task(
        model=model,
        network=experiment.config.network,
        fold=fold,
        prepared_uri=experiment.prepared_uri,
        pictures_uri=storage.join(uri, "pictures"),
        diagnoses=diagnoses,
        segments=1 in experiment.config.phases,
    )
    test = [experiment.volumes[key] for key in experiment.split(fold).test]
    found = evaluate(
        task, test if diagnoses else [volume for volume in test if volume.lesion_px is not None]
    )
    storage.write_bytes(_evaluation_uri(experiment, fold), rows.to_parquet(found))


def evaluation_rows(experiment_uri: str) -> list[dict[str, Any]]:
    """All rows of a training's folds and networks; both phases' rows win over phase 1's alone."""
    found = []
    for network in storage.list_names(experiment_uri):
        for fold in storage.list_names(storage.join(experiment_uri, network)):
            uri = storage.join(experiment_uri, network, fold)
            for name in (EVALUATION, f"phase1-{EVALUATION}"):
                if storage.exists(storage.join(uri, name)):
                    found += rows.from_parquet(storage.read_bytes(storage.join(uri, name)))
                    break
    return found


def side_by_side(experiment_uri: str, found: Sequence[dict[str, Any]]) -> bytes:
    """A training's networks on the same slices of its test parts, see ``gallery``. found: ``evaluation_rows``."""
    models = {}
    for network, fold in sorted(
        {(row["network"], row["fold"]) for row in found if row["tp"] is not None}
    ):
        uri = storage.join(experiment_uri, network, f"fold{fold}")
        has_both = storage.exists(storage.join(uri, EVALUATION))  # whose rows these then are
        models[network, fold] = storage.join(uri, "model" if has_both else "phase1-model")
    trained = {network for network, _ in models}
    leader = next((name for name in ("V8", "V7", *sorted(trained)) if name in trained), "")
    return gallery.side_by_side(
        found, leader, models, storage.join(experiment_uri.rpartition("/")[0], "prepared")
    )


def publish(experiment: Experiment) -> None:
    """Bring MLflow up to date with what lies in storage; saying the same twice changes nothing."""
    config = experiment.config
    report = storage.read_bytes(storage.join(experiment.uri, FOLDS))
    values = asdict(config)
    tracking.describe_run(
        experiment.run,
        parameters={**config.identity, "data_digest": experiment.data_digest},
        files={
            f"{config.network}/config.json": json.dumps(values, indent=2, sort_keys=True).encode(),
            FOLDS: report,
        },
        tags={"covtanet.storage": experiment.uri},
    )
    for fold in config.folds:
        for phase in config.phases:
            described = _described(experiment, fold, phase)
            if described is not None:
                _publish_phase(experiment, fold, phase, described)
    found = [row for row in evaluation_rows(experiment.uri) if row["network"] == config.network]
    files = {
        f"{config.network}/{name}": data for name, data in _pictures(found, config.network).items()
    }
    tracking.describe_run(experiment.run, files=files, is_finished=True)


def _publish_phase(
    experiment: Experiment, fold: int, phase: int, described: dict[str, Any]
) -> None:
    address = experiment.child(fold, phase)
    tracking.log_history(tracking.open_run(address), described["history"], address.uri)
    files = {"curves.png": plots.curves(address.name, described["history"])}
    metrics: dict[str, float] = {}
    if storage.exists(_evaluation_uri(experiment, fold)):
        found = rows.from_parquet(storage.read_bytes(_evaluation_uri(experiment, fold)))
        if phase == 1:
            files |= _best_and_worst(experiment, fold, found)
            metrics = _flat("test", figures.segmentation(found).get("per_volume", {}))
        else:
            files |= _pictures(found, address.name)
            judged = figures.classification(found)
            for pair in figures.PAIRS:
                metrics |= _flat(f"test/{pair}", judged.get(pair, {}))
    tracking.describe_run(
        address,
        parameters={
            "network": experiment.config.network,
            "fold": fold,
            "phase": phase,
            "weights_sha256": described["sha256"],
        },
        metrics=metrics,
        files=files,
        is_finished=True,
    )


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if value is not None}


def _pictures(found: Sequence[dict[str, Any]], title: str) -> dict[str, bytes]:
    """Confusion matrices, ROC and reliability of rows that have a diagnosis."""
    judged = figures.classification(found)
    if not judged["num_volumes"]:
        return {}
    return {
        "confusion.png": plots.confusion(title, judged),
        "roc.png": plots.roc(title, found, judged),
        "reliability.png": plots.reliability(title, judged),
    }


def _best_and_worst(
    experiment: Experiment, fold: int, found: Sequence[dict[str, Any]]
) -> dict[str, bytes]:
    """Pictures of the volumes with the highest and the lowest Dice."""
    dice = figures.segmentation(found).get("volume_dice", {})
    ranked = sorted((value, key) for key, value in dice.items() if value is not None)
    if not ranked:
        return {}
    uri = storage.join(experiment.fold_uri(fold), "pictures")
    return {
        f"overlays/{name}-dice-{value:.3f}.png": storage.read_bytes(storage.join(uri, f"{key}.png"))
        for name, (value, key) in (("worst", ranked[0]), ("best", ranked[-1]))
    }


def register(experiment: Experiment) -> tuple[str, str]:
    """Register the training's model as challenger, once; returns version and digest.

    Choice: that of the lowest fold whose phase 2 is finished. Trainings on the same data then leave the same patients
    unseen, on whom one can be compared with the other; the best fold's model would be the luckiest split's.
    """
    config = experiment.config
    fold = next(
        each for each in range(config.num_folds) if _described(experiment, each, 2) is not None
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        storage.download_files(
            storage.join(experiment.fold_uri(fold), "model"), MODEL_FILES, target
        )
        digest = load_model(target).digest
        test = rows.from_parquet(storage.read_bytes(_evaluation_uri(experiment, fold)))
        tags = {
            "covtanet.data_digest": experiment.data_digest,
            "covtanet.experiment": experiment.key,
            "covtanet.network": experiment.config.network,
            "covtanet.fold": str(fold),
            **{
                f"covtanet.{name}": f"{value:.4f}" for name, value in figures.headline(test).items()
            },
        }
        return tracking.register_model(experiment.run, target, tags, alias="challenger"), digest


def _write_json(uri: str, values: Any) -> None:
    storage.write_bytes(uri, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
