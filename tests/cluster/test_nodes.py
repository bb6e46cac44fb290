"""A head without CPUs and a worker node that share no disk.

``make faults SUITE=nodes`` kills, adds and drains nodes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from nodes import Nodes, reason_to_skip, started_nodes
from running import S3
from screening_runs import Screening
from training_runs import RECIPE

from infra.local.jobs import start_job

WORKER = "10.77.0.2"


@pytest.fixture(scope="module")
def nodes(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Both reach an S3 server with the buckets of the session's."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with started_nodes(tmp_path_factory.mktemp("nodes"), s3.folder.parent, 0, 4) as started:
        yield started


@pytest.fixture(scope="module")
def on_nodes(nodes: Nodes, screening: Screening) -> Screening:
    """Screenings whose driver runs on the head."""
    return replace(screening, environment=nodes.environment, inside=nodes.head.inside)


def test_screening_on_another_node_than_the_driver_equals_that_of_one_node(
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
        assert f"{WORKER} does not see {option}" in output
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
