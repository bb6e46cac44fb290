"""Evaluation of a saved model on a labelled data set, and the count of its outcomes."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from covtanet.data import stacks
from covtanet.data.datasets import read_volumes, root_of
from covtanet.data.labels import LabelledVolume
from covtanet.data.prepared import PreparedVolume
from covtanet.evaluation.pipeline import Evaluated, Task, evaluate_each
from covtanet.experiments.preparation import prepare_volumes
from covtanet.inference.predictor import window_of
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

# Distance of slices for a model without a slice_step_mm.
DEFAULT_STEP_MM = 2.5
# Outcomes that are no fault of the volume: the metrics lack a volume that belongs to them.
FAILURES = ("storage", "internal_error")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Labelled volumes to evaluate on."""

    name: str
    """Layout of the data set, or ``images``."""
    volumes: Sequence[LabelledVolume]
    root: str
    """Folder that relative paths refer to."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Volumes as one model reads them, and those that are refused."""

    volumes: list[PreparedVolume]
    refused: list[PreparedVolume]

    @property
    def all_volumes(self) -> list[PreparedVolume]:
        """All volumes in the order of their keys."""
        return sorted([*self.volumes, *self.refused], key=lambda volume: volume.key)


def open_data(dataset: str, data_uri: str) -> DataSource:
    """Return the volumes of a data set of a named layout."""
    return DataSource(name=dataset, volumes=read_volumes(dataset, data_uri), root=root_of(data_uri))


def open_images(images_uri: str, masks_uri: str) -> DataSource:
    """Return the images of a folder that have a mask in another folder."""
    return DataSource(name="images", volumes=stacks.pair(images_uri, masks_uri), root=images_uri)


def prepare_for(model: SavedModel, source: DataSource, prepared_uri: str) -> PreparedData:
    """Prepare volumes as a model reads them."""
    step_mm = model.preprocessing.slice_step_mm
    if step_mm is None:
        step_mm = DEFAULT_STEP_MM
    volumes = prepare_volumes(
        source.volumes, source.root, prepared_uri, window_of(model), step_mm, refuses_unread=True
    )
    refused = [volume for volume in volumes if volume.reason]
    for volume in refused:
        logger.warning("volume %s is refused: %s", volume.key, volume.reason)
    return PreparedData(
        volumes=[volume for volume in volumes if not volume.reason], refused=refused
    )


def predict(
    model: SavedModel, volumes: Sequence[PreparedVolume], prepared_uri: str, pictures_uri: str
) -> Evaluated:
    """Return a model's rows; without diagnosis, only for volumes with a lesion mask."""
    if not model.capabilities.diagnoses:
        volumes = [volume for volume in volumes if volume.lesion_px is not None]
    task = Task(
        model=model,
        network=str(model.provenance.get("network", "V7")),
        fold=None,
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
