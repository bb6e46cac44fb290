"""The worklist: summary, order, filter, the report as one file, and intensities of its pictures."""

import json
import re
from io import BytesIO
from pathlib import Path
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
from covtanet.report import page_file, worklist


def keys(page: dict[str, Any]) -> str:
    return "".join(row["series_key"][0] for row in page["rows"])


def test_order_puts_missing_values_and_unscreened_series_last() -> None:
    assert keys(worklist.page(ledger())) == "cdbeaf"
    assert keys(worklist.page(ledger(), sort="uncertain")) == "bedcaf"
    assert keys(worklist.page(ledger(), sort="refused"))[:2] == "fa"


def test_filter_and_search_keep_the_summary_of_all_rows() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"status": "rejected"}, "a"),
        ({"grade": "severe"}, "c"),
        ({"grade": "normal"}, "b"),
        ({"grade": "mild"}, "de"),
        ({"text": "BUCKET/D"}, "d"),
        ({"text": "storage"}, "f"),
        ({"text": "nowhere"}, ""),
    )
    for chosen, expected in cases:
        page = worklist.page(ledger(), **chosen)
        assert (keys(page), page["total"]) == (expected, len(expected)), chosen
        assert page["summary"]["series"] == 6


def test_page_has_at_most_max_rows() -> None:
    table = pa.concat_tables([ledger()] * 100)
    page = worklist.page(table, limit=10_000)
    assert (len(page["rows"]), page["total"]) == (worklist.MAX_ROWS, 600)
    assert keys(worklist.page(ledger(), offset=2, limit=2)) == "be"


def test_summary_counts_status_findings_reasons_and_flags() -> None:
    summary = worklist.summary(ledger())
    assert summary["status"] == {"failed": 1, "rejected": 1, "screened": 4}
    assert summary["diagnosis"] == {"infected": 3, "normal": 1}
    assert summary["severity"] == {"mild": 2, "severe": 1}
    assert summary["reasons"] == {"storage": 1, "truncated": 1}
    assert summary["flags"] == {"contrast": 1}
    assert summary["involvement"]["counts"] == [1, 1, 0, 0, 1, 0]
    assert summary["studies_per_minute"] is None  # too few for a rate
    assert worklist.summary(pa.concat_tables([ledger()] * 100))["studies_per_minute"] == 599 / 5
    assert summary["models"] == ["covtanet 1"]
    json.dumps(summary)


def test_empty_ledger_has_a_summary_without_a_rate() -> None:
    page = worklist.page(LEDGER_SCHEMA.empty_table())
    assert (page["total"], page["summary"]["series"], page["summary"]["studies_per_minute"]) == (
        0,
        0,
        None,
    )


def test_report_loads_nothing_and_escapes_its_data() -> None:
    text = worklist.report(ledger(), {"c" * 32: b"png"})
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "</script><b>" not in text
    (embedded,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    data = json.loads(embedded)
    assert keys(data) == "cdbeaf"
    assert data["orders"] == {
        "worst": [0, 1, 2, 3, 4, 5],
        "uncertain": [2, 3, 1, 0, 4, 5],
        "refused": [5, 4, 2, 0, 1, 3],
    }
    assert data["grades"] == ["severe", "mild", "normal", "mild", None, None]
    assert "s3://bucket/c" in data["texts"][0]
    assert data["rows"][4]["reason_detail"] == "</script><b>"
    assert data["pictures"] == {"c" * 32: "data:image/png;base64,cG5n"}
    assert "Research use only" in text


@pytest.mark.parametrize("sort", worklist.SORTS)
def test_report_has_the_order_of_the_endpoint(sort: str) -> None:
    text = worklist.report(ledger(), {})
    (embedded,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    data = json.loads(embedded)
    ordered = [data["rows"][index] for index in data["orders"][sort]]
    assert ordered == json.loads(json.dumps(worklist.page(ledger(), sort=sort)["rows"]))


def test_bundle_holds_every_module_once_without_imports() -> None:
    text = page_file.bundle(page_file.MAIN)
    assert not re.search(r"^(import|export)\b", text, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|class|const) (\w+)", text, re.MULTILINE)
    assert len(names) == len(set(names)), "modules of a report share one scope"
    for path in page_file.PAGE.glob("*.js"):
        opening = path.read_text().splitlines()[0]
        assert text.count(opening) >= 1, path.name


def test_bundle_refuses_an_import_in_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.js").write_text('import * as all from "./other.js";\n')
    monkeypatch.setattr(page_file, "PAGE", tmp_path)
    with pytest.raises(ValueError, match="cannot be bundled"):
        page_file.bundle("main.js")


def test_colours_of_the_page_are_those_of_the_pictures() -> None:
    style = (page_file.PAGE / "worklist.css").read_text()
    for name, rgb in (("lung", overlay.LUNG_RGB), ("lesion", overlay.LESION_RGB)):
        assert f"--{name}-rgb: {' '.join(map(str, rgb))};" in style


WINDOWS = [(-1000.0, 400.0), (-1350.0, 150.0), (-1000.5, 1500.25), (0.0, 80.0)]


def steps_of_hu(window: WindowConfig) -> NDArray[np.int16]:
    """Eight slices, each with four plateaus of HU within the window."""
    plateaus = np.linspace(window.low_hu, window.high_hu, 6)[1:-1].round()
    return np.tile(np.repeat(plateaus, 16).astype(np.int16), (8, 64, 1))


@pytest.mark.parametrize(("low_hu", "high_hu"), WINDOWS)
def test_viewer_intensity_is_hu_by_the_window_of_the_layout(low_hu: float, high_hu: float) -> None:
    window = WindowConfig(low_hu=low_hu, high_hu=high_hu, size_px=64)
    hu = steps_of_hu(window)
    nothing = np.zeros(hu.shape, bool)
    tiles, layout = overlay.viewer(to_input(hu, window), nothing, nothing, window)
    picture = np.asarray(Image.open(BytesIO(overlay.png(tiles))))
    assert layout == {"tiles": 8, "columns": 10, "low_hu": low_hu, "high_hu": high_hu}
    shown_hu = low_hu + (high_hu - low_hu) * picture[:64, :64, 0] / 255
    assert np.abs(shown_hu - hu[0]).max() <= (high_hu - low_hu) / 255


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
