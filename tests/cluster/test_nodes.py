"""A head without CPUs, and worker nodes that share no disk: as on one node.

``make faults SUITE=nodes`` kills, adds and drains nodes.
"""

import re
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from node_callers import PATIENCE_S, PORT, Callers, num_replicas, wait_until
from nodes import Nodes, reason_to_skip, started_nodes
from running import S3
from screening_runs import Screening
from serving_runs import check_equals_row
from training_runs import (
    RECIPE,
    TOLERANCE,
    TrainingRun,
    cut_newest_checkpoint,
    largest_difference,
    training_of,
    trains,
)

from covtanet.evaluation import rows
from infra.local.endpoint import SERVE_ENVIRONMENT, start_endpoint, write_config
from infra.local.jobs import start_job
from infra.local.services import is_healthy

WORKER = "10.77.0.2"
# Of the node that the tests of screenings add. The endpoint holds two others.
CPUS_OF_LAST = 5


@pytest.fixture(scope="module")
def nodes(
    s3: S3, trained: TrainingRun, screening: Screening, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nodes]:
    """Three workers of one CPU: what needs two CPUs runs on two nodes.

    They reach an S3 server with the buckets of the session's, which is started after its data is
    there: it remembers what it listed.
    """
    if reason := reason_to_skip():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("nodes")
    variables = {**SERVE_ENVIRONMENT, "COVTANET_SERVE_CONFIG": str(folder / "serve.toml")}
    with started_nodes(
        folder, s3.folder.parent, 0, 1, 1, 1, with_dashboard=True, variables=variables
    ) as started:
        started.start_tracker()
        yield started


def test_training_on_two_nodes_that_is_killed_and_continued_equals_that_of_one_node(
    nodes: Nodes, trained: TrainingRun
) -> None:
    """Its driver is killed and its newest checkpoint cut; the same command goes on."""
    training = training_of("on-nodes", nodes, more="phases = [1]")
    job = training.start()
    job.wait_for(training.has_epochs(1, 3))
    assert [trains(node) for node in nodes.nodes].count(True) == 2
    job.kill()
    cut_newest_checkpoint(training)
    output = training.run()
    assert "phase 1 continues after epoch" in output, "the training began anew"
    assert "a checkpoint is left out" in output, "the cut checkpoint was taken"
    apart, name = largest_difference(training, trained, phases=(1,))
    assert apart <= TOLERANCE, f"{name} differs by {apart:g}"


def test_evaluation_on_another_node_than_the_driver_equals_that_of_one_node(
    nodes: Nodes, trained: TrainingRun
) -> None:
    expected = rows_by_volume(trained.fold / "evaluation.parquet")
    fold = trained.fold.relative_to(trained.stored)
    job = start_job(
        nodes.environment, "evaluate.py", "--model", f"{trained.storage}/{fold}/model",
        "--dataset", "mosmed", "--data", trained.data, "--out", "s3://bucket/evaluated-on-nodes",
        inside=nodes.head.inside,
    )  # fmt: skip
    assert job.finish() == 0, job.output
    found = rows_by_volume(nodes.bucket / "bucket" / "evaluated-on-nodes" / "rows.parquet")
    assert len(expected) == 5
    for volume, row in expected.items():
        assert found[volume] == {**row, "fold": None}


def rows_by_volume(path: Path) -> dict[str, rows.Row]:
    return {row["volume"]: row for row in rows.from_parquet(path.read_bytes())}


def test_endpoint_on_two_nodes_answers_with_the_values_of_one_node(
    nodes: Nodes, screening: Screening
) -> None:
    """One has the replica of the API, another one that of the model, and both have a proxy."""
    job = next(
        row for row in screening.clean.to_pylist()
        if (row["status"], row["source_format"]) == ("screened", "nifti")
    )  # fmt: skip
    body = (screening.bucket / job["source_uri"].removeprefix("s3://bucket/")).read_bytes()
    token = secrets.token_urlsafe(32)
    write_config(
        nodes.folder / "serve.toml", token, model=str(screening.folder / "model"), ledger="",
        places=(), config=str(screening.folder / "screening.toml"),
    )  # fmt: skip
    callers = Callers(nodes.head, token, [body])
    with callers.session() as session:
        endpoint = start_endpoint(
            nodes.environment, PORT, nodes.folder / "serve.log", token,
            host="0.0.0.0", inside=nodes.head.inside, timeout_s=PATIENCE_S,
        )  # fmt: skip
        try:
            replicas = {node.address: num_replicas(node) for node in nodes.nodes}
            serving = [address for address, counts in replicas.items() if any(counts)]
            assert sorted(replicas[address] for address in serving) == [[0, 1], [1, 0]]
            for address in serving:
                url = f"http://{address}:{PORT}/readyz"
                wait_until(partial(is_healthy, url), f"{address} has no proxy")
                status, answer, _ = callers.ask(session, address, 0)
                assert status == 200, answer
                check_equals_row(answer, job, is_uploaded=True)
        finally:
            endpoint.service.stop()


@pytest.fixture(scope="module")
def on_nodes(nodes: Nodes, screening: Screening) -> Screening:
    """Screenings whose driver runs on the head, with room for them on four nodes."""
    nodes.add_worker(CPUS_OF_LAST)
    nodes.wait_until_seen()
    return replace(screening, environment=nodes.environment, inside=nodes.head.inside)


def test_screening_on_other_nodes_than_the_driver_equals_that_of_one_node(
    on_nodes: Screening, screening: Screening
) -> None:
    on_nodes.run("nodes", "--limit", "9", "--results", "s3://bucket/nodes-results")
    table = on_nodes.table("nodes")
    assert Counter(table["status"].to_pylist())["screened"] == 4
    of_one_node = screening.clean.filter(pc.is_in(screening.clean["series_key"], _keys(table)))
    replace(screening, clean=of_one_node).check_equal("nodes", table)


def _keys(table: pa.Table) -> pa.Array:
    return table["series_key"].combine_chunks()


def test_folders_of_the_head_alone_are_refused_before_anything_is_screened(
    on_nodes: Screening, nodes: Nodes
) -> None:
    archive, ledger = f"{nodes.data}/archive", f"{nodes.data}/ledger"
    nodes.head.run("mkdir", "-p", f"{archive}/PATIENT")
    output = on_nodes.run("refused", expect=3, archive=archive, ledger=ledger)
    for option in ("--archive", "--ledger"):
        (addresses,) = re.findall(rf"([\d., ]+) does not see {option}", output)
        assert WORKER in addresses.split(", ")
    assert "PATIENT" not in output
    assert nodes.head.run("find", ledger, "-type", "f") == ""


def test_folder_that_all_nodes_share_is_accepted(on_nodes: Screening, tmp_path: Path) -> None:
    output = on_nodes.run("shared", "--plan", ledger=str(tmp_path / "ledger"))
    assert "does not see" not in output
    assert list((tmp_path / "ledger").glob("_probe*")) == []


def test_training_with_an_sqlite_tracker_is_refused(nodes: Nodes, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(more="", decay=1.0))
    environment = {**nodes.environment, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    arguments = ("--config", str(recipe), "--data", "s3://bucket/none", "--storage")
    job = start_job(
        environment, "train.py", *arguments, "s3://bucket/none", inside=nodes.head.inside
    )
    assert job.finish() == 3, job.output
    assert "MLFLOW_TRACKING_URI is an SQLite file" in job.output
