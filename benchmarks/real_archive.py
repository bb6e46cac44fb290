"""An archive of real-size series: copies of one real chest CT, or phantoms of that size.

The copies have other UIDs; every other one is stored decompressed.
"""

import os
from pathlib import Path

import imagecodecs
import pydicom
from pydicom.encaps import generate_frames
from pydicom.uid import ExplicitVRLittleEndian

from benchmarks.measure import ROOT, WORK, say
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import make_phantom
from covtanet.phantoms.sampling import configs

REAL_CT = "COVTANET_REAL_CT"
DEFAULT_REAL_CT = ROOT.parent / "shared" / "data" / "dicom" / "ricord-1a-001012"
# A root for UIDs that belong to nobody (ITU-T X.667, a UUID as an integer).
UID_ROOT = "2.25."
PHANTOM_PX, PHANTOM_SLICES = 512, 150


def real_ct() -> Path:
    """Return the folder of the real series, which may be missing."""
    return Path(os.environ.get(REAL_CT, DEFAULT_REAL_CT))


def real_archive(count: int) -> tuple[Path, str]:
    """Return a folder with ``count`` series, made at the first call, and a text that says of what.

    COVTANET_REAL_CT names the folder of a DICOM series to copy.
    """
    source = real_ct()
    paths = sorted(source.rglob("*.dcm"))
    if not paths:
        return _phantoms(count)
    folder = WORK / f"real-{count}-{source.name}"
    if not (folder / "done").exists():
        say(f"copying a series of {len(paths)} slices {count} times, every other decompressed")
        for number in range(count):
            _copy_series(paths, folder / "series" / f"{number:03d}", number)
        (folder / "done").touch()
    return folder / "series", f"{count} copies of {source.name}, {len(paths)} slices of 512 x 512"


def _phantoms(count: int) -> tuple[Path, str]:
    folder = WORK / f"phantoms-{count}-{PHANTOM_PX}-{PHANTOM_SLICES}"
    if not (folder / "done").exists():
        say(f"no real series at {REAL_CT}; making phantoms")
        for number, config in enumerate(configs(count, 5, PHANTOM_PX, PHANTOM_SLICES)):
            target = folder / "series" / f"{number:03d}"
            target.mkdir(parents=True, exist_ok=True)
            for index, data in enumerate(dicom_objects(make_phantom(config), number)):
                (target / f"{index:04d}.dcm").write_bytes(data)
        (folder / "done").touch()
    text = f"{count} phantoms of {PHANTOM_SLICES} slices of {PHANTOM_PX} x {PHANTOM_PX}"
    return folder / "series", text


def _copy_series(paths: list[Path], folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(paths):
        dataset = pydicom.dcmread(path)
        if number % 2 and dataset.file_meta.TransferSyntaxUID.is_compressed:
            (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
            # JPEG Lossless, in which the series is published.
            dataset.PixelData = imagecodecs.jpegsof3_decode(frame).tobytes()
            dataset["PixelData"].is_undefined_length = False
            dataset["PixelData"].VR = "OW"
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.StudyInstanceUID = f"{UID_ROOT}1{number:03d}0"
        dataset.SeriesInstanceUID = f"{UID_ROOT}1{number:03d}1"
        dataset.SOPInstanceUID = f"{UID_ROOT}1{number:03d}2{index:04d}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(folder / f"{index:04d}.dcm", enforce_file_format=True)
