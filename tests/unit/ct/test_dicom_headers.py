"""The scan of DICOM headers: the UIDs of pydicom for sound input, and a budget for all other."""

import struct
import time
import tracemalloc
import warnings
from io import BytesIO
from pathlib import Path

import pydicom
import pydicom.data
import pytest
from hostile import CATALOGUE, CONTROLS
from hostile_dicom import bomb_of_items, nested
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID
from repository import REAL_DATA
from sound_input import slices

from covtanet.archive.object_kinds import HEADER_BYTES, LONG_HEADER_BYTES
from covtanet.ct import dicom_headers
from covtanet.ct.dicom_headers import SeriesIdentity, read_identity

SLOW = ("dicom a head of 500,000 items", "dicom deflated bomb")  # for pydicom, half a minute
UIDS = ["StudyInstanceUID", "SeriesInstanceUID", "PixelData"]


def by_pydicom(data: bytes) -> tuple[str | None, str] | None:
    """Study and series of a whole object; None if pydicom cannot parse it or it names no series."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(
                BytesIO(data), specific_tags=UIDS, force=not dicom_headers.has_magic(data)
            )
        except Exception:
            return None
        uids = [str(dataset.get(name) or "") for name in UIDS[:2]]
    study_uid, series_uid = (dicom_headers._clean_uid(uid) if uid else None for uid in uids)
    return (study_uid, series_uid) if series_uid else None


def flat(data: bytes) -> tuple[str | None, str] | None:
    """The same by the scan, from the lengths that the listing reads."""
    for length in (HEADER_BYTES, LONG_HEADER_BYTES):
        identity = read_identity(data[:length], is_whole=len(data) < length)
        if identity is not None:
            return identity.study_uid, identity.series_uid
    return None


def sound_files() -> list[Path]:
    """Real CT with its damaged kinds, and the test files of pydicom, in every syntax."""
    own = Path(pydicom.data.__file__).parent
    return [path for path in (*REAL_DATA.rglob("*"), *own.rglob("*.dcm")) if path.is_file()]


def test_scan_gives_the_uids_of_pydicom() -> None:
    """If pydicom fails after the UIDs, the scan may still read them; it never gives other UIDs."""
    compared = 0
    for path in sound_files():
        data = path.read_bytes()
        expected = by_pydicom(data) if dicom_headers.looks_like_dicom(data[:HEADER_BYTES]) else None
        if expected is not None:
            assert flat(data) == expected, path.name
            compared += 1
    assert compared > 50


def test_scan_without_preamble_gives_the_uids_of_pydicom() -> None:
    """The same files cut at their file meta, and files without file meta."""
    compared = 0
    for path in sound_files():
        data = path.read_bytes()
        bare = data[132:] if dicom_headers.has_magic(data) else data
        if (
            dicom_headers.looks_like_dicom(bare[:HEADER_BYTES])
            and (expected := by_pydicom(bare)) is not None
        ):
            assert flat(bare) == expected, path.name
            compared += 1
    assert compared > 50


def test_transfer_syntax_gives_start_and_syntax_with_and_without_preamble() -> None:
    data = slices()[0]
    syntax, start = dicom_headers.transfer_syntax(data)
    assert syntax == "1.2.840.10008.1.2.1"
    assert dicom_headers.transfer_syntax(data[128:]) == (syntax, start - 128)
    assert dicom_headers.transfer_syntax(data[132:]) == (syntax, start - 132)
    assert dicom_headers.transfer_syntax(data[start:]) == (None, 0)
    for cut, expected in ((0, 132), (128, 4), (132, 0), (start, 0)):
        assert dicom_headers.data_start(data[cut:]) == expected
        assert dicom_headers.looks_like_dicom(data[cut:])
        assert dicom_headers.has_magic(data[cut:]) == (cut == 0)


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
def test_looks_like_dicom_by_first_elements_without_preamble(head: bytes, expected: bool) -> None:
    assert dicom_headers.looks_like_dicom(head) == expected


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


def test_scan_skips_sequences_of_defined_and_undefined_length_in_every_syntax() -> None:
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
            identity = read_identity(buffer.getvalue(), is_whole=True)
            assert identity == SeriesIdentity(
                str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)
            )


HEADER_BOMBS = {
    "items of a sequence": bomb_of_items,
    "sequences in sequences": lambda: next(iter(nested(2000).values())),
    "empty elements": lambda: (
        slices()[0][:132] + struct.pack("<HH2sH", 8, 8, b"CS", 0) * (LONG_HEADER_BYTES // 8)
    ),
    "file meta without end": lambda: (
        slices()[0][:132] + struct.pack("<HH2sH", 2, 3, b"UI", 0) * (LONG_HEADER_BYTES // 8)
    ),
    "a deflated bomb": lambda: next(iter(CATALOGUE["dicom deflated bomb"][1]().values())),
}


@pytest.mark.parametrize("name", HEADER_BOMBS)
def test_header_bomb_costs_little_time_and_memory(name: str) -> None:
    data = HEADER_BOMBS[name]()[:LONG_HEADER_BYTES]
    started = time.process_time()
    identity = read_identity(data)
    spent_s = time.process_time() - started
    tracemalloc.start()
    read_identity(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert identity is None or name == "a deflated bomb"  # its first bytes are a sound header
    assert spent_s < 0.2
    assert peak < 50 << 20
