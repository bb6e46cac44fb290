"""What a Ray Train worker does: its shard of the data, its rank of the model, its report after every epoch."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from covtanet.ct.window import INTENSITY_STEPS
from covtanet.model.covtanet import CovTANetConfig, JointClassifier
from covtanet.model.losses import FocalTverskyConfig
from covtanet.model.segnet import TASegNet
from covtanet.training import phase1, phase2
from covtanet.training.loop import PhaseConfig, fit

WEIGHTS = "weights.safetensors"
SHUFFLE_ROWS = 1024


def train_phase1(
    network: CovTANetConfig, phase: PhaseConfig, loss: FocalTverskyConfig, seed: int, num_threads: int
) -> None:
    """Train TA-SegNet on this rank's slices."""
    _start(seed, num_threads)
    segnet = TASegNet(network.segnet)
    segnet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = ray.train.torch.prepare_model(segnet, parallel_strategy_kwargs={"broadcast_buffers": False})
    num_ranks = ray.train.get_context().get_world_size()

    def train(optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, float]:
        batches = _batches("train", phase.batch_size, seed + epoch)
        metrics = phase1.train_epoch(model, map(slice_batch, batches), optimizer, loss, sum_over_ranks, num_ranks)
        average_statistics(segnet)
        return metrics

    fit(
        phase,
        model,
        train,
        lambda: phase1.evaluate(segnet, map(slice_batch, _batches("validation", phase.batch_size)), sum_over_ranks),
        lambda metrics: metrics["val_dice"],
        lambda epoch, metrics, is_best: _report(segnet, metrics, is_best),
    )


def train_phase2(network: CovTANetConfig, phase: PhaseConfig, seed: int, num_threads: int) -> None:
    """Train the joint classifier on this rank's volumes, which come as the frozen TA-SegNet's pooled features."""
    _start(seed, num_threads)
    classifier = JointClassifier(network)
    model = ray.train.torch.prepare_model(classifier, parallel_strategy_kwargs={"broadcast_buffers": False})
    num_ranks = ray.train.get_context().get_world_size()

    def train(optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, float]:
        batches = _batches("train", phase.batch_size, seed + epoch)
        metrics = phase2.train_epoch(model, map(volume_batch, batches), optimizer, sum_over_ranks, num_ranks)
        average_statistics(classifier)
        return metrics

    fit(
        phase,
        model,
        train,
        lambda: phase2.evaluate(classifier, map(volume_batch, _batches("validation", 8)), sum_over_ranks),
        lambda metrics: -metrics["val_loss"],
        lambda epoch, metrics, is_best: _report(classifier, metrics, is_best),
    )


def _start(seed: int, num_threads: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(num_threads)


def _batches(shard: str, batch_size: int, shuffle_seed: int | None = None) -> Iterable[dict[str, NDArray[Any]]]:
    shuffle = {} if shuffle_seed is None else {
        "local_shuffle_buffer_size": SHUFFLE_ROWS, "local_shuffle_seed": shuffle_seed
    }  # fmt: skip
    batches: Iterable[dict[str, NDArray[Any]]] = ray.train.get_dataset_shard(shard).iter_batches(
        batch_size=batch_size, batch_format="numpy", prefetch_batches=1, **shuffle
    )
    return batches


def slice_batch(batch: dict[str, NDArray[Any]]) -> tuple[Tensor, Tensor]:
    """Rows of phase 1 to intensities and lesion masks, (B, 1, H, W) float32."""
    levels, lesion = (torch.from_numpy(np.ascontiguousarray(batch[name], np.float32)) for name in ("levels", "lesion"))
    slices = (levels / INTENSITY_STEPS)[:, None].to(_device(), memory_format=torch.channels_last)
    return slices, lesion[:, None].to(_device())


def volume_batch(batch: dict[str, NDArray[Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of phase 2 to pooled features (B, S, C, P, P) and both labels (B,), float32."""
    names = ("pooled", "is_infected", "is_severe")
    pooled, is_infected, is_severe = (
        torch.from_numpy(np.ascontiguousarray(batch[name], np.float32)).to(_device()) for name in names
    )
    return pooled, is_infected, is_severe


def _device() -> torch.device:
    return torch.device(ray.train.torch.get_device())


def sum_over_ranks(sums: Tensor) -> Tensor:
    """Add up sums over ranks; the gradient stays that of this rank's part."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sums
    total = sums.detach().clone().to(_device())
    dist.all_reduce(total)
    return sums + (total.to(sums.device) - sums.detach())


def average_statistics(module: nn.Module) -> None:
    """Average the running statistics of batch norm over ranks, so that every rank validates the same network."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def _report(module: nn.Module, metrics: dict[str, float], is_best: bool) -> None:
    """Report to the controller; rank 0 hands over the weights where they are the best so far."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if is_best and ray.train.get_context().get_world_rank() == 0:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
            save_file(state, Path(folder) / WEIGHTS)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)
