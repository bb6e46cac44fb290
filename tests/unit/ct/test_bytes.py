"""Sound files with a few bytes changed, by a fixed seed, give a volume or a refusal."""

import numpy as np
import pytest
from hostile import CATALOGUE
from sound_input import gz, plain_nifti, slices

from covtanet.ct import dicom, nifti
from covtanet.ct.volume import Volume
from covtanet.errors import REJECTION_REASONS, StudyError

NUM_MUTANTS = 150


def mutant(data: bytes, rng: np.random.Generator, reach: int) -> bytes:
    """Some bytes of the first ``reach`` changed, cut out, doubled, or the end cut off."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at, kind = int(rng.integers(0, min(reach, len(out)))), int(rng.integers(0, 5))
        if kind == 0:
            out[at] = int(rng.integers(0, 256))
        elif kind == 1:
            out[at : at + 4] = rng.choice(
                [b"\xff\xff\xff\xff", bytes(4), b"\x00\x00\x00\x80", b"\x7f\xff\xff\xff"]
            )
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 16))]
        elif kind == 3:
            out[at:at] = out[at : at + int(rng.integers(1, 64))]
        else:
            del out[len(out) - int(rng.integers(1, len(out))) :]
        if not out:
            return b""
    return bytes(out)


def read(kind: str, contents: list[bytes]) -> str:
    try:
        volume = nifti.read(contents[0]) if kind == "nifti" else dicom.read_series(contents)
    except StudyError as refusal:
        return refusal.reason
    assert isinstance(volume, Volume)
    assert np.isfinite(volume.hu).all()
    assert np.isfinite(volume.affine).all()
    return "read"


@pytest.mark.parametrize(("name", "reach"), [("plain", 400), ("gzip", 4000)])
def test_random_nifti_bytes_are_read_or_refused(name: str, reach: int) -> None:
    rng = np.random.default_rng(3)
    sound = plain_nifti() if name == "plain" else gz(plain_nifti())
    verdicts = {read("nifti", [mutant(sound, rng, reach)]) for _ in range(NUM_MUTANTS)}
    assert verdicts <= {*REJECTION_REASONS, "read"}
    assert len(verdicts) >= 2  # the mutants reach more than one check


def test_random_dicom_bytes_are_read_or_refused() -> None:
    rng = np.random.default_rng(4)
    verdicts = set()
    for _ in range(NUM_MUTANTS):
        objects = list(slices())
        index = int(rng.integers(0, len(objects)))
        objects[index] = mutant(objects[index], rng, 1400)
        verdicts.add(read("dicom", objects))
    assert verdicts <= {*REJECTION_REASONS, "read"}
    assert len(verdicts) >= 4


def test_random_pixel_streams_are_read_or_refused() -> None:
    """Compressed frames, each codec's own headers changed."""
    rng = np.random.default_rng(5)
    verdicts = set()
    for name in ("dicom JPEG 2000 cut", "dicom RLE with segments far away"):
        objects = list(CATALOGUE[name][1]().values())
        for _ in range(NUM_MUTANTS // 5):
            at = objects[3].index(b"\xe0\x7f\x10\x00")
            changed = objects[3][:at] + mutant(objects[3][at:], rng, 120)
            verdicts.add(read("dicom", [*objects[:3], changed, *objects[4:]]))
    assert verdicts <= set(REJECTION_REASONS)
