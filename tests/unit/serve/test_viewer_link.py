"""Links to the viewer of the PACS: which templates are allowed, and which rows have a link."""

from pathlib import Path
from typing import Any

import pytest

from covtanet.config import read_toml
from covtanet.errors import ConfigError
from serve.settings import ServeConfig
from serve.viewer_link import check_template, viewer_url

STUDY = "https://pacs.example/ohif/viewer?StudyInstanceUIDs={study_uid}"
ROW = {"source_uri": "s3://bucket/ct/1", "study_uid": "1.2.3", "series_uid": "4.5"}


@pytest.mark.parametrize(
    "template",
    [
        STUDY,
        f"{STUDY}&SeriesInstanceUIDs={{series_uid}}",
        "https://pacs.example:8443/{study_uid}/{series_uid}#top",
        "http://127.0.0.1:8042/stone-webviewer/index.html?study={study_uid}",
        "http://[::1]/{series_uid}",
        "http://localhost:3000/viewer?StudyInstanceUIDs={study_uid}",
    ],
)
def test_sound_template_passes(template: str) -> None:
    check_template(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("http://pacs.example/{study_uid}", "begins with http://pacs.example, expected https"),
        ("http://127.0.0.1.pacs.example/{study_uid}", "expected https"),
        ("javascript:alert('{study_uid}')", "no host"),
        ("data:text/html,{study_uid}", "no host"),
        ("/viewer?{study_uid}", "no host"),
        ("ftp://pacs.example/{study_uid}", "expected https"),
        ("https://pacs.example/viewer", "no placeholder"),
        ("https://pacs.example/{patient_id}", "has the placeholder {patient_id}, expected"),
        ("https://pacs.example/{study_uid}{}", "has the placeholder {}, expected"),
        ("https://pacs.example/{study_uid.__class__}", "placeholder {study_uid.__class__}"),
        ("https://pacs.example/{study_uid!r}", "has the placeholder"),
        ("https://pacs.example/{study_uid:>9}", "has the placeholder"),
        ("https://pacs.example/{study_uid", "brace without its pair"),
        ("https://{study_uid}.example/", "placeholder in its host"),
        ("https://user:secret@pacs.example/{study_uid}", "user or a placeholder in its host"),
        ("https://pacs.example/ {study_uid}", "blank or a control character"),
        ("https://pacs.example/\n{study_uid}", "blank or a control character"),
    ],
)
def test_other_template_is_refused_with_what_is_expected(template: str, message: str) -> None:
    with pytest.raises(
        ValueError, match=message.replace("{", r"\{").replace(".", r"\.")
    ) as refused:
        check_template(template)
    assert "secret" not in str(refused.value)


def test_endpoint_with_a_wrong_template_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    text = 'viewer_url = "http://pacs/{study_uid}"\n[[callers]]\nname = "ann"\ntoken_sha256 = '
    path.write_text(f'{text}"{"0" * 64}"\n')
    with pytest.raises(ConfigError, match="viewer_url begins with http://pacs, expected https"):
        read_toml(path, ServeConfig)


def test_link_names_the_study_or_the_series() -> None:
    assert viewer_url(STUDY, ROW) == "https://pacs.example/ohif/viewer?StudyInstanceUIDs=1.2.3"
    both = "https://pacs.example/{study_uid}/{series_uid}"
    assert viewer_url(both, ROW) == "https://pacs.example/1.2.3/4.5"


@pytest.mark.parametrize(
    "values",
    [
        {"study_uid": None},
        {"study_uid": ""},
        {"study_uid": "1.2&x=javascript:"},
        {"study_uid": "0f" * 16, "source_uri": "1e" * 16},
        # A pseudonym may by chance have no letters.
        {"study_uid": "7" * 32, "source_uri": "8" * 32},
    ],
)
def test_row_without_a_study_uid_or_with_a_pseudonym_has_no_link(values: dict[str, Any]) -> None:
    assert viewer_url(STUDY, {**ROW, **values}) is None


def test_without_a_template_no_row_has_a_link() -> None:
    assert viewer_url("", ROW) is None
