"""Features of the frozen TA-SegNet as stored for phase 2: float16. numpy only.

42 MB a volume at the paper's size, 3.1 MB with ``recipes/lung-box.toml``. 8 bits a value with a
scale for each channel would halve that, but are not shown to train as well (``docs/log.md``).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from covtanet.training.feed import Rows

# Part of the name of the folder: another version computes all features again.
FORMAT_VERSION = 1


def save_features(pooled: NDArray[Any]) -> bytes:
    """Return pooled features of one volume, (S, C, P, P), as the bytes of a file."""
    # safetensors writes the memory as it lies; a network in channels_last lays it in another order.
    return save({"pooled": np.ascontiguousarray(pooled, np.float16)})


def load_features(data: bytes) -> Rows:
    """Read the bytes of ``save_features``; nothing is unpickled."""
    return dict(load(data))
