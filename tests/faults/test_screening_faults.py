"""Screening under real kills, cuts and corruption, over phantoms in a real S3 server.

Unless a test says otherwise, the ledger of a disturbed run equals that of an undisturbed one.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from repository import ROOT
from screening_runs import (
    CHILD,
    DECODER,
    PREDICTOR,
    DeadlySeries,
    Screening,
    signal_one,
    write_archive_and_model,
)

from infra.local.jobs import start_job
from infra.local.services import Service, start_s3

# A scenario runs several jobs one after the other; each alone may take 500 s.
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


class Server:
    """An S3 server that may be killed and started again, at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service: Service = start_s3(folder / "s3", folder / "s3.log")
        self.environment = self.service.environment
        self.port = int(self.environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])

    def kill(self) -> None:
        """Kill the server as a crash would."""
        os.killpg(self.service.process.pid, signal.SIGKILL)

    def restart(self, **changes: str) -> None:
        """Stop the server if it runs, and start it again. changes: of its key or secret."""
        self.service.stop()
        log = self.folder / "s3.log"
        self.service = start_s3(self.folder / "s3", log, port=self.port, **changes)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("screening-faults"))
    yield started
    started.service.stop()


@pytest.fixture(scope="module")
def screening(
    server: Server, own_ray: Callable[..., dict[str, str]], module_environment: dict[str, str]
) -> Screening:
    """An archive, a Ray for this suite alone, and the ledger of an undisturbed run."""
    module_environment.update(server.environment)
    screening = Screening(
        folder=server.folder,
        bucket=server.folder / "s3" / "bucket",
        environment=own_ray(server.environment),
    )
    write_archive_and_model(screening)
    screening.run("clean")
    screening.clean = screening.table("clean")
    return screening


@pytest.mark.parametrize("worker", [DECODER, PREDICTOR])
def test_killed_worker_changes_no_row(
    screening: Screening, seen: Callable[[str], None], worker: str
) -> None:
    name = worker.strip("_").lower()
    job = screening.start(name)
    job.wait_for(lambda: screening.rows_done(name) >= 3)
    job.wait_for(signal_one(screening.environment, worker))
    assert job.finish() == 0, job.output[-3000:]
    seen(screening.check_equal(name))


