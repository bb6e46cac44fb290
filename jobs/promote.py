"""Promote the challenger to champion where it is no worse on the same evaluation set.

python jobs/promote.py --dataset mosmed --data URI
python jobs/promote.py --force "first champion"

Both models are evaluated on the volumes that neither was trained on; every headline figure of the challenger must reach
the champion's less its margin. --force promotes without a comparison and writes the reason into the registry; the first
champion needs it. A volume that cannot be evaluated by both does not stop the comparison of the others, but nothing is
promoted then. Exit codes: 0 promoted or champion already, 2 usage, 3 refused to start, 4 the challenger is worse,
1 some volumes could not be evaluated, or anything else; the same command tries again.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ray
from cluster import check_tracking, connect, parser, place, start_logging
from evaluate import FAILURES, add_data_options, count, predict, prepare, seen_volumes, volumes_of

from covtanet import storage, tracking
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import CheckpointError, ConfigError
from covtanet.evaluation import figures
from covtanet.evaluation.pipeline import Evaluated
from covtanet.evaluation.promotion import Comparison, Margins, compare
from covtanet.model.checkpoint import SavedModel, load_model
from covtanet.report.summary import table

logger = logging.getLogger("covtanet.promote")

# Without these a comparison says too little.
NEEDED = ("dice", *(f"{pair}_auc" for pair in figures.PAIRS))


def parse() -> argparse.Namespace:
    """Read the command line."""
    options, margins = parser(__doc__), Margins()
    add_data_options(options)
    options.add_argument(
        "--version", help="version to promote; default: the one with the alias challenger"
    )
    options.add_argument(
        "--force", metavar="REASON", default="", help="promote without a comparison"
    )
    for name, value in vars(margins).items():
        options.add_argument(
            f"--margin-{name}", type=float, default=value, help=f"default: {value:g}"
        )
    return options.parse_args()


def main() -> int:
    """Run the job; what refuses to start is told in one line."""
    arguments = parse()
    start_logging()
    try:
        return run(arguments)
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        return 3
    except OSError as error:
        logger.error("storage: %s", type(getattr(error, "cause", None) or error).__name__)
        return 1
    except ray.exceptions.RayError as error:  # its text may name a study
        logger.error(
            "Ray: %s; the same command tries again",
            type(getattr(error, "cause", None) or error).__name__,
        )
        return 1
    finally:
        ray.shutdown()


def run(arguments: argparse.Namespace) -> int:
    """Compare, and move the alias."""
    check_tracking()
    version = arguments.version or tracking.version_of("challenger")
    champion = champion_version()
    if version == champion:
        print(f"version {version} is the champion already")
        return 0
    models = {version: _load(version)}  # what cannot be loaded is no champion, whatever the reason
    if arguments.force:
        return promote(version, champion, {"covtanet.promoted_by_force": arguments.force})
    if not champion:
        raise ConfigError(
            "there is no champion to compare with; give a reason by --force for the first one"
        )
    models[champion] = _load(champion)
    compared, failures = evaluate_both(arguments, models)
    lines = [(each.figure, _line(each)) for each in compared]
    print(table(f"Version {version} against champion {champion}", lines))
    worse = [each.figure for each in compared if not each.is_no_worse]
    if worse:
        logger.error(
            "version %s is worse in %s; champion stays %s", version, ", ".join(worse), champion
        )
        return 4
    if failures:  # what could not be read may be what the challenger is worse in
        counted = ", ".join(f"{number} {outcome}" for outcome, number in sorted(failures.items()))
        logger.error(
            "not promoted, the comparison lacks volumes: %s; champion stays %s", counted, champion
        )
        return 1
    return promote(version, champion, {"covtanet.promoted_by_force": ""})


def champion_version() -> str:
    """The champion's version, empty where there is none."""
    try:
        return tracking.version_of("champion")
    except CheckpointError:
        return ""


def promote(version: str, champion: str, tags: dict[str, str]) -> int:
    """Move the alias and write down why."""
    tracking.promote(version, {**tags, "covtanet.champion_before": champion})
    print(f"champion is version {version}, was {champion or 'none'}")
    return 0


def evaluate_both(
    arguments: argparse.Namespace, models: dict[str, SavedModel]
) -> tuple[list[Comparison], Counter[str]]:
    """Headline figures of challenger and champion on the same volumes, each prepared as its model asks.

    Also returned: how many volumes could not be evaluated by one or the other, by kind of failure.

    Raises:
        ConfigError: where that would be no fair comparison, or too thin a one.
    """
    if os.environ.get("RAY_ADDRESS") and not arguments.storage:
        raise ConfigError(
            "on a cluster --storage is needed, where every node finds the prepared volumes"
        )
    _, labelled, root = volumes_of(arguments)
    windows = {str(model.preprocessing) for model in models.values()}
    if len(windows) > 1:
        logger.warning("the two models read slices differently: each is measured on its own grid")
    connect()
    with tempfile.TemporaryDirectory() as folder:
        kept = place(arguments.storage, "--storage") if arguments.storage else folder
        prepared_uri = storage.join(kept, "prepared")
        volumes, failures = {}, Counter[str]()
        for each, model in models.items():
            volumes[each], refused = prepare(model, labelled, root, prepared_uri)
            failures += count(refused, Evaluated(rows=[], failures={}))
        fair = set.intersection(
            *(unseen(each, model, volumes[each]) for each, model in models.items())
        )
        logger.info(
            "comparing on %d of %d volumes, which neither model was trained on",
            len(fair),
            len(labelled),
        )
        if not fair:
            raise ConfigError(
                "no volume is left that neither model was trained on; evaluate on other data"
            )
        evaluated, unanswered = [], set[str]()
        for each, model in models.items():
            chosen = [volume for volume in volumes[each] if str(volume.source_digest) in fair]
            found = predict(model, chosen, prepared_uri, "")
            evaluated.append(found)
            failures += count([], replace(found, rows=[]))
            unanswered |= {
                str(volume.source_digest) for volume in chosen if volume.key in found.failures
            }
    shared = [
        [row for row in each.rows if row["source_digest"] not in unanswered] for each in evaluated
    ]
    headlines = [figures.headline(rows) for rows in shared]
    if missing := [name for name in NEEDED if name not in headlines[1]]:
        raise ConfigError(
            f"the evaluation set gives the champion no {', '.join(missing)}; take one with every grade"
        )
    margins = Margins(**{name: getattr(arguments, f"margin_{name}") for name in vars(Margins())})
    failures = Counter({outcome: failures[outcome] for outcome in FAILURES if failures[outcome]})
    return compare(headlines[0], headlines[1], margins), failures


def unseen(version: str, model: SavedModel, volumes: list[PreparedVolume]) -> set[str]:
    """Source digests of the volumes that a model was not trained on.

    Raises:
        ConfigError: where the model does not say what it was trained on.
    """
    seen = seen_volumes(model, volumes)
    if seen is None:
        raise ConfigError(
            f"version {version} does not say what it was trained on; promote by --force, with a reason"
        )
    return {str(volume.source_digest) for volume in volumes} - seen


def _load(version: str) -> SavedModel:
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(f"models:/{tracking.MODEL_NAME}/{version}", Path(folder))
        return load_model(resolved.folder, resolved.digest)


def _line(each: Comparison) -> str:
    values = [
        ("-" if value is None else f"{value:.4f}") for value in (each.challenger, each.champion)
    ]
    return f"{values[0]} against {values[1]}, margin {each.margin:g}: {'no worse' if each.is_no_worse else 'worse'}"


if __name__ == "__main__":
    sys.exit(main())
