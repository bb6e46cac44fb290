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
import pyarrow.parquet as pq

from benchmarks.counting_proxy import CountingProxy
from benchmarks.measure import ROOT, WORK, Result, say
from benchmarks.screening_runs import run_job, start_screening
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.services import LOOPBACK, start_s3

# The last commit that stored a row and three attempts for each series.
BEFORE = "e907805"
NUM_TRIVIAL = 20_000
NUM_COUNTED = 1_000
NUM_DICOM, DICOM_PX, NUM_SLICES = 20, 128, 40
SIZES = (10_000, 100_000, 1_000_000)
# Of a larger run the rows of the other series are stored before, as if by an earlier driver: Ray
# Data takes the same time for every 100,000.
MOST_SCREENED = 200_000
# Share of the series that are screened after which the driver of a synthetic run is killed.
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
    """Count the requests of runs to an S3 server, of series of one and of many objects."""
    results = []
    for num_objects, archive in ((1, trivial_archive(NUM_COUNTED)), (NUM_SLICES, _dicom_archive())):
        num_series = sum(path.is_file() for path in archive.rglob("*")) // num_objects
        counts = _count_requests(archive, num_series)
        what = f"{num_series} series of {num_objects} objects in S3"
        for kind, bound in (("objects", ""), ("listings", ""), ("ledger and work", "<= 2")):
            value = f"{counts[kind] / num_series:.3f}"
            # A run of few series has more of its own than of its series.
            is_bounded = num_series >= NUM_COUNTED
            name = f"{what}: requests per series, {kind}"
            results.append(Result("t", name, value, bound if is_bounded else ""))
        name = f"{what}: requests for ledger and work in all"
        results.append(Result("t", name, f"{counts['ledger and work']}"))
    return results


def _count_requests(archive: Path, num_series: int) -> Counter[str]:
    """Screen an archive on an S3 server behind a proxy; return its requests by kind."""
    say(f"requests of {num_series} series")
    folder = WORK / "counted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(archive, folder / "s3" / "bucket" / "archive")
    service = start_s3(folder / "s3", folder / "s3.log")
    proxy = CountingProxy(int(service.environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    endpoint = {"AWS_ENDPOINT_URL": f"http://{LOOPBACK}:{proxy.port}"}
    try:
        environment = {**service.environment, **endpoint}
        locations = ("s3://bucket/archive", "s3://bucket/ledger")
        job = start_screening(*locations, MODEL, environment=environment)
        output, _ = job.communicate()
    finally:
        proxy.close()
        service.stop()
    if f"series                 {num_series}\n" not in output:
        raise SystemExit(output)
    counts = Counter[str]()
    for (_, path), count in proxy.requests.items():
        counts[_kind_of(path)] += count
    return counts


def _kind_of(path: str) -> str:
    if "list-type=" in path:
        return "listings"
    return "objects" if path.startswith("/bucket/archive/") else "ledger and work"


def _dicom_archive() -> Path:
    """Return an archive of small DICOM phantoms."""
    folder = WORK / f"dicom-{NUM_DICOM}"
    if not folder.exists():
        for number, config in enumerate(configs(NUM_DICOM, 7, DICOM_PX, NUM_SLICES)):
            target = folder / f"{number:03d}"
            target.mkdir(parents=True)
            for index, content in enumerate(dicom_objects(make_phantom(config), number)):
                (target / f"{index:03d}.dcm").write_bytes(content)
    return folder


def measure_synthetic() -> list[Result]:
    """(w) plan, screen, kill, resume, commit and view of series without pixels, at three sizes."""
    outcomes = {size: _run_synthetic(size) for size in SIZES}
    results = []
    for phase in PHASES:
        for size, outcome in outcomes.items():
            is_commit = phase == "commit" and size == SIZES[-1]
            bound = "<= 180 s" if is_commit else ""
            part = f"{int(outcome['num_screened']):,} of " if phase == "screen" else ""
            value = f"{outcome[phase]} s"
            results.append(Result("w", f"{phase}, {part}{size:,} series", value, bound))
    for size, outcome in outcomes.items():
        count = int(outcome["num_screened"])
        value = f"{1000 * outcome['screen_cpu'] / count:.1f} ms"
        what = f"screen, {count:,} of {size:,} series: CPU of all processes a row"
        results.append(Result("w", what, value))
    for name, text in (("driver_mb", "driver"), ("head_mb", "Ray's head"), ("view_mb", "view")):
        for size, outcome in outcomes.items():
            results.append(Result("w", f"memory of {text}, {size:,}", f"{outcome[name]} MB"))
        growth = outcomes[SIZES[2]][name] / outcomes[SIZES[1]][name]
        text = f"memory of {text}, {SIZES[2]:,} over {SIZES[1]:,} series"
        results.append(Result("w", text, f"{growth:.2f} x", "<= 1.5 x"))
    return results + _measure_file(WORK / f"synthetic-{SIZES[-1]}" / "ledger")


def _measure_file(ledger: Path) -> list[Result]:
    """Count the bytes of a row, and the row groups that filters have to read."""
    (path,) = ledger.glob("date=*/*.parquet")
    metadata = pq.ParquetFile(path).metadata
    row_bytes = path.stat().st_size / metadata.num_rows
    results = [Result("w", "bytes of a row in the ledger", f"{row_bytes:.0f}")]
    for column, low, high in (("status", "rejected", "rejected"), ("involvement", 0.5, 0.51)):
        bounds = f"{column} between {low} and {high}"
        num_read = sum(
            may_hold(metadata.row_group(number), column, low, high)
            for number in range(metadata.num_row_groups)
        )
        share = f"{num_read} of {metadata.num_row_groups}"
        results.append(Result("w", f"row groups that a filter reads, {bounds}", share))
    return results


def may_hold(group: pq.RowGroupMetaData, column: str, low: object, high: object) -> bool:
    """Return whether a row group may hold a value within bounds, by its statistics."""
    chunks = map(group.column, range(group.num_columns))
    (statistics,) = (chunk.statistics for chunk in chunks if chunk.path_in_schema == column)
    if not statistics.has_min_max:  # nulls alone
        return False
    return bool(statistics.min <= high and statistics.max >= low)


def _run_synthetic(num_series: int) -> dict[str, float]:
    """Return the seconds of each phase, those of both starts together, and peaks of memory."""
    folder = WORK / f"synthetic-{num_series}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_screened = min(num_series, MOST_SCREENED)
    num_stored = num_series - num_screened
    say(f"{num_series} synthetic series, {num_stored} finished before: killed half-way")
    die_at = num_stored + int(KILLED_AT * num_screened)
    killed = _phase(folder, num_series, "screen", f"--stored={num_stored}", f"--die-at={die_at}")
    say("continued")
    continued = _phase(folder, num_series, "screen")
    viewed = _phase(folder, num_series, "view")
    return {
        "plan": round(killed["plan"] + continued["plan"], 1),
        "screen": round(killed["screen"] + continued["screen"], 1),
        "num_screened": num_screened,
        "screen_cpu": round(killed["screen_cpu"] + continued["screen_cpu"], 1),
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
