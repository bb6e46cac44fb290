"""The screening half of make faults: kills, cuts and corruption under real jobs over phantoms in a real S3 server."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from services import Job, Service, start_job, start_s3

from covtanet.ledger.diff import differences
from covtanet.model.checkpoint import SavedModel, save_model
from covtanet.model.covtanet import SIZES, CovTANet
from covtanet.model.description import Capabilities, Preprocessing
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs

DATE = "2026-11-23"
NUM_SOUND = 8
CONFIG = '[screening]\nengine = "eager"\ndecode_timeout_s = 6\n'
DECODER, PREDICTOR, CHILD = "_DecoderActor", "_PredictorActor", "sandbox_child"


@dataclass
class Screening:
    """A Ray, an S3 server that may die, an archive in it, and what an undisturbed run makes of it."""

    folder: Path
    bucket: Path
    s3: Service | None
    environment: dict[str, str] = field(default_factory=dict)
    clean: pa.Table = field(default_factory=lambda: pa.table({}))
    truth: list[dict[str, object]] = field(default_factory=list)
    planned: str = ""

    def arguments(
        self, name: str, archive: str = "s3://bucket/archive", ledger: str = ""
    ) -> list[str]:
        """The command of a run into a ledger of its own."""
        return [
            "--archive", archive, "--ledger", ledger or f"s3://bucket/{name}", "--model", str(self.folder / "model"),
            "--config", str(self.folder / "screening.toml"), "--run-date", DATE,
        ]  # fmt: skip

    def start(self, name: str, *more: str, **where: str) -> Job:
        """Start a run."""
        return start_job(self.environment, "screen.py", *self.arguments(name, **where), *more)

    def run(self, name: str, *more: str, expect: int = 0, **where: str) -> str:
        """Run to the end."""
        job = self.start(name, *more, **where)
        code = job.finish()
        assert code == expect, f"exit code {code}, expected {expect}:\n{job.output[-3000:]}"
        assert f"exit code {code}:" in job.lines[-1], "the last line does not tell the exit code"
        return job.output

    def rows_done(self, name: str) -> int:
        """Finished series of a run that goes on."""
        return len(list((self.bucket / name).glob("_work/*/rows/*.parquet")))

    def is_committed(self, name: str) -> bool:
        """Whether the run's file is there."""
        return any((self.bucket / name).glob("date=*/*.parquet"))

    def table(self, name: str) -> pa.Table:
        """The committed run."""
        (path,) = (self.bucket / name).glob("date=*/*.parquet")
        return pq.ParquetFile(path).read()

    def check_equal(self, name: str, table: pa.Table | None = None) -> str:
        """N rows, and all of them as without a fault."""
        table = self.table(name) if table is None else table
        found = differences(self.clean, table)
        assert not found, f"{len(found)} differences, first {found[0]}"
        return f"{table.num_rows} rows, equal to the clean run's"


def fill(setting: Screening) -> None:
    """Write the archive and the model."""
    folder = setting.folder
    setting.bucket.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = SavedModel(
        network=CovTANet(SIZES["small"]).eval(),
        preprocessing=Preprocessing(size_px=128),
        capabilities=Capabilities(segments=True, diagnoses=True),
    )
    save_model(folder / "model", model)
    (folder / "screening.toml").write_text(CONFIG)
    phantoms = list(configs(NUM_SOUND, 21, size_px=128, num_slices=20))
    setting.truth = write_archive("s3://bucket/archive", "s3://bucket/truth", phantoms, 2)


def processes(setting: Screening, part: str) -> Iterator[psutil.Process]:
    """Processes of this setting's Ray whose command line holds a text."""
    token = setting.environment["RAY_AUTH_TOKEN_PATH"]
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if part not in " ".join(process.info["cmdline"] or ()):
                continue
            # A decoder's child has an empty environment, and only root may read that of its parent: Ray's own
            # process above both says whose they are.
            if any(_token_of(each) == token for each in (process, *process.parents())):
                yield process


