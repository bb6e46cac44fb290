"""Nodes that are killed, cut off, added and drained in the middle of a run.

Each node has its own network, processes and disks; they share an S3 server alone.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nodes import Node, Nodes, processes, reason_to_skip, started_nodes
from saved_models import small_model
from screening_runs import CONFIG, Screening
from training_runs import (
    PHANTOMS,
    TOLERANCE,
    TrainingRun,
    largest_difference,
    training_of,
    trains,
)

from covtanet.model.saved_model import save_model
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_mosmed
from infra.local.jobs import Job, start_job

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]
CPUS_PER_NODE = 4
# Names of the processes of a decoder and a predictor that have a series.
DECODER, PREDICTOR = "MapWorker(Map(Decoder)).submit", "MapWorker(Map(PredictorWorker)).submit"
# A decoder that is stopped for a while has not used up its time.
PATIENT_CONFIG = CONFIG.replace("decode_timeout_s = 6", "decode_timeout_s = 300")
NUM_SOUND = 32


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without CPUs; tests add the workers."""
    folder = tmp_path_factory.mktemp("node-faults")
    with started_nodes(folder, folder / "s3", 0) as started:
        yield started


@pytest.fixture
def workers(nodes: Nodes) -> list[Node]:
    """Two worker nodes that live, and no others."""
    alive = [node for node in nodes.nodes[1:] if node.is_alive()]
    for node in alive[2:]:
        node.kill()
    while len(alive) < 2:
        alive.append(nodes.add_worker(CPUS_PER_NODE))
    nodes.wait_until_seen()
    return alive[:2]


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
    (nodes.folder / "screening.toml").write_text(PATIENT_CONFIG)
    phantoms = list(configs(NUM_SOUND, 21, size_px=128, num_slices=20))
    write_archive(str(bucket / "archive"), str(nodes.folder / "truth"), phantoms, 2)
    # Before jobs list the bucket, since the server remembers what it listed.
    write_mosmed(str(bucket / "labelled"), PHANTOMS, 2)
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
    assert job.finish(900) == 0, job.output[-4000:]
    elapsed_s = time.monotonic() - disturbed_at
    planned = ", planned anew" if "planning for the nodes left" in job.output else ""
    return f"after {num_rows} rows, then {elapsed_s:.0f} s{planned}; {screening.check_equal(name)}"


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


