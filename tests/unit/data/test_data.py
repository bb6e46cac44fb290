"""Data sets, labels, folds and prepared volumes."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covtanet.ct import nifti
from covtanet.ct.volume import SourceGrid
from covtanet.ct.window import WindowConfig
from covtanet.data import pictures, prepared, prepared_file
from covtanet.data.datasets import read_volumes
from covtanet.data.folds import Case, assign_folds, split
from covtanet.data.labels import LabelledVolume, read_labels, write_labels
from covtanet.data.stacks import pair
from covtanet.errors import ConfigError
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import Phantom
from covtanet.report import data_report

WINDOW = WindowConfig(size_px=64)
GRID = SourceGrid(shape=(32, 32, 10), affine=np.diag([-1.0, -1.0, 1.0, 1.0]))


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


def test_covid20_marks_grey_volumes_and_joins_a_patients_two(tmp_path: Path) -> None:
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
    assert [volume.intensity for volume in found] == ["hu", "grey8", "grey8", "grey8"]
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


def cases(num_patients: int) -> list[Case]:
    """Two volumes of every fifth patient; masks for mild ones alone, as MosMedData has them."""
    grades = ("normal", "mild", "severe")
    return [
        Case(
            key=f"{patient}-{k}",
            patient=str(patient),
            grade=grades[patient % 3],
            has_lesion_mask=patient % 3 == 1,
        )
        for patient in range(num_patients)
        for k in range(1 + (patient % 5 == 0))
    ]


def test_folds_keep_patients_whole_and_grades_level() -> None:
    own = cases(90)
    folds = assign_folds(own, 5, seed=0)
    for fold in range(5):
        patients = [int(patient) for patient, number in folds.items() if number == fold]
        assert len(patients) == 18
        assert [sum(patient % 3 == grade for patient in patients) for grade in range(3)] == [
            6,
            6,
            6,
        ]


def test_folds_do_not_depend_on_the_order_of_files() -> None:
    own = cases(50)
    shuffled = random.Random(1).sample(own, len(own))
    folds = assign_folds(own, 5, seed=3)
    assert assign_folds(shuffled, 5, seed=3) == folds
    assert split(shuffled, folds, 2, 0.2, seed=3) == split(own, folds, 2, 0.2, seed=3)
    assert assign_folds(own, 5, seed=4) != folds


def test_split_parts_share_no_patient_and_every_volume_is_tested_once() -> None:
    own = cases(50)
    folds = assign_folds(own, 5, seed=0)
    patient_of = {case.key: case.patient for case in own}
    tested: list[str] = []
    for fold in range(5):
        part = split(own, folds, fold, 0.2, seed=0)
        patients = [
            {patient_of[key] for key in keys} for keys in (part.train, part.validation, part.test)
        ]
        assert not patients[0] & patients[1]
        assert not (patients[0] | patients[1]) & patients[2]
        assert {
            key for key in part.validation if int(patient_of[key]) % 3 == 1
        }  # phase 1 can validate
        tested += part.test
    assert sorted(tested) == sorted(patient_of)


def test_fewer_patients_than_folds_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 patients cannot make 5 folds"):
        assign_folds(cases(3), 5, seed=0)


def contents_of(phantom: Phantom, volume: LabelledVolume) -> dict[str, bytes]:
    grid = nifti_grid(phantom)
    found = {volume.volume_path: nifti.write(phantom.hu, grid)}
    if volume.lesion_mask_path:
        found[volume.lesion_mask_path] = nifti.write(phantom.lesion_mask, grid)
    if volume.lung_mask_path:
        found[volume.lung_mask_path] = nifti.write(phantom.lung_mask, grid)
    return found


PHANTOM = LabelledVolume(
    volume_path="v.nii.gz", patient="p", lesion_mask_path="m.nii.gz", lung_mask_path="l.nii.gz"
)


def test_prepared_volume_is_equal_after_parquet(mild: Phantom) -> None:
    found, samples = prepared.prepare(PHANTOM, "k", contents_of(mild, PHANTOM), WINDOW, 0)
    assert samples is not None
    data = prepared_file.to_parquet(found, samples)
    again = prepared_file.read_samples(data)
    assert prepared_file.describe(data) == found
    assert np.array_equal(again.levels, samples.levels)
    assert again.lesion is not None
    assert samples.lesion is not None
    assert np.array_equal(again.lesion, samples.lesion)
    assert found.lesion_px == tuple(again.lesion.sum(axis=(1, 2)))


def test_prepared_volume_of_anisotropic_slices_is_undistorted(mild: Phantom) -> None:
    """Every other row, with voxels twice as long: levels and mask are those of the whole volume."""
    whole, square = prepared.prepare(PHANTOM, "k", contents_of(mild, PHANTOM), WINDOW, 0)
    half = Phantom(
        hu=mild.hu[:, ::2], affine=mild.affine @ np.diag([1.0, 2.0, 1.0, 1.0]),
        lesion_mask=mild.lesion_mask[:, ::2], lung_mask=mild.lung_mask[:, ::2],
    )  # fmt: skip
    found, samples = prepared.prepare(PHANTOM, "k", contents_of(half, PHANTOM), WINDOW, 0)
    assert square is not None
    assert samples is not None
    assert found.slices == whole.slices
    difference = np.abs(samples.levels.astype(int) - square.levels)
    assert np.mean(difference > 0.2 * 65535) < 0.05
    assert samples.lesion is not None
    assert square.lesion is not None
    assert int(samples.lesion.sum()) == pytest.approx(int(square.lesion.sum()), rel=0.2)
    assert np.count_nonzero(samples.lesion & square.lesion) > 0.8 * np.count_nonzero(square.lesion)


def test_severity_follows_from_the_masks_without_a_label(mild: Phantom) -> None:
    """The paper's rule: a tenth of the lung is mild, more than a quarter severe."""
    found, _ = prepared.prepare(PHANTOM, "k", contents_of(mild, PHANTOM), WINDOW, 0)
    assert found.involvement == pytest.approx(mild.involvement)
    assert found.grade == "mild"
    severe = Phantom(
        hu=mild.hu, affine=mild.affine, lesion_mask=mild.lung_mask, lung_mask=mild.lung_mask
    )
    assert (
        prepared.prepare(PHANTOM, "k", contents_of(severe, PHANTOM), WINDOW, 0)[0].grade == "severe"
    )
    none = Phantom(
        hu=mild.hu, affine=mild.affine, lesion_mask=mild.lung_mask & False, lung_mask=mild.lung_mask
    )
    assert (
        prepared.prepare(PHANTOM, "k", contents_of(none, PHANTOM), WINDOW, 0)[0].grade == "normal"
    )


