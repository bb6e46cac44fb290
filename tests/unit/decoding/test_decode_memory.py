"""The largest volume that docs/input.md promises to read fits into the decoder's memory."""

import tracemalloc
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hostile_nifti import DATATYPE, DIM, patched
from pydicom.uid import JPEGLSLossless
from repository import ROOT
from sound_input import gz, phantom, slices

from covtanet.ct import dicom, limits, nifti
from covtanet.ct.window import WindowConfig
from covtanet.decoding import prepare as decode
from covtanet.decoding.stored_masks import _pack_bits
from covtanet.errors import StudyError
from covtanet.phantoms.dicom_writer import write_series
from covtanet.screening.config import ScreeningConfig

MIB = 1 << 20
NUM_SLICES, SLICE_MM, PIXEL_MM = 40, 0.5, 0.7
INPUT_MD = ROOT / "docs" / "input.md"


def thin_slices() -> np.ndarray:
    """512 x 512 pixels in slices so thin that the working grid is small compared with them."""
    middle = phantom().hu[4:8].repeat(NUM_SLICES // 4, axis=0)
    return middle.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    return thin_slices()


def as_jpeg_ls(hu: np.ndarray) -> list[bytes]:
    affine = np.array(
        [[0, 0, PIXEL_MM, 0], [0, PIXEL_MM, 0, 0], [SLICE_MM, 0, 0, 0], [0, 0, 0, 1.0]]
    )
    objects = []
    for data in write_series(hu, affine, study_uid="1.2", series_uid="1.2.3"):
        dataset, buffer = pydicom.dcmread(BytesIO(data)), BytesIO()
        stored = np.frombuffer(dataset.PixelData, "<u2").reshape(512, 512)
        dataset.PixelData = pydicom.encaps.encapsulate([bytes(imagecodecs.jpegls_encode(stored))])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
        dataset.save_as(buffer, enforce_file_format=True)
        objects.append(buffer.getvalue())
    return objects


def as_nifti(hu: np.ndarray) -> bytes:
    image = nib.Nifti1Image(
        (hu.T + 1024).astype(np.uint16), np.diag([-PIXEL_MM, -PIXEL_MM, SLICE_MM, 1.0])
    )
    image.header.set_slope_inter(1, -1024)
    return gz(image.to_bytes())


def peak_bytes(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def once(objects: list[bytes]) -> Iterator[bytes]:
    """Yield fresh bytes, to which no other reference exists."""
    return (bytes(bytearray(data)) for data in objects)


def test_reading_a_series_takes_two_bytes_a_voxel_in_addition_to_its_files(hu: np.ndarray) -> None:
    objects = as_jpeg_ls(hu)
    num_bytes = sum(map(len, objects))
    assert peak_bytes(lambda: dicom.read_series(once(objects))) < num_bytes + 3 * hu.size


def test_uncompressed_series_is_in_memory_once_in_addition_to_its_hu(hu: np.ndarray) -> None:
    affine = np.array(
        [[0, 0, PIXEL_MM, 0], [0, PIXEL_MM, 0, 0], [SLICE_MM, 0, 0, 0], [0, 0, 0, 1.0]]
    )
    objects = write_series(hu, affine, study_uid="1.2", series_uid="1.2.3")
    assert peak_bytes(lambda: dicom.read_series(once(objects))) < 5 * hu.size


def test_compressed_nifti_is_in_memory_once_in_addition_to_its_hu(hu: np.ndarray) -> None:
    data = as_nifti(hu)
    assert peak_bytes(lambda: nifti.read(data)) < 5 * hu.size


@pytest.mark.parametrize("source_format", ["dicom", "nifti"])
def test_prepared_series_takes_five_bytes_a_voxel(hu: np.ndarray, source_format: str) -> None:
    """HU, two masks and the network's input."""
    objects = as_jpeg_ls(hu) if source_format == "dicom" else [as_nifti(hu)]
    window = WindowConfig()
    assert (
        peak_bytes(lambda: decode.prepare(source_format, once(objects), window, 2.5))
        < 5.5 * hu.size
    )


def test_memory_of_the_decoder_holds_the_largest_volume() -> None:
    """1900 slices of 512 x 512 took 2,398 MiB, 5.05 bytes a voxel, JPEG-LS and uncompressed."""
    config = ScreeningConfig()
    assert limits.MAX_BYTES == 2 * limits.MAX_VOXELS == config.max_series_mib * MIB
    assert limits.MAX_VOXELS >= 1900 * 512 * 512
    assert config.decode_memory_mib * MIB > 5.05 * limits.MAX_VOXELS
    while_read = config.max_series_mib * MIB + limits.MAX_BYTES
    while_prepared = limits.MAX_BYTES + 2 * limits.MAX_VOXELS
    assert max(while_read, while_prepared) + 512 * MIB <= config.decode_memory_mib * MIB


def test_documents_name_the_limits_of_size() -> None:
    config = ScreeningConfig()
    (line,) = (
        line for line in INPUT_MD.read_text().splitlines() if line.startswith("| `too_large` |")
    )
    for words in (
        f"2^{limits.MAX_VOXELS.bit_length() - 1} voxels",
        f"2^{limits.MAX_VOXELS.bit_length() - 2} ",
        f"{limits.MAX_SLICES} slices",
        f"{config.max_series_mib // 1024} GiB of bytes",
        f"{config.decode_memory_mib // 1024} GiB to decode",
    ):
        assert words in line


@pytest.mark.parametrize(
    ("datatype", "bits", "shape", "limit"),
    [
        (4, 16, (1024, 1024, 513), 1 << 29),
        (16, 32, (1024, 1024, 257), 1 << 28),
        (64, 64, (512, 1024, 257), 1 << 27),
        (2, 8, (1024, 1024, 513), 1 << 29),
    ],
)
def test_more_voxels_than_fit_are_too_large(
    datatype: int, bits: int, shape: tuple[int, ...], limit: int
) -> None:
    header = patched((DIM, "4h", (3, *shape)), (DATATYPE, "2h", (datatype, bits)))["a.nii"][:400]
    with pytest.raises(StudyError, match=f"expected at most {limit}") as error:
        nifti.read(header)
    assert error.value.reason == "too_large"


def test_fractional_hu_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either format, since they are float32."""
    monkeypatch.setattr(limits, "MAX_BYTES", 3 * phantom().hu.size)
    halves = patched((112, "2f", (0.5, -300.0)))["a.nii"]
    objects = []
    for data in slices():
        dataset, buffer = pydicom.dcmread(BytesIO(data)), BytesIO()
        dataset.RescaleSlope = "0.99"
        dataset.save_as(buffer, enforce_file_format=True)
        objects.append(buffer.getvalue())
    for read in (lambda: nifti.read(halves), lambda: dicom.read_series(objects)):
        with pytest.raises(StudyError, match="expected at most") as error:
            read()
        assert error.value.reason == "too_large"
    assert (
        nifti.read(patched()["a.nii"]).hu.dtype == dicom.read_series(slices()).hu.dtype == np.int16
    )


def test_slices_of_fractional_hu_are_floats_in_their_order() -> None:
    """One slice makes the volume float32; the slices before it keep their values."""
    objects = list(slices())
    dataset, buffer = pydicom.dcmread(BytesIO(objects[7])), BytesIO()
    dataset.RescaleSlope = "0.5"
    dataset.save_as(buffer, enforce_file_format=True)
    objects[7] = buffer.getvalue()
    expected = phantom().hu.astype(np.float32)
    expected[7] = (expected[7] + 1024) * np.float32(0.5) - 1024
    order = np.random.default_rng(0).permutation(len(objects))
    volume = dicom.read_series([objects[index] for index in order])
    assert volume.hu.dtype == np.float32
    np.testing.assert_array_equal(volume.hu, expected)


def test_masks_of_any_size_are_packed_bit_by_bit() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 5, 7), (2, 4, 8), (1, 1, 1)):
        first, second = rng.random(shape) > 0.5, rng.random(shape) > 0.5
        np.testing.assert_array_equal(
            _pack_bits(first, second), np.packbits(np.stack([first, second]))
        )
