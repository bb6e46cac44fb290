"""A training step under Ray against a plain data-parallel loop, waits for data, the feature cache.

On a GPU the rate of training at the paper's size too.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import WORK, Result, say
from covtanet import storage, tracking
from covtanet.data.folds import Split
from covtanet.data.labels import LabelledVolume
from covtanet.data.prepared import PreparedVolume, Samples
from covtanet.data.prepared_file import file_uri, to_parquet
from covtanet.experiments.preparation import prepare_volumes
from covtanet.model.losses import FocalTverskyConfig
from covtanet.model.registry import build_segmenter
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs
from covtanet.phantoms.training_set import write_training_set
from covtanet.training.config import TrainingConfig
from covtanet.training.feed import Sampling, assign_lanes
from covtanet.training.loop import Progress, fit
from covtanet.training.phase1 import phase1
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.pool import SamplePool
from covtanet.training.ranks import Ranks
from covtanet.training.sample_files import SampleFile, read_slices, slice_name, slice_rows
from covtanet.training.stream import SampleStream
from covtanet.training.trainer import PhaseRun, train_phase1, train_phase2

NUM_VOLUMES, NUM_HELD = 9, 1
NUM_EPOCHS = 4  # the first is not counted
PHASE1 = PhaseConfig(num_epochs=NUM_EPOCHS, batch_size=4, micro_batches=2, learning_rate=1e-3)
PHASE2 = PhaseConfig(num_epochs=NUM_EPOCHS, batch_size=2, micro_batches=2, learning_rate=1e-3)
CONFIG = TrainingConfig(
    size="small", num_folds=2, folds=(0,), num_workers=2, phase1=PHASE1, phase2=PHASE2
)
MIN_LOGICAL_CPUS = 4
# Of the measurement of reading alone: 24 volumes of 40 slices, in three windows.
NUM_READ_VOLUMES = 24
READ_PX = 256


History = list[dict[str, float]]


def step_s(history: History) -> float:
    """Return the seconds of a step, median of the epochs that count."""
    return statistics.median(epoch["step_s"] for epoch in history[1:])


def epoch_s(history: History) -> float:
    """Return the seconds of an epoch's steps, median of the epochs that count.

    Every epoch takes all samples, in steps of slightly different sizes.
    """
    return statistics.median(epoch["step_s"] * epoch["num_steps"] for epoch in history[1:])


def wait_share(history: History) -> float:
    """Return the share of the time that a worker waits for data, mean of the epochs that count."""
    return statistics.mean(epoch["data_wait_share"] for epoch in history[1:])


def plain_rank(index: int, count: int, lanes: list[list[str]], store: str, out: str) -> None:
    """Train on one rank of the plain loop: torch.distributed, samples in memory, no Ray."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=count)
    torch.manual_seed(0)
    segnet = build_segmenter(CONFIG.architecture.segnet)
    segnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = DistributedDataParallel(segnet, forward_sync_buffers=False)
    paths = [path for lane in lanes for path in lane]
    volumes = [slice_rows(pq.read_table(path), CONFIG.window.size_px) for path in paths]
    rows = {name: np.concatenate([volume[name] for volume in volumes]) for name in volumes[0]}
    pool = SamplePool(rows, Sampling(batch_size=PHASE1.batch_size), count)
    ranks = Ranks(index=index, count=count)
    phase = phase1(segnet, model, PHASE1, FocalTverskyConfig(), [], ranks)
    progress = fit(PHASE1, phase, {index: pool.lane(index)}, ranks, 0, Progress(), lambda _: None)
    if index == 0:
        Path(out).write_text(json.dumps(progress.history))
    dist.destroy_process_group()


