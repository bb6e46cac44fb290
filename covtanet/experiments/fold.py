"""One fold of one network: both phases and the evaluation, as far as they are not done."""

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

from covtanet import storage, tracking
from covtanet.errors import ConfigError
from covtanet.evaluation import rows
from covtanet.evaluation.pipeline import Task, evaluate
from covtanet.experiments.experiment import Experiment
from covtanet.experiments.outcomes import Outcome, keep_outcome, read_outcome
from covtanet.experiments.results import evaluation_uri, model_uri
from covtanet.inference.predictor import window_of
from covtanet.model.covtanet import CovTANet
from covtanet.model.description import Capabilities, Preprocessing, Readout
from covtanet.model.registry import CLASSIFIERS
from covtanet.model.saved_model import SavedModel, load_model, save_model
from covtanet.training.config import TrainingConfig
from covtanet.training.trainer import train_phase1, train_phase2

logger = logging.getLogger(__name__)


def train_fold(experiment: Experiment, fold: int, encoder_weights: Path | None = None) -> None:
    """Train and evaluate one fold of the configured network, as far as that is not done."""
    config = experiment.config
    split = experiment.split(fold)
    counts = (len(split.train), len(split.validation), len(split.test))
    logger.info(
        "%s fold %d: %d volumes to train, %d to validate, %d to test", config.network, fold, *counts
    )
    segnet = None
    if 1 in config.phases:
        segnet = _phase1(experiment, fold, encoder_weights)
    elif config.phase1_model and config.network not in CLASSIFIERS:
        segnet = saved_segmenter(config)
    classifier = None
    if 2 in config.phases:
        classifier = _phase2(experiment, fold, segnet)
    if not storage.exists(evaluation_uri(experiment, fold)):
        _evaluate_fold(experiment, fold, assemble_model(experiment, fold, segnet, classifier))


def _phase1(experiment: Experiment, fold: int, encoder_weights: Path | None) -> Outcome:
    outcome = read_outcome(experiment, fold, 1)
    if outcome is not None:
        return outcome
    progress = train_phase1(
        experiment.config,
        experiment.volumes,
        experiment.split(fold),
        experiment.prepared_uri,
        experiment.phase_run(fold, 1),
        encoder_weights,
    )
    return keep_outcome(experiment, fold, 1, progress)


def saved_segmenter(config: TrainingConfig) -> Outcome:
    """Return the segmenter of the saved model that the configuration names, as a phase 1.

    Raises:
        CheckpointError: the model cannot be read.
        ConfigError: it is another network than the configuration's, or reads another input.
    """
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(config.phase1_model, Path(folder))
        model = load_model(resolved.folder, resolved.digest)
    expected = config.architecture.segnet
    if model.network.config.segnet != expected:
        raise ConfigError(
            f"phase1_model has the segmenter {model.network.config.segnet}, expected {expected}"
        )
    window = window_of(model)
    if window != config.window:
        raise ConfigError(f"phase1_model reads {window}, expected {config.window}")
    return Outcome(
        weights=dict(model.network.segnet.state_dict()), history=[], digest=resolved.digest
    )


def _phase2(experiment: Experiment, fold: int, segnet: Outcome | None) -> Outcome:
    phase1_digest = segnet.digest if segnet else None
    outcome = read_outcome(experiment, fold, 2)
    if outcome is not None and outcome.phase1_digest == phase1_digest:
        return outcome
    if outcome is not None:
        logger.warning(
            "%s fold %d: phase 2 was trained on another phase 1, and is trained again",
            experiment.config.network,
            fold,
        )
        # Its rows would stand for the new model, should the training be cut before it is evaluated.
        storage.delete(evaluation_uri(experiment, fold))
    progress = train_phase2(
        experiment.config,
        experiment.volumes,
        experiment.split(fold),
        experiment.prepared_uri,
        experiment.phase_run(fold, 2),
        segnet.weights if segnet else {},
    )
    return keep_outcome(experiment, fold, 2, progress, phase1_digest)


def assemble_model(
    experiment: Experiment, fold: int, segnet: Outcome | None, classifier: Outcome | None
) -> SavedModel:
    """Return the model of a fold's finished phases."""
    config = experiment.config
    network = CovTANet(config.architecture)
    if segnet is not None:
        network.segnet.load_state_dict(segnet.weights)
    if classifier is not None:
        network.classifier.load_state_dict(classifier.weights)
    split = experiment.split(fold)
    trained = [experiment.volumes[key] for key in (*split.train, *split.validation)]
    return SavedModel(
        network=network.eval().requires_grad_(False),
        preprocessing=Preprocessing(
            **asdict(config.window),
            slice_step_mm=config.slice_step_mm,
            intensities=tuple(sorted({volume.intensity for volume in trained})),
        ),
        capabilities=Capabilities(segments=segnet is not None, diagnoses=classifier is not None),
        readout=Readout(lesion_threshold=config.lesion_threshold),
        provenance={
            "experiment": experiment.key,
            "network": config.network,
            "fold": fold,
            "data_digest": experiment.data_digest,
            "phase1_sha256": segnet.digest if segnet else None,
            "recipe": asdict(config),
            "software_version": tracking.software_version(),
            "num_volumes": len(trained),
            # An evaluation tells by these which of its volumes the model has seen.
            "seen_sources": sorted(str(volume.source_digest)[:16] for volume in trained),
        },
    )


def _evaluate_fold(experiment: Experiment, fold: int, model: SavedModel) -> None:
    """Save the fold's model, and predict its test volumes."""
    _upload_model(model, model_uri(experiment, fold))
    task = Task(
        model=model,
        network=experiment.config.network,
        fold=fold,
        source=experiment.source,
        prepared_uri=experiment.prepared_uri,
        pictures_uri=storage.join(experiment.fold_uri(fold), "pictures"),
    )
    test = [experiment.volumes[key] for key in experiment.split(fold).test]
    if not model.capabilities.diagnoses:
        # Nothing follows from a volume without mask.
        test = [volume for volume in test if volume.lesion_px is not None]
    data = rows.to_parquet(evaluate(task, test))
    storage.write_bytes(evaluation_uri(experiment, fold), data)


def _upload_model(model: SavedModel, uri: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder, model)
        # weights.safetensors before model.json, without which no folder counts as a model.
        for path in sorted(folder.iterdir(), reverse=True):
            storage.upload(path, storage.join(uri, path.name))
