"""Nodes that are killed, cut off, added and drained in the middle of a run.

Each node has its own network, processes and disks; they share an S3 server alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from nodes import Node, Nodes, reason_to_skip, started_nodes
from saved_models import small_model
from screening_runs import CONFIG, Screening

from covtanet.model.saved_model import save_model
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]
CPUS_PER_NODE = 4
NUM_SOUND = 32


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head without CPUs; tests add the workers."""
    folder = tmp_path_factory.mktemp("node-faults")
    with started_nodes(folder, folder / "s3", 0, with_dashboard=True) as started:
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
    assert job.finish(400) == 0, job.output[-4000:]
    return f"after {num_rows} rows; {screening.check_equal(name)}"


@pytest.mark.parametrize("number", [0, 1])
def test_killed_node_changes_no_row(
    screening: Screening, workers: list[Node], seen: Callable[[str], None], number: int
) -> None:
    seen(run_disturbed(screening, f"killed-{number}", workers[number].kill))


def test_node_without_network_changes_no_row(
    screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    try:
        seen(run_disturbed(screening, "unplugged", workers[1].unplug))
    finally:
        workers[1].kill()


def test_added_node_changes_no_row(
    nodes: Nodes, screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    seen(run_disturbed(screening, "added", lambda: nodes.add_worker(CPUS_PER_NODE)))


def test_drained_node_changes_no_row(
    screening: Screening, workers: list[Node], seen: Callable[[str], None]
) -> None:
    seen(run_disturbed(screening, "drained", workers[1].terminate))
