"""Layouts, stacks of pictures and the index of data sets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covtanet.ct.window import WindowConfig
from covtanet.data import pictures, prepared
from covtanet.data.datasets import read_volumes
from covtanet.data.labels import LabelledVolume, read_labels, write_labels
from covtanet.data.stacks import pair
from covtanet.errors import ConfigError


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


def test_mosmed_grades_follow_the_folders_and_masks_the_names(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "studies/CT-0/study_0001.nii.gz",
        "studies/CT-1/study_0255.nii.gz",
        "studies/CT-4/study_1109.nii.gz",
        "masks/study_0255_mask.nii.gz",
        "dataset_registry.xlsx",
    )
    found = {
        v.patient: (v.diagnosis, v.severity, v.lesion_mask_path)
        for v in read_volumes("mosmed", str(tmp_path))
    }
    assert found == {
        "study_0001": ("normal", None, None),
        "study_0255": ("infected", "mild", "masks/study_0255_mask.nii.gz"),
        "study_1109": ("infected", "severe", None),
    }


def test_covid20_knows_the_line_of_grey_volumes_and_joins_a_patients_two(tmp_path: Path) -> None:
    names = (
        "coronacases_001",
        "radiopaedia_10_85902_1",
        "radiopaedia_10_85902_3",
        "radiopaedia_4_85506_1",
    )
    for name in names:
        touch(
            tmp_path,
            *(
                f"{f}/{name}.nii.gz"
                for f in ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask")
            ),
        )
    found = read_volumes("covid20", str(tmp_path))
    assert [volume.intensity for volume in found] == ["hu", *["grey8:-1250:250"] * 3]
    assert len({volume.patient for volume in found}) == 3
    assert found[0].lesion_mask_path == "Infection_Mask/coronacases_001.nii.gz"


def test_covid20_without_a_mask_is_refused(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "COVID-19-CT-Seg_20cases/coronacases_001.nii.gz",
        "Lung_Mask/coronacases_001.nii.gz",
    )
    with pytest.raises(ConfigError, match="coronacases_001 has no mask in Infection_Mask"):
        read_volumes("covid20", str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("mosmed", "no studies/CT-0 .. CT-4"),
        ("covid20", "no COVID-19-CT-Seg_20cases"),
        ("stacks", "no image has a mask"),
        ("manifest", "neither labels.parquet nor labels.csv"),
    ],
)  # fmt: skip
def test_another_layout_is_refused(dataset: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_volumes(dataset, str(tmp_path))


def test_stacks_pair_images_with_either_kind_of_mask(tmp_path: Path) -> None:
    touch(tmp_path, "nifti/a.nii.gz", "nifti/b.nii.gz", "nifti/c.nii.gz")
    touch(tmp_path, "nifti-masks/a_lung-infection.nii.gz", "nifti-masks/b_mask.nii.gz")
    first, second = read_volumes("stacks", str(tmp_path))
    assert (first.volume_path, first.lesion_labels, first.lung_labels) == (
        "nifti/a.nii.gz",
        "2",
        "1 2",
    )
    assert (second.lesion_mask_path, second.lung_mask_path) == ("nifti-masks/b_mask.nii.gz", None)
    assert (
        pair(str(tmp_path / "nifti"), str(tmp_path / "nifti-masks"))[0].volume_path
        == f"{tmp_path}/nifti/a.nii.gz"
    )


def test_stacks_in_hu_and_single_slices_follow_from_their_names(tmp_path: Path) -> None:
    """Lungs of HU are found as in screening: labels may be missing on slices without lesion."""
    touch(tmp_path, "nifti/case-hu.nii.gz", "nifti/x-slices.nii.gz", "nifti/case2.nii.gz")
    touch(
        tmp_path,
        "nifti-masks/case-hu_lung-infection.nii.gz",
        "nifti-masks/x-slices_mask.nii.gz",
        "nifti-masks/case2_lung-infection.nii.gz",
    )
    volumes = {volume.patient: volume for volume in read_volumes("stacks", str(tmp_path))}
    assert {name: volume.intensity for name, volume in volumes.items()} == {
        "case": "hu",
        "case2": "grey8",
        "x-slices": "grey8",
    }
    assert volumes["case"].lesion_labels == "2"
    assert volumes["case"].lung_mask_path is None
    assert volumes["case2"].lung_mask_path == "nifti-masks/case2_lung-infection.nii.gz"
    orders = [volumes[name].slice_order for name in ("case", "case2", "x-slices")]
    assert orders == ["continuous", "continuous", "single"]


def test_a_folder_of_slices_becomes_a_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded to a square, turned, masks with their slices; what has no mask is left out."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    grey = np.full((20, 40), 80, np.uint8)
    grey[:, :10] = 200  # the patient's back, at the left of the picture
    lesion = np.zeros((20, 40), np.uint8)
    lesion[:10, :10] = 255  # whose upper half comes to lie at the left
    for name in ("2.png", "10.png", "without-mask.png"):
        Image.fromarray(grey).save(tmp_path / "images" / name)
    for name in ("2.png", "10.png"):
        Image.fromarray(lesion).save(tmp_path / "masks" / name)
    told = [
        "--images",
        f"{tmp_path}/images",
        "--masks",
        f"{tmp_path}/masks",
        "--out",
        f"{tmp_path}/stacks",
    ]
    monkeypatch.setattr("sys.argv", ["pictures", *told, "--size-px", "80", "--quarter-turns", "1"])
    assert pictures.main() == 0
    (volume,) = read_volumes("stacks", str(tmp_path / "stacks"))
    assert volume.lesion_mask_path is not None
    contents = {
        path: (tmp_path / "stacks" / path).read_bytes()
        for path in (volume.volume_path, volume.lesion_mask_path)
    }
    found, samples = prepared.prepare(volume, "key", contents, WindowConfig(size_px=80), 2.0)
    assert (found.num_slices, found.slices, found.spacing_mm, found.intensity) == (
        2,
        (0, 1),
        None,
        "grey8",
    )
    assert samples is not None
    assert samples.lesion is not None
    marked = samples.lesion[0] > 0
    assert marked[61:79, 21:39].all()  # the back, now at the bottom
    assert not marked[:59].any()
    assert not marked[:, 41:].any()
    assert np.ptp(samples.levels[0][marked]) == 0
    assert samples.levels[0][70, 40] == pytest.approx(200 / 255 * 65535, rel=0.01)
    assert not samples.levels[0][:, :19].any()  # black where the picture ends


def test_pictures_without_matching_masks_are_refused(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    (images / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="no slice has a mask of its name"):
        pictures.join(images, masks)
    with pytest.raises(ConfigError, match=r"a\.png cannot be read as a picture"):
        pictures.join(images, images)
    Image.fromarray(np.full((20, 40), 80, np.uint8)).save(images / "a.png")
    Image.fromarray(np.full((40, 40), 255, np.uint8)).save(masks / "a.png")
    with pytest.raises(
        ConfigError, match=r"the mask of a\.png has \(40, 40\) pixels, expected \(20, 40\)"
    ):
        pictures.join(images, masks)
    Image.fromarray(np.ones((20, 40), np.uint8)).save(masks / "a.png")
    with pytest.raises(ConfigError, match="no mask has anything brighter than 127"):
        pictures.join(images, masks)


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_index_in_csv_equals_index_in_parquet(name: str, tmp_path: Path) -> None:
    volumes = [
        LabelledVolume(
            volume_path="a.nii.gz",
            patient="1",
            diagnosis="infected",
            severity="mild",
            intensity="grey8",
        ),
        LabelledVolume(
            volume_path="b.nii.gz",
            patient="02",
            lesion_mask_path="b_mask.nii.gz",
            lesion_labels="2",
        ),
    ]
    if name.endswith("csv"):
        (tmp_path / name).write_text(
            "patient,volume_path,diagnosis,severity,intensity,lesion_mask_path,lesion_labels\n"
            "1,a.nii.gz,infected,mild,grey8,,\n02,b.nii.gz,,,,b_mask.nii.gz,2\n"
        )
    else:
        write_labels(str(tmp_path / name), volumes)
    assert read_labels(str(tmp_path / name)) == volumes
    assert read_volumes("manifest", str(tmp_path)) == volumes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("volume_path\na.nii\n", "has no column patient"),
        ("volume_path,patient,grade\na.nii,1,mild\n", "has a column grade, expected"),
        (
            "volume_path,patient,diagnosis,severity\na.nii,1,normal,mild\n",
            "label normal/mild, expected",
        ),
        ("volume_path,patient,intensity\na.nii,1,8bit\n", "intensity 8bit, expected"),
        ("volume_path,patient,intensity\na.nii,1,grey8:0\n", "intensity grey8:0, expected"),
        (
            "volume_path,patient,intensity\na.nii,1,grey8:250:-1250\n",
            "intensity grey8:250:-1250, expected LOW below HIGH",
        ),
        ("volume_path,patient\na.nii,\n", "row 1 of the index has no patient"),
        ("volume_path,patient\na.nii,1\na.nii,1\n", "1 volumes are in the data set twice"),
    ],
)
def test_bad_index_is_refused_with_found_and_expected(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_volumes("manifest", str(tmp_path))


def test_pictures_become_a_stack_of_hu_by_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Black is -1250 HU and white 250; the lungs of single slices are not searched."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    grey = np.zeros((64, 64), np.uint8)
    grey[:, 32:] = 255
    grey[:32, 32:] = 51
    lesion = np.zeros((64, 64), np.uint8)
    lesion[:8] = 255
    # As many as a volume in HU needs.
    for number in range(8):
        Image.fromarray(grey).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(lesion).save(tmp_path / "masks" / f"{number}.png")
    options = ["--images", f"{tmp_path}/images", "--masks", f"{tmp_path}/masks"]
    options += ["--out", f"{tmp_path}/stacks", "--name", "x-slices", "--size-px", "64"]
    monkeypatch.setattr("sys.argv", ["pictures", *options, "--hu", "-1250", "250"])
    assert pictures.main() == 0
    (volume,) = read_volumes("stacks", str(tmp_path / "stacks"))
    assert (volume.patient, volume.intensity, volume.slice_order) == ("x-slices", "hu", "single")
    assert volume.lesion_mask_path is not None
    contents = {
        path: (tmp_path / "stacks" / path).read_bytes()
        for path in (volume.volume_path, volume.lesion_mask_path)
    }
    window = WindowConfig(low_hu=-1250, high_hu=250, size_px=64, crops_to_lungs=True)
    description, samples = prepared.prepare(volume, "key", contents, window, 2.0)
    assert samples is not None, description.reason_detail
    intensity = samples.levels[0] / 65535
    # HU are whole numbers, 1 of 1500.
    assert intensity[0, 0] == pytest.approx(0, abs=1e-3)
    assert intensity[0, 63] == pytest.approx(51 / 255, abs=1e-3)
    assert intensity[63, 63] == pytest.approx(1, abs=1e-3)