def test_series_that_kills_its_worker_fails_as_worker_died(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    deadly = DeadlySeries(screening, "killer")
    job = deadly.screen()
    assert job.finish() in (0, 4), job.output[-3000:]
    rows = {row["series_key"]: row for row in screening.table("killer").to_pylist()}
    assert len(rows) == screening.clean.num_rows
    row = rows[deadly.key]
    assert (row["status"], row["reason"]) == ("failed", "worker_died")
    seen(f"{len(rows)} rows; failed: worker_died after {len(deadly.killed)} workers died")


def test_hanging_series_fails_as_timeout(screening: Screening, seen: Callable[[str], None]) -> None:
    """A decoder's child is stopped by a signal: the series that it reads never ends."""
    job = screening.start("hangs")
    job.wait_for(lambda: screening.rows_done("hangs") >= 2)
    job.wait_for(signal_one(screening.environment, CHILD, signal.SIGSTOP))
    code = job.finish()
    assert code in (0, 4), job.output[-3000:]
    rows = screening.table("hangs").to_pylist()
    reasons = Counter(row["reason"] for row in rows if row["status"] == "failed")
    assert reasons == {"timeout": 1}, reasons
    seen(f"{len(rows)} rows; one failed: timeout, exit code {code}")


def test_killed_decoder_child_changes_no_row(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    """A child that dies once, as if out of memory: the worker survives and reads again."""
    job = screening.start("child")
    job.wait_for(lambda: screening.rows_done("child") >= 2)
    job.wait_for(signal_one(screening.environment, CHILD))
    assert job.finish() == 0, job.output[-3000:]
    seen(screening.check_equal("child"))


def test_driver_killed_thrice_repeats_no_finished_series(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    """The driver dies at 10, 50 and 90 % of one run."""
    total = screening.clean.num_rows
    for share in (0.1, 0.5, 0.9):
        num_rows = share * total
        job = screening.start("driver")
        job.wait_for(lambda num_rows=num_rows: screening.rows_done("driver") >= num_rows)  # type: ignore[misc]
        job.kill()
        assert not screening.is_committed("driver"), "a run that died left a ledger"
        time.sleep(1)
    before = {key: row["screened_at"] for key, row in screening.finished("driver").items()}
    screening.run("driver")
    rows = screening.table("driver").to_pylist()
    after = {row["series_key"]: row["screened_at"] for row in rows}
    num_repeated = sum(after[key] != moment for key, moment in before.items())
    assert num_repeated == 0, f"{num_repeated} finished series were screened again"
    seen(f"{screening.check_equal('driver')}; {len(before)} finished before, none repeated")


def test_second_driver_of_a_run_returns_5(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    """Two drivers, each on a Ray of its own, on a disk, which lets only one create a file."""
    ledger = str(screening.folder / "two")
    environment = {
        name: value for name, value in screening.environment.items() if not name.startswith("RAY_A")
    }
    arguments = screening.arguments("two", ledger=ledger)
    jobs = [start_job(environment, "screen.py", *arguments) for _ in range(2)]
    codes = sorted(job.finish() for job in jobs)
    assert codes in ([0, 5], [0, 0]), (codes, *(job.output[-1500:] for job in jobs))
    (path,) = Path(ledger).glob("date=*/*.parquet")
    equal = screening.check_equal("two", pq.ParquetFile(path).read())
    assert codes == [0, 5], "both say that they committed"
    seen(f"exit codes 0 and 5; {equal}")


def test_committed_run_submitted_again_changes_nothing(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    (path,) = (screening.bucket / "clean").glob("date=*/*.parquet")
    before = path.read_bytes()
    output = screening.run("clean")
    assert "nothing to do" in output
    assert path.read_bytes() == before
    seen("exit code 0, nothing to do, file untouched")


def test_killed_s3_server_loses_no_row(
    screening: Screening, server: Server, seen: Callable[[str], None]
) -> None:
    """The server comes back after some seconds; the job waits, or ends to be resumed."""
    job = screening.start("s3-dies")
    job.wait_for(lambda: screening.rows_done("s3-dies") >= 3)
    server.kill()
    time.sleep(4)
    server.restart()
    code = job.finish()
    assert code in (0, 1), job.output[-3000:]
    if code:
        assert not screening.is_committed("s3-dies")
        screening.run("s3-dies")
    seen(f"exit code {code}; then {screening.check_equal('s3-dies')}")


def test_expired_keys_end_the_job_without_failed_rows(
    screening: Screening, server: Server, seen: Callable[[str], None]
) -> None:
    """The server refuses the keys half-way; the same command continues once they are valid."""
    job = screening.start("keys")
    job.wait_for(lambda: screening.rows_done("keys") >= 3)
    server.restart(secret="another")
    try:
        assert job.finish() == 1, job.output[-3000:]
    finally:
        server.restart()
    assert not screening.is_committed("keys")
    screening.run("keys")
    seen(f"exit code 1, nothing committed; then {screening.check_equal('keys')}")


def test_objects_changed_after_listing_fail_their_series(
    screening: Screening, server: Server, seen: Callable[[str], None]
) -> None:
    """Between listing and reading one object is replaced and another is removed."""
    archive = screening.bucket / "changing"
    shutil.copytree(screening.bucket / "archive", archive)
    server.restart()
    screening.run("changes", "--plan", archive="s3://bucket/changing")
    first, second = sorted((archive / "nifti").iterdir())[:2]
    first.write_bytes(second.read_bytes() + b"1")
    second.unlink()
    server.restart()
    code = screening.start("changes", archive="s3://bucket/changing").finish()
    rows = {
        row["source_uri"].rsplit("/", 1)[1]: row for row in screening.table("changes").to_pylist()
    }
    assert len(rows) == screening.clean.num_rows
    reasons = (rows[first.name]["reason"], rows[second.name]["reason"])
    assert reasons == ("changed", "vanished"), reasons
    assert code == 4, code  # 2 of 25 series are more than 5 %
    seen(f"{len(rows)} rows; failed: changed and failed: vanished, exit code {code}")


def test_full_disk_commits_nothing(screening: Screening, seen: Callable[[str], None]) -> None:
    """The driver may not write a file as large as the ledger; the next start commits it."""
    ledger = screening.folder / "full"

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 10, 24 << 10))

    command = [sys.executable, "jobs/screen.py", *screening.arguments("full", ledger=str(ledger))]
    limited = subprocess.run(
        command, env=screening.environment, capture_output=True, text=True, timeout=280,
        check=False, preexec_fn=limit_file_size, cwd=ROOT,
    )  # fmt: skip
    assert limited.returncode == 1, limited.stderr[-3000:]
    assert not list(ledger.glob("date=*/*"))
    screening.run("full", ledger=str(ledger))
    (path,) = ledger.glob("date=*/*.parquet")
    equal = screening.check_equal("full", pq.ParquetFile(path).read())
    seen(f"exit code 1, nothing committed; then {equal}")


def test_model_of_another_digest_returns_3(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    """Weights that differ from the digest in the model's description; nothing is read."""
    folder = screening.folder / "wrong"
    shutil.copytree(screening.folder / "model", folder)
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    arguments = [*screening.arguments("wrong"), "--model", str(folder)]
    job = start_job(screening.environment, "screen.py", *arguments)
    assert job.finish() == 3, job.output[-2000:]
    assert not (screening.bucket / "wrong").exists()
    seen("exit code 3 before anything was read")


def test_archive_of_bad_files_commits_rejected_rows(
    screening: Screening, seen: Callable[[str], None]
) -> None:
    archive = screening.folder / "bad"
    archive.mkdir()
    for index in range(3):
        (archive / f"{index}.nii").write_bytes(b"no volume")
    screening.run("bad", archive=str(archive), expect=4)
    assert screening.table("bad").num_rows == 3
    seen("exit code 4, 3 rejected rows committed")


def test_empty_archive_returns_3(screening: Screening, seen: Callable[[str], None]) -> None:
    (screening.folder / "nothing").mkdir()
    screening.run("empty", archive=str(screening.folder / "nothing"), expect=3)
    seen("exit code 3, told in one line")
