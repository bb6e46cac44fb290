"""Train and compare segmenters on one GPU in minutes: V8 on all data, three folds, other networks.

python -m benchmarks.train_gpu --data DIR --out DIR [--budget-s 520]
    [--fold N [--steps N]] [--eager] [--toy]

--data: written by gpu_data.py. --fold: only V8 on this fold, then V8 with fewer steps. --toy: all
trainings at a tiny size on the CPU, to test that they run. The order lets a run that is cut keep
the most useful results: V8 on all data; V8 on three folds of two patients; the comparison with
equal, fewer steps. A second process compiles V8, and until it ends networks of the comparison are
trained.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_compile import (
    check_device,
    compile_in_place,
    fill_compiler_cache,
    inference_rate,
)
from benchmarks.gpu_networks import ENCODER, TOY, Scale
from benchmarks.gpu_trial import THRESHOLD, Trial, load_all

# Pairs of a scan with much and a scan with little lesion, so that training sees both in every fold.
FOLDS = (
    ("coronacases-003", "coronacases-005"),
    ("coronacases-001", "coronacases-002"),
    ("coronacases-007", "coronacases-008"),
)
# Limits in seconds on compiling in the second process, and in this one with its kernels on disk.
CACHE_LIMIT_S = 130
COMPILE_LIMIT_S = 75
COMPILED = ("V8", "V7", "V8 without TAU")
# Longest training of the comparison, of the main networks and of the others.
LONGEST_S = 80.0
LONGEST_OTHERS_S = 40.0
# A training of V8 does not start with less time left.
MIN_LONG_S = 30.0
# Networks of the comparison: the main ones in all folds, then the others in the first fold.
MAIN = ("Unet", "V8", "V8 without TAU", "V7")
OTHERS = (
    "Unet++",
    "Attention-Unet",
    "V8, random start",
    "V8, one slice",
    "MultiResUnet",
    "Gated-Unet",
    "CPF-Net",
    "Inf-Net",
    "COPLE-Net",
    "V8 at half size",
    "Mini-SegNet",
    "FCN",
    "Vnet",
)
WHILE_COMPILING = (("Unet", 0), ("Unet", 1), ("Unet", 2), ("Unet++", 0), ("Attention-Unet", 0))


class Run:
    """Order of the trainings of one call."""

    def __init__(self, trial: Trial, compilers: dict[str, subprocess.Popen[bytes]]) -> None:
        self.trial = trial
        self.compilers = compilers
        self.compiled: set[str] = set()
        self.compared: set[tuple[str, int]] = set()

    def all_networks(self) -> None:
        """Train V8 on all data and on the folds, then compare the networks."""
        trial = self.trial
        for name, fold in WHILE_COMPILING:
            if self.compilers and self.compilers["V8"].poll() is None:
                self.compare(name, fold)
        self.wait_for_compiler("V8")
        num_steps = self.long_steps()
        self.train_long("V8 final", (), num_steps, 7)
        for fold, tested in enumerate(FOLDS):
            self.train_long(f"V8 fold {fold}", tested, num_steps, fold)
        trial.metrics["inference_slices_per_s"] = {
            precision: round(inference_rate(trial, "V8", precision, 2 * trial.scale.batch_size), 1)
            for precision in ("float32", "bfloat16")
        }
        trial.say(f"inference, slices per second: {trial.metrics['inference_slices_per_s']}")
        self.comparison()

    def one_fold(self, fold: int, num_steps: int) -> None:
        """Train V8 on one fold, then V8 at the comparison's steps, first on that fold."""
        self.trial.metrics["long_steps"] = num_steps
        self.train_long(f"V8 fold {fold}", FOLDS[fold], num_steps, fold)
        remaining = [number for number in range(len(FOLDS)) if number != fold]
        for number in (fold, *remaining):
            self.compare("V8", number)

    def comparison(self) -> None:
        """Compare with equal steps: the main networks in all folds, then the others."""
        for name in MAIN:
            self.wait_for_compiler(name)
            for fold in range(len(FOLDS)):
                self.compare(name, fold)
            if name != "V8":
                self.trial.forget(name)
        for fold in range(len(FOLDS)):
            for name in OTHERS:
                if self.trial.left_s > 10:
                    self.compare(name, fold)
                    self.trial.forget(name)

    def wait_for_compiler(self, name: str) -> None:
        """Compile a network when the second process has ended; after the limit it stays eager."""
        compiler = self.compilers.pop(name, None)
        if compiler is None:
            return
        left_s = self.trial.started_s + CACHE_LIMIT_S - time.perf_counter()
        try:
            code = compiler.wait(max(0.1, left_s))
        except subprocess.TimeoutExpired:
            compiler.kill()
            self.trial.say(f"{name} stays eager: compiling takes too long")
            return
        if code == 0 and compile_in_place(self.trial, name, COMPILE_LIMIT_S):
            self.compiled.add(name)
        is_compiled = name in self.compiled
        self.trial.say(f"{name}: compiled {is_compiled}, second process returned {code}")

    def long_steps(self) -> int:
        """Measure a step of V8 and return the number of steps of its trainings."""
        trial = self.trial
        step_s = trial.step_s("V8", self._timed_steps(40))
        low, high = trial.scale.long_steps
        num_steps = int(min(high, max(low, round(trial.scale.long_s / step_s, -2))))
        trial.metrics["long_steps"] = num_steps
        trial.say(f"V8: {step_s * 1000:.1f} ms per step, {num_steps} steps per training")
        return num_steps

    def _timed_steps(self, num_steps: int) -> int:
        return 4 if self.trial.scale == TOY else num_steps

    def train_long(self, label: str, tested: tuple[str, ...], num_steps: int, seed: int) -> None:
        """Train V8 and evaluate it on the tested series; on all data there is no evaluation."""
        trial = self.trial
        if trial.left_s < MIN_LONG_S:
            trial.say(f"{label}: left out, {trial.left_s:.0f} s left")
            return
        try:
            trained = trial.train("V8", tested, num_steps, seed)
        except FloatingPointError as error:  # the next trainings go on
            trial.say(f"{label} failed: {error}")
            return
        # A training that the deadline cut before its first step has nothing to keep.
        if not trained.num_steps:
            trial.say(f"{label}: cut before its first step")
            return
        stem = label.replace(" ", "-").lower()
        trial.save(stem, trained.weights, is_half=bool(tested))
        trial.note(label, "V8", trained, num_steps, is_compiled="V8" in self.compiled)
        if tested:
            trial.evaluate("V8", "V8", tested)
            trial.summarise("V8")
        trial.write()

    def compare(self, name: str, fold: int) -> None:
        """Train one network of the comparison on one fold, if the time left suffices."""
        if (name, fold) in self.compared:
            return
        self.compared.add((name, fold))
        label = f"{name}, {self.trial.scale.short_steps} steps"
        try:
            self._compare(name, label, fold)
        except Exception as error:  # the next networks go on
            message = f"{type(error).__name__}: {str(error)[:300]}"
            self.trial.say(f"{label}, fold {fold} failed: {message}")

    def _compare(self, name: str, label: str, fold: int) -> None:
        trial = self.trial
        num_steps = trial.scale.short_steps
        step_s = trial.step_s(name, self._timed_steps(10))
        longest_s = LONGEST_S if name in MAIN else LONGEST_OTHERS_S
        if step_s * num_steps > min(longest_s, trial.left_s - 4):
            trial.say(f"{label}, fold {fold}: left out, {step_s * 1000:.0f} ms per step")
            return
        trained = trial.train(name, FOLDS[fold], num_steps, 1000 + fold)
        is_compiled = name in self.compiled
        trial.note(f"{label}, fold {fold}", name, trained, num_steps, is_compiled=is_compiled)
        if not trained.was_cut:
            trial.evaluate(name, label, FOLDS[fold])
            trial.summarise(label)


