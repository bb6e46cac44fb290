"""Training under real kills: one test per promise; ``make faults SUITE=training`` runs the whole matrix."""

from pathlib import Path

import faults
import pytest
from faults import Setting, Training


def test_a_killed_driver_a_cut_checkpoint_and_a_killed_worker_leave_no_trace(
    setting: Setting, trained: Training
) -> None:
    """The driver dies and its newest checkpoint is cut; then a worker dies."""
    assert faults.cut_checkpoint_then_worker(setting, trained)


def test_two_ranks_train_as_one_that_accumulates(tmp_path: Path) -> None:
    """The same micro-batches on two processes and on one: curves alike to 1e-4, weights to 1e-3.

    Not to the last bit: gradients are added up in another order.
    """
    import json
    from multiprocessing import get_context

    import torch
    from training import curve, train, train_rank

    arguments = [(index, 2, str(tmp_path)) for index in range(2)]
    ranks = [get_context("spawn").Process(target=train_rank, args=each) for each in arguments]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    for phase in (1, 2):
        found = json.loads((tmp_path / f"phase{phase}.json").read_text())
        alone = train(phase)
        assert len(alone.history) == 3
        for one, two in zip(curve(alone), found["curve"], strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-4)
        for name, value in alone.weights.items():
            if name.endswith("num_batches_tracked"):  # one rank's count, or that of both
                continue
            assert torch.allclose(
                torch.tensor(found["weights"][name]), value, rtol=1e-3, atol=1e-3
            ), name
