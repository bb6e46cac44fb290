"""Settings of one phase's optimization; the defaults are the paper's."""

import math
from dataclasses import dataclass

import torch

PRECISIONS = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("step", "cosine")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase's optimization: Adam, 1e-5, decayed by 0.99 every 10 epochs (Section III-B).

    Choice: number of epochs, batch size and early stop, which the paper does not give.
    """

    num_epochs: int = 100
    """Largest number of passes over the training samples."""
    batch_size: int = 4
    """Samples of a micro-batch, over which batch norm takes its statistics."""
    micro_batches: int = 0
    """Micro-batches of an optimizer step, shared out over the workers; 0 for one per worker. A
    worker with several accumulates gradients, and runs them forward twice."""
    optimizer: str = "adam"
    """``adam`` (the paper's) or ``adamw``, whose weight decay is decoupled from the gradient."""
    learning_rate: float = 1e-5
    """Rate of all weights outside the encoder; the peak if there is a warm-up."""
    encoder_rate_share: float = 1.0
    """Rate of the encoder over ``learning_rate``. Below 1 it preserves a pretrained encoder: at a
    rate of 5e-3 for all weights its convolutions moved by 58 % of their norm."""
    weight_decay: float = 0.0
    """Decay of weights with two or more axes; biases, norms and the units' alpha do not decay."""
    schedule: str = "step"
    """``step`` (the paper's decay) or ``cosine`` to zero over all epochs."""
    decay: float = 0.99
    """Factor of the rate after every ``decay_epochs``; schedule ``step`` only."""
    decay_epochs: int = 10
    """Epochs between two decays; schedule ``step`` only."""
    warmup_share: float = 0.0
    """Share of all steps over which the rate rises linearly from zero."""
    clip_norm: float = 0.0
    """Largest norm of a step's gradients; 0 switches clipping off."""
    average_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is then validated and returned;
    0 switches it off."""
    final_bias: float | None = None
    """Initial bias of TA-SegNet's last layer; null leaves it random. -2 is a probability of 12 %:
    the first hundred steps need not learn that most pixels show no lesion."""
    stop_after_epochs: int = 20
    """Epochs without a better validation after which the phase ends."""
    precision: str = "auto"
    """``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU that supports it."""

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_names()
        for name in ("warmup_share", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more and below 1")
        if min(self.weight_decay, self.clip_norm) < 0 or not self.encoder_rate_share > 0:
            raise ValueError(
                "weight_decay and clip_norm must be at least 0, encoder_rate_share above 0"
            )

    def _check_names(self) -> None:
        choices = {"precision": PRECISIONS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, names in choices.items():
            value = getattr(self, name)
            if value not in names:
                raise ValueError(f"{name} is {value}, expected one of {', '.join(names)}")

    def _check_counts(self) -> None:
        counts = (
            self.num_epochs,
            self.batch_size,
            self.decay_epochs,
            self.stop_after_epochs,
        )
        if min(counts) < 1 or not self.learning_rate > 0 or not self.decay > 0:
            raise ValueError(
                "num_epochs, batch_size, decay_epochs and stop_after_epochs must be at least 1, "
                "learning_rate and decay above 0"
            )
        if self.micro_batches < 0:
            raise ValueError(f"micro_batches is {self.micro_batches}, expected at least 0")

    def rate(self, epoch: float) -> float:
        """Return the learning rate; a fraction of an epoch is the share of its steps done."""
        done = epoch / self.num_epochs
        if self.schedule == "cosine":
            rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        else:
            rate = self.learning_rate * self.decay ** (int(epoch) // self.decay_epochs)
        if done < self.warmup_share:
            rate *= done / self.warmup_share
        return rate

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of every forward pass."""
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        enabled = self.precision == "bfloat16" or (self.precision == "auto" and has_bf16)
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
