"""The night at a glance, the order of the worklist, the report, and the grey values of its pictures."""

import json
import re
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from PIL import Image
from worklist_rows import ledger

from covtanet import drawing as overlay
from covtanet.ct.window import WindowConfig, to_input
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.report import worklist


def keys(page: dict[str, Any]) -> str:
    return "".join(each["series_key"][0] for each in page["rows"])


def test_worst_have_most_of_the_lung_involved_and_what_is_unknown_comes_behind() -> None:
    assert keys(worklist.page(ledger())) == "cdbeaf"
    assert keys(worklist.page(ledger(), sort="uncertain")) == "bedcaf"
    assert keys(worklist.page(ledger(), sort="refused"))[:2] == "fa"


def test_filters_and_search_leave_the_summary_of_all() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"status": "rejected"}, "a"), ({"grade": "severe"}, "c"), ({"grade": "normal"}, "b"),
        ({"grade": "mild"}, "de"), ({"text": "BUCKET/D"}, "d"), ({"text": "storage"}, "f"), ({"text": "nowhere"}, ""),
    )  # fmt: skip
    for chosen, expected in cases:
        page = worklist.page(ledger(), **chosen)
        assert (keys(page), page["total"]) == (expected, len(expected)), chosen
        assert page["summary"]["series"] == 6


def test_pages_are_short_however_long_the_ledger() -> None:
    table = pa.concat_tables([ledger()] * 100)
    page = worklist.page(table, limit=10_000)
    assert (len(page["rows"]), page["total"]) == (worklist.MAX_ROWS, 600)
    assert keys(worklist.page(ledger(), offset=2, limit=2)) == "be"


def test_the_night_at_a_glance() -> None:
    found = worklist.summary(ledger())
    assert found["status"] == {"failed": 1, "rejected": 1, "screened": 4}
    assert found["diagnosis"] == {"infected": 3, "normal": 1}
    assert found["severity"] == {"mild": 2, "severe": 1}
    assert found["reasons"] == {"storage": 1, "truncated": 1}
    assert found["flags"] == {"contrast": 1}
    assert found["involvement"]["counts"] == [1, 1, 0, 0, 1, 0]
    assert found["studies_per_minute"] is None  # too few for a rate
    assert worklist.summary(pa.concat_tables([ledger()] * 100))["studies_per_minute"] == 599 / 5
    assert found["models"] == ["covtanet 1"]
    json.dumps(found)


def test_a_night_without_studies_has_a_summary_too() -> None:
    page = worklist.page(LEDGER_SCHEMA.empty_table())
    assert (page["total"], page["summary"]["series"], page["summary"]["studies_per_minute"]) == (
        0,
        0,
        None,
    )


def test_the_report_stands_alone_and_no_text_of_a_ledger_ends_its_data() -> None:
    text = worklist.report(ledger(), {"c" * 32: b"png"})
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "</script><b>" not in text
    (embedded,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    data = json.loads(embedded)
    assert keys(data) == "cdbeaf"
    assert data["rows"][4]["reason_detail"] == "</script><b>"
    assert data["pictures"] == {"c" * 32: "data:image/png;base64,cG5n"}
    assert "Research use only" in text


WINDOWS = [(-1000.0, 400.0), (-1350.0, 150.0), (-1000.5, 1500.25), (0.0, 80.0)]


def steps_of_hu(window: WindowConfig) -> NDArray[np.int16]:
    """Eight slices, each with four plateaus of HU within the window."""
    plateaus = np.linspace(window.low_hu, window.high_hu, 6)[1:-1].round()
    return np.tile(np.repeat(plateaus, 16).astype(np.int16), (8, 64, 1))


@pytest.mark.parametrize(("low_hu", "high_hu"), WINDOWS)
def test_viewer_level_is_hu_by_the_window_that_stands_in_the_picture(
    low_hu: float, high_hu: float
) -> None:
    """As the page reads it: two big-endian float32 in the blue of eight pixels, then the level."""
    window = WindowConfig(low_hu=low_hu, high_hu=high_hu, size_px=64)
    hu = steps_of_hu(window)
    nothing = np.zeros(hu.shape, bool)
    data = overlay.png(overlay.viewer(to_input(hu, window), nothing, nothing, window))
    picture = np.asarray(Image.open(BytesIO(data)))
    assert picture[0, 0, 2] == 8
    low, high = np.frombuffer(picture[0, 1:9, 2].tobytes(), ">f4")
    assert (low, high) == (low_hu, high_hu)
    shown_hu = low + (high - low) * picture[:64, :64, 0] / 255
    assert np.abs(shown_hu - hu[0]).max() <= (high - low) / 255


@pytest.mark.parametrize(("low_hu", "high_hu"), WINDOWS)
def test_preview_greys_span_the_window_of_the_model(low_hu: float, high_hu: float) -> None:
    window = WindowConfig(low_hu=low_hu, high_hu=high_hu, size_px=64)
    hu = steps_of_hu(window)
    nothing = np.zeros(hu.shape, bool)
    tile = overlay.preview(to_input(hu, window), nothing, nothing)[
        : overlay.PREVIEW_PX, : overlay.PREVIEW_PX
    ]
    middles = (np.arange(4) * 16 + 8) * overlay.PREVIEW_PX // 64
    expected = 255 * (hu[0, 0, 8::16] - low_hu) / (high_hu - low_hu)
    assert (tile[..., 0] == tile[..., 1]).all()
    assert np.abs(tile[128, middles, 0] - expected).max() <= 1
