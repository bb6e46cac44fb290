"""Malformed input is refused for its reason, and odd but sound input is read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile import CATALOGUE, CONTROLS
from sound_input import Objects, phantom
from stage_rows import CONFIG, WINDOW, manifest_rows

from covtanet.ct import dicom, nifti
from covtanet.decoding.process import Limits
from covtanet.decoding.sandbox import Sandbox
from covtanet.screening import stages


def write(folder: Path, objects: Objects) -> None:
    for name, data in objects.items():
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One warm child for all."""
    decoder = Sandbox(WINDOW, CONFIG.slice_step_mm, Limits(memory_mib=1024, timeout_s=20))
    yield decoder
    decoder.close()


@pytest.mark.parametrize("name", CATALOGUE)
def test_malformed_input_is_refused_for_its_reason(
    name: str, tmp_path: Path, sandbox: Sandbox
) -> None:
    reason, build = CATALOGUE[name]
    write(tmp_path, build())
    rows = manifest_rows(tmp_path)
    verdicts = []
    for row in rows:
        prepared = stages.prepare_series(
            row, archive=str(tmp_path), window=WINDOW, config=CONFIG, decoder=sandbox
        )
        verdicts.append(prepared.record.to_columns())
    # A cut object is a separate row if its header does not name its series.
    assert {record["reason"] for record in verdicts} <= {reason, "unreadable", "missing_slices"}
    assert verdicts[0]["reason"] == reason or reason in {record["reason"] for record in verdicts}
    assert all(record["status"] == "rejected" for record in verdicts)


@pytest.mark.parametrize("name", CONTROLS)
def test_odd_but_sound_input_gives_the_same_volume(name: str) -> None:
    objects = list(CONTROLS[name]().values())
    volume = nifti.read(objects[0]) if name.startswith("nifti") else dicom.read_series(objects)
    if name == "dicom with padding":
        assert volume.qc_flags == ("contrast", "padding")
        assert volume.hu.min() == -1024
        inside = volume.hu > -1024
        np.testing.assert_array_equal(volume.hu[inside], phantom().hu[inside])
    else:
        np.testing.assert_array_equal(volume.hu, phantom().hu)
        assert volume.qc_flags == ()
    np.testing.assert_allclose(volume.affine, phantom().affine, atol=1e-3)


def test_the_catalogue_is_long_enough() -> None:
    assert len(CATALOGUE) >= 60
    assert len(CONTROLS) >= 8
