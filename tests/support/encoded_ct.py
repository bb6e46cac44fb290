"""Phantoms as NIfTI in any axis order, and as DICOM in compressed transfer syntaxes."""

import gzip
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import imagecodecs
import nibabel as nib
import nibabel.orientations as orientations
import numpy as np
import pydicom
from numpy.typing import DTypeLike, NDArray
from pydicom.uid import UID, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from covtanet.ct import nifti
from covtanet.phantoms.encodings import nifti_grid
from covtanet.phantoms.phantom import Phantom


def as_nifti(phantom: Phantom, axes: str = "LPS", dtype: DTypeLike = np.int16) -> bytes:
    """Return the phantom as a NIfTI file in any axis order."""
    image = nib.Nifti1Image.from_bytes(
        gzip.decompress(nifti.write(phantom.hu, nifti_grid(phantom)))
    )
    turn = orientations.ornt_transform(
        orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(axes))
    )
    turned = image.as_reoriented(turn)
    return bytes(
        nib.Nifti1Image(np.asarray(turned.dataobj).astype(dtype), turned.affine).to_bytes()
    )


ENCODERS: dict[str, Callable[[NDArray[Any]], bytes | bytearray]] = {
    JPEG2000Lossless: lambda pixels: imagecodecs.jpeg2k_encode(
        pixels, level=0, reversible=True, codecformat="j2k"
    ),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLosslessSV1: lambda pixels: imagecodecs.ljpeg_encode(pixels, bitspersample=16),
}


def encoded(plain: Iterable[bytes], syntax: str) -> list[bytes]:
    """Return DICOM objects with their pixels in a compressed transfer syntax."""
    objects = []
    for data in plain:
        dataset = pydicom.dcmread(BytesIO(data))
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        else:
            pixels = np.ascontiguousarray(dataset.pixel_array.view(np.uint16))
            dataset.PixelData = pydicom.encaps.encapsulate([bytes(ENCODERS[syntax](pixels))])
            dataset["PixelData"].is_undefined_length = True
            dataset.file_meta.TransferSyntaxUID = UID(syntax)
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        objects.append(buffer.getvalue())
    return objects
