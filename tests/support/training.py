"""Tiny trainings without a cluster, for the tests of the loop: builders that several processes can
import.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from covtanet.model.covtanet import CovTANetConfig, JointClassifier
from covtanet.model.losses import FocalTverskyConfig, JointLossConfig
from covtanet.model.registry import build_segmenter
from covtanet.model.segnet import TASegNetConfig
from covtanet.training.feed import Lane, Rows, Sampling
from covtanet.training.loop import Phase, Progress, fit
from covtanet.training.phase1 import phase1
from covtanet.training.phase2 import phase2
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks

PX = 32
NETWORK = CovTANetConfig(
    segnet=TASegNetConfig(widths=(4, 8, 8), fusion_channels=4),
    num_slices=4, pooled_px=8, regional_widths=(4, 8), path_channels=16, dropout=0.5,
)  # fmt: skip
CONFIG = PhaseConfig(num_epochs=3, batch_size=2, micro_batches=2, learning_rate=3e-3)


def slice_rows(count: int, seed: int) -> Rows:
    """Return noise with bright squares, the lesions; every fourth slice is without a lesion."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 20000, (count, PX, PX), dtype=np.uint16)
    lesion = np.zeros((count, PX, PX), np.uint8)
    for index in range(count):
        if index % 4:
            y, x = rng.integers(2, PX - 12, 2)
            lesion[index, y : y + 10, x : x + 10] = 1
    levels[lesion > 0] += 30000
    return {
        "name": np.array([f"series{seed}:{index:03d}" for index in range(count)]),
        "has_lesion": np.asarray(lesion.any(axis=(1, 2))),
        "levels": levels,
        "lesion": lesion,
    }


def volume_rows(count: int, seed: int) -> Rows:
    """Return random features whose mean is the grade."""
    rng = np.random.default_rng(seed)
    grade = np.arange(count) % 3
    shape = (
        count,
        NETWORK.num_slices,
        NETWORK.segnet.fused_channels,
        NETWORK.pooled_px,
        NETWORK.pooled_px,
    )
    return {
        "name": np.array([f"volume{seed}-{index:03d}" for index in range(count)]),
        "has_lesion": grade > 0,
        "pooled": (rng.standard_normal(shape) + grade[:, None, None, None, None]).astype(
            np.float16
        ),
        "is_infected": grade > 0,
        "is_severe": grade == 2,
    }


def samples(number: int, phase: int) -> Rows:
    """Return a few samples of a phase, which follow from the number."""
    return slice_rows(12, number) if phase == 1 else volume_rows(9, number)


def lane(number: int, phase: int, config: PhaseConfig) -> Lane:
    """Return a lane that has a pool to itself."""
    return SamplePool(samples(number, phase), Sampling(batch_size=config.batch_size)).lane()


def lanes(phase: int, config: PhaseConfig, ranks: Ranks | None = None) -> dict[int, Lane]:
    """Return this rank's lanes of one pool, which mixes the samples of all lanes."""
    ranks = ranks or Ranks()
    num_lanes = config.micro_batches
    parts = [samples(number, phase) for number in range(num_lanes)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    pool = SamplePool(joined, Sampling(batch_size=config.batch_size), num_lanes)
    return {number: pool.lane(number) for number in range(ranks.index, num_lanes, ranks.count)}


def build(phase: int, config: PhaseConfig, ranks: Ranks) -> Phase[Any]:
    """Return a phase with its network from a fixed seed, data parallel if there are
    several ranks.
    """
    torch.manual_seed(0)
    module: nn.Module = build_segmenter(NETWORK.segnet) if phase == 1 else JointClassifier(NETWORK)
    if phase == 1:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = (
        DistributedDataParallel(module, forward_sync_buffers=False) if ranks.count > 1 else module
    )
    validation = [
        lane(100 + number, phase, config) for number in range(ranks.index, 2, ranks.count)
    ]
    if phase == 1:
        return phase1(module, model, config, FocalTverskyConfig(), validation, ranks)
    return phase2(module, model, config, JointLossConfig(), validation, ranks)


def train(
    phase: int,
    config: PhaseConfig = CONFIG,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    reports: list[Progress] | None = None,
) -> Progress:
    """Train a phase on this rank's lanes."""
    ranks = ranks or Ranks()
    received = [] if reports is None else reports
    return fit(
        config,
        build(phase, config, ranks),
        lanes(phase, config, ranks),
        ranks,
        0,
        progress or Progress(),
        received.append,
    )


MEASURED_TIMES = ("data_wait_share", "step_s")


def curve(progress: Progress) -> list[dict[str, float]]:
    """Return the history without the columns that a clock measured."""
    return [
        {name: value for name, value in epoch.items() if name not in MEASURED_TIMES}
        for epoch in progress.history
    ]


def train_rank(index: int, count: int, folder: str, config: PhaseConfig = CONFIG) -> None:
    """Train both phases as one of several ranks, in this process; rank 0 writes curves
    and weights.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=index, world_size=count
    )
    for phase in (1, 2):
        progress = train(phase, config, Ranks(index=index, count=count))
        if index == 0:
            state = {name: value.tolist() for name, value in progress.weights.items()}
            out = Path(folder) / f"phase{phase}.json"
            out.write_text(json.dumps({"curve": curve(progress), "weights": state}))
    dist.destroy_process_group()
