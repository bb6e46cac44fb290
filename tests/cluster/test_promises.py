"""What the screening promises, each broken for real once: see docs/reliability.md."""

import contextlib
import http.server
import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pydicom
import pytest
from hostile import CATALOGUE, CONTROLS
from repository import ROOT
from running import S3, Cluster
from screening_runs import CONFIG, Screening
from sound_input import gz, plain_nifti, slices

from covtanet import storage
from covtanet.ledger.read import read_run
from covtanet.ledger.view import newest_rows


def write(prefix: str, name: str, objects: dict[str, bytes]) -> None:
    for key, data in objects.items():
        storage.write_bytes(f"{prefix}/{name.replace(' ', '-').replace(':', '')}/{key}", data)


def check_malformed(rows: list[dict[str, Any]], archive: str) -> None:
    """Every malformed series is refused for its reason, every odd one is screened."""
    found: dict[str, set[str]] = {}
    for row in rows:
        folder = row["source_uri"].removeprefix(f"{archive}/").split("/")[0]
        found.setdefault(folder, set()).add(row["reason"] or row["status"])
    for name, (reason, _) in CATALOGUE.items():
        assert reason in found[f"bad-{name.replace(' ', '-').replace(':', '')}"], name
        assert "screened" not in found[f"bad-{name.replace(' ', '-').replace(':', '')}"], name
    for name in CONTROLS:
        assert found[f"good-{name.replace(' ', '-')}"] == {"screened"}, name


@contextlib.contextmanager
def listener() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Where alerts go: its URL, and what was sent there."""
    heard: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            return

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True)
class Nights:
    """Nights of one archive, each screened by a job."""

    screening: Screening
    cluster: Cluster
    archive: Path
    ledger: Path
    url_file: Path

    def screen(self, date: str, expect: int = 0) -> tuple[list[tuple[str, str]], str]:
        """Return folder and reason or status of each row of the night, and the job's output."""
        output = self.cluster.run_job(
            "nightly.py",
            "--archive",
            str(self.archive),
            "--ledger",
            str(self.ledger),
            "--model",
            str(self.screening.folder / "model"),
            "--config",
            str(self.screening.folder / "screening.toml"),
            "--night",
            date,
            "--alert-url-file",
            str(self.url_file),
            expect=expect,
        )
        (path,) = self.ledger.glob(f"date={date}/*.parquet")
        rows = read_run(str(path)).to_pylist()
        outcomes = [
            (row["source_uri"].removeprefix(f"{self.archive}/"), row["reason"] or row["status"])
            for row in rows
        ]
        return sorted(outcomes), output


