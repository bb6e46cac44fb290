"""Nodes that are killed, cut off, added and drained in the middle of a run.

Each node has its own network, processes and disks; they share an S3 server alone.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nodes import Node, Nodes, reason_to_skip, started_nodes
from saved_models import small_model
from screening_runs import CONFIG, Screening
from training_runs import (
    PHANTOMS,
    TOLERANCE,
    TrainingRun,
    TrainingSetup,
    largest_difference,
)

from covtanet.model.saved_model import save_model
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_mosmed

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]
CPUS_PER_NODE = 4
NUM_SOUND = 32


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without CPUs; tests add the workers."""
    folder = tmp_path_factory.mktemp("node-faults")
    with started_nodes(folder, folder / "s3", 0) as started:
        yield started


@pytest.fixture
def workers(nodes: Nodes) -> list[Node]:
    """Two worker nodes that live."""
    alive = [node for node in nodes.nodes[1:] if node.is_alive()]
    while len(alive) < 2:
        alive.append(nodes.add_worker(CPUS_PER_NODE))
    return alive


@pytest.fixture(scope="module")
def screening(nodes: Nodes) -> Screening:
    """An archive, and the ledger of a run on the head alone, by a Ray of its own."""
    bucket = nodes.bucket / "bucket"
    of_one_node = dict(nodes.environment)
    del of_one_node["RAY_ADDRESS"]
    screening = Screening(
        folder=nodes.folder, bucket=bucket, environment=of_one_node, inside=nodes.head.inside
    )
    save_model(nodes.folder / "model", small_model())
    (nodes.folder / "screening.toml").write_text(CONFIG)
    phantoms = list(configs(NUM_SOUND, 21, size_px=128, num_slices=20))
    write_archive(str(bucket / "archive"), str(nodes.folder / "truth"), phantoms, 2)
    screening.run("clean")
    screening.clean = screening.table("clean")
    return replace(screening, environment=nodes.environment)


def run_disturbed(screening: Screening, name: str, disturb: Callable[[], object]) -> str:
    """Disturb a run after its first rows; return a summary of its rows, checked."""
    job = screening.start(name)
    job.wait_for(lambda: screening.rows_done(name) >= 2)
    num_rows = screening.rows_done(name)
    disturb()
    disturbed_at = time.monotonic()
    assert job.finish(300) == 0, job.output[-4000:]
    elapsed_s = time.monotonic() - disturbed_at
    return f"after {num_rows} rows, then {elapsed_s:.0f} s; {screening.check_equal(name)}"


@pytest.mark.parametrize("loss", [Node.kill, Node.unplug, Node.terminate])
def test_lost_node_that_is_replaced_changes_no_row(
    loss: Callable[[Node], None],
    nodes: Nodes,
    screening: Screening,
    workers: list[Node],
    seen: Callable[[str], None],
) -> None:
    """Killed, cut off from the network, or drained. Another takes its place, as on Kubernetes."""

    def replace_one() -> None:
        loss(workers[1])
        nodes.add_worker(CPUS_PER_NODE)

    try:
        seen(run_disturbed(screening, loss.__name__, replace_one))
    finally:
        workers[1].kill()


def test_added_node_changes_no_row(
    nodes: Nodes, screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    seen(run_disturbed(screening, "added", lambda: nodes.add_worker(CPUS_PER_NODE)))


def test_lost_node_that_nobody_replaces_changes_no_row(
    screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    """The workers that start again would take all CPUs of the other node from some stage."""
    seen(run_disturbed(screening, "unreplaced", workers[1].kill))


@pytest.fixture
def small_nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Three workers with one CPU each: two train, on two nodes, and the third feeds them."""
    with started_nodes(tmp_path, tmp_path / "s3", 0, 1, 1, 1, with_dashboard=True) as started:
        started.start_tracker()
        yield started


def test_killed_node_of_a_training_changes_no_curve(
    small_nodes: Nodes, seen: Callable[[str], None]
) -> None:
    bucket = small_nodes.bucket / "bucket"
    write_mosmed(str(bucket / "mosmed"), PHANTOMS, 2)
    clean = training_of("clean", small_nodes)
    clean.run()
    training = training_of("killed", small_nodes)
    job = training.start()
    job.wait_for(training.has_epochs(1, 2))
    (first, second) = (node for node in small_nodes.nodes if trains(node))
    second.kill()
    # Another machine takes its place, as Kubernetes would have it.
    small_nodes.add_worker(1)
    assert job.finish() == 0, job.output[-4000:]
    assert "phase 1 continues after epoch" in job.output
    apart, name = largest_difference(training, clean, (1, 2))
    assert apart <= TOLERANCE, f"{name} differs by {apart:g}"
    losses = zip(training.losses(), clean.losses(), strict=True)
    far = max(abs(loss - expected) for loss, expected in losses)
    seen(f"killed {second.address}, not {first.address}; losses differ by at most {far:.1g}")


def training_of(name: str, nodes: Nodes) -> TrainingRun:
    """Return a training whose driver runs on the head."""
    setup = TrainingSetup(
        environment=nodes.environment, folder=nodes.folder, data="s3://bucket/mosmed"
    )
    return replace(
        setup.training(name),
        environment=nodes.environment,
        storage=f"s3://bucket/{name}",
        stored=nodes.bucket / "bucket" / name,
        inside=nodes.head.inside,
    )


def trains(node: Node) -> bool:
    """Return whether a worker of a training runs on a node."""
    return node.is_alive() and "RayTrainWorker" in node.run("ps", "ax")
