"""Names of the series of a PACS that are left out."""

import pytest

from covtanet.archive.dicomweb_series import _modality_name
from covtanet.storage.dicomweb import FoundSeries


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("SEG", "SEG"),
        ("MR", "MR"),
        ("", "of no known modality"),
        ("Doe^Jane", "of no known modality"),
        ("MR\n12:00 ERROR", "of no known modality"),
        ("A" * 17, "of no known modality"),
    ],
)
def test_modality_is_named_only_if_it_is_a_code(modality: str, name: str) -> None:
    found = FoundSeries(study_uid="1.2", series_uid="3.4", modality=modality, num_instances=1)
    assert _modality_name(found) == name
