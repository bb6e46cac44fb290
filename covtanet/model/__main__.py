"""python -m covtanet.model list: every network with its source, parameters and GFLOPs."""

import argparse
import sys
import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from covtanet.errors import ConfigError
from covtanet.model.covtanet import SIZES, JointClassifier, architecture
from covtanet.model.registry import NAMES, SOURCES, build_segmenter

# Sides of the slices of the sizes "small" and "paper".
SIDES_PX = (128, 512)


def module_of(name: str, size: str, side_px: int) -> tuple[nn.Module, torch.Tensor]:
    """Return the network of a row of the tables, without storage, and an input for it.

    The input is a slice (1, C, H, W), or for a classifier the slices of a volume (1, S, 1, H, W).
    """
    config = architecture(name, SIZES[size], side_px)
    with torch.device("meta"):
        if config.backbone:
            return JointClassifier(config), torch.zeros(1, config.num_slices, 1, side_px, side_px)
        return build_segmenter(config.segnet), torch.zeros(
            1, config.segnet.in_channels, side_px, side_px
        )


def cost(name: str, size: str = "paper") -> tuple[float, list[float]]:
    """Return parameters in millions, and GFLOPs of one slice at each of SIDES_PX.

    A multiply-add counts as two operations.
    """
    gflops = []
    num_parameters = 0
    for side_px in SIDES_PX:
        module, example = module_of(name, size, side_px)
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module.eval()(example)
        num_slices = example.shape[1] if example.dim() == 5 else 1
        gflops.append(counter.get_total_flops() / num_slices / 1e9)
    return num_parameters / 1e6, gflops


def main() -> int:
    """Print the list."""
    options = argparse.ArgumentParser(prog="python -m covtanet.model", description=__doc__)
    options.add_argument("command", choices=("list",))
    options.add_argument("--size", choices=SIZES, default="paper")
    size = options.parse_args().size
    warnings.simplefilter("ignore")
    print(f"{'network':15} {'parameters M':>12} {'GFLOPs 128':>11} {'512':>8}  source")
    for name in NAMES:
        try:
            millions, (small, large) = cost(name, size)
        except ConfigError as error:
            print(f"{name:15} {error}")
            continue
        print(f"{name:15} {millions:12.2f} {small:11.2f} {large:8.1f}  {SOURCES[name]}", flush=True)
    print("Per slice; a classifier's with its share of aggregation and both heads.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
