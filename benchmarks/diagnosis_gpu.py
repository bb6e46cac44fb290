"""Table IV on mosmed-mid, on one GPU in minutes: CovTANet, five classifiers and the lesion share.

python -m benchmarks.diagnosis_gpu --data FILE.npz --weights FILE --out DIR [--budget-s 430]
    [--chosen DIR] [--toy]

--data: written by diagnosis_data.py. --weights: of the frozen segmenter, V8 on the lung box.
--chosen: the files of an earlier run, whose choices are taken. --toy: all trainings at a tiny size
on the CPU, to test that they run.

One process for each network; they share the GPU and leave one file each: lines of JSON, one per
training and one per tested study. A run that is cut keeps every finished fold. diagnosis_table.py
prints the table.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import diagnosis_slices
from benchmarks.diagnosis_networks import COVTANET, LESION_SHARE, SCALE, TOY
from benchmarks.diagnosis_trial import Trial, chosen_in
from benchmarks.diagnosis_views import Views, frozen_segmenter

# Each process has its rows one after the other. All networks have the same time.
GROUPS = (
    (LESION_SHARE, COVTANET),
    ("VGG-19",),
    ("ResNet-50",),
    ("Xception",),
    ("DenseNet121",),
    ("InceptionV3",),
)
NUM_TOY_SLICES = 60


def start_groups(arguments: argparse.Namespace) -> list["subprocess.Popen[bytes]"]:
    """Start one process for each group of networks."""
    # Python and one thread for kernels: a core is enough for each process.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.diagnosis_gpu", *sys.argv[1:]]
    return [
        subprocess.Popen([*command, "--group", str(group)], env=environment)
        for group in range(len(GROUPS))
    ]


def run_group(arguments: argparse.Namespace, started_s: float) -> int:
    """Train and test the networks of one group in all folds."""
    scale = TOY if arguments.toy else SCALE
    device = torch.device("cpu" if arguments.toy else "cuda")
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    slices = diagnosis_slices.read(arguments.data)
    if arguments.toy:
        slices = slices.some(np.arange(0, len(slices.names), len(slices.names) // NUM_TOY_SLICES))
    trial = Trial(
        views=Views(
            slices=slices,
            scale=scale,
            device=device,
            segmenter=frozen_segmenter(arguments.weights, device),
        ),
        deadline_s=started_s + arguments.budget_s,
        path=arguments.out / f"rows-{arguments.group}.jsonl",
        chosen=chosen_in(arguments.chosen) if arguments.chosen else {},
    )
    names = GROUPS[arguments.group]
    failed = 0
    for index, name in enumerate(names):
        try:
            trial.run(name, num_left=len(names) - index)
        except Exception as error:  # the next networks go on
            trial.say(f"{name} failed: {type(error).__name__}: {str(error)[:300]}")
            failed += 1
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--weights", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budget-s", type=float, default=430.0)
    options.add_argument("--chosen", type=Path, help="files of a run whose choices are taken")
    options.add_argument("--toy", action="store_true")
    options.add_argument("--group", type=int, help="of GROUPS; all of them by default")
    return options.parse_args()


def main() -> int:
    """Run all groups, or the one that is named."""
    started_s = time.perf_counter()
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.group is not None:
        return run_group(arguments, started_s)
    processes = start_groups(arguments)
    try:
        return max(process.wait() for process in processes)
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
