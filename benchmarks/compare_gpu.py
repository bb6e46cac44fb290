"""Compare all segmenters fairly on one GPU: several processes train at once, by one plan.

python -m benchmarks.compare_gpu --data DIR --out DIR [--budget-s 500] [--workers 8]
    [--main-steps 600] [--other-steps 300] [--memory-gib 55] [--previous RESULTS.jsonl ..] [--toy]

--data: written by gpu_data.py. --previous: results of earlier runs, whose trainings are not
repeated. One process cannot keep a large GPU busy: networks have many small kernels, and the host
that starts them sets the time. So each process trains one network at a time. Every result is
appended to OUT/results.jsonl when its training ends, so a run that is killed keeps the rest.
``python -m benchmarks.compare_networks OUT`` prints the tables.

Rate: for every network a short training at each of three rates, at half the side of the input, on
one patient and the single slices, judged on one other patient (compare_plan.RATE_JUDGE). Then equal
steps, batch and input for every network.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare_plan import Plan, Task, rate_tasks, training_tasks

RESULTS = "results.jsonl"
# Steps of a training that chooses a rate.
RATE_STEPS = 120
TOY_STEPS = 2
# Pause before a process looks again for a task.
WAIT_S = 0.5
# A process that fails this often stays away, so that a broken device ends the run.
MAX_STARTS = 4


class Run:
    """Processes that train, and the file of their results."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan) -> None:
        self.arguments = arguments
        self.plan = plan
        self.started_s = time.perf_counter()
        self.deadline_s: float = self.started_s + arguments.budget_s
        self.lock = threading.Lock()
        self.processes: dict[int, subprocess.Popen[str]] = {}

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline_s - time.perf_counter()

    def say(self, text: str) -> None:
        """Print and log a line."""
        line = f"[{time.perf_counter() - self.started_s:6.1f} s] {text}"
        with self.lock:
            print(line, flush=True)
            with (self.arguments.out / "log.txt").open("a") as log:
                log.write(line + "\n")

    def record(self, row: dict[str, Any]) -> None:
        """Append a result to the file."""
        with self.lock, (self.arguments.out / RESULTS).open("a") as results:
            results.write(json.dumps(row) + "\n")

    def all(self) -> None:
        """Train until the plan or the time ends."""
        threads = [
            threading.Thread(target=self._serve, args=(index,), daemon=True)
            for index in range(self.arguments.workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.1, self.left_s))
        for process in list(self.processes.values()):
            process.kill()
        for task in self.plan.waiting:
            self.say(f"left out: {task.label}")

    def _serve(self, index: int) -> None:
        """Give tasks to one process; start another process when it dies."""
        num_starts = 0
        process: subprocess.Popen[str] | None = None
        while self.left_s > 0 and num_starts < MAX_STARTS:
            task = self.plan.take(self.left_s)
            if task is None:
                if not self.plan.is_waiting(self.left_s):
                    return
                time.sleep(WAIT_S)
                continue
            if process is None or process.poll() is not None:
                num_starts += 1
                process = self._start(index)
            self._do(index, process, task)

    def _start(self, index: int) -> subprocess.Popen[str]:
        """Start a process that trains; it computes on one core."""
        arguments = self.arguments
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.compare_worker", "--data", arguments.data]
        command += ["--toy"] if arguments.toy else []
        with (arguments.out / "errors.txt").open("ab") as errors:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        self.processes[index] = process
        return process

    def _do(self, index: int, process: subprocess.Popen[str], task: Task) -> None:
        """Have a process do a task and record the result."""
        started_s = time.perf_counter()
        row = _ask(process, task, self.left_s)
        whole = {"label": task.label, **asdict(task), **row}
        whole["task_s"] = round(time.perf_counter() - started_s, 1)
        # When the deadline kills the process, the unfinished training has no result.
        if self.left_s > 0 or whole["status"] == "done":
            self.record(whole)
        self.plan.finish(task, whole)
        step_ms = 1000 * row.get("step_s", 0.0)
        memory = f"{step_ms:.0f} ms per step, {row.get('peak_gib', 0)} GiB"
        message = row.get("message", "")
        self.say(
            f"process {index}: {task.label}, rate {task.rate:g}: {whole['status']} "
            f"after {whole['task_s']} s; {memory} {message}"
        )


def _ask(process: subprocess.Popen[str], task: Task, left_s: float) -> dict[str, Any]:
    """Send a task to a process and return its answer; one that died has none."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"task": asdict(task), "left_s": left_s}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except (BrokenPipeError, ValueError):
        line = ""
    if not line:
        return {"status": "failed", "message": f"the process ended, code {process.wait()}"}
    row: dict[str, Any] = json.loads(line)
    return row


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budget-s", type=float, default=500.0)
    options.add_argument("--workers", type=int, default=8)
    options.add_argument("--main-steps", type=int, default=600, help="of V8, Unet, V7, V8 plain")
    options.add_argument("--other-steps", type=int, default=300, help="of all networks")
    options.add_argument("--rate-steps", type=int, default=RATE_STEPS)
    options.add_argument("--memory-gib", type=float, default=55.0, help="of all processes together")
    options.add_argument("--previous", type=Path, nargs="*", default=[])
    options.add_argument("--toy", action="store_true")
    arguments = options.parse_args()
    if arguments.toy:
        arguments.main_steps = TOY_STEPS + 1
        arguments.other_steps = TOY_STEPS
        arguments.rate_steps = TOY_STEPS
    return arguments


def main() -> int:
    """Run the plan."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tasks = rate_tasks(arguments.rate_steps)
    tasks += training_tasks(arguments.main_steps, arguments.other_steps)
    rows = []
    for path in arguments.previous:
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    run = Run(arguments, Plan(tasks, rows, arguments.memory_gib))
    # A run that finishes no training leaves an empty file.
    (arguments.out / RESULTS).touch()
    for row in rows:
        # So that the tables follow from one folder.
        run.record(row)
    run.say(f"{len(run.plan.waiting)} trainings planned, {arguments.workers} processes")
    run.all()
    run.say("end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
