"""Features of the frozen TA-SegNet as stored for phase 2: 8 bits a value. numpy only."""

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from covtanet.training.feed import Rows

# Part of the name of the folder: another version computes all features again.
FORMAT_VERSION = 1
STEPS = 255


def encode_features(pooled: NDArray[np.float32]) -> Rows:
    """Return pooled features as 8 bits with an offset and a scale for each channel.

    pooled: of one volume, (S, C, P, P). Returns ``pooled`` (S, C, P, P) uint8, ``offset`` and
    ``scale`` (C,); a value is offset + scale * pooled, within half a scale of the original.
    """
    offset = pooled.min(axis=(0, 2, 3))
    extent = pooled.max(axis=(0, 2, 3)) - offset
    # A constant channel: any scale gives back its offset.
    scale = np.where(extent > 0, extent / STEPS, 1).astype(np.float32)
    steps = (pooled - offset[:, None, None]) / scale[:, None, None]
    return {
        "pooled": np.rint(steps).clip(0, STEPS).astype(np.uint8),
        "offset": offset.astype(np.float32),
        "scale": scale,
    }


def save_features(features: Rows) -> bytes:
    """Return encoded features as the bytes of a file."""
    return save(features)


def load_features(data: bytes) -> Rows:
    """Read the bytes of ``save_features``; nothing is unpickled."""
    return dict(load(data))