def grey(values: np.ndarray) -> tuple[LabelledVolume, dict[str, bytes]]:
    volume = replace(PHANTOM, lung_mask_path=None, intensity="grey8")
    mask = np.zeros(values.shape, np.uint8)
    mask[4, 10:14, 10:14] = 1
    return volume, {"v.nii.gz": nifti.write(values, GRID), "m.nii.gz": nifti.write(mask, GRID)}


def test_grey_values_map_linearly_and_are_never_windowed_as_hu() -> None:
    values = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (10, 32, 1))
    volume, contents = grey(values)
    found, samples = prepared.prepare(volume, "k", contents, WindowConfig(size_px=32), 0)
    assert samples is not None
    assert np.allclose(samples.levels / 65535, values / 255, atol=1e-4)
    assert (found.intensity, found.involvement) == ("grey8", None)
    assert (
        prepared.prepare(
            replace(volume, intensity="auto"), "k", contents, WindowConfig(size_px=32), 0
        )[0]
        == found
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"intensity": "hu"}, "label_map"),  # 32 different values, none below 0
        ({"lesion_mask_path": None}, "unlabelled"),
    ],
)
def test_volume_of_other_intensity_than_declared_is_refused(
    change: dict[str, str], reason: str
) -> None:
    volume, contents = grey(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (10, 32, 1)))
    found, samples = prepared.prepare(replace(volume, **change), "k", contents, WINDOW, 0)
    assert (found.reason, samples) == (reason, None)
    assert prepared_file.describe(prepared_file.to_parquet(found, samples)) == found


def test_hu_declared_grey_are_refused(mild: Phantom) -> None:
    volume = replace(PHANTOM, intensity="grey8")
    assert (
        prepared.prepare(volume, "k", contents_of(mild, volume), WINDOW, 0)[0].reason == "not_grey8"
    )


def test_mask_of_another_shape_is_refused(mild: Phantom) -> None:
    contents = contents_of(mild, PHANTOM)
    contents["m.nii.gz"] = nifti.write(np.zeros((10, 32, 32), np.uint8), GRID)
    found, _ = prepared.prepare(PHANTOM, "k", contents, WINDOW, 0)
    assert found.reason == "mask_mismatch"
    assert "expected (24, 128, 128)" in str(found.reason_detail)


def test_key_changes_with_source_label_and_preprocessing() -> None:
    keys = {
        prepared.volume_key(volume, versions, window, step)
        for volume, versions, window, step in (
            (PHANTOM, ["1"], WINDOW, 0.0),
            (PHANTOM, ["2"], WINDOW, 0.0),
            (replace(PHANTOM, diagnosis="infected"), ["1"], WINDOW, 0.0),
            (PHANTOM, ["1"], WindowConfig(size_px=128), 0.0),
            (PHANTOM, ["1"], WINDOW, 2.5),
        )
    }
    assert len(keys) == 5


def test_data_report_counts_grades_and_reasons_without_identities(mild: Phantom) -> None:
    sound, _ = prepared.prepare(PHANTOM, "k1", contents_of(mild, PHANTOM), WINDOW, 0)
    lost = prepared.refused(
        replace(PHANTOM, patient="Mueller"), "k2", WINDOW, "missing", "not there"
    )
    text = data_report.as_text([sound, lost], ["a trap"])
    assert "volumes" in text
    assert "2 of 2 patients" in text
    assert "missing" in text
    assert "note: a trap" in text
    assert "Mueller" not in text
