"""The whole system on one machine: phantoms, an S3 server, Ray, training, registry, screening, ledger and pictures.

Everything it leaves is under .demo/; everything it starts is stopped, whatever happens.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from services import ROOT, Service, start_ray, start_s3, write_private

from covtanet import drawing as overlay
from covtanet import storage
from covtanet.phantoms import agreement
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_training_set

DEMO = ROOT / ".demo"
NUM_TRAINING, NUM_SOUND = 72, 28
TRAINING_SEED, ARCHIVE_SEED = 11, 12
NUM_PICTURES = 8


def main() -> int:
    """Run the demo; 0 where the ledger is complete and agrees with the truth."""
    started = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    (DEMO / "s3" / "demo").mkdir(parents=True)
    services: list[Service] = []
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="cov") as ray_folder:  # Ray's sockets need a short path
        try:
            return run(services, Path(ray_folder), started)
        finally:
            for service in reversed(services):
                service.stop()


def run(services: list[Service], ray_folder: Path, started: float) -> int:
    """Start what is needed and go through the steps."""

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)

    s3 = start_s3(DEMO / "s3", DEMO / "s3.log")
    services.append(s3)
    os.environ.update(s3.environment)
    cores = len(os.sched_getaffinity(0))
    say(
        f"making {NUM_TRAINING} phantoms to train on and an archive of {NUM_SOUND} sound and 17 damaged series"
    )
    write_training_set("s3://demo/training", configs(NUM_TRAINING, TRAINING_SEED), cores)
    write_archive(
        "s3://demo/archive", "s3://demo/truth", list(configs(NUM_SOUND, ARCHIVE_SEED)), cores
    )

    token = DEMO / "ray_token"
    write_private(token, secrets.token_hex(32))
    environment = {
        **s3.environment,
        "MLFLOW_TRACKING_URI": f"sqlite:///{DEMO}/mlflow.db",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    say("starting Ray")
    ray = start_ray(DEMO / "ray.log", environment, token, temp_folder=ray_folder)
    services.append(ray)
    submit = {**os.environ, **ray.environment}

    say("training in two phases, on phantoms of its own")
    job(
        submit, "train.py", "--config", "recipes/demo.toml", "--data", "s3://demo/training",
        "--storage", "s3://demo/training-runs", "--experiment", "demo", "--artifacts", str(DEMO / "artifacts"),
    )  # fmt: skip
    job(submit, "promote.py", "--force", "the demo's only model")
    say("screening the archive with the registered model")
    job(
        submit, "screen.py", "--archive", "s3://demo/archive", "--ledger", "s3://demo/ledger",
        "--model", "models:/covtanet@champion", "--results", "s3://demo/results",
    )  # fmt: skip
    return conclude(say)


def job(environment: dict[str, str], script: str, *arguments: str) -> None:
    """Submit a job to the cluster as a user would and follow it."""
    command = [
        Path(sys.executable).with_name("ray"), "job", "submit", "--log-style=record", "--log-color=false",
        "--working-dir", ROOT, "--", "python", f"jobs/{script}", *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with (DEMO / "jobs.log").open("a") as log:
        for line in process.stdout:
            log.write(line)
            if is_news(line):
                print(f"         {line}", end="", flush=True)
    if process.wait():
        raise SystemExit(f"jobs/{script} failed; its log is {DEMO / 'jobs.log'}")


NEWS = re.compile(
    r"(\d\d:){2}\d\d \w+ covtanet|\(TrainController[^)]*\) V\d fold|registered |champion is|ignored|\w*Error"
)
TABLE = re.compile(r"[a-z_() ]* {2,}\S")


def is_news(line: str) -> bool:
    """What a person wants to see of a job's log, its own lines and its table; all of it is in .demo/jobs.log."""
    return bool(NEWS.match(line) or TABLE.match(line) or line.startswith(("Screening", "-----")))


def conclude(say: Callable[[str], None]) -> int:
    """Compare with the truth, and make the picture sheet."""
    (committed,) = (DEMO / "s3" / "demo" / "ledger").glob("date=*/*.parquet")
    ledger = pq.read_table(BytesIO(committed.read_bytes()))
    found = agreement.compare(ledger, "s3://demo/archive", "s3://demo/truth", "s3://demo/results")
    print(found.as_table())
    rows = [row for row in ledger.to_pylist() if row["status"] == "screened"]
    rows.sort(key=lambda row: -(row["involvement"] or 0))
    shown = [rows[k] for k in np.unique(np.linspace(0, len(rows) - 1, NUM_PICTURES).astype(int))]
    pictures = []
    for row in shown:
        uri = storage.join("s3://demo/results", row["run_id"], row["series_key"], "preview.png")
        caption = (
            f"{row['series_key'][:8]}   {row['diagnosis']} (p {row['p_infected']:.2f})   "
            f"severity {row['severity'] or '-'}   involvement {100 * (row['involvement'] or 0):.1f} %   "
            f"lesion {row['lesion_volume_ml']:.0f} ml of {row['lung_volume_ml']:.0f} ml lung"
        )
        pictures.append((caption, Image.open(BytesIO(storage.read_bytes(uri))).convert("RGB")))
    overlay.sheet(pictures).save(DEMO / "overlays.png")
    print(
        f"\nledger    {committed}\npictures  {DEMO / 'overlays.png'}\nregistry  sqlite:///{DEMO}/mlflow.db"
    )
    print("next      make screen ARCHIVE=your-folder LEDGER=your-ledger")
    print(
        "A model trained on phantoms: its predictions on real CT mean nothing. Research use only."
    )
    say("done" if found.is_good else "the ledger does not agree with the truth as it should")
    return 0 if found.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
