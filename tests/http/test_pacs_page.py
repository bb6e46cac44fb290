"""What the worklist shows from the PACS: link, labels and full resolution, with a real Orthanc."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pacs import PASSWORD, credentials
from pacs_worklist import (
    ACCESSION,
    ENHANCED_SERIES_UID,
    NUM_SLICES,
    QUARTER_HU,
    SERIES_UID,
    SIZE_PX,
    STUDY_DATE,
    STUDY_UID,
    Served,
    commit_batch,
    enhanced_object,
    serving,
    slice_hu,
    source_objects,
    source_uri,
)
from PIL import Image
from worklist_rows import row

from covtanet.archive import dicomweb_images
from infra.local.endpoint import Endpoint
from infra.local.services import LOOPBACK, free_ports
from infra.pacs.orthanc import INSTALL, Orthanc, is_installed, start_orthanc
from serve.settings import Caller, ServeConfig

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)"
)
pytestmark = pytest.mark.skipif(not is_installed(), reason=f"Orthanc is not installed: {INSTALL}")

BATCH, OTHER_BATCH, ENHANCED_BATCH, SERVE_BATCH = (digit * 16 for digit in "1234")
TOKEN, OTHER_TOKEN = "token-of-ann", "token-of-ben"
VIEWER = "https://pacs.example/ohif/viewer?StudyInstanceUIDs={study_uid}"
# Series keys of the batch's rows; worklist_rows has these letters.
IN_PACS, IN_FOLDER, HIDDEN, DELETED, REFUSED, UNREACHABLE = (letter * 32 for letter in "abcdef")
LUNG = "low_hu=-1350&high_hu=150"


def caller(name: str, token: str, *places: str) -> Caller:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return Caller(name=name, token_sha256=digest, places=places)


@pytest.fixture(scope="module")
def pacs(worklist_pacs_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A PACS with one series of 512 x 512, and its credentials in the environment."""
    folder = tmp_path_factory.mktemp("pacs")
    server = start_orthanc(folder, PASSWORD, worklist_pacs_port)
    server.load([*source_objects(), enhanced_object()])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials(folder).items():
            patch.setenv(name, value)
        dicomweb_images._server.cache_clear()
        yield server
    server.service.stop()


