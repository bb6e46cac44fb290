"""Files of a phase's split: dealt out to lanes, refused if too few, features named by weights."""

from dataclasses import replace

import pytest
import torch

from covtanet.data.folds import Split
from covtanet.data.prepared import PreparedVolume
from covtanet.errors import ConfigError
from covtanet.training.config import TrainingConfig
from covtanet.training.lanes import fit_in_memory
from covtanet.training.phase_config import PhaseConfig
from covtanet.training.phase_data import features_folder, slice_data, volume_data


def config(batch_size: int, micro_batches: int = 2, **settings: int) -> TrainingConfig:
    phase = PhaseConfig(batch_size=batch_size, micro_batches=micro_batches)
    values: dict[str, int] = {"num_neighbours": 0, "cache_bytes": 4 << 30} | settings
    return TrainingConfig(
        size="tiny",
        phase1=phase,
        phase2=phase,
        num_neighbours=values["num_neighbours"],
        cache_bytes=values["cache_bytes"],
    )


def volume(key: str, num_slices: int) -> PreparedVolume:
    return PreparedVolume(
        key=key, volume_path=key, patient=key, intensity="hu", diagnosis="infected",
        severity="severe", slices=tuple(range(num_slices)), lesion_px=(1,) * num_slices,
    )  # fmt: skip


VOLUMES = {key: volume(key, count) for key, count in (("a", 6), ("b", 4), ("c", 3))}
SPLIT = Split(train=("a", "b"), validation=("c",), test=())


def test_files_name_the_samples_of_the_split() -> None:
    data = slice_data(config(2), VOLUMES, SPLIT, "prepared")
    assert [file.uri for file in data.train] == ["prepared/a.parquet", "prepared/b.parquet"]
    assert data.train[1].names == ("b:00000", "b:00001", "b:00002", "b:00003")
    assert [[file.series for file in lane] for lane in data.validation] == [["c"], []]
    # Of 96 pixels, with their masks.
    assert sum(file.num_bytes for file in data.files) == 13 * 3 * 96 * 96


def test_volumes_of_phase_2_are_read_from_features_or_slices() -> None:
    data = volume_data(config(1), VOLUMES, SPLIT, "prepared", "features")
    assert data.train[0].uri == "features/a.safetensors"
    assert (data.train[0].names, data.train[0].is_severe) == (("a",), True)
    recomputed = replace(config(1), cache_features=False)
    data = volume_data(recomputed, VOLUMES, SPLIT, "prepared", "features")
    assert data.train[0].uri == "prepared/a.parquet"


def test_neighbours_need_no_memory_for_all_slices() -> None:
    streamed = config(2, num_neighbours=1, cache_bytes=1)
    data = slice_data(streamed, VOLUMES, SPLIT, "prepared")
    assert not fit_in_memory(streamed, data.files)


def test_data_of_less_than_a_step_is_refused() -> None:
    message = "phase 1 draws 10 samples of .*, expected at least micro_batches times .*, 12"
    with pytest.raises(ConfigError, match=message):
        slice_data(config(6), VOLUMES, SPLIT, "prepared")
    # One volume is enough in memory, because lanes share its slices.
    one = replace(SPLIT, train=("a",))
    slice_data(config(2), VOLUMES, one, "prepared")
    with pytest.raises(ConfigError, match="too few for each of 2 micro_batches"):
        slice_data(config(2, cache_bytes=1), VOLUMES, one, "prepared")


def test_features_are_named_by_the_segmenter_and_its_precision() -> None:
    states = [{"weight": torch.full((2,), float(value))} for value in (1, 2)]
    folders = [features_folder("storage/phase2", config(1), state) for state in states]
    assert folders[0] == features_folder("storage/phase2", config(2), states[0])
    assert folders[0] != folders[1]
    bfloat16 = replace(config(1), phase2=PhaseConfig(precision="bfloat16"))
    assert folders[0] != features_folder("storage/phase2", bfloat16, states[0])
    assert folders[0].startswith("storage/phase2/features-")
