"""Time of each OpenVINO engine of a saved model: start, and slices in turns.

python -m benchmarks.engines --model DIR [--threads N]

Prints a Markdown table. start: conversion and compilation, then the same from the cache. CPU
seconds, since other work on the machine disturbs the clock.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from covtanet.inference.float_engine import FloatEngine
from covtanet.inference.openvino_engine import INT8, NAMES, missing_instructions
from covtanet.inference.predictor import Predictor
from covtanet.machine import num_cores
from covtanet.model.saved_model import SavedModel, load_model

NUM_SLICES, BATCH, ROUNDS = 64, 16, 5


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--threads", type=int, default=num_cores())
    arguments = options.parse_args()
    model = load_model(arguments.model)
    names = [name for name in NAMES if not missing_instructions(name)]
    if model.quantizers is None:
        names.remove(INT8)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COVTANET_CACHE"] = folder
        starts = {
            name: [_start_s(model, name, arguments.threads) for _ in range(2)] for name in names
        }
        engines = {name: _engine(model, name, arguments.threads) for name in names}
    spent = _in_turns(engines, model)
    print(
        "| engine | CPU ms a slice | slices a second | of float32 | start, CPU s | from the cache |"
    )
    print("|---|---|---|---|---|---|")
    for name, (cpu_ms, rate) in spent.items():
        share = cpu_ms / spent[NAMES[0]][0]
        first, cached = starts[name]
        print(f"| {name} | {cpu_ms:.1f} | {rate:.0f} | {share:.2f} | {first:.1f} | {cached:.1f} |")
    return 0


def _engine(model: SavedModel, name: str, num_threads: int) -> FloatEngine:
    engine = Predictor(model, engine=name, num_threads=num_threads).engine
    assert isinstance(engine, FloatEngine)
    return engine


def _start_s(model: SavedModel, name: str, num_threads: int) -> float:
    return _cpu_s(lambda: Predictor(model, engine=name, num_threads=num_threads))


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _in_turns(engines: dict[str, FloatEngine], model: SavedModel) -> dict[str, tuple[float, float]]:
    """Return the least CPU milliseconds per slice and the most slices per second, by engine."""
    size = model.preprocessing.size_px
    channels = model.network.config.segnet.in_channels
    slices = np.random.default_rng(0).random((NUM_SLICES, channels, size, size), dtype=np.float32)
    cpu_s: dict[str, list[float]] = {name: [] for name in engines}
    wall_s: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 + ROUNDS):  # the first one warms up
        for name, engine in engines.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for start in range(0, NUM_SLICES, BATCH):
                engine.run(slices[start : start + BATCH])
            cpu_s[name].append(time.process_time() - cpu)
            wall_s[name].append(time.perf_counter() - wall)
    return {
        name: (1000 * min(cpu_s[name][1:]) / NUM_SLICES, NUM_SLICES / min(wall_s[name][1:]))
        for name in engines
    }


if __name__ == "__main__":
    sys.exit(main())
