"""Networks and optimization that train_gpu.py compares."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from covtanet.model.encoder import pretrained_state
from covtanet.model.registry import SEGMENTERS, BaselineConfig, SegmenterConfig, build_segmenter
from covtanet.model.segnet import TASegNet, TASegNetConfig
from covtanet.training.optimizer import set_final_bias
from covtanet.training.phase_config import PhaseConfig

ENCODER = "tf_efficientnet_lite0"
# Air beyond a slice: -1000 HU over -1250..250 HU in 150 steps.
AIR_GREY = 25
FINAL_BIAS = -2.0
# Rates of all weights outside a pretrained encoder. FCN has no batch norm and diverges at the rate
# of the other networks. Choice: not tuned for each network.
PRETRAINED_RATE = 3e-3
RATE = 2e-3
FCN_RATE = 2e-4
# MONAI's VNet refuses three channels, so it has no neighbours in z.
SINGLE_CHANNEL = ("Vnet",)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the comparison."""

    segnet: SegmenterConfig
    is_pretrained: bool = False
    """Whether the encoder starts from ImageNet weights."""
    rate: float = RATE
    """Learning rate of all weights outside a pretrained encoder."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of networks, batches and trainings."""

    size_px: int = 256
    batch_size: int = 32
    short_steps: int = 600
    """Steps of a training of the comparison."""
    long_s: float = 48.0
    """Time that a training of V8 should take, from which its steps follow."""
    long_steps: tuple[int, int] = (1000, 3000)
    """Smallest and largest number of steps of a training of V8."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512)
    fusion_channels: int = 32
    slice_stride: int = 1
    """Every n-th slice of a series is read."""


TOY = Scale(
    size_px=64,
    batch_size=2,
    short_steps=2,
    long_s=1.0,
    long_steps=(2, 3),
    widths=(4, 8, 16, 16, 16),
    fusion_channels=4,
    slice_stride=48,
)


def networks(scale: Scale) -> dict[str, Network]:
    """Return all networks by name; all but the Vnet read neighbours in z."""
    plain = TASegNetConfig(
        in_channels=3, widths=scale.widths, fusion_channels=scale.fusion_channels
    )
    rows = _variants_of_v8(plain)
    # V1 is the Unet of Tables II and III.
    rows["Unet"] = Network(segnet=plain.row_of_table_i("V1"))
    for row in ("V2", "V3", "V4", "V5", "V6", "V7"):
        rows[row] = Network(segnet=plain.row_of_table_i(row))
    for name in SEGMENTERS:
        channels = 1 if name in SINGLE_CHANNEL else plain.in_channels
        baseline = BaselineConfig(name=name, in_channels=channels, widths=plain.widths)
        rows[name] = Network(segnet=baseline, rate=FCN_RATE if name == "FCN" else RATE)
    return rows


def _variants_of_v8(plain: TASegNetConfig) -> dict[str, Network]:
    # Half the fusion channels: at full size they take most of V8's time on a CPU.
    narrow = replace(plain, fusion_channels=max(4, plain.fusion_channels // 2))
    v8 = replace(narrow.row_of_table_i("V8", ENCODER), stem_channels=16)
    variants = {
        "V8": v8,
        "V8 without TAU": replace(v8, encoder_tau=False, decoder_tau=False),
        "V8, one slice": replace(v8, in_channels=1),
        "V8 at half size": replace(v8, stem_channels=0),
    }
    rows = {
        name: Network(segnet=config, is_pretrained=True, rate=PRETRAINED_RATE)
        for name, config in variants.items()
    }
    rows["V8, random start"] = Network(segnet=v8, rate=PRETRAINED_RATE)
    return rows


def phase_config(network: Network, scale: Scale, num_steps: int) -> PhaseConfig:
    """Return the optimization of one training."""
    return PhaseConfig(
        num_epochs=1,
        batch_size=scale.batch_size,
        micro_batches=1,
        optimizer="adamw",
        learning_rate=network.rate,
        encoder_rate_share=0.2 if network.is_pretrained else 1.0,
        weight_decay=1e-2,
        schedule="cosine",
        warmup_share=0.1,
        clip_norm=1.0,
        # The average reaches back over about 20 steps.
        average_decay=max(0.0, 1 - 20 / num_steps),
        final_bias=FINAL_BIAS,
    )


def initial_state(network: Network, seed: int, weights: Path) -> dict[str, Tensor]:
    """Return the initial weights: drawn by a seed, a pretrained encoder's from a file."""
    torch.manual_seed(seed)
    module = build_segmenter(network.segnet)
    if network.is_pretrained and isinstance(module, TASegNet):
        config = module.config
        state = pretrained_state(config.encoder, config.in_channels, weights)
        module.encoder.load_state_dict(state)
    set_final_bias(PhaseConfig(final_bias=FINAL_BIAS), module)
    return dict(module.state_dict())