def test_added_node_gets_work_and_changes_no_row(
    nodes: Nodes, screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    """The pools grow to ``max_nodes``."""
    config = nodes.folder / "max-nodes.toml"
    config.write_text(f"{PATIENT_CONFIG}max_nodes = 3\n")
    job = screening.start("added", "--config", str(config))
    # With its plan made: as many workers as two nodes have room for. They are stopped until the
    # new node has worked: they might finish all series before.
    job.wait_for(lambda: stop_actors(workers).count(DECODER) == 3)
    node = nodes.add_worker(CPUS_PER_NODE)
    added_at = time.monotonic()
    idle = {DECODER, PREDICTOR}

    def have_worked() -> bool:
        stop_actors(workers)
        titles = processes(node)
        idle.difference_update([title for title in idle if title in titles])
        return not idle

    job.wait_for(have_worked)
    actors_s = time.monotonic() - added_at
    for other in workers:
        signal_actors(other, "CONT")
    assert job.finish(900) == 0, job.output[-4000:]
    elapsed_s = time.monotonic() - added_at
    seen(
        f"both pools worked on it after {actors_s:.0f} s, the end came after {elapsed_s:.0f} s; "
        f"{screening.check_equal('added')}"
    )


def stop_actors(nodes: list[Node]) -> str:
    """Stop the decoders and predictors that have a series; return all names of processes."""
    for node in nodes:
        signal_actors(node, "STOP")
    return "".join(processes(node) for node in nodes)


def signal_actors(node: Node, name: str) -> None:
    """Send a signal to the decoders and predictors of a node that have a series."""
    subprocess.run([*node.inside, "pkill", f"-{name}", "-f", r"MapWorker.Map.*submit"], check=False)


def test_lost_node_that_nobody_replaces_changes_no_row(
    screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    """Only sometimes a stage gets no CPU on the other node: a stopped predictor is as a stage
    without workers.
    """

    def lose_one() -> None:
        # Ray may put both predictors on one node.
        left, lost = sorted(workers, key=lambda node: "PredictorWorker" not in processes(node))
        lost.kill()
        left.run("pkill", "-STOP", "-f", "MapWorker.Map.PredictorWorker")

    summary = run_disturbed(screening, "unreplaced", lose_one)
    assert "planned anew" in summary
    seen(summary)


def test_killed_node_of_an_evaluation_changes_no_table(
    nodes: Nodes, screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    bucket = nodes.bucket / "bucket"

    def start(out: str) -> Job:
        arguments = ("--model", str(nodes.folder / "model"), "--out", f"s3://bucket/{out}")
        labelled = ("--dataset", "mosmed", "--data", "s3://bucket/labelled")
        return start_job(
            nodes.environment, "evaluate.py", *arguments, *labelled, inside=nodes.head.inside
        )

    clean = start("evaluated")
    assert clean.finish() == 0, clean.output[-4000:]
    job = start("evaluated-killed")
    out = bucket / "evaluated-killed"
    job.wait_for(lambda: len(list(out.glob("pictures/*.png"))) >= 2)
    num_pictures = len(list(out.glob("pictures/*.png")))
    (node,) = (node for node in workers if "MapWorker(Map(_Evaluator))" in processes(node))
    node.kill()
    killed_at = time.monotonic()
    assert job.finish(900) == 0, job.output[-4000:]
    elapsed_s = time.monotonic() - killed_at
    for name in ("tables.md", "metrics.json", "metrics.csv"):
        expected = (bucket / "evaluated" / name).read_bytes()
        assert (out / name).read_bytes() == expected, name
    seen(f"after {num_pictures} volumes, then {elapsed_s:.0f} s; the same tables and metrics")


@pytest.fixture
def small_nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Three workers with one CPU each."""
    with started_nodes(tmp_path, tmp_path / "s3", 0, 1, 1, 1, with_dashboard=True) as started:
        started.start_tracker()
        yield started


def test_killed_node_of_a_training_changes_no_curve(
    small_nodes: Nodes, seen: Callable[[str], None]
) -> None:
    """Two workers train, on two nodes, and the third node feeds them."""
    bucket = small_nodes.bucket / "bucket"
    write_mosmed(str(bucket / "mosmed"), PHANTOMS, 2)
    clean = training_of("clean", small_nodes)
    clean.run(timeout_s=900)
    training = training_of("killed", small_nodes)
    job = training.start()
    job.wait_for(training.has_epochs(1, 2), 600)
    (first, second) = (node for node in small_nodes.nodes if trains(node))
    second.kill()
    # Another machine takes its place, as Kubernetes would have it.
    small_nodes.add_worker(1)
    assert job.finish(900) == 0, job.output[-4000:]
    assert "phase 1 continues after epoch" in job.output
    seen(f"killed {second.address}, not {first.address}; {check_same(training, clean)}")


def test_elastic_training_goes_on_without_a_killed_node(
    small_nodes: Nodes, seen: Callable[[str], None]
) -> None:
    """Three workers train on three nodes; two go on, one of which has two of the three lanes."""
    write_mosmed(str(small_nodes.bucket / "bucket" / "mosmed"), PHANTOMS, 2)
    clean, training = (elastic_training(name, small_nodes) for name in ("one", "elastic"))
    recipe = clean.recipe.read_text()
    clean.recipe.write_text(recipe.replace("num_workers = 3\nmin_workers = 1", "num_workers = 1"))
    clean.run(timeout_s=900)
    job = training.start()
    job.wait_for(training.has_epochs(1, 2), 600)
    (*_, last) = (node for node in small_nodes.nodes if trains(node))
    last.kill()
    killed_at = time.monotonic()
    job.wait_for(training.has_finished(1), 600)
    elapsed_s = time.monotonic() - killed_at
    assert job.finish(900) == 0, job.output[-4000:]
    assert "phase 1 continues after epoch" in job.output
    far = losses_apart(training, clean)
    assert far <= 1e-3
    seen(f"phase 1 ended {elapsed_s:.0f} s later; losses differ by at most {far:.1g}")


def elastic_training(name: str, nodes: Nodes) -> TrainingRun:
    """Return a training of three lanes, by one to three workers."""
    training = training_of(name, nodes)
    recipe = training.recipe.read_text().replace('size = "small"', 'size = "tiny"')
    # More epochs than pass until a node is killed.
    recipe = recipe.replace("num_epochs = 4", "num_epochs = 8")
    recipe = recipe.replace("micro_batches = 2", "micro_batches = 3")
    # Other numbers of workers add up in another order, and large steps magnify what that changes.
    recipe = recipe.replace("4e-3", "1e-4").replace("1e-3", "1e-4")
    training.recipe.write_text(
        recipe.replace("num_workers = 2", "num_workers = 3\nmin_workers = 1")
    )
    return training


def check_same(training: TrainingRun, clean: TrainingRun) -> str:
    """Check the weights against those of another training; return how far losses are apart."""
    apart, name = largest_difference(training, clean, (1, 2))
    assert apart <= TOLERANCE, f"{name} differs by {apart:g}"
    return f"losses differ by at most {losses_apart(training, clean):.1g}"


def losses_apart(training: TrainingRun, clean: TrainingRun) -> float:
    """Return the largest difference of two trainings' losses."""
    losses = zip(training.losses(), clean.losses(), strict=True)
    return max(abs(loss - expected) for loss, expected in losses)
