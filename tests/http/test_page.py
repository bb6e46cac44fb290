"""The worklist page in a real browser, served by the endpoint and as a report."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from running import S3
from screening_runs import Screening
from worklist_rows import ledger

from covtanet import drawing as overlay
from covtanet.ct.window import WindowConfig, to_input
from covtanet.report import worklist
from covtanet.report.night_report import write_report
from covtanet.report.page_file import PAGE
from infra.local.endpoint import Endpoint

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which any error of the script fails the test."""
    errors: list[str] = []
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    yield opened
    opened.close()
    assert not errors


def log_in(page: Any, endpoint: Endpoint) -> None:
    page.goto(f"{endpoint.url}/")
    page.fill("#token", endpoint.token)
    page.press("#token", "Enter")
    page.wait_for_selector("#rows tr")


def mean_colour(page: Any) -> list[int]:
    """Return the mean of red, green and blue over the canvas."""
    colour: list[int] = page.evaluate(
        """() => {
          const canvas = document.querySelector("canvas");
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          const sums = [0, 0, 0];
          data.forEach((value, index) => { if (index % 4 < 3) sums[index % 4] += value; });
          return sums.map((sum) => sum / (width * height));
        }"""
    )
    return colour


def test_series_opens_scrolls_and_changes_window_and_overlay(
    page: Any, endpoint: Endpoint, batch: str
) -> None:
    log_in(page, endpoint)
    assert "Research use only" in page.inner_text("header")
    assert "25 series" in page.inner_text("#summary")
    assert page.locator("#rows tr").count() == 25
    page.keyboard.press("j")
    page.wait_for_selector("#study canvas")
    first, shown = mean_colour(page), page.inner_text("#study .tools")
    assert sum(first) > 10
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#study .tools") != shown
    page.locator("#study canvas").hover()
    moved = page.inner_text("#study .tools")
    page.mouse.wheel(0, 100)
    page.wait_for_function(
        "(before) => document.querySelector('#study .tools').innerText !== before", arg=moved
    )
    marked = mean_colour(page)
    page.keyboard.press("o")  # without the overlay every pixel is grey
    plain = mean_colour(page)
    assert plain != marked
    assert max(plain) - min(plain) < 1e-6
    page.keyboard.press("3")
    assert mean_colour(page) != plain
    assert page.locator("#study .legend .swatch").count() == 2
    assert "model" in page.inner_text("#study dl")
    page.keyboard.press("Escape")
    assert not page.is_visible("#study")


def test_filters_and_search_narrow_the_list(page: Any, endpoint: Endpoint, batch: str) -> None:
    log_in(page, endpoint)
    page.select_option("#status", "rejected")
    page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 17")
    page.fill("#text", "truncated")
    page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 1")
    page.click("#rows tr")
    assert "Not screened" in page.inner_text("#study")
    page.fill("#text", "<img src=x onerror=alert(1)>")
    page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 0")


def test_wrong_token_shows_the_problem_in_the_login_form(browser: Any, endpoint: Endpoint) -> None:
    page = browser.new_page()  # without the check of errors: Chromium logs the answer 403
    page.goto(f"{endpoint.url}/")
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    page.wait_for_function(
        "() => document.querySelector('#login-problem').innerText.toLowerCase() === 'unknown token'"
    )
    assert page.input_value("#token") == ""
    page.close()


def test_sign_out_forgets_the_token(page: Any, endpoint: Endpoint, batch: str) -> None:
    log_in(page, endpoint)
    page.click("#sign-out")
    assert page.is_visible("#login")
    assert not page.is_visible("#work")
    page.reload()
    page.wait_for_selector("#login")
    assert page.evaluate("() => sessionStorage.length") == 0


def committed_batch(s3: S3, batch: str, name: str, count: int) -> str:
    """Write a batch with many copies of the rows of a real batch; return its id."""
    root = s3.folder / "served" / "_batches"
    (path,) = root.glob(f"callers/*/{batch}.json")
    record = json.loads(path.read_text())
    served = root / "ledger"
    named = json.loads((served / "_batches" / f"{batch}.run").read_text())
    table = pq.ParquetFile(
        served / f"date={named['run_date']}" / f"{named['run_id']}.parquet"
    ).read()
    rows = [row for row in table.to_pylist() if row["status"] == "screened"]
    many = [
        {
            **rows[k % len(rows)],
            "series_key": f"{k:032x}",
            "screened_at": rows[0]["screened_at"] + timedelta(seconds=k),
        }
        for k in range(count)
    ]
    from covtanet import storage

    new = pa.Table.from_pylist(many, table.schema)
    sink = pa.BufferOutputStream()
    pq.write_table(new, sink)
    own, callers = (
        "s3://bucket/served/_batches/ledger",
        f"s3://bucket/served/_batches/callers/{path.parent.name}",
    )
    storage.write_bytes(
        f"{own}/date={named['run_date']}/{name}.parquet", sink.getvalue().to_pybytes()
    )
    storage.write_bytes(
        f"{own}/_batches/{name}.run", json.dumps({**named, "run_id": name}).encode()
    )
    storage.write_bytes(
        f"{callers}/{name}.json", json.dumps({**record, "batch_id": name, "ended": None}).encode()
    )
    storage.write_bytes(f"{callers}/newest/1-{name}", b"")
    return name


