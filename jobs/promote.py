"""Promote the challenger to champion where it is no worse on the same evaluation set.

python jobs/promote.py --dataset mosmed --data URI
python jobs/promote.py --force "first champion"

Both models are evaluated on the volumes that neither was trained on; every headline figure of the challenger must reach
the champion's less its margin. --force promotes without a comparison and writes the reason into the registry; the first
champion needs it. Exit codes: 0 promoted or champion already, 2 usage, 3 refused to start, 4 the challenger is worse.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import ray
from cluster import check_tracking, connect, parser, place, start_logging
from evaluate import add_data_options, predict, prepare, seen_volumes, volumes_of

from covtanet import tracking
from covtanet.errors import CheckpointError, ConfigError
from covtanet.evaluation import figures
from covtanet.evaluation.promotion import Comparison, Margins, compare
from covtanet.model.checkpoint import SavedModel, load_model
from covtanet.report.summary import table

logger = logging.getLogger("covtanet.promote")


def parse() -> argparse.Namespace:
    """Read the command line."""
    options, margins = parser(__doc__), Margins()
    add_data_options(options)
    options.add_argument("--version", help="version to promote; default: the one with the alias challenger")
    options.add_argument("--force", metavar="REASON", default="", help="promote without a comparison")
    for name, value in vars(margins).items():
        options.add_argument(f"--margin-{name}", type=float, default=value, help=f"default: {value:g}")
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
        logger.error("storage: %s", type(error).__name__)
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
    if arguments.force:
        return promote(version, champion, {"covtanet.promoted_by_force": arguments.force})
    if not champion:
        raise ConfigError("there is no champion to compare with; give a reason by --force for the first one")
    compared = evaluate_both(arguments, version, champion)
    lines = [(each.figure, _line(each)) for each in compared]
    print(table(f"Version {version} against champion {champion}", lines))
    worse = [each.figure for each in compared if not each.is_no_worse]
    if worse:
        logger.error("version %s is worse in %s; champion stays %s", version, ", ".join(worse), champion)
        return 4
    return promote(version, champion, {"covtanet.promoted_by_force": ""})


def champion_version() -> str:
    """The champion's version, empty where there is none."""
    try:
        return tracking.version_of("champion")
    except CheckpointError:
        return ""


def promote(version: str, champion: str, tags: dict[str, str]) -> int:
    """Move the alias and write down why."""
    tracking.set_version_tags(version, {**tags, "covtanet.champion_before": champion})
    tracking.set_alias(version, "champion")
    print(f"champion is version {version}, was {champion or 'none'}")
    return 0


def evaluate_both(arguments: argparse.Namespace, version: str, champion: str) -> list[Comparison]:
    """Headline figures of both on the same volumes, each prepared as its model asks."""
    _, labelled, root = volumes_of(arguments)
    models = {each: _load(each) for each in (version, champion)}
    connect()
    with tempfile.TemporaryDirectory() as folder:
        prepared_uri = place(arguments.storage, "--storage") if arguments.storage else folder
        volumes = {each: prepare(model, labelled, root, prepared_uri) for each, model in models.items()}
        sources = [
            {str(v.source_digest) for v in volumes[each]}
            - {str(v.source_digest) for v in volumes[each] if v.key in seen_volumes(models[each], volumes[each])}
            for each in models
        ]
        fair = sources[0] & sources[1]
        if not fair:
            raise ConfigError("no volume is left that neither model was trained on; evaluate on other data")
        logger.info("comparing on %d of %d volumes, which neither model was trained on", len(fair), len(labelled))
        found = {}
        for each, model in models.items():
            chosen = [volume for volume in volumes[each] if str(volume.source_digest) in fair]
            found[each] = figures.headline(predict(model, chosen, prepared_uri, ""))
    margins = Margins(**{name: getattr(arguments, f"margin_{name}") for name in vars(Margins())})
    return compare(found[version], found[champion], margins)


def _load(version: str) -> SavedModel:
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(f"models:/{tracking.MODEL_NAME}/{version}", Path(folder))
        return load_model(resolved.folder, resolved.digest)


def _line(each: Comparison) -> str:
    values = [("-" if value is None else f"{value:.4f}") for value in (each.challenger, each.champion)]
    return f"{values[0]} against {values[1]}, margin {each.margin:g}: {'no worse' if each.is_no_worse else 'worse'}"


if __name__ == "__main__":
    sys.exit(main())
