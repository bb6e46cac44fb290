"""What ``make pacs`` loads: phantoms, some of them damaged, and real series if there are any."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pydicom

from covtanet.phantoms.damage import DICOM_DAMAGE
from covtanet.phantoms.encodings import dicom_objects
from covtanet.phantoms.phantom import PhantomConfig, make_phantom
from covtanet.phantoms.sampling import configs
from infra.local.services import ROOT

# Real series for tests and trials, beside the checkout; nothing of them is copied into it.
REAL = ROOT.parent / "shared" / "data" / "dicom"
SEED, NUM_SOUND = 71, 4
# Damage that a PACS takes in: the objects are sound, the series is not.
DAMAGE = ("missing_position", "missing_rescale", "gantry_tilt", "missing_slices", "too_few_slices")
DAMAGE_SEED = 7100


def sound_configs() -> list[PhantomConfig]:
    """Return the sound phantoms, and one more for the second night."""
    return list(configs(NUM_SOUND + 1, SEED))


def first_night() -> Iterator[list[bytes]]:
    """Yield the objects of each series of the first night."""
    phantoms = sound_configs()
    for number, config in enumerate(phantoms[:NUM_SOUND]):
        yield dicom_objects(make_phantom(config), SEED + number)
    for number, name in enumerate(DAMAGE):
        seed = DAMAGE_SEED + number
        phantom = make_phantom(replace(phantoms[0], seed=seed))
        yield DICOM_DAMAGE[name](dicom_objects(phantom, seed))
    yield from real_series()


def second_night() -> list[bytes]:
    """Return the objects of the series that comes on the second night."""
    return dicom_objects(make_phantom(sound_configs()[NUM_SOUND]), SEED + NUM_SOUND)


def real_series() -> Iterator[list[bytes]]:
    """Yield the objects of each real series, if there are any."""
    if not REAL.is_dir():
        return
    for folder in sorted(path for path in REAL.iterdir() if path.is_dir()):
        yield [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]


def write_folder(folder: Path, contents: list[bytes]) -> None:
    """Write a series as files that are named by the UIDs of their objects."""
    for content in contents:
        header = pydicom.dcmread(BytesIO(content), stop_before_pixels=True)
        path = folder / str(header.SeriesInstanceUID) / str(header.SOPInstanceUID)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