def _token_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RAY_AUTH_TOKEN_PATH")
    except psutil.Error:
        return None


def kill_one(
    setting: Screening, part: str, sent: signal.Signals = signal.SIGKILL
) -> Callable[[], bool]:
    """A condition that comes true by signalling such a process."""

    def try_it() -> bool:
        for process in processes(setting, part):
            with contextlib.suppress(psutil.Error):
                process.send_signal(sent)
                return True
        return False

    return try_it


def worker_killed(name: str, part: str) -> Callable[[Screening], str]:
    """A worker of a kind is killed once, half-way."""

    def scenario(setting: Screening) -> str:
        job = setting.start(name)
        job.wait_for(lambda: setting.rows_done(name) >= 3)
        job.wait_for(kill_one(setting, part))
        assert job.finish() == 0, job.output[-3000:]
        return setting.check_equal(name)

    return scenario


def series_kills_its_worker(setting: Screening) -> str:
    """Whoever decodes one certain series is killed, each time."""
    name = "killer"
    job, key, killed = start_killer(setting, name)
    assert job.finish() in (0, 4), job.output[-3000:]
    rows = {row["series_key"]: row for row in setting.table(name).to_pylist()}
    assert len(rows) == setting.clean.num_rows
    assert (rows[key]["status"], rows[key]["reason"]) == ("failed", "worker_died"), rows[key][
        "reason"
    ]
    return f"{len(rows)} rows; failed: worker_died after {killed} workers died"


def start_killer(setting: Screening, name: str) -> tuple[Job, str, int]:
    """A run in which whoever decodes one certain series dies, until its row is there; its key, and how many died."""
    key = next(
        row["series_key"] for row in setting.clean.to_pylist() if row["status"] == "screened"
    )
    job, killed = setting.start(name), set()
    attempts_seen = 0

    def is_over() -> bool:
        nonlocal attempts_seen
        for path in (setting.bucket / name).glob(f"_work/*/attempts/*/{key}.json"):
            with contextlib.suppress(OSError, ValueError):
                attempt = json.loads(path.read_text())
                if attempt.get("decode", 0) > attempts_seen:
                    attempts_seen = attempt["decode"]
                    # This worker alone: the series of another one would come to its third attempt as well.
                    with contextlib.suppress(psutil.Error):
                        psutil.Process(attempt["pid"]).kill()
                        killed.add(attempt["pid"])
        return bool(
            [*(setting.bucket / name).glob(f"_work/*/rows/{key}.parquet")]
        ) or setting.is_committed(name)

    job.wait_for(is_over)
    return job, key, len(killed)


def series_hangs(setting: Screening) -> str:
    """A decoder's child is stopped in its tracks: what it reads never ends."""
    name = "hangs"
    job = setting.start(name)
    job.wait_for(lambda: setting.rows_done(name) >= 2)
    job.wait_for(kill_one(setting, CHILD, signal.SIGSTOP))
    code = job.finish()
    assert code in (0, 4), job.output[-3000:]
    reasons = Counter(
        row["reason"] for row in setting.table(name).to_pylist() if row["status"] == "failed"
    )
    assert reasons == {"timeout": 1}, reasons
    return f"{setting.table(name).num_rows} rows; one failed: timeout, exit code {code}"


def child_killed(setting: Screening) -> str:
    """A decoder's child dies once, as of memory: the series is read again."""
    name = "child"
    job = setting.start(name)
    job.wait_for(lambda: setting.rows_done(name) >= 2)
    job.wait_for(kill_one(setting, CHILD))
    assert job.finish() == 0, job.output[-3000:]
    return setting.check_equal(name)