def plain_loop(lanes: list[list[str]]) -> History:
    """Train with a process for each lane; return the history."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "history.json"
        processes = []
        for index in range(len(lanes)):
            arguments = (index, len(lanes), lanes, f"{folder}/store", str(out))
            process = get_context("spawn").Process(target=plain_rank, args=arguments)
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        history: History = json.loads(out.read_text())
        return history


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Prepared volumes, their split, and the folder of all measured trainings."""

    folder: Path
    volumes: dict[str, PreparedVolume]
    split: Split

    @property
    def uri(self) -> str:
        """The folder of the prepared volumes."""
        return str(self.folder / "prepared")

    def checkpoints(self, name: str) -> PhaseRun:
        """Return the location of a measured training's checkpoints."""
        run = tracking.RunAddress(
            uri=f"sqlite:///{self.folder}/mlflow.db", experiment="bench", name=name, key=name
        )
        storage_uri = str(self.folder / "checkpoints")
        return PhaseRun(storage_uri=storage_uri, name=f"{name}-{time.time_ns()}", run=run)

    def train_phase1(self, name: str, config: TrainingConfig) -> History:
        """Train phase 1 under Ray; return the history."""
        say(f"phase 1 under Ray, {name}")
        location = self.checkpoints(name)
        return train_phase1(config, self.volumes, self.split, self.uri, location).history

    def lanes(self) -> list[list[str]]:
        """Return the files of the prepared volumes, lane by lane."""
        num_slices = {key: len(self.volumes[key].slices) for key in self.split.train}
        lanes = []
        for keys in assign_lanes(num_slices, PHASE1.micro_batches):
            lanes.append([file_uri(self.uri, key) for key in keys])
        return lanes


def measure() -> list[Result]:
    """(t) phase 1 in three ways, phase 2 in two, and a GPU if there is one."""
    folder = WORK / "training"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    labelled = write_training_set(str(folder / "data"), configs(NUM_VOLUMES, 55), 2)
    ray.init(
        address="local", num_cpus=MIN_LOGICAL_CPUS, include_dashboard=False, log_to_driver=False
    )
    try:
        data = _prepare(folder, labelled)
        results = [*_measure_phase1(data), *_measure_phase2(data)]
        results += _measure_reading(folder)
    finally:
        ray.shutdown()
    if torch.cuda.is_available():
        results += measure_device()
    return results


def _prepare(folder: Path, labelled: list[LabelledVolume]) -> PreparedData:
    prepared = prepare_volumes(
        labelled,
        str(folder / "data"),
        str(folder / "prepared"),
        CONFIG.window,
        CONFIG.slice_step_mm,
    )
    volumes = {volume.key: volume for volume in prepared}
    keys = sorted(volumes)
    split = Split(train=tuple(keys[NUM_HELD:]), validation=tuple(keys[:NUM_HELD]), test=())
    return PreparedData(folder=folder, volumes=volumes, split=split)


def _measure_phase1(data: PreparedData) -> list[Result]:
    """Measure the plain loop and both kinds of lanes in turns, twice; the faster turn counts."""
    lanes = data.lanes()
    plain: list[History] = []
    under_ray: dict[str, list[History]] = {
        "samples kept in memory": [],
        "read from storage every epoch": [],
    }
    for turn in range(2):
        say("phase 1, plain loop")
        plain.append(plain_loop(lanes))
        cached = data.train_phase1(f"memory{turn}", CONFIG)
        under_ray["samples kept in memory"].append(cached)
        # A cache of one byte holds no sample: every epoch reads them anew.
        streamed = data.train_phase1(f"stream{turn}", replace(CONFIG, cache_bytes=1))
        under_ray["read from storage every epoch"].append(streamed)
    base = min(map(epoch_s, plain))
    over = f"over the plain loop's ({base:.1f} s)"
    results = []
    for kind, histories in under_ray.items():
        ratio = min(map(epoch_s, histories)) / base
        name = f"phase-1 epoch under Ray Train, {kind}, {over}"
        results.append(Result("t", name, f"{ratio:.2f} x", "<= 1.1 x"))
    memory, stream = (min(map(epoch_s, histories)) for histories in under_ray.values())
    name = "phase-1 epoch, read from storage every epoch over kept in memory"
    results.append(Result("t", name, f"{stream / memory:.2f} x", "<= 1.1 x"))
    for kind, histories in under_ray.items():
        share = f"{100 * max(map(wait_share, histories)):.1f} %"
        results.append(Result("t", f"a worker waits for data, {kind}", share, "<= 10 %"))
    return results


