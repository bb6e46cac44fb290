"""Train and compare segmenters on one GPU in minutes: what ships, three folds, other networks.

python benchmarks/train_gpu.py --data DIR --out DIR [--budget-s 520] [--toy]

--data: made by gpu_data.py. --toy: everything at a tiny size on the CPU, to see that it runs.
Order, so that a run that is cut keeps the most: V8 on everything; V8 on three folds of two
patients; then the comparison at equal, fewer steps. V8 is compiled by a process beside, and until
that is done networks of the comparison are trained.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_trial import (
    ENCODER,
    FOLDS,
    THRESHOLD,
    TOY,
    Scale,
    Trial,
    check,
    compiled_step,
    inference_rate,
    load_all,
    warm,
)

# Seconds that compiling may take: by the process beside; in this one, from what that left on disk.
WARM_LIMIT_S, COMPILE_LIMIT_S = 130, 75
COMPILED = ("V8", "V7", "V8 without TAU")
# Seconds that one training of the comparison may take: of the main rows, of the others.
LONGEST_S, LONGEST_OTHERS_S = 80.0, 40.0
# A long training does not start with less time left.
MIN_LONG_S = 30.0
# Networks of the comparison: these in all folds, then all others in the first fold, in this order.
FIRST = ("Unet", "V8", "V8 without TAU", "V7")
SECOND = (
    "Unet++", "Attention-Unet", "V8, random start", "V8, one slice", "MultiResUnet", "Gated-Unet",
    "CPF-Net", "Inf-Net", "COPLE-Net", "V8 at half size", "Mini-SegNet", "FCN", "Vnet",
)  # fmt: skip
WHILE_COMPILING = (("Unet", 0), ("Unet", 1), ("Unet", 2), ("Unet++", 0), ("Attention-Unet", 0))


class Run:
    """The plan of one call. short: trainings of the comparison that are done."""

    def __init__(self, trial: Trial, warmers: dict[str, subprocess.Popen[bytes]]) -> None:
        self.trial, self.warmers = trial, warmers
        self.compiled: set[str] = set()
        self.short: set[tuple[str, int]] = set()

    def wait(self, name: str) -> None:
        """Compile a network once its process beside is done; without that in time it stays eager."""
        warmer = self.warmers.pop(name, None)
        if warmer is None:
            return
        left_s = self.trial.started_s + WARM_LIMIT_S - time.perf_counter()
        try:
            code = warmer.wait(max(0.1, left_s))
        except subprocess.TimeoutExpired:
            warmer.kill()
            self.trial.say(f"{name} stays eager: compiling takes too long")
            return
        if code == 0 and compiled_step(self.trial, name, COMPILE_LIMIT_S):
            self.compiled.add(name)
        self.trial.say(f"{name}: compiled {name in self.compiled}, process beside returned {code}")

    def long(self, label: str, tested: tuple[str, ...], num_steps: int, seed: int) -> None:
        """V8 for long; the folds are tested, and what ships has nothing to be tested on."""
        if self.trial.left_s < MIN_LONG_S:
            self.trial.say(f"{label}: left out, {self.trial.left_s:.0f} s left")
            return
        try:
            trained = self.trial.train("V8", tested, num_steps, seed)
        except FloatingPointError as error:  # must not cost the other trainings
            self.trial.say(f"{label} failed: {error}")
            return
        stem = label.replace(" ", "-").lower()
        self.trial.save(stem, trained.weights, is_half=bool(tested))
        self.trial.note(label, "V8", trained, num_steps, "V8" in self.compiled)
        if tested:
            self.trial.evaluate("V8", "V8", tested)
            self.trial.summarise("V8")
        self.trial.write()

    def compare(self, name: str, fold: int) -> None:
        """One training of the comparison, if it fits into what is left."""
        if (name, fold) in self.short:
            return
        trial, num_steps = self.trial, self.trial.scale.short_steps
        label = f"{name}, {num_steps} steps"
        self.short.add((name, fold))
        try:
            step_s = trial.step_s(name, 4 if trial.scale.size_px < 100 else 10)
            longest_s = LONGEST_S if name in FIRST else LONGEST_OTHERS_S
            if step_s * num_steps > min(longest_s, trial.left_s - 4):
                trial.say(f"{label}, fold {fold}: left out, {step_s * 1000:.0f} ms a step")
                return
            trained = trial.train(name, FOLDS[fold], num_steps, 1000 + fold)
            trial.note(f"{label}, fold {fold}", name, trained, num_steps, name in self.compiled)
            if not trained.was_cut:
                trial.evaluate(name, label, FOLDS[fold])
                trial.summarise(label)
        except Exception as error:  # a network that fails must not cost the others
            trial.say(f"{label}, fold {fold} failed: {type(error).__name__}: {str(error)[:300]}")

    def go(self) -> None:
        trial = self.trial
        for name, fold in WHILE_COMPILING:
            if self.warmers and self.warmers["V8"].poll() is None:
                self.compare(name, fold)
        self.wait("V8")
        step_s = trial.step_s("V8", 4 if trial.scale.size_px < 100 else 40)
        low, high = trial.scale.long_steps
        num_steps = min(high, max(low, round(trial.scale.long_s / step_s, -2)))
        num_steps = int(num_steps)
        trial.figures["long_steps"] = num_steps
        trial.say(f"V8: {step_s * 1000:.1f} ms a step, {num_steps} steps a training")
        self.long("V8 final", (), num_steps, 7)
        for fold, tested in enumerate(FOLDS):
            self.long(f"V8 fold {fold}", tested, num_steps, fold)
        trial.figures["inference_slices_per_s"] = {
            precision: round(inference_rate(trial, "V8", precision, 2 * trial.scale.batch_size), 1)
            for precision in ("float32", "bfloat16")
        }
        trial.say(f"inference, slices a second: {trial.figures['inference_slices_per_s']}")
        self.comparison()

    def rest(self, fold: int, num_steps: int) -> None:
        """V8 on one fold for long, then V8 at the comparison's steps: what a cut run left out."""
        self.trial.figures["long_steps"] = num_steps
        self.long(f"V8 fold {fold}", FOLDS[fold], num_steps, fold)
        for number in (fold, *(other for other in range(len(FOLDS)) if other != fold)):
            self.compare("V8", number)

    def comparison(self) -> None:
        """Equal steps for all: the main rows in all folds, the rest in the first, then in all."""
        for name in FIRST:
            self.wait(name)
            for fold in range(len(FOLDS)):
                self.compare(name, fold)
            if name != "V8":
                self.trial.forget(name)
        for fold in range(len(FOLDS)):
            for name in SECOND:
                if self.trial.left_s > 10:
                    self.compare(name, fold)
                    self.trial.forget(name)


