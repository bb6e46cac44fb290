"""Evaluation of a saved model on a labelled data set, and the count of its outcomes."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from covtanet.data.datasets import DataSource
from covtanet.data.prepared import PreparedVolume
from covtanet.evaluation.pipeline import Evaluated, Task, evaluate_each, step_of
from covtanet.experiments.preparation import prepare_volumes
from covtanet.inference.predictor import window_of
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

# Outcomes that are no fault of the volume: the metrics lack a volume that belongs to them.
FAILURES = ("storage", "internal_error")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Volumes as one model reads them, and those that are refused."""

    source: DataSource
    volumes: list[PreparedVolume]
    refused: list[PreparedVolume]

    @property
    def all_volumes(self) -> list[PreparedVolume]:
        """All volumes in the order of their keys."""
        return sorted([*self.volumes, *self.refused], key=lambda volume: volume.key)


def prepare_for(model: SavedModel, source: DataSource, prepared_uri: str) -> PreparedData:
    """Prepare volumes as a model reads them."""
    volumes = prepare_volumes(
        source.volumes,
        source.root,
        prepared_uri,
        window_of(model),
        step_of(model),
        refuses_unread=True,
    )
    refused = [volume for volume in volumes if volume.reason]
    for volume in refused:
        logger.warning("volume %s is refused: %s", volume.key, volume.reason)
    return PreparedData(
        source=source,
        volumes=[volume for volume in volumes if not volume.reason],
        refused=refused,
    )


def predict(
    model: SavedModel,
    volumes: Sequence[PreparedVolume],
    source: DataSource,
    prepared_uri: str,
    pictures_uri: str,
) -> Evaluated:
    """Return a model's rows; without diagnosis, only for volumes with a lesion mask."""
    if not model.capabilities.diagnoses and model.readout.burden is None:
        volumes = [volume for volume in volumes if volume.lesion_px is not None]
    task = Task(
        model=model,
        network=str(model.provenance.get("network", "V7")),
        fold=None,
        source=source,
        prepared_uri=prepared_uri,
        pictures_uri=pictures_uri,
    )
    return evaluate_each(task, volumes)


def seen_sources(model: SavedModel, volumes: Sequence[PreparedVolume]) -> set[str] | None:
    """Return source digests of the volumes that the model was trained or validated on.

    Null if the model does not say.
    """
    if "seen_sources" not in model.provenance:
        return None
    # A model keeps the first 16 digits.
    seen = set(model.provenance["seen_sources"])
    digests = {str(volume.source_digest) for volume in volumes}
    return {digest for digest in digests if digest[:16] in seen}


def count_outcomes(refused: Sequence[PreparedVolume], evaluated: Evaluated) -> Counter[str]:
    """Count volumes that were evaluated, refused by reason, and failed by kind of failure."""
    outcomes = Counter({"evaluated": len(evaluated.rows)})
    outcomes.update(str(volume.reason) for volume in refused)
    # A failure begins with "storage:" or "internal error,".
    kinds = [failure.partition(":")[0].partition(",")[0] for failure in evaluated.failures.values()]
    outcomes.update(kind.replace(" ", "_") for kind in kinds)
    return outcomes


def has_failures(outcomes: Counter[str]) -> bool:
    """Return whether the metrics lack a volume that belongs to them."""
    return any(outcomes[failure] for failure in FAILURES)


def describe_outcomes(outcomes: Counter[str]) -> str:
    """Return the outcomes as one line."""
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
