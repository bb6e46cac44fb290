"""Optimizer with two learning rates, gradient clipping, and the moving average of the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from covtanet.model.segnet import TASegNet
from covtanet.training.phase_config import PhaseConfig

ENCODER = "encoder."
AVERAGE = "average/"
NUM_UPDATES = f"{AVERAGE}num_updates"
STATISTICS = ("running_mean", "running_var")


def make_optimizer(
    config: PhaseConfig, module: nn.Module, *, fused: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of a phase, with separate groups for the encoder and for weight decay.

    fused: one kernel for all weights, on a GPU.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # Biases, norms and the attention units' alpha have one axis and are never decayed.
            key = (name.startswith(ENCODER), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    options = [
        _group_options(config, parameters, is_encoder=is_encoder, is_decayed=is_decayed)
        for (is_encoder, is_decayed), parameters in groups.items()
    ]
    optimizer_class = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return optimizer_class(options, lr=config.learning_rate, fused=fused or None)


def _group_options(
    config: PhaseConfig, parameters: list[nn.Parameter], *, is_encoder: bool, is_decayed: bool
) -> dict[str, Any]:
    rate_share = config.encoder_rate_share if is_encoder else 1.0
    weight_decay = config.weight_decay if is_decayed else 0.0
    return {"params": parameters, "weight_decay": weight_decay, "rate_share": rate_share}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group. rate: of all weights outside the encoder."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_share"]


def clip_gradients(config: PhaseConfig, parameters: Iterable[nn.Parameter]) -> None:
    """Scale the gradients down to ``clip_norm`` if their norm is larger."""
    if config.clip_norm:
        torch.nn.utils.clip_grad_norm_(list(parameters), config.clip_norm)


def set_final_bias(config: PhaseConfig, module: nn.Module) -> None:
    """Set the initial bias of TA-SegNet's last layer; other networks are left unchanged."""
    if config.final_bias is not None and isinstance(module, TASegNet):
        layer = module.filter[-1]
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        nn.init.constant_(layer.bias, config.final_bias)


class WeightAverage:
    """Exponential moving average of a module's weights and batch-norm statistics.

    The start is corrected as Adam corrects its moments: the first k states have the weights
    decay^(k-1), .., decay, 1, normalised, so the random initial weights have no share; with
    warm-up, whose first step has rate 0, they are the first of the k states.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        # The module's own tensors, which the optimizer changes in place.
        self.source = {
            name: value for name, value in module.state_dict().items() if value.is_floating_point()
        }
        self.average = {name: value.detach().clone() for name, value in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the module's present state to the average."""
        self.num_updates += 1
        # 1 at the first update, which replaces the random initial weights.
        share = (1 - self.decay) / (1 - self.decay**self.num_updates)
        averages = list(self.average.values())
        # One call for all tensors instead of one per tensor.
        torch._foreach_lerp_(averages, list(self.source.values()), share)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged tensors by name."""
        return dict(self.average)

    def parameters(self) -> dict[str, Tensor]:
        """Return the averaged weights only; lanes average batch-norm statistics themselves.

        ``training/resident.py``, which has no lanes, takes ``state``, statistics included.
        """
        return {
            name: value for name, value in self.average.items() if not name.endswith(STATISTICS)
        }

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the state that ``restore`` reads, under names that no weight has."""
        # Contiguous, as the file format wants it: a module may have channels last.
        state = {
            f"{AVERAGE}{name}": value.cpu().clone(memory_format=torch.contiguous_format)
            for name, value in self.average.items()
        }
        return state | {NUM_UPDATES: torch.tensor(self.num_updates)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self.num_updates = int(state[NUM_UPDATES])
        for name, value in self.average.items():
            value.copy_(state[f"{AVERAGE}{name}"])
