"""Engines and training steps on one GPU, as shares of its measured bfloat16 rate; in ten minutes.

python -m benchmarks.gpu --out DIR [--budget-s 540] [--toy]

Needs torch, timm, numpy, scipy, Pillow and safetensors; no Ray, no data, no weights. Each part runs
in a process of its own with a time limit, so that a part that fails, hangs or breaks the device
ends alone; its error is written down. After every part DIR/gpu.json and DIR/gpu.md are written
anew. --toy: the same parts of a tiny network on the CPU, in seconds, to test that they run.

Exit codes: 0 all parts were measured; 1 some were not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import FULL, TOY, cases, parts
from benchmarks.gpu_inference import measure_engine, measure_gemm
from benchmarks.gpu_table import to_markdown
from benchmarks.gpu_training import measure_training

# A part does not start with less time left.
MIN_PART_S = 15.0
ERROR_CHARACTERS = 500
# A toy leaves a GPU alone, and one thread waits for no other on a machine that does other work too.
TOY_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> int:
    """Run all parts in processes of their own, or the one that is named in this process."""
    arguments = parse_arguments()
    if arguments.part:
        return run_part(arguments.part, arguments.out, is_toy=arguments.toy)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(is_toy=arguments.toy), "parts": {}}
    deadline_s = time.perf_counter() + arguments.budget_s
    for part, limit_s in parts(is_toy=arguments.toy).items():
        left_s = deadline_s - time.perf_counter()
        if left_s < MIN_PART_S:
            results["parts"][part] = {"error": f"left out, {max(left_s, 0):.0f} s left"}
        else:
            results["parts"][part] = start_part(part, arguments, min(limit_s, left_s))
        print(f"{part}: {results['parts'][part]}", flush=True)
        write(arguments.out, results)
    return int(any("error" in values for values in results["parts"].values()))


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budget-s", type=float, default=540.0)
    options.add_argument("--toy", action="store_true")
    options.add_argument("--part", default="", help="measure this part alone, in this process")
    return options.parse_args()


def environment(*, is_toy: bool) -> dict[str, Any]:
    """Return what the figures depend on."""
    has_gpu = torch.cuda.is_available() and not is_toy
    return {
        "device": torch.cuda.get_device_name() if has_gpu else platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "is_toy": is_toy,
    }


def start_part(part: str, arguments: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run a part in another process; return its values, or its error."""
    path = _file_of(part, arguments.out)
    path.unlink(missing_ok=True)  # of an earlier call
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(arguments.out)]
    command += ["--part", part, *(["--toy"] if arguments.toy else [])]
    process_environment = os.environ | (TOY_ENVIRONMENT if arguments.toy else {})
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=process_environment,
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"time-out after {limit_s:.0f} s"}
    if done.returncode or not path.exists():
        return {"error": _last_line(done.stderr) or f"exit code {done.returncode}"}
    values: dict[str, Any] = json.loads(path.read_text())
    return {**values, "wall_s": round(time.perf_counter() - started, 1)}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[-1][:ERROR_CHARACTERS]


def _file_of(part: str, out: Path) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in part)
    return out / f"part-{name}.json"


def run_part(part: str, out: Path, *, is_toy: bool) -> int:
    """Measure a part in this process and write its values."""
    device = torch.device("cpu" if is_toy else "cuda")
    effort = TOY if is_toy else FULL
    name, _, kind = part.partition(": ")
    if part == "GEMM":
        values = measure_gemm(effort, device)
    elif kind == "training":
        values = measure_training(cases()[name], effort, device)
    else:
        values = measure_engine(cases()[name], kind, effort, device)
    out.mkdir(parents=True, exist_ok=True)
    _file_of(part, out).write_text(json.dumps(values) + "\n")
    return 0


def write(out: Path, results: dict[str, Any]) -> None:
    """Write results and table; a run that is cut keeps what was measured."""
    partial = out / "gpu.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.rename(out / "gpu.json")
    (out / "gpu.md").write_text(to_markdown(results))


if __name__ == "__main__":
    sys.exit(main())
