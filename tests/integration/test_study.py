"""One request's study: bounded before anything is decoded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from saved_models import small_model
from sound_input import gz, plain_nifti

from covtanet import storage
from covtanet.ct.window import WindowConfig
from covtanet.errors import UploadError
from covtanet.inference.predictor import Predictor
from covtanet.ledger.run import digest_of
from covtanet.screening.config import ScreeningConfig, config_values
from covtanet.screening.study import Screener, StudyLimits


@pytest.fixture
def screener() -> Iterator[Screener]:
    predictor = Predictor(small_model(), engine="eager")
    found = Screener(predictor, WindowConfig(size_px=64), ScreeningConfig(engine="eager"), "digest")
    yield found
    found.close()


def fill(folder: Path, count: int) -> str:
    for index in range(count):
        (folder / f"{index}.nii.gz").write_bytes(gz(plain_nifti()))
    return str(folder)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (StudyLimits(max_series=2), "3 series, expected at most 2"),
        (StudyLimits(max_objects=2), "more than 2 objects"),
        (StudyLimits(max_bytes=100), "expected at most 100"),
    ],
)
def test_study_with_more_than_a_request_may_hold_is_refused_before_it_is_decoded(
    screener: Screener,
    tmp_path: Path,
    limits: StudyLimits,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(
        type(screener.decoder), "__call__", lambda *arguments, **how: decoded.append(arguments)
    )
    with pytest.raises(UploadError, match=message) as error:
        list(screener(fill(tmp_path, 3), limits=limits))
    assert error.value.reason == "too_large"
    assert not decoded


def test_one_object_is_found_without_listing_its_archive(
    screener: Screener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 3)
    monkeypatch.setattr(storage, "walk", None)  # whoever lists fails
    (row,) = screener(str(tmp_path / "1.nii.gz"), limits=StudyLimits())
    assert (row["status"], row["source_uri"]) == ("screened", str(tmp_path / "1.nii.gz"))


def test_row_names_configuration_and_software_as_a_run_of_the_job_does(tmp_path: Path) -> None:
    """Screened or refused: the digest is that of a run with the same window and configuration."""
    window, config = WindowConfig(size_px=64), ScreeningConfig(engine="eager")
    screener = Screener(
        Predictor(small_model(), engine="eager"), window, config, "digest", "0.1+g12ab"
    )
    (tmp_path / "0.nii.gz").write_bytes(gz(plain_nifti()))
    (tmp_path / "1.nii.gz").write_bytes(gz(plain_nifti())[:-40])
    found = list(screener(str(tmp_path)))
    screener.close()
    assert [row["status"] for row in found] == ["screened", "rejected"]
    expected = digest_of(config_values(window, config))
    assert {(row["config_digest"], row["software_version"]) for row in found} == {
        (expected, "0.1+g12ab")
    }
    assert expected != digest_of(config_values(WindowConfig(size_px=96), config))


def test_listing_stops_at_the_limit(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    with pytest.raises(storage.TooManyObjectsError, match="more than 2 objects"):
        list(storage.walk(str(tmp_path), max_objects=2))
    assert len(list(storage.walk(str(tmp_path), max_objects=3))) == 3
