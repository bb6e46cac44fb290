"""Train CovTANet in its two phases on Ray, fold by fold, and register the model as challenger.

covtanet train --config recipes/demo.toml --data URI --storage URI
ray job submit --working-dir . -- python jobs/train.py --config recipes/mosmed.toml

Started again, the same command goes on from the point at which the last one stopped. Runs and
models go to MLFLOW_TRACKING_URI; if that does not answer, the training goes on, and the command,
started again, logs and registers finished work.

Exit codes: 0 done and registered; 1 a fold failed, the tracker did not take everything, or storage,
Ray or this software failed: the same command continues; also 1 if a loss or gradient was NaN: then
the same seed would meet it again, so change the learning rate or the seed; 2 usage; 3 refused to
start.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from covtanet import tracking
from covtanet.cluster import wait_for_gpus
from covtanet.config import load_config
from covtanet.data.datasets import DATASETS, open_data
from covtanet.errors import ConfigError
from covtanet.experiments.experiment import Experiment, open_experiment, prepare_data
from covtanet.experiments.parallel import Result, train_all
from covtanet.experiments.publish import publish, register
from covtanet.experiments.variants import (
    ABLATION_ROWS,
    NETWORKS,
    ablation_variants,
    change,
    network_variants,
)
from covtanet.model.covtanet import CovTANet
from covtanet.report import data_report
from covtanet.runtime import (
    ExitCode,
    check_tracking,
    connect,
    location,
    parser,
    run_command,
)
from covtanet.shared_folders import check_shared, check_tracking_shared
from covtanet.training.config import TrainingConfig

logger = logging.getLogger("covtanet.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(run, parse(argv))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__, "train")
    options.add_argument(
        "--config", type=Path, required=True, help="TOML file with a [training] table"
    )
    options.add_argument(
        "--data", help="folder or s3:// prefix of the data set; default: the configuration's"
    )
    options.add_argument(
        "--storage",
        help="folder or s3:// prefix for everything that is kept; default: the configuration's",
    )
    options.add_argument(
        "--experiment",
        default="covtanet",
        help="MLflow experiment; also names the folder in storage",
    )
    options.add_argument(
        "--artifacts",
        default="",
        help="location of a new experiment's files; default: MLflow's",
    )
    options.add_argument(
        "--fold", type=int, action="append", help="train this fold only; may be repeated"
    )
    variants = options.add_mutually_exclusive_group()
    variants.add_argument(
        "--ablation",
        choices=ABLATION_ROWS,
        help="a row of Table I, or all: phase 1 alone, nothing is registered",
    )
    variants.add_argument(
        "--network",
        action="append",
        choices=NETWORKS,
        help="a row of Tables II to IV, or V8, the pretrained TA-SegNet; may be repeated; or all "
        "that the data set has truth for, without V8",
    )
    options.add_argument(
        "--encoder-weights", type=Path, help="V8: timm's ImageNet weights as a local .safetensors"
    )
    return options.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Open the experiment, train the folds that are not finished, publish, register."""
    check_tracking()
    loaded = load_config(arguments.config)
    data = arguments.data or loaded.places.data
    storage_uri = arguments.storage or loaded.places.storage
    if not data or not storage_uri:
        raise ConfigError("--data and --storage are needed, or the configuration's [places]")
    config = loaded.training
    if arguments.fold:
        config = change(config, folds=tuple(sorted(set(arguments.fold))))
    address = _address(arguments)
    # Ray Train asks the dashboard for its state.
    connect(with_dashboard=True)
    data = location(data, "--data")
    storage_uri = location(storage_uri, "--storage")
    check_shared(written={"--storage": storage_uri}, read={"--data": data})
    check_tracking_shared(address.uri)
    config = config.resolved(wait_for_gpus())
    experiment = _open(config, data, storage_uri, address)
    experiments = [
        replace(experiment, config=variant) for variant in _variants(config, arguments, experiment)
    ]
    with tracking.tolerated("the training"):
        # Before any of its children ask for the parent at the same time.
        tracking.open_run(experiment.run)
    is_published = _train(experiments, arguments.encoder_weights)
    if not is_published:
        return ExitCode.ERROR
    print(
        f"trained  {experiment.uri}\n"
        f"next     covtanet evaluate --model {experiment.uri} --out FOLDER"
    )
    return ExitCode.DONE


def _address(arguments: argparse.Namespace) -> tracking.RunAddress:
    artifacts = ""
    if arguments.artifacts:
        artifacts = location(arguments.artifacts, "--artifacts")
    return tracking.RunAddress(
        uri=tracking.tracking_uri(),
        experiment=arguments.experiment,
        name=arguments.experiment,
        key="",
        artifacts=artifacts,
    )


def _open(
    config: TrainingConfig, data_uri: str, storage_uri: str, address: tracking.RunAddress
) -> Experiment:
    source = open_data(config.dataset, data_uri)
    volumes = prepare_data(config, source, storage_uri)
    # Shown before the experiment is opened, which refuses data with unreadable volumes.
    print(data_report.as_text(volumes, DATASETS[config.dataset].notes), flush=True)
    return open_experiment(config, source, volumes, data_uri, storage_uri, address)


def _variants(
    config: TrainingConfig, arguments: argparse.Namespace, experiment: Experiment
) -> list[TrainingConfig]:
    variants = [config]
    if arguments.ablation:
        variants = ablation_variants(config, arguments.ablation)
    elif arguments.network:
        variants = network_variants(config, arguments.network, experiment.volumes.values())
    for variant in variants:
        # A missing library shows now, not after hours of training other networks.
        with torch.device("meta"):
            CovTANet(variant.architecture)
    return variants


def _train(experiments: Sequence[Experiment], encoder_weights: Path | None) -> bool:
    """Train all folds of all networks; return whether the tracker took everything.

    Raises:
        Exception: the first failure, after the other folds have been trained.
    """
    items = [(experiment, fold) for experiment in experiments for fold in experiment.config.folds]
    folds_left = Counter(experiment.config.network for experiment, _ in items)
    failures: list[Exception] = []
    is_published = True
    for result in train_all(items, encoder_weights):
        experiment, _, failure = result
        _log(result)
        if failure is not None:
            failures.append(failure)
            continue
        network = experiment.config.network
        folds_left[network] -= 1
        if folds_left[network]:
            with tracking.tolerated("the finished fold"):
                publish(experiment)
        else:
            is_published = _finish(experiment) and is_published
    if failures:
        raise failures[0]
    return is_published


def _log(result: Result) -> None:
    experiment, fold, failure = result
    if failure is None:
        logger.info("%s fold %d is trained and evaluated", experiment.config.network, fold)
    else:
        logger.error("%s fold %d: %s", experiment.config.network, fold, failure)


def _finish(experiment: Experiment) -> bool:
    """Publish a network, and register it if phase 2 was trained.

    Returns whether the tracker took it.
    """
    is_done = False
    with tracking.tolerated("the training"):
        publish(experiment)
        if experiment.config.phases == (1, 2):
            version, digest = register(experiment)
            name = tracking.MODEL_NAME
            print(f"registered {name} version {version} as challenger, digest {digest[:12]}")
        is_done = True
    if not is_done:
        logger.error(
            "trained, but the tracker did not take it: started again, the same command publishes it"
        )
    return is_done
