"""A sound phantom as NIfTI and as DICOM objects, which other modules damage."""

import gzip
from functools import cache

from covtanet.ct import nifti
from covtanet.phantoms.encodings import dicom_objects, nifti_grid
from covtanet.phantoms.phantom import Phantom, PhantomConfig, make_phantom

Objects = dict[str, bytes]


@cache
def phantom() -> Phantom:
    return make_phantom(
        PhantomConfig(seed=9, involvement=0.1, size_px=64, num_slices=12, pixel_mm=5.6, slice_mm=18)
    )


@cache
def plain_nifti() -> bytes:
    return gzip.decompress(nifti.write(phantom().hu, nifti_grid(phantom())))


@cache
def slices() -> tuple[bytes, ...]:
    return tuple(dicom_objects(phantom(), 9))


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def named(objects: list[bytes] | tuple[bytes, ...]) -> Objects:
    return {f"IM{index:04d}.dcm": data for index, data in enumerate(objects)}