def driver_killed(setting: Screening) -> str:
    """The driver dies at 10, 50 and 90 %, three times in one run."""
    name, total, redone = "driver", setting.clean.num_rows, 0
    for share in (0.1, 0.5, 0.9):
        job = setting.start(name)
        job.wait_for(lambda share=share: setting.rows_done(name) >= share * total)  # type: ignore[misc]
        job.kill()
        assert not setting.is_committed(name), "a run that died left a ledger"
        time.sleep(1)
    rows = (setting.bucket / name).glob("_work/*/rows/*.parquet")
    before = {
        path.name: pq.ParquetFile(path).read(["screened_at"])["screened_at"][0].as_py()
        for path in rows
    }
    setting.run(name)
    after = {
        f"{row['series_key']}.parquet": row["screened_at"]
        for row in setting.table(name).to_pylist()
    }
    redone = sum(after[key] != moment for key, moment in before.items())
    assert redone == 0, f"{redone} finished series were screened again"
    return f"{setting.check_equal(name)}; {len(before)} finished before, none redone"


def two_drivers(setting: Screening) -> str:
    """The same command twice at once, each with a Ray of its own, on a disk, where a file is created by one alone."""
    ledger = str(setting.folder / "two")
    own = {
        name: value for name, value in setting.environment.items() if not name.startswith("RAY_A")
    }
    jobs = [start_job(own, "screen.py", *setting.arguments("two", ledger=ledger)) for _ in range(2)]
    codes = sorted(job.finish() for job in jobs)
    assert codes in ([0, 5], [0, 0]), (codes, *(job.output[-1500:] for job in jobs))
    (path,) = Path(ledger).glob("date=*/*.parquet")
    seen = setting.check_equal("two", pq.ParquetFile(path).read())
    assert codes == [0, 5], "both say that they committed"
    return f"exit codes 0 and 5; {seen}"


def again(setting: Screening) -> str:
    """A finished run submitted again."""
    (path,) = (setting.bucket / "clean").glob("date=*/*.parquet")
    before = path.read_bytes()
    output = setting.run("clean")
    assert "nothing to do" in output
    assert path.read_bytes() == before
    return "exit code 0, nothing to do, file untouched"


def _restart(setting: Screening, **changes: str) -> None:
    assert setting.s3 is not None
    setting.s3.stop()
    setting.s3 = start_s3(
        setting.folder / "s3", setting.folder / "s3.log", port=int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]),
        **changes,
    )  # fmt: skip


def s3_dies(setting: Screening) -> str:
    """The S3 server is killed half-way and comes back after some seconds."""
    name = "s3-dies"
    job = setting.start(name)
    job.wait_for(lambda: setting.rows_done(name) >= 3)
    assert setting.s3 is not None
    os.killpg(setting.s3.process.pid, signal.SIGKILL)
    time.sleep(4)
    _restart(setting)
    code = job.finish()
    assert code in (0, 1), job.output[-3000:]
    if code:
        assert not setting.is_committed(name)
        setting.run(name)
    return f"exit code {code}; then {setting.check_equal(name)}"


def keys_expire(setting: Screening) -> str:
    """The server takes our keys no longer, half-way: no series is to blame."""
    name = "keys"
    job = setting.start(name)
    job.wait_for(lambda: setting.rows_done(name) >= 3)
    _restart(setting, secret="another")
    try:
        code = job.finish()
        assert code == 1, job.output[-3000:]
    finally:
        _restart(setting)
    assert not setting.is_committed(name)
    setting.run(name)
    return f"exit code 1, nothing committed; then {setting.check_equal(name)}"


