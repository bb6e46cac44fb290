"""RescaleType and ContrastBolusAgent are words that people type."""

import numpy as np
import pydicom
import pytest
from odd_dicom import (
    item,
    read,
    reason_of,
    with_groups,
    with_values,
)
from pydicom.dataset import Dataset
from sound_input import phantom

from covtanet.ct.dicom_contrast import names_agent


@pytest.mark.parametrize(
    "text",
    [
        "HU",
        "hu",
        "HU ",
        "Hounsfield",
        "HOUNSFIELD UNITS",
        "Hounsfield Unit(s)",
        "Hounsfield units (HU)",
        "houndsfield",
        "H.U.",
        "[HU]",
        "US",
        "HU_MOD",
        "UNSPECIFIED",
        "CT Number",
        "",
    ],
)
def test_rescale_type_that_is_hu_in_words_is_read(text: str) -> None:
    np.testing.assert_array_equal(read(with_values(RescaleType=text)).hu, phantom().hu)


@pytest.mark.parametrize(
    "text", ["Z_EFF", "ED", "EDW", "MGML", "PCT", "HU*10", "OD", "US_Z", "IODINE"]
)
def test_rescale_type_of_other_units_is_not_hu(text: str) -> None:
    assert reason_of(with_values(RescaleType=text)) == "not_hu"


def test_rescale_type_is_checked_after_the_geometry() -> None:
    assert (
        reason_of(with_values(RescaleType="Z_EFF")[:5] + with_values(RescaleType="Z_EFF")[6:])
        == "missing_slices"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NONE",
        "No",
        "N",
        "none.",
        "NO CONTRAST",
        "Non-contrast",
        "NON CONTRAST",
        "W/O",
        "w/o contrast",
        "WITHOUT",
        "WITHOUT IV CONTRAST",
        "-",
        "--",
        "N/A",
        "NOT GIVEN",
        "native",
        "NATIV",
        "ohne KM",
        "sans injection",
        "C-",
        "0",
        "no iv or oral contrast",
        "UNENHANCED",
        "sin contraste",
    ],
)
def test_words_for_no_contrast_agent_are_not_flagged(text: str) -> None:
    assert not names_agent(text)


@pytest.mark.parametrize(
    "text",
    [
        "OMNIPAQUE",
        "ISOVUE300/100",
        "yes",
        "NON IONIC",
        "Nonionic 100 ml",
        "NO ORAL, IV OMNIPAQUE",
        "IV",
        "ORAL",
        "CE",
        "C+",
        "Contrast",
        "APPLIED",
        "IODINE",
        "Natrium",
        "Ultravist 370",
    ],
)
def test_words_that_name_a_contrast_agent_are_flagged(text: str) -> None:
    assert names_agent(text)


def test_contrast_flag_follows_the_words() -> None:
    assert read(with_values(ContrastBolusAgent="NONE")).qc_flags == ()
    assert read(with_values(ContrastBolusAgent="OMNIPAQUE")).qc_flags == ("contrast",)
    agents = item(CodeValue="C-B0310", CodingSchemeDesignator="SRT", CodeMeaning="Iohexol")
    assert read(with_values(ContrastBolusAgentSequence=agents)).qc_flags == ("contrast",)
    none = item(CodeValue="0", CodingSchemeDesignator="99X", CodeMeaning="None")
    assert read(with_values(ContrastBolusAgentSequence=none)).qc_flags == ()


def agents(*meanings: str) -> pydicom.Sequence:
    agents = []
    for number, meaning in enumerate(meanings, 1):
        (agent,) = item(
            CodeValue="1",
            CodingSchemeDesignator="99X",
            CodeMeaning=meaning,
            ContrastBolusAgentNumber=number,
        )
        agents.append(agent)
    return pydicom.Sequence(agents)


@pytest.mark.parametrize(
    ("meanings", "usage", "is_flagged"),
    [
        (("Iohexol",), None, True),
        (("None",), None, False),
        (
            ("Iohexol",),
            {"ContrastBolusAgentNumber": 1, "ContrastBolusAgentAdministered": "YES"},
            True,
        ),
        (
            ("Iohexol",),
            {"ContrastBolusAgentNumber": 1, "ContrastBolusAgentAdministered": "NO"},
            False,
        ),
        (("Iohexol",), {"ContrastBolusAgentNumber": 1, "ContrastBolusAgentDetected": "YES"}, True),
        (
            ("None", "Water"),
            {"ContrastBolusAgentNumber": 2, "ContrastBolusAgentAdministered": "NO"},
            False,
        ),
        (
            ("Iohexol", "Water"),
            {"ContrastBolusAgentNumber": 2, "ContrastBolusAgentAdministered": "NO"},
            True,
        ),
    ],
)
def test_agents_of_an_enhanced_ct_count_if_they_were_administered(
    meanings: tuple[str, ...], usage: dict[str, object] | None, is_flagged: bool
) -> None:
    def change(index: int, frame: Dataset) -> None:
        if usage is not None:
            frame.ContrastBolusUsageSequence = item(**usage)

    dataset = with_groups(change, ContrastBolusAgentSequence=agents(*meanings))
    assert read([dataset]).qc_flags == (("contrast",) if is_flagged else ())


def test_contrast_agent_of_the_first_frames_is_flagged() -> None:
    def change(index: int, frame: Dataset) -> None:
        usage = {
            "ContrastBolusAgentNumber": 1,
            "ContrastBolusAgentAdministered": "YES" if index > 9 else "NO",
        }
        frame.ContrastBolusUsageSequence = item(**usage)

    assert read([with_groups(change, ContrastBolusAgentSequence=agents("Iohexol"))]).qc_flags == (
        "contrast",
    )