def _measure_reading(folder: Path) -> list[Result]:
    """Measure a lane that reads slices from storage without a training."""
    files = [_write_volume(folder, number) for number in range(NUM_READ_VOLUMES)]
    read = partial(read_slices, size_px=READ_PX)
    stream = SampleStream(files, Sampling(batch_size=8), read, num_epochs=1, window_bytes=64 << 20)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    num_slices = sum(len(rows["name"]) for rows in stream.lane().batches(0))
    rate = num_slices / (time.perf_counter() - started_s)
    cpu_ms = 1000 * (time.process_time() - started_cpu_s) / num_slices
    name = f"slices of {READ_PX} x {READ_PX} that a worker reads a second, without a training"
    cpu = f"CPU time of reading a slice of {READ_PX} x {READ_PX}"
    return [Result("t", name, f"{rate:.0f}"), Result("t", cpu, f"{cpu_ms:.2f} ms")]


def _write_volume(folder: Path, number: int) -> SampleFile:
    """Write a phantom as a prepared volume."""
    (config,) = configs(1, number, size_px=READ_PX, num_slices=40)
    phantom = make_phantom(config)
    share = (phantom.hu + 1000.0) / 1400
    key = f"read-{number}"
    names = tuple(slice_name(key, index) for index in range(len(share)))
    volume = PreparedVolume(
        key=key,
        volume_path="",
        patient=key,
        intensity="hu",
        slices=tuple(range(len(share))),
        lesion_px=tuple(int(mask.sum()) for mask in phantom.lesion_mask),
        size_px=READ_PX,
    )
    levels = (np.clip(share, 0, 1) * np.iinfo(np.uint16).max).astype(np.uint16)
    samples = Samples(levels=levels, lesion=phantom.lesion_mask.astype(np.uint8))
    uri = str(folder / f"{key}.parquet")
    storage.write_bytes(uri, to_parquet(volume, samples))
    has_lesion = tuple(pixels > 0 for pixels in volume.lesion_px or ())
    num_bytes = 3 * READ_PX**2
    return SampleFile(
        series=key, uri=uri, names=names, has_lesion=has_lesion, bytes_per_sample=num_bytes
    )


def _measure_phase2(data: PreparedData) -> list[Result]:
    torch.manual_seed(0)
    segnet = build_segmenter(CONFIG.architecture.segnet)
    state = {name: value.contiguous() for name, value in segnet.state_dict().items()}
    steps = {}
    for name, is_cached in (("cached", True), ("recomputed", False)):
        say(f"phase 2, features {name}")
        config = replace(CONFIG, cache_features=is_cached)
        progress = train_phase2(
            config, data.volumes, data.split, data.uri, data.checkpoints(name), state
        )
        steps[name] = step_s(progress.history)
    ratio = steps["recomputed"] / steps["cached"]
    name = "phase-2 step, features recomputed every epoch over cached"
    return [Result("t", name, f"{ratio:.1f} x")]


def measure_device() -> list[Result]:
    """Measure training at the paper's size on a GPU, and its share of the GPU's matrix rate."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    config = TrainingConfig()
    segnet = build_segmenter(config.architecture.segnet)
    segnet.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
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
    peak = _rate(lambda: matrix @ matrix, 50) * 2 * 8192**3
    slices_per_s = _rate(step, 20) * len(batch)
    # A backward pass takes twice the operations of its forward pass.
    flops = 3 * counter.get_total_flops() * slices_per_s
    name = f"slices a second in training, {config.window.size_px} x {config.window.size_px}"
    return [
        Result("t", f"{name}, bfloat16", f"{slices_per_s:.0f}"),
        Result("t", "share of the device's own bfloat16 matrix rate", f"{flops / peak:.2f}"),
    ]


def _rate(work: Callable[[], object], rounds: int) -> float:
    """Return how often a second the GPU does a work, after three rounds that do not count."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(rounds):
        work()
    torch.cuda.synchronize()
    return rounds / (time.perf_counter() - started)
