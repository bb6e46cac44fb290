"""A process of compare_gpu.py: reads tasks from standard input, writes results to standard output.

A line is a JSON object, in both directions.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_plan import Task
from benchmarks.compare_training import Bench
from benchmarks.gpu_networks import ENCODER, TOY, Scale
from benchmarks.gpu_trial import load_all

# At half the side a step that chooses a rate takes a quarter of the time on the card.
RATE_PX = 128


def answer(bench: Bench, line: str) -> dict[str, Any]:
    """Return the result of one task; an exception is a result, and the process goes on."""
    order = json.loads(line)
    deadline_s = time.perf_counter() + order["left_s"]
    try:
        return bench.run(Task(**order["task"]), deadline_s)
    except torch.OutOfMemoryError as error:
        return {"status": "out_of_memory", "message": str(error)[:200]}
    except FloatingPointError as error:
        return {"status": "diverged", "message": str(error)[:200]}
    except Exception as error:  # the next tasks go on
        return {"status": "failed", "message": f"{type(error).__name__}: {str(error)[:300]}"}


def release(device: torch.device) -> None:
    """Return the memory of the last network, which other processes need.

    Raises:
        RuntimeError: the device fails in this process; after some errors it does for ever.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def make_bench(data: Path, *, is_toy: bool) -> Bench:
    """Read the data and choose the device."""
    scale = TOY if is_toy else Scale()
    return Bench(
        scale=scale,
        rate_px=scale.size_px if is_toy else RATE_PX,
        series=load_all(data, scale.slice_stride),
        weights=data / f"{ENCODER}.safetensors",
        device=torch.device("cpu" if is_toy else "cuda"),
    )


def main() -> int:
    """Answer tasks until standard input ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--toy", action="store_true")
    arguments = options.parse_args()
    # Results have a channel that no library prints to.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    # Evaluation is in exact float32, as on the CPUs that screen; training is in bfloat16 anyway.
    torch.backends.cudnn.allow_tf32 = False
    # Processes that share a card disturb the timing by which cuDNN would choose kernels.
    torch.backends.cudnn.benchmark = False
    bench = make_bench(arguments.data, is_toy=arguments.toy)
    for line in sys.stdin:
        results.write(json.dumps(answer(bench, line)) + "\n")
        results.flush()
        # If the device has failed this ends the process, and compare_gpu.py starts another.
        release(bench.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
