"""An experiment: its configuration, data and folds, and its folder in storage.

All that is known of an experiment lies in storage, in a folder named by the digest of
configuration and data. The same command finds there what is finished and does the rest. MLflow
shows the experiment; it is never asked what has been done, so a tracker that is down loses nothing.

    STORAGE/prepared/                      volumes as the networks read them, shared by experiments
    STORAGE/NAME-KEY/experiment.json       resolved configuration
                     folds.json            fold of every volume
                     data_report.parquet   one row per volume, refused ones with their reason
                     NETWORK/foldK/        phase1/ phase2/ model/ evaluation.parquet pictures/
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from covtanet import storage, tracking
from covtanet.data.datasets import DataSource
from covtanet.data.folds import Split, assign_folds, split
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.experiments.preparation import prepare_volumes
from covtanet.report import data_report
from covtanet.training.config import TrainingConfig
from covtanet.training.trainer import PhaseRun

logger = logging.getLogger(__name__)

CONFIG = "experiment.json"
FOLDS = "folds.json"
REPORT = "data_report.parquet"
PREPARED = "prepared"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An opened experiment with the configuration of one network."""

    config: TrainingConfig
    uri: str
    """The experiment's folder."""
    prepared_uri: str
    key: str
    run: tracking.RunAddress
    """Its parent run."""
    source: DataSource
    volumes: dict[str, PreparedVolume]
    folds: dict[str, int]
    data_digest: str
    num_at_once: int = 1
    """Trainings that share the machines."""

    def split(self, fold: int) -> Split:
        """Return the volumes of one fold, the same for both phases and every network."""
        cases = [volume.case for volume in self.volumes.values()]
        by_patient = {volume.patient: self.folds[key] for key, volume in self.volumes.items()}
        return split(cases, by_patient, fold, self.config.validation_share, self.config.seed)

    def fold_uri(self, fold: int) -> str:
        """Return the folder of a fold of the configured network."""
        return storage.join(self.uri, self.config.network, f"fold{fold}")

    def phase_uri(self, fold: int, phase: int) -> str:
        """Return the folder of a finished phase."""
        return storage.join(self.fold_uri(fold), f"phase{phase}")

    def child(self, fold: int, phase: int) -> tracking.RunAddress:
        """Return the run of one fold and phase."""
        name = f"{self.config.network} fold {fold} phase {phase}"
        return replace(self.run, name=name, key=f"{self.key} {name}", parent=self.run)

    def phase_run(self, fold: int, phase: int) -> PhaseRun:
        """Return the checkpoints' location and the run of one fold and phase."""
        return PhaseRun(
            storage_uri=storage.join(self.fold_uri(fold), "checkpoints"),
            name=f"{self.key}-{self.config.network}-fold{fold}-phase{phase}",
            run=self.child(fold, phase),
            num_at_once=self.num_at_once,
        )


def prepare_data(
    config: TrainingConfig, source: DataSource, storage_uri: str
) -> list[PreparedVolume]:
    """Return all volumes of the data set, prepared or refused; those done before are kept."""
    prepared_uri = storage.join(storage_uri, PREPARED)
    return prepare_volumes(
        source.volumes, source.root, prepared_uri, config.window, config.slice_step_mm
    )


def open_experiment(
    config: TrainingConfig,
    source: DataSource,
    volumes: Sequence[PreparedVolume],
    data_uri: str,
    storage_uri: str,
    run: tracking.RunAddress,
) -> Experiment:
    """Write the data's report, split the volumes, and describe the experiment in storage.

    Raises:
        ConfigError: a volume is refused and the configuration does not exclude it, or volumes in
            HU and grey values without a line to HU meet.
    """
    keys = [volume.key for volume in volumes]
    key = config.key(keys)
    uri = storage.join(storage_uri, f"{run.experiment}-{key}")
    # Before a refusal: the report has the reasons.
    storage.write_bytes(storage.join(uri, REPORT), data_report.as_parquet(volumes))
    accepted = _accepted(config, volumes, uri)
    _check_scale(list(accepted.values()), uri)
    folds = _assign_folds(config, accepted)
    write_json(storage.join(uri, FOLDS), folds)
    data_digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    described = {"name": run.experiment, "key": key, "data": data_uri, "data_digest": data_digest}
    write_json(storage.join(uri, CONFIG), {**described, "config": asdict(config)})
    logger.info(
        "experiment %s, %d volumes in %d folds: %s", key, len(accepted), config.num_folds, uri
    )
    return Experiment(
        config=config,
        uri=uri,
        prepared_uri=storage.join(storage_uri, PREPARED),
        key=key,
        run=replace(run, name=f"{run.experiment} {key}", key=key),
        source=source,
        volumes=accepted,
        folds=folds,
        data_digest=data_digest,
    )


def _accepted(
    config: TrainingConfig, volumes: Sequence[PreparedVolume], uri: str
) -> dict[str, PreparedVolume]:
    refused = [volume for volume in volumes if volume.reason]
    for volume in refused:
        logger.warning("volume %s is refused: %s", volume.key, volume.reason)
    if refused and not config.exclude_rejected:
        raise ConfigError(
            f"{len(refused)} of {len(volumes)} volumes are refused, see {REPORT} in {uri}; mend "
            "them, or go on without them by exclude_rejected = true"
        )
    return {volume.key: volume for volume in volumes if not volume.reason}


def _check_scale(volumes: Sequence[PreparedVolume], uri: str) -> None:
    """Refuse two intensity scales in one training: the same tissue would have two intensities."""
    greys = [volume.key for volume in volumes if volume.intensity == "grey8"]
    if greys and len(greys) < len(volumes):
        raise ConfigError(
            f"{len(greys)} volumes are grey values without a line to HU, the first {greys[0]}, and "
            f"{len(volumes) - len(greys)} are HU, expected one scale, see {REPORT} in {uri}; if "
            "the line is known, give it as intensity grey8:LOW:HIGH, else train on one kind alone"
        )


def _assign_folds(config: TrainingConfig, volumes: dict[str, PreparedVolume]) -> dict[str, int]:
    cases = [volume.case for volume in volumes.values()]
    by_patient = assign_folds(cases, config.num_folds, config.seed)
    return {key: by_patient[volume.patient] for key, volume in volumes.items()}


def write_json(uri: str, values: Any) -> None:
    """Write plain values as JSON."""
    storage.write_bytes(uri, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
