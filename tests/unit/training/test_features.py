"""Stored features of phase 2: the file, and the micro-batch that is made of it."""

from pathlib import Path

import numpy as np
import torch

from covtanet import storage
from covtanet.training.features import save_features
from covtanet.training.phase2 import volume_batch
from covtanet.training.sample_files import SampleFile, read_features


def test_stored_features_become_a_micro_batch_with_their_labels(tmp_path: Path) -> None:
    # (S, C, P, P)
    pooled = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    uri = str(tmp_path / "a.safetensors")
    storage.write_bytes(uri, save_features(pooled))
    file = SampleFile(
        series="a",
        uri=uri,
        names=("a",),
        has_lesion=(True,),
        bytes_per_sample=pooled.size * 2,
        is_infected=True,
    )
    rows = read_features(file)
    assert rows["pooled"].nbytes == file.num_bytes
    batch = volume_batch(rows, torch.device("cpu"), None)
    assert (batch.names, batch.is_infected.tolist(), batch.is_severe.tolist()) == (["a"], [1], [0])
    assert batch.pooled.dtype == torch.float32
    assert np.allclose(batch.pooled[0].numpy(), pooled, rtol=1e-3, atol=1e-6)
