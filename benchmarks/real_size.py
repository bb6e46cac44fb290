"""The screening job on real-size series against a plain loop, and its CPU seconds by stage."""

import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.measure import CORES, ROOT, WORK, Result, say
from benchmarks.real_archive import real_archive
from benchmarks.screening_runs import JobRun, run_job

NUM_SERIES = 24
MODEL = ROOT / "models" / "v8-lung-box"
# The last commit before the job was made fast on real series: its lung mask and measuring, and its
# model, whose weights are the same.
COMMIT_BEFORE = "91c2e3c65ef42dfcfad61f6da849693ed25c75fe"
# Bounds for the difference of involvement of a series, as the engines' in the model card.
MAX_DIFFERENCE = 0.005


def measure() -> list[Result]:
    """(r) the job from its first series to the commit, against the loop over the same series."""
    folder, text = real_archive(NUM_SERIES)
    say(f"plain loop over {text}")
    loop = plain_loop(folder)
    loop_s = sum(row["spent_s"] for row in loop)
    say(f"plain loop: {loop_s:.0f} s; the job")
    run = run_job(folder, model=MODEL)
    spent = run.times.seconds(run.started, run.ended)
    share = sum(spent.values()) / (CORES * run.spent_s)
    difference = _largest_difference(loop, run.ledger)
    gain = f"{loop_s / run.spent_s:.2f} x"
    bound = f"<= {MAX_DIFFERENCE}"
    return [
        Result("r", f"plain loop over the job, {text}", gain, ">= 2.5 x"),
        Result("r", "series per minute by the job", f"{60 * len(loop) / run.spent_s:.1f}"),
        Result("r", "series per minute by the loop", f"{60 * len(loop) / loop_s:.1f}"),
        Result("r", "seconds from the command to the first series", f"{run.start_s:.1f}", "<= 15"),
        Result("r", "share of the cores in use", f"{share:.2f}"),
        Result("r", "largest difference of involvement", f"{difference:.4f}", bound),
        Result("r", "peak memory of all processes", f"{run.memory.peak_bytes() / 1e9:.1f} GB"),
        *_cpu_seconds(run, loop),
    ]


def plain_loop(folder: Path) -> list[dict[str, Any]]:
    """Run the loop with the code of the earlier commit; return a row per series."""
    code = WORK / "before" / COMMIT_BEFORE
    if not code.exists():
        _extract(code)
    script = str(ROOT / "benchmarks" / "plain_loop.py")
    output = subprocess.run(
        [sys.executable, script, str(folder), str(code / MODEL.relative_to(ROOT)), str(CORES)],
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _extract(target: Path) -> None:
    """Take the earlier commit's package and model out of the history."""
    names = ["covtanet", str(MODEL.relative_to(ROOT))]
    command = ["git", "-C", str(ROOT), "archive", COMMIT_BEFORE, *names]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(target, filter="data")


def _largest_difference(loop: list[dict[str, Any]], ledger: pa.Table) -> float:
    """Return the largest difference of involvement between loop and ledger.

    Raises:
        SystemExit: a series has no involvement in the ledger, or none in the loop.
    """
    by_folder = {Path(row["source_uri"]).name: row["involvement"] for row in ledger.to_pylist()}
    differences: list[float] = []
    for row in loop:
        measured = by_folder.get(row["series"])
        if (measured is None) != (row["involvement"] is None):
            by_loop = row["involvement"]
            raise SystemExit(f"series {row['series']}: {measured}, by the loop {by_loop}")
        if measured is not None:
            differences.append(abs(measured - row["involvement"]))
    return max(differences)


def _cpu_seconds(run: JobRun, loop: list[dict[str, Any]]) -> list[Result]:
    """Return the CPU seconds of each stage per series, start-up included, and of the loop."""
    spent = run.times.seconds(0, run.ended)
    rows = [
        Result("r", f"CPU seconds per series: {stage}", f"{seconds / len(loop):.2f}")
        for stage, seconds in sorted(spent.items())
    ]
    loop_s = sum(row["cpu_s"] for row in loop)
    rows.append(Result("r", "CPU seconds per series: plain loop", f"{loop_s / len(loop):.2f}"))
    driver_s = f"{spent.get('driver', 0):.1f}"
    return [*rows, Result("r", "CPU seconds of the driver in all", driver_s, "<= 5")]