def object_changes(setting: Screening) -> str:
    """Between listing and reading one object is overwritten and another is gone."""
    name, archive = "changes", setting.bucket / "changing"
    shutil.copytree(setting.bucket / "archive", archive)
    _restart(setting)
    setting.run(name, "--plan", archive="s3://bucket/changing")
    first, second = sorted((archive / "nifti").iterdir())[:2]
    first.write_bytes(second.read_bytes() + b"1")
    second.unlink()
    _restart(setting)
    output = setting.start(name, archive="s3://bucket/changing")
    code = output.finish()
    rows = {row["source_uri"].rsplit("/", 1)[1]: row for row in setting.table(name).to_pylist()}
    assert len(setting.table(name)) == setting.clean.num_rows
    seen = (rows[first.name]["reason"], rows[second.name]["reason"])
    assert seen == ("changed", "vanished"), seen
    assert code == 4, code  # 2 of 27 series are more than 5 %
    return f"{setting.clean.num_rows} rows; failed: changed and failed: vanished, exit code {code}"


def disk_is_full(setting: Screening) -> str:
    """The driver may write no file of the ledger's size."""
    ledger = setting.folder / "full"

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 10, 24 << 10))

    command = [sys.executable, "jobs/screen.py", *setting.arguments("full", ledger=str(ledger))]
    limited = subprocess.run(
        command, env=setting.environment, capture_output=True, text=True, timeout=280, check=False,
        preexec_fn=no_large_files, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert limited.returncode == 1, limited.stderr[-3000:]
    assert not list(ledger.glob("date=*/*"))
    setting.run("full", ledger=str(ledger))
    (path,) = ledger.glob("date=*/*.parquet")
    return f"exit code 1, nothing committed; then {setting.check_equal('full', pq.ParquetFile(path).read())}"


def wrong_model(setting: Screening) -> str:
    """Weights that are not what the model's description says."""
    folder = setting.folder / "wrong"
    shutil.copytree(setting.folder / "model", folder)
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    job = start_job(
        setting.environment, "screen.py", *setting.arguments("wrong"), "--model", str(folder)
    )
    assert job.finish() == 3, job.output[-2000:]
    assert not (setting.bucket / "wrong").exists()
    return "exit code 3 before anything was read"


def all_bad(setting: Screening) -> str:
    """Nothing in the archive is a chest CT."""
    for index in range(3):
        (setting.folder / "bad").mkdir(exist_ok=True)
        (setting.folder / "bad" / f"{index}.nii").write_bytes(b"no volume")
    setting.run("bad", archive=str(setting.folder / "bad"), expect=4)
    assert setting.table("bad").num_rows == 3
    return "exit code 4, 3 rejected rows committed"


def empty_archive(setting: Screening) -> str:
    """There is nothing to screen."""
    (setting.folder / "nothing").mkdir()
    setting.run("empty", archive=str(setting.folder / "nothing"), expect=3)
    return "exit code 3, told in one line"


Scenario = Callable[[Screening], str]
SCREENING: dict[str, tuple[Scenario, str]] = {
    "decoding worker killed": (worker_killed("decoder", DECODER), "N rows, equal"),
    "predicting worker killed": (worker_killed("predictor", PREDICTOR), "N rows, equal"),
    "a series kills its worker every time": (
        series_kills_its_worker,
        "failed: worker_died, the job ends",
    ),
    "a series hangs": (series_hangs, "failed: timeout, others equal"),
    "a decoder's child killed": (child_killed, "the worker survives; N rows, equal"),
    "driver killed at 10, 50 and 90 %": (driver_killed, "goes on; nothing redone; N rows, equal"),
    "two drivers of one run": (two_drivers, "one wins, the other says so; N rows, equal"),
    "a finished run again": (again, "nothing to do"),
    "S3 server killed": (s3_dies, "waits or stops clean; never a missing row"),
    "keys expire half-way": (keys_expire, "stops clean, resumable; not N failed rows"),
    "object changed, object gone": (object_changes, "failed: changed, failed: vanished"),
    "no room for the ledger": (disk_is_full, "non-zero, nothing committed; the next start commits"),
    "model of another digest": (wrong_model, "refused before reading"),
    "all input bad": (all_bad, "committed, exit code 4"),
    "empty archive": (empty_archive, "a clear error"),
}