def test_ten_thousand_rows_open_as_fast_as_a_hundred(
    page: Any, endpoint: Endpoint, batch: str, s3: S3
) -> None:
    seconds = {}
    names = {count: committed_batch(s3, batch, f"{count:016x}", count) for count in (100, 10_000)}
    log_in(page, endpoint)
    for count in (100, 10_000, 100, 10_000):  # the second time counts: the first reads the file
        started = time.monotonic()
        page.select_option("#batch", names[count])
        page.wait_for_function(
            f"() => document.querySelector('#shown').innerText.endsWith('of {count}')"
        )
        seconds[count] = time.monotonic() - started
        assert page.locator("#rows tr").count() == min(count, worklist.MAX_ROWS)
    # The requirement is three times; a tenth of a second more for other load of the machine.
    assert seconds[10_000] <= 3 * seconds[100] + 0.1, seconds
    page.click("#next")
    page.wait_for_function("() => document.querySelector('#shown').innerText.startsWith('201')")
    assert page.locator("#rows tr").count() == worklist.MAX_ROWS


def test_report_opens_without_a_server(
    page: Any, screening: Screening, endpoint: Endpoint, batch: str, s3: S3, tmp_path: Path
) -> None:
    uri = write_report("s3://bucket/served/_batches/ledger", "", "")
    path = s3.folder / uri.removeprefix("s3://bucket/")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[0-9a-f]{16}\.html", path.name)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#rows tr")
    page.keyboard.press("j")
    page.wait_for_selector("#study img")
    assert page.evaluate("() => document.querySelector('#study img').naturalWidth") > 500
    page.select_option("#status", "rejected")
    page.fill("#text", "TRUNCATED")
    page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 1")
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requested)


GREY_AT = (
    "(x) => document.querySelector('canvas').getContext('2d').getImageData(x, 32, 1, 1).data[0]"
)
LUNG_PRESET, SOFT_TISSUE_PRESET = (-1350, 150), (-160, 240)
SITE = "http://worklist.test"
BATCH = {"batch_id": "0" * 16, "state": "committed", "run_date": "2026-11-23", "series": 1}


def serve_series(page: Any, files: dict[str, bytes]) -> None:
    """Answer the page's requests: a batch with one series and these result files."""
    listed = worklist.page(ledger().slice(2, 1))

    def answer(route: Any) -> None:
        path = urlsplit(route.request.url).path
        name = path.rpartition("/")[2]
        if path == "/":
            route.fulfill(path=PAGE / "index.html")
        elif path.startswith("/worklist/"):
            route.fulfill(path=PAGE / name)
        elif name == "batches":
            route.fulfill(json=[BATCH])
        elif name == "worklist":
            route.fulfill(json=listed)
        elif name in files:
            route.fulfill(body=files[name])
        else:
            route.fulfill(status=404, json={"reason": "not_there", "message": "missing"})

    page.route(f"{SITE}/**", answer)


def open_series(page: Any, files: dict[str, bytes]) -> None:
    """Log in to a page that lists one series, and open it."""
    serve_series(page, files)
    page.goto(f"{SITE}/")
    page.fill("#token", "any")
    page.press("#token", "Enter")
    page.wait_for_selector("#rows tr")
    page.keyboard.press("j")
    page.wait_for_selector("canvas")


def check_greys(page: Any, low_hu: float, high_hu: float) -> None:
    """Check that air in the lung and soft tissue have the greys of their HU under the presets."""
    for key, (low, high) in (("1", LUNG_PRESET), ("3", SOFT_TISSUE_PRESET)):
        page.keyboard.press(key)
        for x, hu in ((8, -700), (56, 40)):
            grey = page.evaluate(GREY_AT, x)
            expected = min(max(255 * (hu - low) / (high - low), 0), 255)
            # One step of the 8-bit intensity, seen through the preset, and a rounding.
            step = (high_hu - low_hu) / (high - low)
            assert abs(grey - expected) <= step + 1, (key, hu)


def two_tissues(window: WindowConfig) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """Return tiles and layout of eight slices, -700 HU at the left and 40 HU at the right."""
    hu = np.full((8, 64, 64), -700, np.int16)
    hu[:, :, 32:] = 40
    nothing = np.zeros(hu.shape, bool)
    return overlay.viewer(to_input(hu, window), nothing, nothing, window)


@pytest.mark.parametrize(
    ("low_hu", "high_hu"), [(-1000.0, 400.0), (-1350.0, 150.0), (-1000.5, 1500.0)]
)
def test_viewer_shows_hu_by_the_window_of_viewer_json(
    page: Any, low_hu: float, high_hu: float
) -> None:
    """The same HU have the same grey under a preset, for every window of the model."""
    tiles, layout = two_tissues(WindowConfig(low_hu=low_hu, high_hu=high_hu, size_px=64))
    open_series(
        page, {"viewer.png": overlay.png(tiles), "viewer.json": json.dumps(layout).encode()}
    )
    assert "5 of 8" in page.inner_text("#study .tools")
    check_greys(page, low_hu, high_hu)


@pytest.mark.parametrize(
    ("low_hu", "high_hu", "has_window"), [(-1350.0, 150.0, True), (-1000.0, 400.0, False)]
)
def test_viewer_opens_results_without_viewer_json(
    browser: Any, low_hu: float, high_hu: float, has_window: bool
) -> None:
    """Older runs wrote count and window into the blue of the first pixels; the first, count
    alone."""
    tiles, layout = two_tissues(WindowConfig(low_hu=low_hu, high_hu=high_hu, size_px=64))
    tiles[0, 0, 2] = layout["tiles"]
    if has_window:
        tiles[0, 1:9, 2] = np.frombuffer(np.array([low_hu, high_hu], ">f4").tobytes(), np.uint8)
    page = browser.new_page()  # without the check of errors: Chromium logs the answer 404
    open_series(page, {"viewer.png": overlay.png(tiles)})
    assert "5 of 8" in page.inner_text("#study .tools")
    check_greys(page, low_hu, high_hu)
    page.close()
