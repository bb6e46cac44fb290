"""The part of gpu.py that measures a step of phase 1."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_cases import Case, Effort
from benchmarks.gpu_inference import Values, peak_memory_bytes, seconds_of
from covtanet.model.losses import FocalTverskyConfig, loss_terms
from covtanet.model.registry import build_segmenter
from covtanet.training.optimizer import make_optimizer
from covtanet.training.phase1 import supervised_loss, supervised_sums
from covtanet.training.phase_config import PhaseConfig

LESION_SHARE = 0.05


def measure_training(case: Case, effort: Effort, device: torch.device) -> Values:
    """Measure a step in bfloat16 with the paper's Adam, fused, on a batch that lies on the device.

    The batch is halved until it fits the memory.
    """
    torch.manual_seed(0)
    module: nn.Module = build_segmenter(case.network.segnet)
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.train()
    batch_size = case.train_batch
    while True:
        try:
            step = _step(module, case, batch_size, device)
            seconds = seconds_of(step, device, effort.timed_s)
            break
        except torch.OutOfMemoryError:
            # Below two a batch norm over one pixel has nothing to take statistics of.
            if batch_size <= 2:
                raise
        batch_size //= 2
        torch.cuda.empty_cache()
    return {
        "batch_size": batch_size,
        "flops_per_slice": _flops_of_slice(module, case, device),
        "step_seconds": seconds,
        "slices_per_s": batch_size / seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _step(
    module: nn.Module, case: Case, batch_size: int, device: torch.device
) -> Callable[[], Tensor]:
    """Return a function that does one step: forward, loss, backward, optimizer."""
    config = PhaseConfig(precision="bfloat16")
    optimizer = make_optimizer(config, module, fused=device.type == "cuda")
    loss_of = _loss(module, case, batch_size, device, config)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _loss(
    module: nn.Module, case: Case, batch_size: int, device: torch.device, config: PhaseConfig
) -> Callable[[], Tensor]:
    """Return a function that runs a batch forward to its loss."""
    terms = loss_terms(FocalTverskyConfig())
    images = torch.rand((batch_size, *case.shape), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    mask = (torch.rand((batch_size, 1, *case.shape[1:]), device=device) < LESION_SHARE).float()

    def loss_of() -> Tensor:
        with config.autocast(device):
            logits = module(images)
        return supervised_loss(supervised_sums(logits, mask, terms), terms)

    return loss_of


def _flops_of_slice(module: nn.Module, case: Case, device: torch.device) -> float:
    """Return the floating point operations of one slice, forward and backward."""
    # Two slices: batch norm over one pixel of one slice has no statistics.
    loss_of = _loss(module, case, 2, device, PhaseConfig(precision="bfloat16"))
    with FlopCounterMode(display=False) as counter:
        loss_of().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 2
