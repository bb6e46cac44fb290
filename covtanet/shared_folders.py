"""Refuse folders and databases that only some nodes of a cluster have, before the work begins.

A path of this machine is as good as s3:// if every node mounts the same folder. Otherwise rows and
checkpoints would land on whichever node a worker runs, and the loss would show at the end. Not
covered: nodes that join later, and files that an index or a ledger names outside these folders.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from covtanet import storage
from covtanet.cluster import nodes_with_cpus
from covtanet.errors import ConfigError

SQLITE = "sqlite:"
# Enough to tell two folders apart; a folder may hold a million names.
NUM_NAMES = 100


def check_shared(written: Mapping[str, str], read: Mapping[str, str]) -> None:
    """Refuse a local location that a node with workers does not see as this process does.

    written, read: locations by the option that names them. A written location is tried with a file,
    a read one by its first names. One node that runs the driver too has nothing to share.

    Raises:
        ConfigError: names option and nodes, no path.
    """
    nodes = addresses_of_workers()
    if is_this_node_alone(nodes):
        return
    probes = {option: _names_of(uri) for option, uri in read.items() if _is_local(uri)}
    tokens: dict[str, str] = {}
    try:
        for option, uri in written.items():
            if _is_local(uri):
                tokens[option] = storage.join(uri, f"_probe-{uuid.uuid4().hex}")
                storage.write_bytes(tokens[option], b"")
                probes[option] = [tokens[option]]
        _refuse_missing(nodes, _find_missing(nodes, probes))
    finally:
        for token in tokens.values():
            storage.delete(token)


def check_tracking_shared(uri: str) -> None:
    """Refuse an SQLite file as tracking store if workers of other nodes log as well.

    Raises:
        ConfigError: each node would write a database of its own.
    """
    nodes = addresses_of_workers()
    if uri.startswith(SQLITE) and not is_this_node_alone(nodes):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI is an SQLite file, and workers of {len(nodes)} nodes would log "
            "to files of their own; expected the http(s):// address of an MLflow server"
        )


def addresses_of_workers() -> dict[str, str]:
    """Return the address of every living node that has CPUs, by its id."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes_with_cpus()}


def is_this_node_alone(nodes: Mapping[str, str]) -> bool:
    """Return whether all workers run on the node of this process."""
    return set(nodes) <= {ray.get_runtime_context().get_node_id()}


def _is_local(uri: str) -> bool:
    return bool(uri) and not storage.is_s3(uri) and not storage.is_dicomweb(uri)


def _names_of(folder: str) -> list[str]:
    """Return the folder and the paths of some names in it, in no order."""
    path = Path(folder)
    if not path.is_dir():
        # Missing here: the command says so itself.
        return []
    with os.scandir(path) as entries:
        return [folder, *(entry.path for entry in islice(entries, NUM_NAMES))]


def _find_missing(
    nodes: Mapping[str, str], probes: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the addresses of the nodes that miss a path, by option."""
    options = [option for option, paths in probes.items() if paths]
    if not options:
        return {}
    task = ray.remote(num_cpus=0)(_misses)
    paths = [list(probes[option]) for option in options]
    answers = []
    for node_id in nodes:
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        answers.append(task.options(scheduling_strategy=here).remote(paths))
    missing: dict[str, list[str]] = {}
    for address, misses in zip(nodes.values(), ray.get(answers), strict=True):
        for option, missed in zip(options, misses, strict=True):
            if _are_here(missed):
                missing.setdefault(option, []).append(address)
    return missing


def _are_here(missed: Sequence[str]) -> bool:
    """Return whether this node still has one of the paths: the others were removed meanwhile."""
    return any(map(os.path.lexists, missed))


def _misses(probes: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return of each list of paths those that this node does not see."""
    return [[path for path in paths if not os.path.lexists(path)] for paths in probes]


def _refuse_missing(nodes: Mapping[str, str], missing: Mapping[str, Sequence[str]]) -> None:
    if missing:
        found = "; ".join(
            f"{', '.join(addresses)} does not see {option}" for option, addresses in missing.items()
        )
        raise ConfigError(
            f"{found}: expected s3:// or a folder that all {len(nodes)} nodes with workers share"
        )
