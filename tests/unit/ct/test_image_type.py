"""Localizers, projections and reformats are recognized by the attributes of the objects."""

import numpy as np
import pytest
from odd_dicom import (
    copied,
    datasets,
    item,
    localizer,
    read,
    reason_of,
    reformatted,
    with_groups,
    with_values,
)
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID
from sound_input import phantom

from covtanet.ct.dicom_image_type import is_localizer, is_projection, is_reformatted


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["ORIGINAL", "PRIMARY", "AXIAL"], ""),
        (["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"], ""),
        (["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM7 SPI DUAL", "STD", "SNRG", "DET_AB"], ""),
        (["DERIVED", "SECONDARY"], ""),
        (["DERIVED", "SECONDARY", "AXIAL"], ""),
        (["DERIVED", "PRIMARY", "AXIAL", "JP2K LOSSY 6:1"], ""),
        (["ORIGINAL", "PRIMARY", "AXIAL", "FILTERED BACK PROJECTION"], ""),
        (["DERIVED", "SECONDARY", "AXIAL", "MIP"], "projection"),
        (["DERIVED", "SECONDARY", "MIP"], "projection"),
        (["DERIVED", "SECONDARY", "OTHER", "CSA MIP"], "projection"),
        (["DERIVED", "SECONDARY", "MIP_SAG"], "projection"),
        (["DERIVED", "SECONDARY", "AXIAL", "MinIP"], "projection"),
        (["DERIVED", "SECONDARY", "REFORMATTED", "MIN_IP"], "projection"),
        (["DERIVED", "SECONDARY", "REFORMATTED", "MAX IP"], "projection"),
        (["DERIVED", "SECONDARY", "AXIAL", "MIP THIN"], "projection"),
        (["DERIVED", "SECONDARY", "MAXIMUM INTENSITY PROJECTION"], "projection"),
        (["DERIVED", "SECONDARY", "PROJECTION IMAGE"], "projection"),
        (["DERIVED", "SECONDARY", "VOLUME", "MINIMUM"], "projection"),
        (["DERIVED", "SECONDARY", "AXIAL", "VOLREN"], "projection"),
        (["DERIVED", "SECONDARY", "AXIAL", "VRT"], "projection"),
        (["DERIVED", "SECONDARY", "CURVED MPR"], "projection"),
        (["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"], "reformatted"),
        (["DERIVED", "SECONDARY", "AXIAL", "AVERAGE INTENSITY PROJECTION"], "reformatted"),
        (["DERIVED", "SECONDARY", "AXIAL", "MEAN"], "reformatted"),
        (
            ["DERIVED", "SECONDARY", "MPR", "CSA MPR", "", "CSAPARALLEL", "AXIAL", "CT_SOM5 SPI"],
            "reformatted",
        ),
        (["DERIVED", "SECONDARY", "OTHER", "CSA MPR THICK"], "reformatted"),
        (["DERIVED", "SECONDARY", "MPVR"], "reformatted"),
        (["DERIVED", "SECONDARY", "REFORMATTED"], "reformatted"),
        (["DERIVED", "SECONDARY", "OTHER", "CSA RESAMPLED"], "reformatted"),
        (["ORIGINAL", "PRIMARY", "LOCALIZER"], "localizer"),
        (["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"], "localizer"),
        (["DERIVED", "SECONDARY", "LOCALIZER", "PROJECTION IMAGE"], "localizer"),
        (["ORIGINAL", "PRIMARY", "SCOUT"], "localizer"),
        ("ORIGINAL", ""),
        (None, ""),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_image_type_of_vendors_is_classified_by_its_words(
    values: list[str] | str | None, kind: str
) -> None:
    header = Dataset()
    header.ImageType = values
    kinds = {
        "localizer": is_localizer(header),
        "projection": is_projection(header),
        "reformatted": is_reformatted(header),
    }
    first = next((name for name, holds in kinds.items() if holds), "")
    assert first == kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"VolumeBasedCalculationTechnique": "MAX_IP"}, "projection"),
        ({"VolumeBasedCalculationTechnique": "MIN_IP"}, "projection"),
        ({"VolumeBasedCalculationTechnique": "VOLUME_RENDER"}, "projection"),
        ({"VolumetricProperties": "DISTORTED"}, "projection"),
        ({"VolumetricProperties": "SAMPLED"}, "reformatted"),
        ({"VolumeBasedCalculationTechnique": "MPR"}, "reformatted"),
        ({"VolumetricProperties": "VOLUME", "VolumeBasedCalculationTechnique": "NONE"}, ""),
        (
            {"DerivationCodeSequence": item(CodeValue="113078", CodingSchemeDesignator="DCM")},
            "projection",
        ),
        (
            {"DerivationCodeSequence": item(CodeValue="113072", CodingSchemeDesignator="DCM")},
            "reformatted",
        ),
        ({"DerivationCodeSequence": item(CodeValue="113040", CodingSchemeDesignator="DCM")}, ""),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "AVERAGE"]}, "reformatted"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}, "projection"),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, ""),
    ],
)
def test_computed_slices_are_refused_or_flagged(values: dict[str, object], kind: str) -> None:
    if kind == "projection":
        assert reason_of(with_values(**values)) == "projection"
        return
    volume = read(with_values(**values))
    np.testing.assert_array_equal(volume.hu, phantom().hu)
    assert volume.qc_flags == ((kind,) if kind else ())


