"""A training on one intensity scale."""

from pathlib import Path

import pytest

from covtanet import tracking
from covtanet.data.datasets import DataSource
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.experiments.experiment import Experiment, open_experiment
from covtanet.training.config import TrainingConfig

SOURCE = DataSource(name="manifest", volumes=(), root="")


def opened(folder: Path, *intensities: str) -> Experiment:
    volumes = [
        PreparedVolume(key=f"k{number}", volume_path=f"v{number}", patient=str(number),
                       intensity=intensity, lesion_px=(1,))
        for number, intensity in enumerate(intensities)
    ]  # fmt: skip
    config = TrainingConfig(size="small", num_folds=2, folds=(0,))
    run = tracking.RunAddress(uri="", experiment="e", name="e", key="")
    return open_experiment(config, SOURCE, volumes, "/data", str(folder), run)


def test_hu_and_grey_values_without_a_line_are_refused_together(tmp_path: Path) -> None:
    message = (
        r"1 volumes are grey values without a line to HU, the first k1, and 2 are HU, expected "
        r"one scale, see data_report\.parquet in .*; if the line is known, give it as intensity "
        r"grey8:LOW:HIGH"
    )
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, "hu", "grey8", "hu")


@pytest.mark.parametrize("intensity", ["hu", "grey8"])
def test_one_scale_is_accepted(intensity: str, tmp_path: Path) -> None:
    assert len(opened(tmp_path, intensity, intensity).volumes) == 2
