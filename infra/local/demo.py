"""The whole system on one machine, in .demo/: phantoms, training, registry, screening, ledger.

python -m infra.local.demo     ``make demo``; ends with 0 if the ledger agrees with the truth

It starts an S3 server and a Ray, and stops both, also if it fails.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from covtanet import drawing, storage
from covtanet.machine import num_cores
from covtanet.phantoms import agreement
from covtanet.phantoms.archive import write_archive
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_training_set
from infra.local.services import ROOT, start_ray, start_s3, write_private

DEMO = ROOT / ".demo"
NUM_TRAINING, NUM_SOUND = 72, 28
# Training and archive must not share a phantom.
TRAINING_SEED, ARCHIVE_SEED = 11, 12
NUM_PICTURES = 8
# Lines of a job's log that a person wants to see; .demo/jobs.log holds all of it.
NEWS = re.compile(
    r"(\d\d:){2}\d\d \w+ covtanet|\(TrainController[^)]*\) V\d fold"
    r"|registered |champion is|ignored|\w*Error"
)
TABLE = re.compile(r"[a-z_() ]* {2,}\S")


class Clock:
    """Print lines after the seconds since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)


def main() -> int:
    """Run the demo; return 0 if the ledger is complete and agrees with the truth."""
    clock = Clock()
    shutil.rmtree(DEMO, ignore_errors=True)
    (DEMO / "s3" / "demo").mkdir(parents=True)
    # A signal must run the cleanup that stops the services.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda *_: sys.exit(143))
    with running_services(clock) as environment:
        run_jobs(environment, clock)
        return show_results(clock)


@contextmanager
def running_services(clock: Clock) -> Iterator[dict[str, str]]:
    """Start S3, write the phantoms, start Ray; yield the environment of jobs."""
    with ExitStack() as stack:
        s3 = start_s3(DEMO / "s3", DEMO / "s3.log")
        stack.callback(s3.stop)
        os.environ.update(s3.environment)
        write_phantoms(clock)
        token = DEMO / "ray_token"
        write_private(token, secrets.token_hex(32))
        environment = {
            **s3.environment,
            "MLFLOW_TRACKING_URI": f"sqlite:///{DEMO}/mlflow.db",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        clock.say("starting Ray")
        # Ray's sockets need a short path.
        short = stack.enter_context(tempfile.TemporaryDirectory(prefix="cov"))
        ray = start_ray(DEMO / "ray.log", environment, token, temp_folder=Path(short))
        stack.callback(ray.stop)
        yield {**os.environ, **ray.environment}


def write_phantoms(clock: Clock) -> None:
    """Write the training set, and an archive of sound and damaged series with their truth."""
    cores = num_cores()
    archive = f"an archive of {NUM_SOUND} sound and 17 damaged series"
    clock.say(f"making {NUM_TRAINING} phantoms to train on and {archive}")
    write_training_set("s3://demo/training", configs(NUM_TRAINING, TRAINING_SEED), cores)
    phantoms = list(configs(NUM_SOUND, ARCHIVE_SEED))
    write_archive("s3://demo/archive", "s3://demo/truth", phantoms, cores)


def run_jobs(environment: dict[str, str], clock: Clock) -> None:
    """Train, promote the model, and screen the archive with it."""
    clock.say("training in two phases on the phantoms")
    submit(
        environment, "train.py", "--config", "recipes/demo.toml", "--data", "s3://demo/training",
        "--storage", "s3://demo/training-runs", "--experiment", "demo",
        "--artifacts", str(DEMO / "artifacts"),
    )  # fmt: skip
    submit(environment, "promote.py", "--force", "the demo's only model")
    clock.say("screening the archive with the registered model")
    submit(
        environment, "screen.py", "--archive", "s3://demo/archive", "--ledger", "s3://demo/ledger",
        "--model", "models:/covtanet@champion", "--results", "s3://demo/results",
    )  # fmt: skip


def submit(environment: dict[str, str], script: str, *arguments: str) -> None:
    """Submit a job to the cluster as a user would, and follow it."""
    command = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--log-style=record",
        "--log-color=false",
        "--working-dir",
        str(ROOT),
        "--",
        "python",
        f"jobs/{script}",
        *arguments,
    ]
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


def is_news(line: str) -> bool:
    """Whether a line of a job's log is shown: the project's lines and its tables."""
    return bool(NEWS.match(line) or TABLE.match(line) or line.startswith(("Screening", "-----")))


def show_results(clock: Clock) -> int:
    """Compare the ledger with the truth, write the sheet of pictures, print all locations."""
    (committed,) = (DEMO / "s3" / "demo" / "ledger").glob("date=*/*.parquet")
    ledger = pq.read_table(BytesIO(committed.read_bytes()))
    compared = agreement.compare(
        ledger, "s3://demo/archive", "s3://demo/truth", "s3://demo/results"
    )
    print(compared.as_table())
    pictures = [(caption(row), preview(row)) for row in choose_rows(ledger.to_pylist())]
    drawing.sheet(pictures).save(DEMO / "overlays.png")
    print(f"\nledger    {committed}")
    print(f"pictures  {DEMO / 'overlays.png'}")
    print(f"registry  sqlite:///{DEMO}/mlflow.db")
    print("next      make screen ARCHIVE=your-folder LEDGER=your-ledger")
    print("A model trained on phantoms: its predictions on real CT mean nothing.")
    print("Research use only.")
    if not compared.is_good:
        clock.say("the ledger does not agree with the truth as it should")
        return 1
    clock.say("done")
    return 0


def choose_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return screened rows evenly spaced from the most to the least involvement."""
    screened = [row for row in rows if row["status"] == "screened"]
    screened.sort(key=lambda row: -(row["involvement"] or 0))
    indices = np.unique(np.linspace(0, len(screened) - 1, NUM_PICTURES).astype(int))
    return [screened[index] for index in indices]


def caption(row: dict[str, Any]) -> str:
    """Return the numbers that stand under a picture."""
    return (
        f"{row['series_key'][:8]}   {row['diagnosis']} (p {row['p_infected']:.2f})   "
        f"severity {row['severity'] or '-'}   "
        f"involvement {100 * (row['involvement'] or 0):.1f} %   "
        f"lesion {row['lesion_volume_ml']:.0f} ml of {row['lung_volume_ml']:.0f} ml lung"
    )


def preview(row: dict[str, Any]) -> Image.Image:
    """Read the picture of a screened series."""
    uri = storage.join("s3://demo/results", row["run_id"], row["series_key"], "preview.png")
    return Image.open(BytesIO(storage.read_bytes(uri))).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
