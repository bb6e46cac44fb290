"""A real PACS as an archive: its series, their objects, and all that goes wrong on the way."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pacs import IGNORED, NUM_SERIES, PASSWORD, credentials, edited, phantom_series, uids_of
from slow_proxy import SlowDoor

from covtanet import storage
from covtanet.archive import dicomweb_series
from covtanet.archive.dicomweb_series import (
    IgnoredSeries,
    fetch_instances,
    find_archive,
    find_study,
)
from covtanet.archive.fetch import fetch_series
from covtanet.archive.manifest import Series
from covtanet.ct.window import WindowConfig
from covtanet.errors import ConfigError, Reason, StudyError
from covtanet.ledger.record import ScreeningRecord
from covtanet.screening.config import ScreeningConfig
from covtanet.screening.stages import in_process, prepare_series
from covtanet.storage import dicomweb, dicomweb_server
from infra.local.services import free_ports
from infra.pacs.orthanc import Orthanc

CONFIG, WINDOW = ScreeningConfig(engine="eager"), WindowConfig(size_px=128)


@pytest.fixture(autouse=True)
def _known_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give this process the PACS's password, and short pauses between retries."""
    for name, value in credentials(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dicomweb_server, "BACKOFF_S", 0.02)
    monkeypatch.setattr(dicomweb_series, "FIRST_PAUSE_S", 0.01)
    dicomweb_server.dicomweb_server.cache_clear()
    yield
    dicomweb_server.dicomweb_server.cache_clear()


@pytest.fixture
def door(orthanc: Orthanc) -> Iterator[SlowDoor]:
    """A proxy in front of the PACS."""
    proxy = SlowDoor(int(orthanc.url.rpartition(":")[2]))
    yield proxy
    proxy.close()


def behind(proxy: SlowDoor) -> str:
    return f"dicomweb+http://127.0.0.1:{proxy.port}/dicom-web"


def chest(root: str, number: int = 0) -> Series:
    """The series of one phantom as the PACS lists it."""
    study_uid, series_uid, _ = uids_of(phantom_series(number)[0])
    _, found = find_study(f"{root}/studies/{study_uid}/series/{series_uid}")
    (series,) = found
    return series


def fetched(series: Series, root: str) -> dict[str, str]:
    """SHA-256 of each object by UID."""
    digests = {}
    for uid, chunks in fetch_instances(series, root):
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        digests[uid] = digest.hexdigest()
    return digests


def stored(number: int = 0) -> dict[str, str]:
    """What the PACS was given."""
    return {uids_of(one)[2]: hashlib.sha256(one).hexdigest() for one in phantom_series(number)}


def test_archive_lists_ct_series_and_counts_all_others(orthanc: Orthanc) -> None:
    found = list(find_archive(orthanc.archive, ""))
    series = [one for one in found if isinstance(one, Series)]
    assert sorted(one.kind for one in found if isinstance(one, IgnoredSeries)) == IGNORED
    expected = {uids_of(phantom_series(number)[0])[:2] for number in range(NUM_SERIES)}
    assert {(one.study_uid, one.series_uid) for one in series} == expected
    assert {len(one.objects) for one in series} == {20}
    assert {one.num_bytes for one in series} == {None}
    assert len({one.series_key for one in series}) == NUM_SERIES


def test_query_filters_the_studies(orthanc: Orthanc) -> None:
    study_uid, series_uid, _ = uids_of(phantom_series(2)[0])
    found = list(find_archive(orthanc.archive, f"StudyInstanceUID={study_uid}"))
    assert [one.series_uid for one in found if isinstance(one, Series)] == [series_uid]
    assert list(find_archive(orthanc.archive, "StudyDate=20260101-20260131")) == []


def test_search_of_small_pages_finds_every_match_once(
    orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicomweb, "PAGE", 3)
    found = list(find_archive(orthanc.archive, ""))
    assert len(found) == NUM_SERIES + len(IGNORED)
    assert {len(one.objects) for one in found if isinstance(one, Series)} == {20}


def test_objects_are_those_that_were_stored(orthanc: Orthanc) -> None:
    assert fetched(chest(orthanc.archive), orthanc.archive) == stored()


def test_digest_equals_that_of_files_named_by_uid(orthanc: Orthanc, tmp_path: Path) -> None:
    digests = []
    folder = tmp_path / "series"
    folder.mkdir()
    for content in phantom_series(0):
        (folder / uids_of(content)[2]).write_bytes(content)
    items = [item for _, objects in storage.walk(str(folder)) for item in objects]
    in_folder = Series(source_path="", source_format="dicom", objects=tuple(items))
    for series, archive in ((in_folder, str(folder)), (chest(orthanc.archive), orthanc.archive)):
        digest = storage.ContentDigest()
        for chunks in fetch_series(series, archive, digest):
            for _ in chunks:
                pass
        digests.append((digest.hexdigest(), digest.num_bytes))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("num_cuts", [1, 3])
