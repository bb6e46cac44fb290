"""Features of phase 2 as they are stored."""

import numpy as np
import pytest
import torch

from covtanet.training.features import load_features, save_features


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_come_back_whatever_their_layout_in_memory(layout: torch.memory_format) -> None:
    pooled = torch.randn(2, 4, 8, 8).to(memory_format=layout).half().numpy()
    stored = load_features(save_features(pooled))["pooled"]
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, pooled)
