"""Checkpoints in storage: best weights once, the newest whole one is read, few are written."""

from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from training import train

from covtanet.training import worker
from covtanet.training.checkpoint_store import CheckpointWriter, newest_progress
from covtanet.training.config import TrainingConfig
from covtanet.training.loop import Progress
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.phase_data import PhaseData
from covtanet.training.ranks import Ranks


def progress_of(num_epochs: int, best: dict[str, torch.Tensor]) -> Progress:
    """Return a progress whose first weight is its number of epochs."""
    history = [{"epoch": float(epoch), "best_epoch": 0.0} for epoch in range(num_epochs)]
    weights = {"w": torch.tensor([float(num_epochs)])}
    return Progress(history=history, weights=weights, best=best, optimizer=weights)


def best_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("best_*.safetensors"))


def name_of(number: int) -> str:
    return f"checkpoint_2026-11-27_00-00-0{number}.000000"


def test_best_weights_are_written_only_when_they_changed(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    best = {"w": torch.tensor([7.0])}
    writer.write(progress_of(1, best), name_of(1))
    (first,) = best_files(tmp_path)
    written_ns = first.stat().st_mtime_ns
    writer.write(progress_of(2, best), name_of(2))
    assert [path.stat().st_mtime_ns for path in best_files(tmp_path)] == [written_ns]
    assert not list(tmp_path.glob("checkpoint_*/best*"))
    newest = newest_progress(str(tmp_path))
    assert len(newest.history) == 2
    assert newest.weights["w"].tolist() == [2.0]
    assert newest.best["w"].tolist() == [7.0]


def test_best_weights_that_no_kept_checkpoint_names_are_deleted(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    for number in range(1, 7):
        writer.write(progress_of(number, {"w": torch.tensor([-float(number)])}), name_of(number))
    # Two checkpoints are kept, and Ray Train may not have deleted the third yet.
    assert len(best_files(tmp_path)) == 3
    assert newest_progress(str(tmp_path)).best["w"].tolist() == [-6.0]


@pytest.mark.parametrize("damage", ["weights", "state", "best", "best is missing"])
def test_damaged_checkpoint_is_left_out_for_the_one_before(damage: str, tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path))
    writer.write(progress_of(1, {"w": torch.tensor([1.0])}), name_of(1))
    before = set(best_files(tmp_path))
    writer.write(progress_of(2, {"w": torch.tensor([2.0])}), name_of(2))
    (newest_best,) = set(best_files(tmp_path)) - before
    if damage == "best is missing":
        newest_best.unlink()
    else:
        folder = tmp_path / name_of(2)
        path = {
            "weights": folder / "weights.safetensors",
            "state": folder / "state.json",
            "best": newest_best,
        }[damage]
        path.write_bytes(path.read_bytes()[:-3])
    assert len(newest_progress(str(tmp_path)).history) == 1


def test_storage_without_a_checkpoint_gives_an_empty_progress(tmp_path: Path) -> None:
    assert newest_progress(str(tmp_path / "nothing")) == Progress()


def test_training_continued_from_storage_ends_with_the_same_weights(tmp_path: Path) -> None:
    reports: list[Progress] = []
    whole = train(1, reports=reports)
    CheckpointWriter(str(tmp_path)).write(reports[1], name_of(1))
    again = train(1, progress=newest_progress(str(tmp_path)))
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value), name
        assert torch.equal(again.best[name], whole.best[name]), name


def reports_of(
    config: TrainingConfig, num_epochs: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Return the reports of a rank of two, one for each epoch of a training of phase 1."""
    reported: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], **options: Any) -> None:
        reported.append({**metrics, **options})

    monkeypatch.setattr(ray.train, "report", report)
    data = PhaseData(train=(), validation=())
    job = worker.WorkerJob(config=config, phase=1, data=data, num_at_once=1, checkpoints_uri="")
    reporter = worker._Reporter(job, Ranks(index=index, count=2))
    for number in range(1, num_epochs + 1):
        reporter(progress_of(number, {}))
    return reported


def epochs_with_checkpoint(reported: list[dict[str, Any]]) -> list[int]:
    return [row["num_epochs"] for row in reported if row["checkpoint"] is not None]


@pytest.mark.parametrize(
    ("checkpoint_epochs", "num_epochs", "expected"),
    [(0, 6, [1, 2, 3, 4, 5, 6]), (4, 6, [4, 6]), (10, 6, [6]), (0, 60, [*range(3, 61, 3)])],
)
def test_checkpoint_is_written_every_few_epochs_and_after_the_last(
    checkpoint_epochs: int, num_epochs: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone writes; every rank reports every epoch."""
    phase = PhaseConfig(num_epochs=num_epochs, stop_after_epochs=num_epochs)
    config = TrainingConfig(checkpoint_epochs=checkpoint_epochs, phase1=phase)
    for index, written in enumerate((expected, [])):
        reported = reports_of(config, num_epochs, index, monkeypatch)
        assert [row["num_epochs"] for row in reported] == [*range(1, num_epochs + 1)]
        assert epochs_with_checkpoint(reported) == written
        modes = {row["checkpoint_upload_mode"] for row in reported}
        assert modes == {ray.train.CheckpointUploadMode.ASYNC}


def test_epoch_of_an_early_stop_has_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch is the best one, and three without a better one end the phase."""
    config = TrainingConfig(
        checkpoint_epochs=10, phase1=PhaseConfig(num_epochs=100, stop_after_epochs=3)
    )
    assert epochs_with_checkpoint(reports_of(config, 4, 0, monkeypatch)) == [4]
