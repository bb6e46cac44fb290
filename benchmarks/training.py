"""The training half of make bench: Ray's step against a plain data-parallel loop, waiting for data, feature cache."""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from covtanet import tracking
from covtanet.data.folds import Split
from covtanet.data.phantom_archive import configs, write_training_set
from covtanet.data.prepared import PreparedVolume
from covtanet.model.losses import FocalTverskyConfig
from covtanet.model.segnet import TASegNet
from covtanet.training import distributed
from covtanet.training.config import TrainingConfig
from covtanet.training.distributed import Place
from covtanet.training.feed import MemoryLane, Sampling, assign_lanes
from covtanet.training.loop import Progress, fit
from covtanet.training.phase1 import phase1
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.ranks import Ranks
from covtanet.training.worker import slice_rows

NUM_VOLUMES, NUM_HELD = 9, 1
NUM_EPOCHS = 4  # the first is not counted
PHASE1 = PhaseConfig(num_epochs=NUM_EPOCHS, batch_size=4, learning_rate=1e-3)
PHASE2 = PhaseConfig(num_epochs=NUM_EPOCHS, batch_size=2, learning_rate=1e-3)
CONFIG = TrainingConfig(size="small", num_folds=2, folds=(0,), phase1=PHASE1, phase2=PHASE2)
MIN_LOGICAL_CPUS = 4


def step_s(history: list[dict[str, float]]) -> float:
    """Seconds of a step, median of the epochs that count."""
    return statistics.median(epoch["step_s"] for epoch in history[1:])


def wait_share(history: list[dict[str, float]]) -> float:
    """Share of the time that a worker waits for data, mean of the epochs that count."""
    return statistics.mean(epoch["data_wait_share"] for epoch in history[1:])