def test_truncated_answer_is_completed(door: SlowDoor, num_cuts: int) -> None:
    series = chest(behind(door))
    door.cut_after_bytes, door.num_cuts = 100_000, num_cuts
    assert fetched(series, behind(door)) == stored()
    assert door.num_cuts in (0, num_cuts - 1)  # an instance alone is smaller than a cut


def test_answer_cut_within_an_instance_goes_on_behind_its_bytes(door: SlowDoor) -> None:
    series = chest(behind(door))
    # An instance has 33 kB: each of its first requests breaks off.
    door.cut_after_bytes, door.num_cuts = 20_000, 3
    assert fetched(series, behind(door)) == stored()
    assert door.num_cuts == 0


def test_answer_that_always_breaks_off_raises(door: SlowDoor) -> None:
    series = chest(behind(door))
    door.cut_after_bytes, door.num_cuts = 20_000, 10_000
    with pytest.raises(OSError, match="breaks off"):
        fetched(series, behind(door))


def test_instance_that_changes_while_it_is_read_raises(door: SlowDoor, orthanc: Orthanc) -> None:
    study = [edited(phantom_series(3)[0], "exchanged")]
    orthanc.load(study)
    study_uid, series_uid, uid = uids_of(study[0])
    path = f"studies/{study_uid}/series/{series_uid}"
    item = storage.ObjectInfo(f"{path}/instances/{uid}", None, "")
    series = Series(source_path=f"{path}/", source_format="dicom", objects=(item,))
    door.cut_after_bytes, door.num_cuts = 20_000, 1
    _, chunks = next(fetch_instances(series, behind(door)))
    next(chunks)
    delete_series(orthanc, series_uid)
    orthanc.load([edited(phantom_series(3)[0], "exchanged", PatientName="ANOTHER")])
    with pytest.raises(storage.ObjectChangedError, match="changed while"):
        list(chunks)
    delete_series(orthanc, series_uid)


def delete_series(orthanc: Orthanc, series_uid: str) -> None:
    query = {"Level": "Series", "Query": {"SeriesInstanceUID": series_uid}}
    for identifier in orthanc.request("POST", "tools/find", json.dumps(query).encode()).json():
        orthanc.request("DELETE", f"series/{identifier}")


def test_changed_and_deleted_series_fail_their_rows(orthanc: Orthanc) -> None:
    first, second = (edited(content, "changing") for content in phantom_series(1)[:2])
    orthanc.load([first])
    study_uid, series_uid, _ = uids_of(first)
    uri = f"{orthanc.archive}/studies/{study_uid}/series/{series_uid}"
    _, (listed,) = find_study(uri)
    orthanc.load([second])
    assert reason_of(listed, orthanc.archive) == Reason.CHANGED
    _, (relisted,) = find_study(uri)
    assert relisted.to_row()["source_version"] != listed.to_row()["source_version"]
    assert relisted.series_key == listed.series_key
    delete_series(orthanc, series_uid)
    assert reason_of(listed, orthanc.archive) == Reason.VANISHED
    # Its listing may have failed, too: a digest of nothing would be taken for that of the series.
    record = prepared(replace(listed, objects=()), orthanc.archive)
    assert (record.reason, record.source_digest, record.num_bytes) == ("vanished", None, None)


def test_series_without_one_of_its_instances_fails_its_row(orthanc: Orthanc) -> None:
    contents = [edited(content, "shrinking") for content in phantom_series(1)[:2]]
    orthanc.load(contents)
    study_uid, series_uid, uid = uids_of(contents[0])
    _, (listed,) = find_study(f"{orthanc.archive}/studies/{study_uid}/series/{series_uid}")
    query = {"Level": "Instance", "Query": {"SOPInstanceUID": uid}}
    (identifier,) = orthanc.request("POST", "tools/find", json.dumps(query).encode()).json()
    orthanc.request("DELETE", f"instances/{identifier}")
    assert reason_of(listed, orthanc.archive) == Reason.VANISHED
    delete_series(orthanc, series_uid)


def reason_of(series: Series, root: str) -> str | None:
    """Return why a series is not prepared."""
    return prepared(series, root).reason


def prepared(series: Series, root: str) -> ScreeningRecord:
    """Return the record of a series after decoding, or after it failed."""
    return prepare_series(
        series.to_row(),
        archive=root,
        window=WINDOW,
        config=CONFIG,
        decoder=in_process(WINDOW, CONFIG),
    ).record