def test_nightly_screens_new_and_changed_series_and_alerts(
    screening: Screening, cluster: Cluster
) -> None:
    """A night without new, changed or failed series commits no row; the view has all, once."""
    archive = screening.folder / "nightly"
    for name in ("a", "b", "c"):
        (archive / name).mkdir(parents=True)
        (archive / name / "ct.nii.gz").write_bytes(gz(plain_nifti()))
    (archive / "gone.nii").symlink_to(screening.folder / "nowhere.nii")
    ledger, url_file = screening.folder / "nightly-ledger", screening.folder / "alert-url"

    night = Nights(screening, cluster, archive, ledger, url_file).screen
    with listener() as (url, heard):
        url_file.write_text(url)
        first = [(f"{name}/ct.nii.gz", "screened") for name in "abc"]
        assert night("2026-11-20", expect=4)[0] == [*first, ("gone.nii", "vanished")]
        (archive / "b" / "ct.nii.gz").write_bytes(gz(plain_nifti() + b"later"))
        (archive / "d").mkdir()
        (archive / "d" / "ct.nii.gz").write_bytes(b"no volume")
        (archive / "gone.nii").unlink()
        (archive / "gone.nii").write_bytes(plain_nifti())
        assert night("2026-11-21")[0] == [
            ("b/ct.nii.gz", "screened"), ("d/ct.nii.gz", "unreadable"), ("gone.nii", "screened")
        ]  # fmt: skip
        assert night("2026-11-23")[0] == []
        before = {path: path.stat().st_mtime_ns for path in ledger.rglob("*") if path.is_file()}
        assert "the night of 2026-11-23 is done; nothing to do" in night("2026-11-23")[1]
        assert {
            path: path.stat().st_mtime_ns for path in ledger.rglob("*") if path.is_file()
        } == before
    assert [(each["alert"], each["night"]) for each in heard] == [
        ("too_many_refused", "2026-11-20"), ("missing_run", "2026-11-22")
    ]  # fmt: skip
    assert heard[0]["reasons"] == {"vanished": 1}
    assert "nightly" not in str(heard), "an alert names a place"
    assert len(list((ledger / "_reports").glob("*.html"))) == 3
    rows = newest_rows(str(ledger)).to_pylist()
    assert len(rows) == 5
    assert Counter(row["status"] for row in rows) == {"screened": 4, "rejected": 1}
    shown = subprocess.run(
        [sys.executable, "jobs/ledger.py", str(ledger), "runs"],
        cwd=ROOT,
        env=screening.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "4 series: 3 screened, 0 rejected, 1 failed" in shown
    assert "0 series: 0 screened" in shown


CANARY = "CANARY"


def with_canaries() -> list[bytes]:
    """The series with a canary in every text, in private tags and as a padding of the file."""
    out = []
    for data in slices():
        dataset = pydicom.dcmread(BytesIO(data))
        for name in (
            "PatientID",
            "PatientName",
            "PatientComments",
            "InstitutionName",
            "StudyDescription",
            "SeriesDescription",
            "AccessionNumber",
            "ReferringPhysicianName",
            "OperatorsName",
            "ProtocolName",
            "StudyID",
            "PatientAddress",
        ):
            setattr(dataset, name, f"{CANARY}^{name}"[:16])
        dataset.private_block(0x0011, CANARY, create=True).add_new(1, "LO", CANARY)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        out.append(buffer.getvalue())
    return out


def write_canary_archives(archive: str, everything: str) -> None:
    """Write two archives with canaries; the second has all malformed and odd series too."""
    objects = with_canaries()
    for place in (archive, everything):
        for index, data in enumerate(objects):
            storage.write_bytes(f"{place}/{CANARY}-study/{CANARY}{index}", data)
        storage.write_bytes(f"{place}/{CANARY}.nii.gz", gz(plain_nifti())[:-900])
        storage.write_bytes(f"{place}/{CANARY}-broken/1", objects[0][:-500])
        storage.write_bytes(f"{place}/{CANARY}-broken/2.dcm", objects[1][:700])
    for name, (_, build) in CATALOGUE.items():
        write(everything, f"bad {name}", build())
    for name, build in CONTROLS.items():
        write(everything, f"good {name}", build())


def check_logs(cluster: Cluster) -> None:
    """No log of the cluster has a canary of a header or of a study's folder."""
    logs = [
        path
        for path in Path(cluster.environment["RAY_TMP"]).rglob("*")
        if path.is_file() and "logs" in path.parts
    ]
    assert logs
    texts = {path.name: path.read_bytes() for path in logs}
    assert not [
        name
        for name, text in texts.items()
        if f"{CANARY}-study".encode() in text or b"CANARY^" in text
    ]


def test_deidentify_hides_identities_and_malformed_input_is_refused(
    screening: Screening, cluster: Cluster, s3: S3
) -> None:
    archive = f"s3://bucket/{CANARY}-archive"
    everything = f"s3://bucket/{CANARY}-and-malformed"
    write_canary_archives(archive, everything)

    output = screening.run(
        "canary-open", "--results", "s3://bucket/canary-results", archive=everything
    )
    table = screening.table("canary-open")
    check_malformed(table.to_pylist(), everything)
    hidden_columns = [name for name in table.column_names if name != "source_uri"]
    assert CANARY not in str(table.select(hidden_columns).to_pylist())
    assert CANARY in str(table["source_uri"].to_pylist())
    assert CANARY not in output
    for path in (s3.folder / "canary-results").rglob("*"):
        assert CANARY not in path.name
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()

    key = screening.folder / "site.key"
    key.write_bytes(b"a secret of this hospital")
    key.chmod(0o600)
    config = screening.folder / "hidden.toml"
    config.write_text(CONFIG + "deidentify = true\n")
    output = screening.run(
        "canary-hidden", "--config", str(config), "--site-key", str(key), "--linkage", "s3://bucket/linkage",
        "--results", "s3://bucket/canary-hidden-results", archive=archive,
    )  # fmt: skip
    assert CANARY not in output.replace(f"{CANARY}-archive", "")
    for folder in ("canary-hidden", "canary-hidden-results"):
        for path in (s3.folder / folder).rglob("*"):
            assert CANARY not in str(path.relative_to(s3.folder))
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
    hidden, shown = screening.table("canary-hidden").to_pylist(), table.to_pylist()
    assert CANARY not in str(hidden)
    assert not {row["series_key"] for row in hidden} & {row["series_key"] for row in shown}
    assert not {row["study_uid"] for row in hidden if row["study_uid"]} & {
        row["study_uid"] for row in shown
    }
    of_canaries = [row for row in shown if CANARY in row["source_uri"].removeprefix(everything)]
    assert Counter(row["reason"] for row in hidden) == Counter(row["reason"] for row in of_canaries)
    (linked,) = (s3.folder / "linkage").glob("date=*/*.parquet")
    assert CANARY in str(pq.ParquetFile(linked).read().to_pylist())
    check_logs(cluster)


@pytest.mark.parametrize(
    ("header", "status"), [({}, 401), ({"Authorization": "Bearer wrong"}, 403)]
)
def test_ray_without_token_returns_401_or_403(
    cluster: Cluster, header: dict[str, str], status: int
) -> None:
    request = urllib.request.Request(
        f"{cluster.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=header
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)
    assert error.value.code == status


def test_pickle_as_model_is_refused_with_3(screening: Screening) -> None:
    import torch

    folder = screening.folder / "pickle"
    folder.mkdir()
    torch.save({"weights": torch.zeros(1)}, folder / "weights.safetensors")
    (folder / "model.json").write_text(json.dumps({}))
    output = screening.run("pickle", "--model", str(folder), expect=3)
    assert "Traceback" not in output