def plain_rank(index: int, count: int, lanes: list[list[str]], store: str, out: str) -> None:
    """One rank of the plain loop: torch.distributed, samples in memory, no Ray."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=count)
    torch.manual_seed(0)
    segnet = TASegNet(CONFIG.architecture.segnet)
    segnet.to(memory_format=torch.channels_last)
    model = DistributedDataParallel(segnet, forward_sync_buffers=False)
    tables = [pq.read_table(path) for path in lanes[index]]
    parts = [slice_rows(table, CONFIG.window.size_px) for table in tables]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lane = MemoryLane(rows, Sampling(batch_size=PHASE1.batch_size), index)
    ranks = Ranks(index=index, count=count)
    phase = phase1(segnet, model, PHASE1, FocalTverskyConfig(), [], ranks)
    progress = fit(PHASE1, phase, {index: lane}, ranks, 0, Progress(), lambda _: None)
    if index == 0:
        Path(out).write_text(json.dumps(progress.history))
    dist.destroy_process_group()


def plain_loop(lanes: list[list[str]]) -> list[dict[str, float]]:
    """The plain loop on two processes; its history."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "history.json"
        ranks = [
            get_context("spawn").Process(
                target=plain_rank, args=(index, len(lanes), lanes, f"{folder}/store", str(out))
            )
            for index in range(len(lanes))
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        history: list[dict[str, float]] = json.loads(out.read_text())
        return history


def place(folder: Path, name: str) -> Place:
    """Where one measured training keeps its checkpoints."""
    run = tracking.RunAddress(uri=f"sqlite:///{folder}/mlflow.db", experiment="bench", name=name, key=name)
    return Place(storage_uri=str(folder / "checkpoints"), name=f"{name}-{time.time_ns()}", run=run)


def measure(folder: Path, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    """(what, value, wanted) of every figure."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    volumes = write_training_set(str(folder / "data"), configs(NUM_VOLUMES, 55), 2)
    ray.init(address="local", num_cpus=MIN_LOGICAL_CPUS, include_dashboard=False, log_to_driver=False)
    try:
        return _measure(folder, volumes, say)
    finally:
        ray.shutdown()


def _measure(folder: Path, labelled: list, say: Callable[[str], None]) -> list[tuple[str, str, str]]:
    prepared_uri = str(folder / "prepared")
    found = distributed.prepare_volumes(
        labelled, str(folder / "data"), prepared_uri, CONFIG.window, CONFIG.slice_step_mm
    )
    volumes = {volume.key: volume for volume in found}
    keys = sorted(volumes)
    split = Split(train=tuple(keys[NUM_HELD:]), validation=tuple(keys[:NUM_HELD]), test=())
    lanes = assign_lanes({key: len(volumes[key].slices) for key in split.train}, PHASE1.micro_batches)
    paths = [[distributed.prepared_uri_of(prepared_uri, key) for key in lane] for lane in lanes]

    def under_ray(name: str, config: TrainingConfig) -> list[dict[str, float]]:
        say(f"phase 1 under Ray, {name}")
        return distributed.train_phase1(config, volumes, split, prepared_uri, place(folder, name)).history

    plain, cached, streamed = [], [], []
    for turn in range(2):
        say("phase 1, plain loop")
        plain.append(plain_loop(paths))
        cached.append(under_ray(f"memory{turn}", CONFIG))
        streamed.append(under_ray(f"stream{turn}", replace(CONFIG, cache_bytes=1)))
    base = min(step_s(history) for history in plain)
    rows = [
        (
            f"phase-1 step under Ray Train and Ray Data, {name}, over the plain loop's ({base:.2f} s)",
            f"{min(step_s(history) for history in histories) / base:.2f} x",
            "<= 1.1 x",
        )
        for name, histories in (("samples kept in memory", cached), ("streamed every epoch", streamed))
    ]
    rows += [
        (f"a worker waits for data, {name}", f"{100 * max(wait_share(h) for h in histories):.1f} %", "<= 10 %")
        for name, histories in (("samples kept in memory", cached), ("streamed every epoch", streamed))
    ]
    return rows + _measure_cache(folder, volumes, split, prepared_uri, say)


def _measure_cache(
    folder: Path, volumes: dict[str, PreparedVolume], split: Split, prepared_uri: str, say: Callable[[str], None]
) -> list[tuple[str, str, str]]:
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in TASegNet(CONFIG.architecture.segnet).state_dict().items()}
    steps = {}
    for name, is_cached in (("cached", True), ("recomputed", False)):
        say(f"phase 2, features {name}")
        config = replace(CONFIG, cache_features=is_cached)
        progress = distributed.train_phase2(config, volumes, split, prepared_uri, place(folder, name), state)
        steps[name] = step_s(progress.history)
    return [
        (
            "phase-2 step, features recomputed every epoch over cached",
            f"{steps['recomputed'] / steps['cached']:.1f} x",
            "",
        )
    ]


def measure_device() -> list[tuple[str, str, str]]:
    """Training speed at the paper's size and its share of the device's own matrix rate, in one run; on a GPU."""
    from torch.utils.flop_counter import FlopCounterMode

    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    config = TrainingConfig()
    segnet = TASegNet(config.architecture.segnet).to(device, memory_format=torch.channels_last)
    batch = torch.rand(8, 1, config.window.size_px, config.window.size_px, device=device)
    optimizer = torch.optim.Adam(segnet.parameters())

    def step() -> None:
        with torch.autocast("cuda", dtype):
            loss = segnet(batch).float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        segnet(batch[:1])
    matrix = torch.rand(8192, 8192, device=device, dtype=dtype)
    rates = []
    for work, rounds in ((lambda: matrix @ matrix, 50), (step, 20)):
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            work()
        torch.cuda.synchronize()
        rates.append(rounds / (time.perf_counter() - started))
    peak, flops = rates[0] * 2 * 8192**3, 3 * counter.get_total_flops() * len(batch) * rates[1]
    return [
        ("slices a second in training, 512 x 512, bfloat16", f"{rates[1] * len(batch):.0f}", ""),
        ("share of the device's own bfloat16 matrix rate", f"{flops / peak:.2f}", ""),
    ]
