"""Compilation, inference rate and the check of the device for train_gpu.py."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_networks import Scale, initial_state, networks, phase_config
from benchmarks.gpu_trial import PICTURES, WARM_STEPS, Trial
from covtanet.data.slice_file import load_slices
from covtanet.model.losses import CrossEntropyDiceConfig, loss_terms
from covtanet.model.registry import build_segmenter
from covtanet.training.batch_augment import BatchAugmentConfig, BatchAugmenter
from covtanet.training.resident import Recipe, ResidentSlices, batch_of, train


def compile_in_place(trial: Trial, name: str, limit_s: int) -> bool:
    """Compile a network; return False if that fails or exceeds the limit, and leave it eager."""
    module, _ = trial.module_of(name)
    try:
        with _time_limit(limit_s):
            trial.modules[name] = (module, torch.compile(module, dynamic=False))
            trial.train(name, (), WARM_STEPS, 0, restart=False)
    except Exception as error:  # the compiler may raise anything, and eager training continues
        trial.say(f"{name} stays eager: {type(error).__name__}: {str(error)[:300]}")
        trial.modules[name] = (module, module)
        return False
    return True


@contextmanager
def _time_limit(limit_s: int) -> Iterator[None]:
    """Raise TimeoutError after ``limit_s`` seconds."""

    def expire(signum: int, frame: Any) -> None:
        raise TimeoutError(f"time-out after {limit_s} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def fill_compiler_cache(data: Path, name: str, scale: Scale, device: torch.device) -> int:
    """Compile a network in this process, which leaves its kernels on disk for the main one."""
    network = networks(scale)[name]
    module: nn.Module = build_segmenter(network.segnet)
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.train()
    forward = torch.compile(module, dynamic=False)
    # The single slices suffice: compilation depends on the shapes and strides of a batch only.
    slices = ResidentSlices.of([load_slices(data / f"{PICTURES}.npz", 0)], device)
    recipe = Recipe(
        phase=phase_config(network, scale, 100),
        num_steps=1,
        size_px=scale.size_px,
        channels=network.segnet.in_channels,
        seed=0,
    )
    augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), device)
    started = time.perf_counter()
    train(module, forward, slices, recipe, augmenter, loss_terms(CrossEntropyDiceConfig()))
    print(f"{name} compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return 0


def inference_rate(trial: Trial, name: str, precision: str, batch_size: int) -> float:
    """Return the slices per second through a network, without flips."""
    module, _ = trial.module_of(name)
    module.eval()
    channels = networks(trial.scale)[name].segnet.in_channels
    side = trial.scale.size_px
    images = torch.rand(batch_size, channels, side, side, device=trial.device)
    images = images.contiguous(memory_format=torch.channels_last)
    is_bf16 = precision == "bfloat16"
    rounds = 10 if trial.device.type == "cuda" else 1
    started = 0.0
    with torch.inference_mode(), torch.autocast(trial.device.type, torch.bfloat16, enabled=is_bf16):
        for index in range(2 * rounds):
            # The first half of the rounds chooses kernels and is not timed.
            if index == rounds:
                _synchronise(trial.device)
                started = time.perf_counter()
            module(images)
        _synchronise(trial.device)
    module.train()
    return rounds * batch_size / (time.perf_counter() - started)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def check_device(trial: Trial) -> None:
    """Refuse a device on which a seed does not determine the batch or a step is not finite.

    Raises:
        RuntimeError: the same seed gave two different batches.
        FloatingPointError: the loss of ten steps is not finite.
    """
    slices = ResidentSlices.of(list(trial.series.values()), trial.device)
    recipe = trial.recipe_of("V8", 10, 0)
    augmenter = BatchAugmenter(BatchAugmentConfig(is_on=True), trial.device)
    first, mask = batch_of(slices, recipe, augmenter, 5)
    second, _ = batch_of(slices, recipe, augmenter, 5)
    if not torch.equal(first, second):
        raise RuntimeError("the same seed gave two different batches")
    module, _ = trial.module_of("V8")
    module.load_state_dict(initial_state(networks(trial.scale)["V8"], 0, trial.weights))
    module.eval()
    with torch.inference_mode():
        exact = torch.sigmoid(module(first))
        with torch.autocast(trial.device.type, torch.bfloat16):
            rounded = torch.sigmoid(module(first).float())
    module.train()
    trained = trial.train("V8", (), 10, 0)
    trial.metrics["check"] = {
        "mean_difference_of_bfloat16": round(float((exact - rounded).abs().mean()), 5),
        "lesion_share_of_a_batch": round(float(mask.mean()), 5),
        "loss_of_ten_steps": [round(loss, 4) for loss in trained.losses],
    }
    trial.say(f"check: {trial.metrics['check']}")
