"""Optimizer with two learning rates, gradient clipping, and the moving average of the weights."""

from collections.abc import Iterable

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
    """Return the optimizer of a phase, with a group each for encoder or rest, decayed or not.

    fused: one kernel for all weights, on a GPU.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(ENCODER), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    described = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "rate_share": config.encoder_rate_share if is_encoder else 1.0,
        }
        for (is_encoder, is_decayed), parameters in groups.items()
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(described, lr=config.learning_rate, fused=fused or None)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group from that of the rest."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_share"]


def clip_gradients(config: PhaseConfig, parameters: Iterable[nn.Parameter]) -> None:
    """Scale the gradients down to ``clip_norm`` if their norm is larger."""
    if config.clip_norm:
        torch.nn.utils.clip_grad_norm_(list(parameters), config.clip_norm)


def set_final_bias(config: PhaseConfig, module: nn.Module) -> None:
    """Set the start of TA-SegNet's final bias; the compared networks keep their own."""
    if config.final_bias is not None and isinstance(module, TASegNet):
        layer = module.filter[-1]
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        nn.init.constant_(layer.bias, config.final_bias)


class WeightAverage:
    """Exponential moving average of a module's weights and batch-norm statistics.

    The start is corrected as Adam's moments are: the average of the first k states has the weights
    decay^(k-1), .., decay, 1, normalised, so that the random initial weights never enter.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.source = [value for value in module.state_dict().values() if value.is_floating_point()]
        self.names = [n for n, value in module.state_dict().items() if value.is_floating_point()]
        self.average = [value.detach().clone() for value in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present state."""
        self.num_updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.num_updates)
        torch._foreach_lerp_(self.average, self.source, share)

    def parameters(self) -> dict[str, Tensor]:
        """Return the averaged weights without batch-norm statistics, which lanes keep themselves."""
        return {n: value for n, value in self.state().items() if not n.endswith(STATISTICS)}

    def checkpoint(self) -> dict[str, Tensor]:
        """Return what ``restore`` needs, under names that no weight has."""
        state = {f"{AVERAGE}{name}": value.cpu().clone() for name, value in self.state().items()}
        return state | {NUM_UPDATES: torch.tensor(self.num_updates)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.num_updates = int(state[NUM_UPDATES])
        for name, value in self.state().items():
            value.copy_(state[f"{AVERAGE}{name}"])

    def state(self) -> dict[str, Tensor]:
        """Return the averaged tensors by name."""
        return dict(zip(self.names, self.average, strict=True))
