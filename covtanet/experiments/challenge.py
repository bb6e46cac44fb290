"""Comparison of challenger and champion on the volumes that neither model was trained on.

Volumes are compared in pairs, with intervals over patients (``evaluation.paired``).
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from covtanet.errors import ConfigError
from covtanet.evaluation import metrics
from covtanet.evaluation.paired import intervals
from covtanet.evaluation.pipeline import Evaluated
from covtanet.evaluation.promotion import Comparison, Margins, compare
from covtanet.experiments.model_evaluation import (
    FAILURES,
    PreparedData,
    count_outcomes,
    predict,
    seen_sources,
)
from covtanet.model.saved_model import SavedModel

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model that is compared, and the volumes as it reads them."""

    version: str
    model: SavedModel
    data: PreparedData


def compare_models(
    challenger: Contender, champion: Contender, prepared_uri: str, margins: Margins
) -> tuple[list[Comparison], Counter[str]]:
    """Compare headline metrics on the same volumes, each prepared as its model reads it.

    Also returned: how many volumes could not be evaluated by one or the other, by kind of failure.

    Raises:
        ConfigError: the comparison would not be fair, or too thin.
    """
    contenders = (challenger, champion)
    fair = _unseen(challenger) & _unseen(champion)
    logger.info(
        "comparing on %d of %d volumes, which neither model was trained on",
        len(fair),
        len(challenger.data.all_volumes),
    )
    if not fair:
        raise ConfigError(
            "no volume is left that neither model was trained on; evaluate on other data"
        )
    evaluations = {
        contender.version: _evaluate(contender, fair, prepared_uri) for contender in contenders
    }
    failures: Counter[str] = Counter()
    for contender in contenders:
        failures += count_outcomes(contender.data.refused, evaluations[contender.version])
    rows = _shared_rows(contenders, evaluations)
    headlines = {version: metrics.headline(shared) for version, shared in rows.items()}
    missing = [name for name in _required(champion) if name not in headlines[champion.version]]
    if missing:
        raise ConfigError(
            f"the evaluation set gives the champion no {', '.join(missing)}; "
            "use a set with every grade"
        )
    compared = compare(
        headlines[challenger.version],
        headlines[champion.version],
        margins,
        intervals(rows[challenger.version], rows[champion.version]),
    )
    return compared, Counter({kind: failures[kind] for kind in FAILURES if failures[kind]})


def _required(champion: Contender) -> list[str]:
    """Return the metrics of the champion without which a comparison says too little.

    Those that its model can give: a model whose diagnosis follows from the involvement has no
    probability of a severe infection.
    """
    names = ["dice"]
    for pair, (_, _, column) in metrics.PAIRS.items():
        by_burden = column == "p_infected" and champion.model.readout.burden is not None
        if champion.model.capabilities.diagnoses or by_burden:
            names.append(f"{pair}_auc")
    return names


def _evaluate(contender: Contender, fair: set[str], prepared_uri: str) -> Evaluated:
    chosen = [volume for volume in contender.data.volumes if str(volume.source_digest) in fair]
    return predict(contender.model, chosen, contender.data.source, prepared_uri, "")


def _shared_rows(
    contenders: tuple[Contender, Contender], evaluations: Mapping[str, Evaluated]
) -> dict[str, list[Row]]:
    """Return the rows of the volumes that both models could evaluate, by version.

    The models read a volume on grids of their own, so volumes are matched by source digest.
    """
    failed = set()
    for contender in contenders:
        failures = evaluations[contender.version].failures
        for volume in contender.data.volumes:
            if volume.key in failures:
                failed.add(str(volume.source_digest))
    return {
        version: [row for row in evaluated.rows if row["source_digest"] not in failed]
        for version, evaluated in evaluations.items()
    }


def _unseen(contender: Contender) -> set[str]:
    """Return source digests of the volumes that a model was not trained on.

    Raises:
        ConfigError: the model does not name its training volumes.
    """
    volumes = contender.data.volumes
    seen = seen_sources(contender.model, volumes)
    if seen is None:
        raise ConfigError(
            f"version {contender.version} does not say what it was trained on; promote by --force, "
            "with a reason"
        )
    return {str(volume.source_digest) for volume in volumes} - seen
