"""The data set mosmed-mid: its index, and volumes of one slice from a picture to a prediction."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved_models import small_model

from covtanet.ct.window import WindowConfig
from covtanet.data import prepared, prepared_file
from covtanet.data.datasets import read_volumes
from covtanet.data.labels import LabelledVolume
from covtanet.data.source import read_source
from covtanet.errors import ConfigError
from covtanet.evaluation.deployed import evaluate_source
from covtanet.evaluation.rows import SOURCE_GRID, EvaluatedModel, new_row
from covtanet.inference.predictor import Predictor
from covtanet.model.description import Readout
from covtanet.phantoms.phantom import Phantom

INDEX = (
    "file,class,study,hu_at_0,hu_per_grey\n"
    "CT-0/001.jpg,CT-0,study_0001,-2048,10\n"
    "CT-1/001.jpg,CT-1,study_0002,-2048,11\n"
    "CT-3/001.jpg,CT-3,study_0003,-2048,12.5\n"
    "CT-4/001.jpg,CT-4,study_0004,,\n"
)
HU_AT_0, HU_PER_GREY = -1200.0, 8.0
WINDOW = WindowConfig(size_px=128)
ONE_SLICE = LabelledVolume(
    volume_path="CT-1/001.png",
    patient="study_0002",
    lesion_mask_path="lesion-masks/CT-1/001.png",
    diagnosis="infected",
    severity="mild",
    intensity=f"grey8:{HU_AT_0:g}:{HU_AT_0 + 255 * HU_PER_GREY:g}",
)


def write(folder: Path, index: str = INDEX) -> str:
    (folder / "lesion-masks" / "CT-1").mkdir(parents=True)
    (folder / "lesion-masks" / "CT-1" / "001.png").write_bytes(b"")
    (folder / "index.csv").write_text(index)
    return str(folder)


def png(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def contents_of(phantom: Phantom) -> dict[str, bytes]:
    """Return the phantom's slice with the most lesion, as the data set stores a slice."""
    index = int(phantom.lesion_mask.sum(axis=(1, 2)).argmax())
    grey = np.clip(np.rint((phantom.hu[index] - HU_AT_0) / HU_PER_GREY), 0, 255)
    return {
        ONE_SLICE.volume_path: png(grey),
        str(ONE_SLICE.lesion_mask_path): png(255 * phantom.lesion_mask[index]),
    }


def test_mosmed_mid_grades_masks_and_lines_follow_from_the_index(tmp_path: Path) -> None:
    volumes = {volume.patient: volume for volume in read_volumes("mosmed-mid", write(tmp_path))}
    labels = {name: (volume.diagnosis, volume.severity) for name, volume in volumes.items()}
    assert labels == {
        "study_0001": ("normal", None),
        "study_0002": ("infected", "mild"),
        "study_0003": ("infected", "severe"),
        "study_0004": ("infected", "severe"),
    }
    masks = {name: volume.lesion_mask_path for name, volume in volumes.items()}
    assert [name for name in masks if masks[name]] == ["study_0002"]
    assert masks["study_0002"] == "lesion-masks/CT-1/001.png"
    # 255 steps of 12.5 HU above -2048.
    assert volumes["study_0003"].intensity == "grey8:-2048.00:1139.50"


def test_mosmed_mid_slice_without_a_line_takes_the_median_line(tmp_path: Path) -> None:
    volumes = {volume.patient: volume for volume in read_volumes("mosmed-mid", write(tmp_path))}
    assert volumes["study_0004"].intensity == "grey8:-2048.00:757.00"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (INDEX.replace("hu_per_grey", "scale"), "index.csv has no column hu_per_grey"),
        (INDEX.replace("CT-3,", "CT-9,"), "class CT-9, expected CT-0 to CT-4"),
        (INDEX.replace("12.5", "wide"), "a line that is not two numbers"),
        (INDEX.replace("12.5", "-1"), "grey8:-2048.00:-2303.00"),
        (INDEX.splitlines()[0] + "\nCT-0/1.jpg,CT-0,s,,\n", "no line from grey values to HU"),
    ],
)
def test_damaged_mosmed_mid_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_volumes("mosmed-mid", write(tmp_path, index))


def test_picture_of_one_slice_is_prepared_with_its_mask(mild: Phantom) -> None:
    volume, samples = prepared.prepare(ONE_SLICE, "k", contents_of(mild), WINDOW, 2.5)
    assert volume.reason is None
    assert (volume.num_slices, volume.slices, volume.grade) == (1, (0,), "mild")
    assert volume.spacing_mm is None
    assert samples is not None
    assert samples.levels.shape == (1, 128, 128)
    # The phantom has 128 pixels a side, so that the mask is not resized.
    assert volume.lesion_px == (int(mild.lesion_mask.sum(axis=(1, 2)).max()),)
    again = prepared_file.read_samples(prepared_file.to_parquet(volume, samples))
    assert np.array_equal(again.levels, samples.levels)


def test_picture_of_one_slice_is_cropped_to_its_lungs(mild: Phantom) -> None:
    window = WindowConfig(size_px=128, crops_to_lungs=True)
    _, whole = prepared.prepare(ONE_SLICE, "k", contents_of(mild), WINDOW, 2.5)
    volume, cropped = prepared.prepare(ONE_SLICE, "k", contents_of(mild), window, 2.5)
    assert volume.reason is None
    assert whole is not None
    assert cropped is not None
    assert cropped.lesion is not None
    assert whole.lesion is not None
    # Enlarged: the lungs fill the box.
    assert cropped.lesion.sum() > 1.2 * whole.lesion.sum()


def test_picture_without_a_line_to_hu_is_refused(mild: Phantom) -> None:
    volume = LabelledVolume(volume_path=ONE_SLICE.volume_path, patient="p", diagnosis="normal")
    refused, samples = prepared.prepare(volume, "k", contents_of(mild), WINDOW, 2.5)
    assert (refused.reason, samples) == ("not_hu", None)
    assert "expected grey8:LOW:HIGH" in str(refused.reason_detail)


def test_volume_of_one_slice_is_diagnosed_and_evaluated(mild: Phantom) -> None:
    """A model that reads 16 slices reads the one slice 16 times; the lungs are cut, yet counted."""
    volume, samples = prepared.prepare(ONE_SLICE, "k", contents_of(mild), WINDOW, 2.5)
    assert samples is not None
    assert prepared.diagnosis_slices(samples, 16).shape[0] == 16
    model = EvaluatedModel(
        predictor=Predictor(small_model()),
        window=WINDOW,
        readout=Readout(),
        slice_step_mm=2.5,
    )
    row = new_row(volume, "V7", 0, SOURCE_GRID)
    row = evaluate_source(model, row, read_source(ONE_SLICE, contents_of(mild))).row
    assert 0 <= row["p_infected"] <= 1
    assert 0 <= row["involvement"] <= 1
    assert row["tp"][0] + row["fn"][0] == mild.lesion_mask.sum(axis=(1, 2)).max()
