"""A committed batch whose series lie in a PACS, and the application that shows it, without Ray."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import requests
import uvicorn
from chests import enhanced

from covtanet import drawing, storage
from covtanet.ct.window import WindowConfig, to_input
from covtanet.ledger.run import committed_uri
from covtanet.ledger.schema import LEDGER_SCHEMA
from covtanet.phantoms.dicom_writer import write_series
from infra.local.services import LOOPBACK, free_ports
from serve.app import api
from serve.batches import Batches
from serve.settings import Caller, ServeConfig
from serve.state import ReplicaState, current_state

NIGHT = date(2026, 11, 23)
STUDY_UID, SERIES_UID = "1.2.826.0.1.3680043.10.1471.77", "1.2.826.0.1.3680043.10.1471.77.1"
ENHANCED_SERIES_UID = "1.2.826.0.1.3680043.10.1471.77.2"
# Neither may be found in a log.
ACCESSION, STUDY_DATE = "CANARY-7731", "20260102"
NUM_SLICES, SIZE_PX = 9, 512
AIR_HU = -1000
# Of the quarter that lies to the front and to the right of the patient.
QUARTER_HU = 100


def slice_hu(index: int) -> int:
    """Return the HU of a slice, counted from the base."""
    return -900 + 100 * index


def source_objects() -> list[bytes]:
    """Return a series of 512 x 512 whose instance numbers fall from base to apex.

    Each slice has its own HU, apart from one quarter. The objects are in no order.
    """
    hu = np.empty((NUM_SLICES, SIZE_PX, SIZE_PX), np.int16)
    hu[:] = np.array([slice_hu(index) for index in range(NUM_SLICES)])[:, None, None]
    hu[:, : SIZE_PX // 2, : SIZE_PX // 2] = QUARTER_HU
    affine = np.array([[0, 0, 0.7, -180], [0, 0.7, 0, -160], [5, 0, 0, -300], [0, 0, 0, 1]])
    objects = write_series(hu, affine, study_uid=STUDY_UID, series_uid=SERIES_UID)
    labelled = [_labelled(content, NUM_SLICES - k) for k, content in enumerate(objects)]
    return labelled[::2] + labelled[1::2]


def _labelled(content: bytes, number: int) -> bytes:
    dataset = pydicom.dcmread(BytesIO(content))
    dataset.InstanceNumber = number
    dataset.AccessionNumber = ACCESSION
    dataset.StudyDate = STUDY_DATE
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def enhanced_object() -> bytes:
    """Return the same slices, in no order, as the frames of one Enhanced CT of another series."""
    series_uid = ENHANCED_SERIES_UID
    whole = enhanced([pydicom.dcmread(BytesIO(content)) for content in source_objects()])
    whole.SeriesInstanceUID = series_uid
    whole.SOPInstanceUID = f"{series_uid}.1"
    whole.file_meta.MediaStorageSOPInstanceUID = whole.SOPInstanceUID
    buffer = BytesIO()
    whole.save_as(buffer)
    return buffer.getvalue()


def source_uri(root: str, series_uid: str = SERIES_UID) -> str:
    """Return the location of a series as the ledger has it."""
    return f"{root}/studies/{STUDY_UID}/series/{series_uid}/"


def commit_batch(
    ledger: str,
    caller: Caller,
    batch_id: str,
    rows: list[dict[str, Any]],
    *,
    is_listed: bool = True,
) -> None:
    """Write a committed batch of a caller, with the viewer's tiles of its first row.

    is_listed: whether the list of the caller's batches has it.
    """
    batches = Batches(ServeConfig(callers=(caller,), ledger=ledger))
    now = datetime.now(UTC)
    run = {"run_id": batch_id, "run_date": NIGHT.isoformat(), "begun_at": now.isoformat()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, LEDGER_SCHEMA), sink)
    storage.write_bytes(
        committed_uri(batches.ledger, NIGHT, batch_id), sink.getvalue().to_pybytes()
    )
    named = storage.join(batches.ledger, "_batches", f"{batch_id}.run")
    storage.write_bytes(named, json.dumps(run).encode())
    record = {
        "batch_id": batch_id,
        "asked": {"archive": "s3://bucket/archive", "run_date": NIGHT.isoformat()},
        "jobs": ["none"],
        "submitted_at": now.isoformat(),
        "ended": {"run_id": batch_id, "state": "committed", "series": len(rows)},
    }
    batches.records.write(record, caller)
    if is_listed:
        batches.records.list_as_newest(batch_id, caller, now)
    tiles, layout = _tiles()
    results = storage.join(batches.ledger, "_results", batch_id, rows[0]["series_key"])
    storage.write_bytes(storage.join(results, "viewer.png"), tiles)
    storage.write_bytes(storage.join(results, "viewer.json"), layout)


def _tiles() -> tuple[bytes, bytes]:
    window = WindowConfig(size_px=64)
    hu = np.full((8, 64, 64), -700, np.int16)
    nothing = np.zeros(hu.shape, bool)
    tiles, layout = drawing.viewer(to_input(hu, window), nothing, nothing, window)
    return drawing.png(tiles), json.dumps(layout).encode()


@dataclass(frozen=True, kw_only=True)
class Served:
    """The application on a port of loopback."""

    url: str
    token: str

    def ask(self, path: str, token: str = "") -> requests.Response:
        """Send a GET."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return requests.get(f"{self.url}{path}", headers=headers, timeout=60)


@contextmanager
def serving(settings: ServeConfig, token: str) -> Iterator[Served]:
    """Serve the application over HTTP; nothing here asks its model, so there is none."""
    state = ReplicaState(None, settings)
    # The application is one object, which another server of this process may serve as well.
    overrides = dict(api.dependency_overrides)
    api.dependency_overrides[current_state] = lambda: state
    (port,) = free_ports(1)
    config = uvicorn.Config(api, host=LOOPBACK, port=port, log_level="info", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.02)
        yield Served(url=f"http://{LOOPBACK}:{port}", token=token)
    finally:
        server.should_exit = True
        thread.join()
        api.dependency_overrides = overrides
