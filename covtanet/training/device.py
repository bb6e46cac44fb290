"""Stored arrays on the training's device."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor of the same type on the device.

    To a GPU from page-locked memory, so that the host goes on meanwhile; on a CPU the tensor shares
    the array's memory.
    """
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
