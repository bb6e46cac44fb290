"""Features of phase 2 with 8 bits a value: error, file, values on the device."""

import numpy as np
import torch
from training import NETWORK

from covtanet.training.features import encode_features, load_features, save_features
from covtanet.training.phase2 import stored_features, volume_batch


def test_stored_features_are_within_half_a_step_of_their_channel() -> None:
    rng = np.random.default_rng(0)
    # (S, C, P, P); channels of very different extent, one of them constant.
    extent = np.array([1e-3, 1, 100, 0], np.float32)[:, None, None]
    pooled = (3 + extent * rng.standard_normal((6, 4, 8, 8))).astype(np.float32)
    features = load_features(save_features(encode_features(pooled)))
    assert features["pooled"].dtype == np.uint8
    rows = {name: values[None] for name, values in features.items()}
    restored = stored_features(rows, torch.device("cpu"))[0].numpy()
    spread = pooled.max((0, 2, 3)) - pooled.min((0, 2, 3))
    step = (spread / 255)[:, None, None]
    assert (np.abs(restored - pooled) <= 0.51 * step + 1e-6).all()
    assert (restored[:, 3] == 3).all()


def test_batch_holds_features_of_either_kind() -> None:
    channels, px = NETWORK.segnet.fused_channels, NETWORK.pooled_px
    rng = np.random.default_rng(0)
    pooled = rng.standard_normal((2, NETWORK.num_slices, channels, px, px)).astype(np.float32)
    labels = {
        "name": np.array(["a", "b"]),
        "is_infected": np.array([True, False]),
        "is_severe": np.array([False, False]),
    }
    encoded = [encode_features(values) for values in pooled]
    rows = labels | {name: np.stack([each[name] for each in encoded]) for name in encoded[0]}
    device = torch.device("cpu")
    stored = volume_batch(rows, device, None)
    plain = volume_batch(labels | {"pooled": pooled.astype(np.float16)}, device, None)
    assert stored.names == ["a", "b"]
    assert stored.is_infected.tolist() == [1, 0]
    torch.testing.assert_close(stored.pooled, plain.pooled, atol=0.02, rtol=0)
