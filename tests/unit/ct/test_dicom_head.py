"""The scan of DICOM heads: pydicom's answers for sound input, and a budget for all other."""

import struct
import time
import tracemalloc
import warnings
from io import BytesIO
from pathlib import Path

import pydicom
import pydicom.data
import pytest
from hostile import CATALOGUE, CONTROLS, bomb_of_items, nested, slices
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID
from repository import REAL_DATA

from covtanet.archive.manifest import HEAD_BYTES, LONG_HEAD_BYTES
from covtanet.ct import dicom_head
from covtanet.ct.dicom_head import SeriesIdentity, read_identity

SLOW = ("dicom a head of 500,000 items", "dicom deflated bomb")  # for pydicom, half a minute
UIDS = ["StudyInstanceUID", "SeriesInstanceUID", "PixelData"]


def by_pydicom(data: bytes) -> tuple[str | None, str] | None:
    """Study and series of a whole object; None if pydicom cannot parse it or it names no series."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(
                BytesIO(data), specific_tags=UIDS, force=not dicom_head.has_magic(data)
            )
        except Exception:
            return None
        uids = [str(dataset.get(name) or "") for name in UIDS[:2]]
    study_uid, series_uid = (dicom_head._clean_uid(uid) if uid else None for uid in uids)
    return (study_uid, series_uid) if series_uid else None


def flat(data: bytes) -> tuple[str | None, str] | None:
    """The same by the scan, from the lengths that the listing reads."""
    for length in (HEAD_BYTES, LONG_HEAD_BYTES):
        found = read_identity(data[:length], is_whole=len(data) < length)
        if found is not None:
            return found.study_uid, found.series_uid
    return None


def sound_files() -> list[Path]:
    """Real CT with its damaged kinds, and the files that pydicom tests itself with, in every syntax there is."""
    own = Path(pydicom.data.__file__).parent
    return [path for path in (*REAL_DATA.rglob("*"), *own.rglob("*.dcm")) if path.is_file()]


def test_scan_finds_what_pydicom_finds() -> None:
    """Where pydicom reads on behind the UIDs and fails, the scan may know better; it never says something else."""
    compared = 0
    for path in sound_files():
        data = path.read_bytes()
        expected = by_pydicom(data) if dicom_head.looks_like_dicom(data[:HEAD_BYTES]) else None
        if expected is not None:
            assert flat(data) == expected, path.name
            compared += 1
    assert compared > 50


def test_scan_finds_what_pydicom_finds_without_preamble() -> None:
    """The same files cut at their file meta, and those that have none."""
    compared = 0
    for path in sound_files():
        data = path.read_bytes()
        bare = data[132:] if dicom_head.has_magic(data) else data
        if (
            dicom_head.looks_like_dicom(bare[:HEAD_BYTES])
            and (expected := by_pydicom(bare)) is not None
        ):
            assert flat(bare) == expected, path.name
            compared += 1
    assert compared > 50


def test_start_and_syntax_of_the_data_set_are_found_with_a_preamble_and_without() -> None:
    data = slices()[0]
    syntax, start = dicom_head.transfer_syntax(data)
    assert syntax == "1.2.840.10008.1.2.1"
    assert dicom_head.transfer_syntax(data[128:]) == (syntax, start - 128)
    assert dicom_head.transfer_syntax(data[132:]) == (syntax, start - 132)
    assert dicom_head.transfer_syntax(data[start:]) == (None, 0)
    for cut, expected in ((0, 132), (128, 4), (132, 0), (start, 0)):
        assert dicom_head.data_start(data[cut:]) == expected
        assert dicom_head.looks_like_dicom(data[cut:])
        assert dicom_head.has_magic(data[cut:]) == (cut == 0)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100\x08\0\x60\0CS\x02\0CT", True),
        (b"\x08\0\x05\0\x0a\0\0\0ISO_IR 100\x08\0\x60\0\x02\0\0\0CT", True),
        (b"\0\x08\0\x05CS\0\x0aISO_IR 100\0\x08\0\x60CS\0\x02CT", True),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", True),  # cut
        (b"\x08\0\x05\0CS\x02\0AB\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff", True),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100\x08\0\x05\0CS\x02\0CT", False),  # the same tag again
        (b"\x08\0\x05\0ZZ\x0a\0ISO_IR 100\x08\0\x60\0CS\x02\0CT", False),
        (b"\x08\0\x05\0\0\0\x0a\0" + bytes(99), False),  # 640 KiB
        (b"\x10\0\x10\0PN\x02\0AB" + bytes(99), False),
        (b"\x02\0\0\0\x04\0\0\0" + bytes(99), False),
        (b"\x08\0\x05", False),
        (b"", False),
    ],
)
def test_first_elements_tell_dicom_without_preamble(head: bytes, expected: bool) -> None:
    assert dicom_head.looks_like_dicom(head) == expected


@pytest.mark.parametrize("name", [name for name in CONTROLS if name.startswith("dicom")])
def test_scan_reads_odd_but_sound_objects(name: str) -> None:
    for data in CONTROLS[name]().values():
        assert flat(data) == by_pydicom(data) != None  # noqa: E711


@pytest.mark.parametrize(
    "name", [name for name in CATALOGUE if name.startswith("dicom") and name not in SLOW]
)
def test_scan_never_names_another_series_than_pydicom(name: str) -> None:
    for data in CATALOGUE[name][1]().values():
        expected = by_pydicom(data)
        assert expected is None or flat(data) in (None, expected)


def test_sequences_of_both_kinds_of_length_are_passed_in_every_syntax() -> None:
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"):
        for is_undefined in (True, False):
            dataset = pydicom.dcmread(BytesIO(slices()[0]))
            inner, outer = Dataset(), Dataset()
            inner.SeriesInstanceUID = "9.9.9"
            outer.ReferencedImageSequence = Sequence([inner, Dataset()])
            dataset.ReferencedSeriesSequence = Sequence([outer, outer])
            for sequence in (outer["ReferencedImageSequence"], dataset["ReferencedSeriesSequence"]):
                sequence.is_undefined_length = is_undefined
                for item in sequence.value:
                    item.is_undefined_length_sequence_item = is_undefined
            dataset.file_meta.TransferSyntaxUID = UID(syntax)
            buffer = BytesIO()
            dataset.save_as(buffer, enforce_file_format=True)
            found = read_identity(buffer.getvalue(), is_whole=True)
            assert found == SeriesIdentity(
                str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
            )


HEAD_BOMBS = {
    "items of a sequence": bomb_of_items,
    "sequences in sequences": lambda: next(iter(nested(2000).values())),
    "empty elements": lambda: (
        slices()[0][:132] + struct.pack("<HH2sH", 8, 8, b"CS", 0) * (LONG_HEAD_BYTES // 8)
    ),
    "file meta without end": lambda: (
        slices()[0][:132] + struct.pack("<HH2sH", 2, 3, b"UI", 0) * (LONG_HEAD_BYTES // 8)
    ),
    "a deflated bomb": lambda: next(iter(CATALOGUE["dicom deflated bomb"][1]().values())),
}


@pytest.mark.parametrize("name", HEAD_BOMBS)
def test_head_bomb_costs_little_time_and_memory(name: str) -> None:
    data = HEAD_BOMBS[name]()[:LONG_HEAD_BYTES]
    started = time.process_time()
    found = read_identity(data)
    spent_s = time.process_time() - started
    tracemalloc.start()
    read_identity(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is None or name == "a deflated bomb"  # whose first bytes are a sound head
    assert spent_s < 0.2
    assert peak < 50 << 20