def frame_type(**values: object) -> FileDataset:
    return with_groups(
        lambda index, frame: setattr(frame, "CTImageFrameTypeSequence", item(**values))
    )


def test_frames_of_an_enhanced_ct_are_classified_one_by_one() -> None:
    assert reason_of([frame_type(VolumeBasedCalculationTechnique="MAX_IP")]) == "projection"
    assert (
        reason_of([frame_type(FrameType=["DERIVED", "SECONDARY", "AXIAL", "MINIMUM"])])
        == "projection"
    )
    assert read([frame_type(VolumeBasedCalculationTechnique="MPR")]).qc_flags == ("reformatted",)
    assert read([frame_type(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])]).qc_flags == ()


def test_projection_goes_after_not_ct_and_before_unsupported_syntax() -> None:
    mip = {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"]}
    assert reason_of(with_values(**mip, Modality="MR")) == "not_ct"
    series = with_values(**mip)
    for dataset in series:
        dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.51")
        dataset.PixelData = encapsulate([b"\xff\xd8"])
        dataset["PixelData"].is_undefined_length = True
    assert reason_of(series) == "projection"


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_slices_of_another_plane_are_flagged_as_reformatted(plane: str) -> None:
    volume = read(reformatted(plane))
    assert volume.qc_flags == ("reformatted",)
    np.testing.assert_array_equal(volume.hu[::3], phantom().hu)


def test_localizer_under_the_series_uid_is_left_out() -> None:
    volume = read([datasets()[0], localizer(), *datasets()[1:]])
    np.testing.assert_array_equal(volume.hu, phantom().hu)
    assert volume.qc_flags == ("localizer_dropped",)


@pytest.mark.parametrize(
    "words", [["ORIGINAL", "PRIMARY", "SCOUT"], ["DERIVED", "SECONDARY", "LOCALIZER", "MIP"]]
)
def test_localizer_is_recognized_by_any_of_its_names(words: list[str]) -> None:
    scout = localizer()
    scout.ImageType = words
    del scout.ImagePositionPatient, scout.PixelSpacing  # it needs no place
    assert read([scout, *datasets()]).qc_flags == ("localizer_dropped",)


def test_series_of_localizers_and_localizers_of_another_patient_are_refused() -> None:
    assert reason_of([localizer(), copied(localizer(), 78)]) == "not_ct"
    stranger = localizer()
    stranger.PatientID = "ANOTHER"
    assert reason_of([stranger, *datasets()]) == "mixed_patients"


def test_frames_that_are_localizers_are_left_out() -> None:
    def first_is_localizer(index: int, frame: Dataset) -> None:
        kind = ["ORIGINAL", "PRIMARY", "VOLUME" if index else "LOCALIZER", "NONE"]
        frame.CTImageFrameTypeSequence = item(FrameType=kind)

    volume = read([with_groups(first_is_localizer)])
    np.testing.assert_array_equal(volume.hu, phantom().hu[1:])
    assert volume.qc_flags == ("localizer_dropped",)