def start_compilers(arguments: argparse.Namespace) -> dict[str, subprocess.Popen[bytes]]:
    """Start one process for each network to compile; they share the compiler's cache on disk."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "5"}
    log = (arguments.out / "log.txt").open("ab")
    command = [sys.executable, "-m", "benchmarks.train_gpu"]
    command += ["--data", str(arguments.data), "--out", str(arguments.out), "--compile-only"]
    return {
        name: subprocess.Popen([*command, name], env=environment, stderr=log) for name in COMPILED
    }


def try_check(trial: Trial) -> None:
    """Check the device; a failure is reported and the trainings go on."""
    try:
        check_device(trial)
    except Exception as error:  # a device that cannot train fails in the next step anyway
        trial.say(f"check failed: {type(error).__name__}: {error}")


def start_trial(arguments: argparse.Namespace, scale: Scale, device: torch.device) -> Trial:
    """Return a trial with all data read, which records its device and settings."""
    started_s = time.perf_counter()
    trial = Trial(
        scale=scale,
        series=load_all(arguments.data, scale.slice_stride),
        weights=arguments.data / f"{ENCODER}.safetensors",
        out=arguments.out,
        device=device,
        deadline_s=started_s + arguments.budget_s,
        started_s=started_s,
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    trial.metrics["environment"] = {
        "device": name,
        "torch": torch.__version__,
        "threshold": THRESHOLD,
        "folds": FOLDS,
    }
    trial.say(f"{name}, torch {torch.__version__}, {len(trial.series)} series")
    return trial


def parse_arguments() -> argparse.Namespace:
    """Return the command's options."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budget-s", type=float, default=520.0)
    options.add_argument("--toy", action="store_true")
    options.add_argument("--eager", action="store_true", help="compile nothing")
    options.add_argument("--fold", type=int, help="only V8 on this fold, then with fewer steps")
    options.add_argument("--steps", type=int, default=1000, help="of V8 with --fold")
    options.add_argument("--compile-only", default="", help="compile this network and end")
    return options.parse_args()


def main() -> int:
    """Run the trainings of one call."""
    arguments = parse_arguments()
    scale = TOY if arguments.toy else Scale()
    device = torch.device("cpu" if arguments.toy else "cuda")
    # Evaluation is in exact float32, as on the CPUs that screen; training is in bfloat16 anyway.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if arguments.compile_only:
        return fill_compiler_cache(arguments.data, arguments.compile_only, scale, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    is_eager = arguments.toy or arguments.eager or arguments.fold is not None
    compilers = {} if is_eager else start_compilers(arguments)
    trial = start_trial(arguments, scale, device)
    try:
        if arguments.fold is None:
            try_check(trial)
            Run(trial, compilers).all_networks()
        else:
            Run(trial, compilers).one_fold(arguments.fold, arguments.steps)
    finally:
        for compiler in compilers.values():
            compiler.kill()
        trial.say("end")
        trial.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
