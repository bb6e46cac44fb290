"""Batches: records per caller, pages of them, committed ledgers, errors of storage and of Ray."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from covtanet import storage
from covtanet.ledger.batch import BatchRun
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.ledger.work import write_rows
from serve.app import api, build
from serve.batches import Batches, JobsUnavailableError, ModelNotAllowedError
from serve.refusals import BATCH_PROBLEMS
from serve.schemas import BatchRequest
from serve.settings import Caller, ServeConfig

ANN, BOB = Caller(name="ann", token_sha256="a" * 64), Caller(name="bob", token_sha256="b" * 64)


def settings(folder: Path, **more: Any) -> ServeConfig:
    return ServeConfig(callers=(ANN, BOB), ledger=str(folder), **more)


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    return Batches(settings(tmp_path))


def write(batches: Batches, caller: Caller, index: int) -> str:
    """Write the record of a committed batch with one row; return its id."""
    batch_id, today = f"{index:016x}", datetime.now(UTC).date()
    request = {"archive": "s3://hospital/ct", "run_date": today.isoformat()}
    ended = {
        "state": "committed",
        "counts": {"screened": 1},
        "series": 1,
        "run_id": batch_id,
        "exit_code": 0,
    }
    record = {
        "batch_id": batch_id,
        "asked": request,
        "jobs": ["one"],
        "submitted_at": f"{index:06}",
        "ended": ended,
    }
    batches.records.write(record, caller)
    storage.write_bytes(batches.records.uri(caller, "newest", f"{20_000 - index}-{batch_id}"), b"")
    return batch_id


def commit(batches: Batches, batch_id: str) -> None:
    run = BatchRun(run_id=batch_id, run_date=date(2026, 11, 26), begun_at=datetime.now(UTC))
    named = {"run_id": batch_id, "run_date": "2026-11-26", "begun_at": run.begun_at.isoformat()}
    storage.write_bytes(f"{batches.ledger}/_batches/{batch_id}.run", json.dumps(named).encode())
    path = Path(run.committed_uri(batches.ledger))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, LEDGER_SCHEMA, [])


def count_storage_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls of storage from here on, by function."""
    num_calls: Counter[str] = Counter()

    def spy(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(uri: str, *arguments: Any) -> Any:
            num_calls[name] += 1
            return real(uri, *arguments)

        return counted

    for name in ("read_bytes", "list_names", "exists"):
        monkeypatch.setattr(storage, name, spy(name, getattr(storage, name)))
    return num_calls


def test_page_of_batches_reads_only_the_records_of_that_page(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(200):
        write(batches, ANN, index)
        write(batches, BOB, 5000 + index)
    num_calls = count_storage_calls(monkeypatch)
    states = batches.page_of(ANN, 10, 50)
    expected_ids = [f"{index:016x}" for index in range(189, 139, -1)]
    assert [state.batch_id for state in states] == expected_ids
    assert num_calls == {"list_names": 1, "read_bytes": 50}


def test_record_that_is_not_json_is_left_out_of_the_list(batches: Batches) -> None:
    readable = write(batches, ANN, 1)
    broken = write(batches, ANN, 2)
    storage.write_bytes(batches.records.uri(ANN, f"{broken}.json"), b"{")
    assert [state.batch_id for state in batches.page_of(ANN, 0, 50)] == [readable]
    with pytest.raises(KeyError):
        batches.find(broken, ANN)


def test_batch_of_another_caller_raises_key_error(batches: Batches) -> None:
    with pytest.raises(KeyError):
        batches.find(write(batches, ANN, 1), BOB)


def test_ledgers_read_by_many_threads_at_once_raise_nothing(batches: Batches) -> None:
    """More ledgers than the cache holds: a thread may drop a ledger that another thread reads."""
    ids = [write(batches, ANN, index) for index in range(6)]
    for batch_id in ids:
        commit(batches, batch_id)
    errors: list[BaseException] = []

    def read(start: int) -> None:
        try:
            for index in range(300):
                batches.rows(ids[(start + index) % len(ids)], ANN)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_model_outside_the_configuration_is_refused(tmp_path: Path) -> None:
    batches = Batches(settings(tmp_path, models=("models:/covtanet@challenger",)))
    request = BatchRequest(archive="s3://hospital/ct", model="models:/covtanet/7")
    with pytest.raises(ModelNotAllowedError, match="does not name this model"):
        batches.submit(request, ANN, "")
    allowed = request.model_copy(update={"model": "models:/covtanet@challenger"})
    # The check lets it pass; without a Ray the submission fails at the job server.
    with pytest.raises(JobsUnavailableError, match="job server does not answer"):
        batches.submit(allowed, ANN, "")


def test_batch_writes_into_a_ledger_apart_from_the_nightly_runs(tmp_path: Path) -> None:
    batches = Batches(settings(tmp_path))
    values = {
        "archive": "s3://hospital/ct",
        "model": "",
        "run_date": "2026-11-26",
        "since": "last",
        "group_by": "",
    }
    command = batches.command({"batch_id": "0" * 16, "asked": {**values, "limit": 0}})
    assert command[command.index("--ledger") + 1] == f"{tmp_path}/_batches/ledger"
    assert command[command.index("--results") + 1] == f"{tmp_path}/_batches/ledger/_results"
    assert command[:2] == ["timeout", "--foreground"]
    assert command[3] == "86400"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (OSError("s3://hospital/Doe^Jane"), 503, "storage"),
        (ConnectionError("Doe^Jane"), 503, "storage"),
        (OSError(28, "Doe^Jane"), 503, "no_space"),
        (JobsUnavailableError("Doe^Jane"), 503, "jobs_unavailable"),
        (storage.AccessError("Doe^Jane"), 403, "storage_refuses"),
    ],
)
def test_os_errors_of_storage_and_ray_have_a_status_and_no_text(
    error: OSError, status: int, reason: str
) -> None:
    handler: Any = api.exception_handlers[OSError]
    answer = asyncio.run(handler(None, error))
    assert (answer.status_code, json.loads(answer.body)["reason"]) == (status, reason)
    assert b"Doe" not in answer.body
    assert ("retry-after" in answer.headers) == (status == 503)
    assert status in BATCH_PROBLEMS


def test_replica_reserves_cpus_and_memory_of_its_decoders(tmp_path: Path) -> None:
    options = build(settings(tmp_path, num_decoders=3))._bound_deployment.ray_actor_options
    assert (options["num_cpus"], options["memory"]) == (3, 3 * (3072 + 600) << 20)