def test_wrong_password_stops_the_job(orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COVTANET_DICOMWEB_PASSWORD_FILE")
    monkeypatch.setenv("COVTANET_DICOMWEB_PASSWORD", "another")
    series = Series(source_path="studies/1.2/series/3.4/", source_format="dicom", objects=())
    with pytest.raises(storage.AccessError, match="401") as refused:
        list(find_archive(orthanc.archive, ""))
    assert PASSWORD not in str(refused.value)
    with pytest.raises(storage.AccessError):  # it concerns every series: no row of this one
        prepared(series, orthanc.archive)


def test_server_that_is_away_stops_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb_server, "MAX_RETRIES", 2)
    root = f"dicomweb+http://127.0.0.1:{free_ports(1)[0]}/dicom-web"
    with pytest.raises(storage.UnreachableError, match="NewConnectionError"):
        list(find_archive(root, ""))
    series = Series(source_path="studies/1.2/series/3.4/", source_format="dicom", objects=())
    with pytest.raises(storage.UnreachableError):  # it concerns every series: no row of this one
        prepared(series, root)


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"502 Bad Gateway", b"503 Busy"])
def test_busy_server_is_asked_again(door: SlowDoor, status: bytes) -> None:
    door.busy_answer = b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nRetry-After: 0\r\n\r\n"
    door.busy_answers = 4
    assert len(chest(behind(door)).objects) == 20
    assert door.busy_answers == 0


def test_redirect_is_refused_without_a_request_to_its_target(
    door: SlowDoor, orthanc: Orthanc
) -> None:
    target = SlowDoor(int(orthanc.url.rpartition(":")[2]))
    location = f"Location: http://127.0.0.1:{target.port}/dicom-web/studies\r\n".encode()
    door.busy_answer = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n" + location + b"\r\n"
    door.busy_answers = 1
    with pytest.raises(OSError, match="answered 302"):
        list(find_archive(behind(door), ""))
    target.close()
    assert target.num_connections == 0


def test_server_that_answers_late_fails_one_series(
    door: SlowDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = chest(behind(door))
    monkeypatch.setattr(dicomweb_series, "SERIES_TIMEOUT_S", 0.3)
    monkeypatch.setattr(dicomweb_server, "CHUNK_BYTES", 1 << 14)
    door.bytes_per_s = 40_000
    record = prepared(series, behind(door))
    assert (record.status, record.reason) == ("failed", Reason.TIMEOUT)
    assert record.num_bytes is None


def test_series_of_more_bytes_than_allowed_is_refused(orthanc: Orthanc) -> None:
    series = chest(orthanc.archive)
    read = (list(chunks) for _, chunks in fetch_instances(series, orthanc.archive, 100_000))
    with pytest.raises(StudyError, match="more than 0 MiB"):
        list(read)


def test_screened_series_knows_its_size(orthanc: Orthanc) -> None:
    record = prepared(chest(orthanc.archive), orthanc.archive)
    assert record.status is None  # prepared
    assert record.num_bytes == sum(map(len, phantom_series(0)))


def test_study_uri_must_name_a_study(orthanc: Orthanc) -> None:
    with pytest.raises(ConfigError, match="ROOT/studies/UID"):
        find_study(orthanc.archive)


def test_objects_are_sent_once_and_found(orthanc: Orthanc) -> None:
    sent = edited(phantom_series(2)[0], "sent", Modality="OT")
    study_uid, series_uid, uid = uids_of(sent)
    path = f"studies/{study_uid}/series/{series_uid}"
    assert dicomweb.stored_uids(orthanc.archive, path) == set()
    for _ in range(2):
        assert dicomweb.store(orthanc.archive, study_uid, [sent]) == {}
    assert dicomweb.stored_uids(orthanc.archive, path) == {uid}
    delete_series(orthanc, series_uid)


def test_certificate_of_private_authority_is_trusted_by_its_file_alone(
    orthanc: Orthanc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not Orthanc's own TLS: version 1.10.1 of Debian ends with a segmentation fault.
    certificate = make_certificate(tmp_path)
    door = SlowDoor(int(orthanc.url.rpartition(":")[2]), certificate=certificate)
    root = behind(door).replace("http:", "https:")
    with pytest.raises(storage.UnreachableError, match="certificate"):
        list(find_archive(root, ""))
    assert door.num_connections == 1  # once more would be the same
    monkeypatch.setenv("COVTANET_DICOMWEB_CA_FILE", str(certificate))
    dicomweb_server.dicomweb_server.cache_clear()
    assert fetched(chest(root), root) == stored()
    door.close()


def make_certificate(folder: Path) -> Path:
    """Return a PEM file with a key and a certificate of 127.0.0.1 that nobody knows."""
    key, certificate, both = (folder / name for name in ("key.pem", "one.pem", "both.pem"))
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
        "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    return both