@pytest.fixture(scope="module")
def foreign_pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A PACS with another password."""
    server = start_orthanc(tmp_path_factory.mktemp("foreign"), "another")
    yield server
    server.service.stop()


@pytest.fixture(scope="module")
def settings(
    pacs: Orthanc, foreign_pacs: Orthanc, tmp_path_factory: pytest.TempPathFactory
) -> ServeConfig:
    """Settings with all that the PACS offers, and a ledger with one batch of each caller."""
    ledger = str(tmp_path_factory.mktemp("ledger"))
    (closed,) = free_ports(1)
    known: dict[str, Any] = {"study_uid": STUDY_UID, "series_uid": SERIES_UID}
    found: dict[str, Any] = {**known, "diagnosis": "infected", "p_infected": 0.9}
    nowhere = f"dicomweb+http://{LOOPBACK}:{closed}/dicom-web"
    ann = caller("ann", TOKEN, pacs.archive, foreign_pacs.archive, nowhere)
    ben = caller("ben", OTHER_TOKEN, pacs.archive)
    rows = [
        row("a", **found, involvement=0.4, source_uri=source_uri(pacs.archive)),
        row("b", **found, source_uri="s3://bucket/b"),
        row("c", source_uri="f" * 32, study_uid="7" * 32, series_uid="8" * 32),
        row("d", **known, source_uri=source_uri(pacs.archive, "1.2.3")),
        row("e", **known, source_uri=source_uri(foreign_pacs.archive)),
        row("f", **known, source_uri=source_uri(nowhere), status="failed", reason="storage"),
    ]
    commit_batch(ledger, ann, BATCH, rows)
    commit_batch(ledger, ben, OTHER_BATCH, rows[:1])
    enhanced_ct = row("a", **known, source_uri=source_uri(pacs.archive, ENHANCED_SERIES_UID))
    commit_batch(ledger, ann, ENHANCED_BATCH, [enhanced_ct], is_listed=False)
    return ServeConfig(callers=(ann, ben), ledger=ledger, viewer_url=VIEWER, shows_accession=True)


@pytest.fixture(scope="module")
def served(settings: ServeConfig) -> Iterator[Served]:
    with serving(settings, TOKEN) as application:
        yield application


def path_of(key: str, name: str, batch: str = BATCH) -> str:
    return f"/v1/batches/{batch}/series/{key}/{name}"


def picture(
    served: Served, index: int, window: str = LUNG, batch: str = BATCH
) -> NDArray[np.uint8]:
    answer = served.ask(path_of(IN_PACS, f"source/{index}?{window}", batch))
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["Cache-Control"] == "no-store"
    return np.asarray(Image.open(BytesIO(answer.content)))


def grey_of(index: int, low_hu: int = -1350, high_hu: int = 150) -> float:
    return min(255, 255 * max(0, slice_hu(index) - low_hu) / (high_hu - low_hu))


def test_source_lists_slices_from_base_to_apex(served: Served) -> None:
    answer = served.ask(path_of(IN_PACS, "source"))
    numbers = list(range(NUM_SLICES, 0, -1))  # they fall from base to apex
    assert answer.json() == {"num_slices": NUM_SLICES, "instance_numbers": numbers}
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(("low_hu", "high_hu"), [(-1350, 150), (-1000, 400), (-160, 241)])
def test_source_picture_has_every_pixel_and_greys_by_the_window(
    served: Served, low_hu: int, high_hu: int
) -> None:
    def grey(hu: int) -> float:
        return 255 * min(1, max(0, (hu - low_hu) / (high_hu - low_hu)))

    for index in (0, 5, NUM_SLICES - 1):
        shown = picture(served, index, f"low_hu={low_hu}&high_hu={high_hu}").astype(float)
        assert shown.shape == (SIZE_PX, SIZE_PX)
        half = SIZE_PX // 2
        assert np.abs(shown[:half, :half] - grey(QUARTER_HU)).max() <= 1
        assert np.abs(shown[half:] - grey(slice_hu(index))).max() <= 1
        assert np.abs(shown[:, half:] - grey(slice_hu(index))).max() <= 1


def test_frames_of_enhanced_ct_are_shown_from_base_to_apex(served: Served) -> None:
    answer = served.ask(path_of(IN_PACS, "source", ENHANCED_BATCH)).json()
    assert answer["num_slices"] == NUM_SLICES
    assert answer["instance_numbers"] == [1, 6, 2, 7, 3, 8, 4, 9, 5]  # every second slice first
    for index in (0, 4, NUM_SLICES - 1):
        shown = picture(served, index, batch=ENHANCED_BATCH)
        assert abs(float(shown[400, 400]) - grey_of(index)) <= 1


def test_endpoint_on_ray_serve_shows_the_series_of_the_pacs(
    endpoint: Endpoint, pacs: Orthanc
) -> None:
    uris = {"source_uri": source_uri(pacs.archive), "study_uid": STUDY_UID}
    rows = [row("a", **uris, series_uid=SERIES_UID)]
    commit_batch("s3://bucket/served", caller("local", TOKEN), SERVE_BATCH, rows, is_listed=False)
    listed = endpoint.ask("GET", path_of(IN_PACS, "source", SERVE_BATCH))[1]
    assert listed["num_slices"] == NUM_SLICES
    status, content, headers = endpoint.ask("GET", path_of(IN_PACS, "source/2", SERVE_BATCH))
    assert (status, headers["Content-Type"]) == (200, "image/png")
    shown = np.asarray(Image.open(BytesIO(content)))
    assert abs(float(shown[400, 400]) - grey_of(2)) <= 1
    status, answer, _ = endpoint.ask("GET", path_of(IN_PACS, "study", SERVE_BATCH))
    assert (status, answer["reason"]) == (404, "not_shown")


def test_study_labels_come_from_the_pacs(served: Served) -> None:
    answer = served.ask(path_of(IN_PACS, "study"))
    assert answer.json() == {"accession_number": ACCESSION, "study_date": "2026-01-02"}
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("key", "name", "status", "reason"),
    [
        (IN_FOLDER, "study", 404, "no_source"),
        (IN_FOLDER, "source", 404, "no_source"),
        (HIDDEN, "source/0", 404, "no_source"),
        (DELETED, "source", 404, "not_in_pacs"),
        (REFUSED, "study", 502, "pacs_refuses"),
        (UNREACHABLE, "source", 503, "pacs"),
        (UNREACHABLE, "source/3", 503, "pacs"),
        ("0" * 32, "source", 404, "not_there"),
        (IN_PACS, f"source/{NUM_SLICES}", 404, "no_such_slice"),
        (IN_PACS, "source/-1", 422, "invalid_request"),
        (IN_PACS, "source/9999999", 422, "invalid_request"),
        (IN_PACS, "source/0?low_hu=100&high_hu=100", 422, "invalid_request"),
        (IN_PACS, "source/0?low_hu=nan", 422, "invalid_request"),
        (IN_PACS, f"source/{SERIES_UID}.1", 422, "invalid_request"),
    ],
)
def test_request_that_the_pacs_cannot_answer_has_a_reason(
    served: Served, key: str, name: str, status: int, reason: str
) -> None:
    answer = served.ask(path_of(key, name))
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert ("Retry-After" in answer.headers) == (status == 503)


def test_series_of_another_callers_batch_returns_404(served: Served) -> None:
    for name in ("study", "source", "source/0"):
        answer = served.ask(path_of(IN_PACS, name, OTHER_BATCH))
        assert (answer.status_code, answer.json()["reason"]) == (404, "no_such_batch")
        assert served.ask(path_of(IN_PACS, name, OTHER_BATCH), OTHER_TOKEN).status_code == 200


def test_location_that_was_taken_from_a_caller_returns_403(settings: ServeConfig) -> None:
    callers = (caller("ann", TOKEN, "s3://bucket/archive"),)
    with serving(replace(settings, callers=callers), TOKEN) as application:
        for name in ("study", "source", "source/0"):
            answer = application.ask(path_of(IN_PACS, name))
            assert (answer.status_code, answer.json()["reason"]) == (403, "place_not_allowed")


def test_log_has_series_key_and_neither_labels_nor_uids(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for key in (IN_PACS, REFUSED, UNREACHABLE, DELETED):
            for name in ("study", "source", "source/0"):
                served.ask(path_of(key, name))
    for hidden in (ACCESSION, STUDY_DATE, "2026-01-02", STUDY_UID, SERIES_UID, PASSWORD):
        assert hidden not in caplog.text
    assert "UnreachableError at storage/dicomweb_server.py" in caplog.text
    assert "route=/v1/batches/{batch_id}/series/{series_key}/study status=200" in caplog.text
    assert f"series={IN_PACS}" in caplog.text


def test_labels_are_hidden_unless_the_settings_show_them(settings: ServeConfig) -> None:
    with serving(replace(settings, shows_accession=False, viewer_url=""), TOKEN) as application:
        answer = application.ask(path_of(IN_PACS, "study"))
        assert (answer.status_code, answer.json()["reason"]) == (404, "not_shown")
        rows = application.ask(f"/v1/batches/{BATCH}/worklist").json()["rows"]
    offers = {row["series_key"]: row["pacs"] for row in rows}
    assert offers[IN_PACS] == {"viewer_url": None, "has_source": True, "has_labels": False}


def test_worklist_offers_the_pacs_by_the_row(served: Served) -> None:
    rows = served.ask(f"/v1/batches/{BATCH}/worklist").json()["rows"]
    offers = {row["series_key"]: row["pacs"] for row in rows}
    link = VIEWER.format(study_uid=STUDY_UID)
    assert offers[IN_PACS] == {"viewer_url": link, "has_source": True, "has_labels": True}
    assert offers[IN_FOLDER] == {"viewer_url": link, "has_source": False, "has_labels": False}
    assert offers[HIDDEN] == {"viewer_url": None, "has_source": False, "has_labels": False}


# The page


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
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    opened.close()
    assert not errors


def open_row(page: Any, served: Served, key: str) -> None:
    page.goto(f"{served.url}/")
    page.fill("#token", served.token)
    page.press("#token", "Enter")
    page.click(f"#rows tr:has-text('{key[:8]}')")
    page.wait_for_selector("#study dl")


def wait_for_text(page: Any, text: str) -> None:
    page.wait_for_function(
        "(text) => document.querySelector('#study').innerText.includes(text)", arg=text
    )


def shown_grey(page: Any) -> int:
    """Return the grey in the lower right of the picture, once it is that of the chosen slice."""
    page.wait_for_selector("#study .source img:not(.late)")
    grey: int = page.evaluate(
        """async () => {
          const image = document.querySelector("#study .source img");
          await image.decode();
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0);
          return context.getImageData(400, 400, 1, 1).data[0];
        }"""
    )
    return grey


@needs_browser
def test_link_opens_the_viewer_in_a_new_tab(page: Any, served: Served) -> None:
    open_row(page, served, IN_PACS)
    link = page.locator("#study a")
    assert link.inner_text() == "Open in viewer"
    assert link.get_attribute("href") == VIEWER.format(study_uid=STUDY_UID)
    assert link.get_attribute("target") == "_blank"
    assert link.get_attribute("rel") == "noopener noreferrer"
    page.click(f"#rows tr:has-text('{HIDDEN[:8]}')")
    wait_for_text(page, HIDDEN)
    assert page.locator("#study a").count() == 0
    assert page.locator("#full").count() == 0


@needs_browser
def test_opened_row_shows_accession_number_and_study_date(page: Any, served: Served) -> None:
    open_row(page, served, IN_PACS)
    wait_for_text(page, ACCESSION)
    wait_for_text(page, "2026-01-02")
    stored = page.evaluate("() => JSON.stringify([{...sessionStorage}, {...localStorage}])")
    assert ACCESSION not in stored


@needs_browser
def test_page_asks_for_no_labels_if_the_settings_hide_them(
    page: Any, settings: ServeConfig
) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    with serving(replace(settings, shows_accession=False), TOKEN) as application:
        open_row(page, application, IN_PACS)
        page.wait_for_selector("#study canvas")
    assert not [url for url in requested if url.endswith("/study")]
    assert "accession" not in page.inner_text("#study")


@needs_browser
def test_full_resolution_steps_through_the_slices_of_the_pacs(page: Any, served: Served) -> None:
    open_row(page, served, IN_PACS)
    page.wait_for_selector("#study canvas")
    page.keyboard.press("f")
    page.wait_for_selector("#study .source img")
    assert page.get_attribute("#full", "aria-pressed") == "true"
    assert not page.is_visible("#study canvas")
    assert page.evaluate("() => document.querySelector('.source img').naturalWidth") == SIZE_PX
    middle = NUM_SLICES // 2
    assert "5 of 9" in page.inner_text("#study")
    assert abs(shown_grey(page) - grey_of(middle)) <= 1
    page.keyboard.press("ArrowUp")
    assert "6 of 9" in page.inner_text("#study")
    assert abs(shown_grey(page) - grey_of(middle + 1)) <= 1
    page.locator("#study .source img").hover()
    page.mouse.wheel(0, 100)
    wait_for_text(page, "7 of 9")
    page.get_by_role("slider", name="slice").nth(-1).fill("1")
    assert abs(shown_grey(page) - grey_of(1)) <= 1
    page.keyboard.press("2")
    assert abs(shown_grey(page) - grey_of(1, -1000, 400)) <= 1
    label = page.get_attribute("#study .source img", "alt")
    assert label == "slice 2 of 9 at full resolution, wide window"
    page.keyboard.press("f")
    assert page.is_visible("#study canvas")
    assert page.input_value("#study select") == "1"  # the window goes with the user
    page.keyboard.press("1")


@needs_browser
def test_full_resolution_without_a_pacs_shows_the_problem(page: Any, served: Served) -> None:
    open_row(page, served, UNREACHABLE)
    page.click("#full")
    wait_for_text(page, "No full resolution: the PACS does not answer")
    wait_for_text(page, "unknown: the PACS does not answer")


@needs_browser
def test_picture_that_does_not_come_is_replaced_by_the_problem(page: Any, served: Served) -> None:
    open_row(page, served, IN_PACS)
    page.click("#full")
    shown_grey(page)
    problem = json.dumps({"reason": "pacs", "message": "the PACS does not answer"})
    page.route("**/source/0?*", lambda route: route.fulfill(status=503, body=problem))
    page.keyboard.press("3")  # pictures of this window are not loaded yet
    shown_grey(page)
    page.locator("#study .source + .problem + .tools input").fill("0")
    wait_for_text(page, "No picture: the PACS does not answer")
    assert not page.is_visible("#study .source img")
    page.unroute("**/source/0?*")
    page.keyboard.press("ArrowUp")
    shown_grey(page)
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#study .source img:not(.late)")
    assert "No picture" not in page.inner_text("#study")
