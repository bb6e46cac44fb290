"""Promote the challenger to champion if it is no worse on the same evaluation set.

covtanet promote --dataset mosmed --data URI
covtanet promote --force "first champion"

Both models are evaluated on the volumes that neither was trained on. No headline metric of the
challenger may be lower than the champion's by more than its margin, nor may the 95 % interval of
the difference reach below that. The interval is paired, over patients; few patients make it wide.
The comparison is printed and written on the version as tags. --force promotes without a comparison
and writes the reason into the registry; the first champion needs it. A volume that cannot be
evaluated by both does not stop the comparison of the others, but nothing is promoted then.
`python jobs/promote.py` is the same command.

Exit codes: 0 promoted or champion already; 1 storage, Ray or this software failed: the same
command tries again; 2 usage; 3 refused to start; 4 not promoted: the challenger is worse or may be
worse, or some volumes could not be evaluated, see the log.
"""

import argparse
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from covtanet import storage, tracking
from covtanet.cluster import wait_for_gpus
from covtanet.commands.evaluate import add_data_options, data_locations, open_source
from covtanet.data.datasets import DataSource
from covtanet.errors import CheckpointError, ConfigError
from covtanet.evaluation.promotion import Comparison, Margins
from covtanet.experiments.challenge import Contender, compare_models
from covtanet.experiments.model_evaluation import describe_outcomes, prepare_for
from covtanet.model.saved_model import SavedModel, load_model
from covtanet.report import data_report
from covtanet.report.summary import table
from covtanet.runtime import (
    ExitCode,
    check_tracking,
    connect,
    location,
    parser,
    run_command,
)
from covtanet.shared_folders import check_shared

logger = logging.getLogger("covtanet.promote")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, parse(argv))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "promote")
    add_data_options(options)
    options.add_argument(
        "--version", help="version to promote; default: the one with the alias challenger"
    )
    options.add_argument(
        "--force", metavar="REASON", default="", help="promote without a comparison"
    )
    for name, value in vars(Margins()).items():
        options.add_argument(
            f"--margin-{name}", type=float, default=value, help=f"default: {value:g}"
        )
    return options.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Compare, and move the alias."""
    check_tracking()
    version = arguments.version or tracking.version_of("challenger")
    champion = _champion_version()
    if version == champion:
        print(f"version {version} is the champion already")
        return ExitCode.DONE
    # A model that cannot be loaded is no champion, whatever the reason given.
    challenger_model = _load(version)
    if arguments.force:
        return _promote(version, champion, {"covtanet.promoted_by_force": arguments.force})
    if not champion:
        raise ConfigError(
            "there is no champion to compare with; give a reason by --force for the first one"
        )
    models = {version: challenger_model, champion: _load(champion)}
    comparisons, failures = evaluate_both(arguments, models)
    lines = [(comparison.metric, str(comparison)) for comparison in comparisons]
    print(table(f"Version {version} against champion {champion}", lines))
    tags = {f"covtanet.compared_{metric}": text for metric, text in lines}
    tags["covtanet.compared_with"] = champion
    objections = _objections(comparisons)
    if objections:
        logger.error(
            "version %s %s; champion stays %s", version, " and ".join(objections), champion
        )
    elif failures:
        # The challenger may be worse in the very volumes that could not be evaluated.
        logger.error(
            "not promoted, the comparison lacks volumes: %s; champion stays %s",
            describe_outcomes(failures),
            champion,
        )
    if objections or failures:
        tracking.tag_version(version, tags)
        return ExitCode.BELOW_BOUND
    return _promote(version, champion, {**tags, "covtanet.promoted_by_force": ""})


def _objections(comparisons: Sequence[Comparison]) -> list[str]:
    """Return why the challenger may not replace the champion; empty if it is no worse."""
    worse = [comparison.metric for comparison in comparisons if comparison.is_worse]
    uncertain = [
        f"{comparison.metric} ({comparison.interval})"
        for comparison in comparisons
        if not comparison.is_no_worse and not comparison.is_worse
    ]
    objections = []
    if worse:
        objections.append(f"is worse in {', '.join(worse)}")
    if uncertain:
        objections.append(f"may be worse in {', '.join(uncertain)}")
    return objections


def _champion_version() -> str:
    """Return the champion's version; empty without a champion."""
    try:
        return tracking.version_of("champion")
    except CheckpointError:
        return ""


def _promote(version: str, champion: str, tags: Mapping[str, str]) -> int:
    """Move the alias and write down why."""
    tracking.promote(version, {**tags, "covtanet.champion_before": champion})
    print(f"champion is version {version}, was {champion or 'none'}")
    return ExitCode.DONE


def _load(version: str) -> SavedModel:
    with tempfile.TemporaryDirectory() as folder:
        resolved = tracking.resolve_model(f"models:/{tracking.MODEL_NAME}/{version}", Path(folder))
        return load_model(resolved.folder, resolved.digest)


def evaluate_both(
    arguments: argparse.Namespace, models: Mapping[str, SavedModel]
) -> tuple[list[Comparison], Counter[str]]:
    """Compare challenger and champion, in this order, on the data that the options name.

    Returns the comparisons, and how many volumes could not be evaluated by kind of failure.
    """
    if os.environ.get("RAY_ADDRESS") and not arguments.storage:
        raise ConfigError(
            "on a cluster --storage is needed, so that every node finds the prepared volumes"
        )
    source = open_source(arguments)
    if len({model.preprocessing for model in models.values()}) > 1:
        logger.warning(
            "the two models read slices differently: grey values without a line to HU are counted "
            "at the input size of each"
        )
    connect()
    wait_for_gpus()
    margins = Margins(**{name: getattr(arguments, f"margin_{name}") for name in vars(Margins())})
    with tempfile.TemporaryDirectory() as folder:
        storage_uri = folder
        if arguments.storage:
            storage_uri = location(arguments.storage, "--storage")
        check_shared(written={"--storage": storage_uri}, read=data_locations(arguments))
        prepared_uri = storage.join(storage_uri, "prepared")
        challenger, champion = (
            _contender(version, model, source, prepared_uri) for version, model in models.items()
        )
        return compare_models(challenger, champion, prepared_uri, margins)


def _contender(version: str, model: SavedModel, source: DataSource, prepared_uri: str) -> Contender:
    data = prepare_for(model, source, prepared_uri)
    print(data_report.as_text(data.all_volumes, ()), flush=True)
    return Contender(version=version, model=model, data=data)
