"""DICOM results of one request's study: their place, identity and limits."""

import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from export_rows import write_objects
from hostile_dicom import enhanced
from pacs import phantom_series
from saved_models import small_model

import serve.results
from covtanet.ct.window import WindowConfig
from covtanet.decoding.child_process import DECODER, Child
from covtanet.errors import SandboxClosedError
from covtanet.inference.predictor import Predictor
from covtanet.report.source_series import READER_LIMITS
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.study import Screener
from serve.decoders import DeadlineError
from serve.results import Results, ResultsMaker, ResultsRequest, identity_of

MODEL = {"name": "covtanet", "version": "1"}


@pytest.fixture
def screener() -> Iterator[Screener]:
    predictor = Predictor(small_model(), engine="eager")
    window, config = WindowConfig(size_px=64), ScreeningConfig(engine="eager")
    found = Screener(predictor, window, config, "d" * 64, "0.1")
    yield found
    found.close()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    write_objects(tmp_path / "study", phantom_series(0))
    return tmp_path / "study"


# Results whose files are closed after each test.
OPEN: list[Results] = []


@pytest.fixture(autouse=True)
def _closed_files() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def maker_of(folder: Path, child: Child, check: Any = lambda: None) -> ResultsMaker:
    request = ResultsRequest(in_answer=True, server="", folder=folder)
    maker = ResultsMaker(request, MODEL, child, threading.Lock(), check)
    OPEN.append(maker.results)
    return maker


def make(
    screener: Screener, study: Path, folder: Path, check: Any = lambda: None
) -> tuple[dict[str, Any], Results]:
    """The row of a study, and the results that an answer would carry."""
    maker = maker_of(folder, screener.decoder.child, check)
    (row,) = screener(str(study), receive=maker.receive)
    return row, maker.results


def datasets(results: Results) -> list[pydicom.Dataset]:
    contents = [b"".join(chunks) for _, chunks in results.objects()]
    assert [len(content) for content in contents] == results.sizes
    return [pydicom.dcmread(BytesIO(content)) for content in contents]


def test_segments_of_study_have_the_volumes_of_its_row(
    screener: Screener, study: Path, tmp_path: Path
) -> None:
    row, results = make(screener, study, tmp_path)
    assert (row["status"], results.outcomes[0]["outcome"]) == ("screened", "made")
    found = datasets(results)
    (seg,) = (item for item in found if item.Modality == "SEG")
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    voxel_ml = np.prod([row[f"spacing_{axis}_mm"] for axis in "zyx"]) / 1000
    assert [float(mm) for mm in measures.PixelSpacing] == pytest.approx(
        [row["spacing_y_mm"], row["spacing_x_mm"]]
    )
    segments = [
        item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        for item in seg.PerFrameFunctionalGroupsSequence
    ]
    lung_ml = seg.pixel_array[np.array(segments) == 2].sum() * voxel_ml
    assert lung_ml == pytest.approx(row["lung_volume_ml"], rel=1e-4)


def test_uids_follow_from_source_model_and_configuration(
    screener: Screener, study: Path, tmp_path: Path
) -> None:
    """Whatever the name of its folder; a copy of the objects is the same source."""
    write_objects(tmp_path / "copy" / "of" / "it", phantom_series(0))
    row, first = make(screener, study, tmp_path)
    _, second = make(screener, tmp_path / "copy", tmp_path)
    uids = [[item.SOPInstanceUID for item in datasets(found)] for found in (first, second)]
    assert uids[0] == uids[1]
    for name in ("model_digest", "config_digest"):
        assert identity_of({**row, name: "other"}) != identity_of(row)
    screener.provenance["config_digest"] = "other"
    _, third = make(screener, study, tmp_path)
    assert not {item.SOPInstanceUID for item in datasets(third)} & set(uids[0])


def test_study_beyond_the_memory_of_results_has_rows_alone(
    screener: Screener, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.results, "MAX_VOXELS", 1000)
    row, results = make(screener, study, tmp_path)
    assert row["status"] == "screened"
    assert [item["outcome"] for item in results.outcomes] == ["too_large"]
    assert datasets(results) == []


def test_enhanced_series_has_rows_and_an_outcome(screener: Screener, tmp_path: Path) -> None:
    write_objects(tmp_path / "study", list(enhanced().values()))
    row, results = make(screener, tmp_path / "study", tmp_path)
    assert row["status"] == "screened"
    assert [item["outcome"] for item in results.outcomes] == ["enhanced_multi_frame"]


def test_request_that_has_ended_makes_no_results(
    screener: Screener, study: Path, tmp_path: Path
) -> None:
    def ended() -> None:
        raise DeadlineError("ended")

    with pytest.raises(DeadlineError):
        make(screener, study, tmp_path, ended)
    # Its decoder is killed while it makes them.
    child = Child(DECODER, READER_LIMITS)
    child.kill()
    maker = maker_of(tmp_path, child)
    with pytest.raises(SandboxClosedError):
        list(screener(str(study), receive=maker.receive))


def test_results_leave_no_file_behind(screener: Screener, study: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    _, results = make(screener, study, tmp_path / "files")
    assert results.sizes
    assert list((tmp_path / "files").iterdir()) == []
