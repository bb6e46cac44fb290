"""The cost of a series beside its pixels: trivial series, requests to storage, a million rows."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.counting_proxy import CountingProxy
from benchmarks.measure import ROOT, WORK, Result, say
from benchmarks.screening_runs import run_job, start_screening
from infra.local.services import LOOPBACK, start_s3

# The last commit that stored a row and three attempts for each series.
BEFORE = "e907805"
NUM_TRIVIAL = 20_000
NUM_COUNTED = 1_000
SIZES = (10_000, 100_000, 1_000_000)
# Rows at which the driver of a synthetic run is killed.
KILLED_AT = 0.5
PHASES = ("plan", "screen", "commit", "view")
MODEL = ROOT / "models" / "v8-lung-box"


def measure_trivial() -> list[Result]:
    """(t) series that are refused at the header: now, and before rows were stored in chunks."""
    archive = trivial_archive(NUM_TRIVIAL)
    say(f"{NUM_TRIVIAL} trivial series, now")
    now = run_job(archive, model=MODEL)
    say(f"the same by commit {BEFORE}")
    before = run_job(archive, model=MODEL, root=_checkout(BEFORE))
    rows = {run.ledger.num_rows for run in (now, before)}
    if rows != {NUM_TRIVIAL}:
        raise SystemExit(f"{rows} rows, expected {NUM_TRIVIAL}")
    what = f"{NUM_TRIVIAL} series refused at the header"
    return [
        Result("t", f"{what}: rate over before", f"{before.spent_s / now.spent_s:.1f} x", ">= 3 x"),
        Result("t", f"{what}: CPU seconds over before", f"{now.cpu_s / before.cpu_s:.2f} x"),
        Result("t", f"{what}: series a minute", f"{60 * NUM_TRIVIAL / now.spent_s:.0f}"),
        *_measure_requests(),
    ]


def _measure_requests() -> list[Result]:
    """Count the requests of a run to an S3 server."""
    say(f"requests of {NUM_COUNTED} series")
    folder = WORK / "counted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trivial_archive(NUM_COUNTED), folder / "s3" / "bucket" / "archive")
    service = start_s3(folder / "s3", folder / "s3.log")
    proxy = CountingProxy(int(service.environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    endpoint = {"AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{proxy.port}"}
    try:
        environment = {**service.environment, **endpoint}
        locations = ("s3://bucket/archive", "s3://bucket/ledger")
        job = start_screening(*locations, MODEL, environment=environment)
        output, _ = job.communicate()
        if f"series                 {NUM_COUNTED}" not in output:
            raise SystemExit(output)
    finally:
        proxy.close()
        service.stop()
    counts = Counter[str]()
    for (method, path), count in proxy.requests.items():
        counts[_kind_of(method, path)] += count
    text = f"requests per series, {NUM_COUNTED} series of one object"
    return [
        Result("t", f"{text}, {kind}", f"{counts[kind] / NUM_COUNTED:.3f}", bound)
        for kind, bound in (("objects", ""), ("listings", ""), ("ledger and work", "<= 2"))
    ]


def _kind_of(method: str, path: str) -> str:
    if "list-type=" in path:
        return "listings"
    return "objects" if path.startswith("/bucket/archive/") else "ledger and work"


def measure_synthetic() -> list[Result]:
    """(w) plan, screen, kill, resume, commit and view of series without pixels, at three sizes."""
    outcomes = {size: _run_synthetic(size) for size in SIZES}
    results = []
    for phase in PHASES:
        for size, outcome in outcomes.items():
            is_commit = phase == "commit" and size == SIZES[-1]
            bound = "<= 180 s" if is_commit else ""
            results.append(Result("w", f"{phase}, {size:,} series", f"{outcome[phase]} s", bound))
    for name, text in (("driver_mb", "driver"), ("head_mb", "Ray's head"), ("view_mb", "view")):
        for size, outcome in outcomes.items():
            results.append(Result("w", f"memory of {text}, {size:,}", f"{outcome[name]} MB"))
        growth = outcomes[SIZES[2]][name] / outcomes[SIZES[1]][name]
        text = f"memory of {text}, {SIZES[2]:,} over {SIZES[1]:,} series"
        results.append(Result("w", text, f"{growth:.2f} x", "<= 1.5 x"))
    return results


def _run_synthetic(num_series: int) -> dict[str, float]:
    """Return the seconds of each phase, those of both starts together, and peaks of memory."""
    folder = WORK / f"synthetic-{num_series}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    say(f"{num_series} synthetic series: killed half-way")
    killed = _phase(folder, num_series, "screen", f"--die-at={int(KILLED_AT * num_series)}")
    say("continued")
    continued = _phase(folder, num_series, "screen")
    viewed = _phase(folder, num_series, "view")
    return {
        "plan": round(killed["plan"] + continued["plan"], 1),
        "screen": round(killed["screen"] + continued["screen"], 1),
        "commit": continued["commit"],
        "view": viewed["view"],
        "driver_mb": max(killed["driver_mb"], continued["driver_mb"]),
        "head_mb": max(killed["head_mb"], continued["head_mb"]),
        "view_mb": viewed["driver_mb"],
    }


def _phase(folder: Path, num_series: int, phase: str, *more: str) -> dict[str, float]:
    """Run a phase in another process; return the last line that it noted."""
    notes = folder / "notes.jsonl"
    arguments = [str(folder), str(num_series), phase, str(notes), *more]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.synthetic_run", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code not in (0, -9):
        raise SystemExit(f"exit code {code} of {phase} of {num_series} series")
    last: dict[str, float] = json.loads(notes.read_text().splitlines()[-1])
    say(json.dumps(last))
    return last


def trivial_archive(num_series: int) -> Path:
    """Return an archive of volumes of one slice, in folders of a thousand."""
    folder = WORK / f"trivial-{num_series}"
    if not folder.exists():
        say(f"making {num_series} trivial series")
        data = nib.Nifti1Image(np.zeros((8, 8, 1), np.int16), np.eye(4)).to_bytes()
        for number in range(num_series):
            path = folder / f"{number // 1000:03d}" / f"ct-{number:05d}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def _checkout(commit: str) -> Path:
    """Return a folder with the repository at an earlier commit."""
    folder = WORK / f"commit-{commit}"
    if not folder.exists():
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        folder.mkdir(parents=True)
        subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
    return folder