def start_warmers(arguments: argparse.Namespace) -> dict[str, subprocess.Popen[bytes]]:
    """One process for each network to compile; they share the compiler's cache on disk."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "5"}
    log = (arguments.out / "log.txt").open("ab")
    return {
        name: subprocess.Popen(
            [
                sys.executable, "-m", "benchmarks.train_gpu",
                "--data", str(arguments.data), "--out", str(arguments.out), "--warm", name,
            ],
            env=environment, stderr=log,
        )
        for name in COMPILED
    }  # fmt: skip


def checked(trial: Trial) -> None:
    try:
        check(trial)
    except Exception as error:  # a difference is reported; a device that cannot train fails next
        trial.say(f"check failed: {type(error).__name__}: {error}")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budget-s", type=float, default=520.0)
    options.add_argument("--toy", action="store_true")
    options.add_argument("--eager", action="store_true", help="compile nothing")
    options.add_argument("--fold", type=int, help="V8 on this fold alone, then at fewer steps")
    options.add_argument("--steps", type=int, default=1000, help="with --fold: of the long training")
    options.add_argument("--warm", default="", help="compile this network and end")
    arguments = options.parse_args()
    started_s = time.perf_counter()
    scale = TOY if arguments.toy else Scale()
    device = torch.device("cpu" if arguments.toy else "cuda")
    # Evaluation is in exact float32, as on the CPUs that screen; training is in bfloat16 anyway.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    weights = arguments.data / f"{ENCODER}.safetensors"
    if arguments.warm:
        return warm(arguments.data, weights, arguments.warm, scale, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    is_eager = arguments.toy or arguments.eager or arguments.fold is not None
    warmers = {} if is_eager else start_warmers(arguments)
    trial = Trial(
        scale=scale,
        series=load_all(arguments.data, scale.slice_stride),
        weights=weights,
        out=arguments.out,
        device=device,
        deadline_s=started_s + arguments.budget_s,
        started_s=started_s,
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    trial.figures["environment"] = {
        "device": name, "torch": torch.__version__, "threshold": THRESHOLD, "folds": FOLDS
    }  # fmt: skip
    trial.say(f"{name}, torch {torch.__version__}, {len(trial.series)} series")
    try:
        if arguments.fold is None:
            checked(trial)
            Run(trial, warmers).go()
        else:
            Run(trial, warmers).rest(arguments.fold, arguments.steps)
    finally:
        for warmer in warmers.values():
            warmer.kill()
        trial.say("end")
        trial.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
