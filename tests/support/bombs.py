"""Small uploads that cost a careless reader much: a zip's directory, DICOM headers, a mask."""

import gzip
import io
import struct
import zipfile

import nibabel as nib
import numpy as np

EXPLICIT_LITTLE_ENDIAN = b"1.2.840.10008.1.2.1\x00"


def directory_bomb(num_entries: int, num_declared: int | None = None) -> bytes:
    """Make a zip of one member and a central directory of many entries.

    num_declared: the number that the zip states, the true one by default.
    """
    name = b"a"
    # File header of the central directory: versions, flags, method, time, date, CRC, sizes, lengths
    # of name, extra and comment, disk, attributes, offset.
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, *[0] * 7, len(name), *[0] * 6)
    directory = (entry + name) * num_entries
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, *[0] * 7, len(name), 0) + name
    declared = num_entries if num_declared is None else num_declared
    # ZIP64 end of central directory: 44 bytes follow, versions 45, disks, entries, size, offset.
    numbers = (44, 45, 45, 0, 0, declared, declared, len(directory), len(local))
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", *numbers)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(local) + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return local + directory + record + locator + end


def empty_items(num_items: int) -> bytes:
    """Make a sequence of empty items, in Explicit VR Little Endian.

    Its length is undefined: a reader learns its end only by reading all items.
    """
    sequence = struct.pack("<2H2sHI", 8, 0x1115, b"SQ", 0, 0xFFFFFFFF)
    item = struct.pack("<2HI", 0xFFFE, 0xE000, 0)
    return sequence + item * num_items


def header_bomb(num_items: int) -> bytes:
    """Make a DICOM object with such a sequence in its header, before any UID of its series."""
    syntax = struct.pack("<2H2sH", 2, 0x10, b"UI", len(EXPLICIT_LITTLE_ENDIAN))
    syntax += EXPLICIT_LITTLE_ENDIAN
    meta = struct.pack("<2H2sHI", 2, 0, b"UL", 4, len(syntax)) + syntax
    return bytes(128) + b"DICM" + meta + empty_items(num_items)


def header_bombs(num_objects: int, num_items: int) -> bytes:
    """Make a zip of such objects."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        # Noise keeps the ratio below the limit of an upload.
        noise = np.random.default_rng(0).integers(0, 256, num_items // 16, np.uint8).tobytes()
        for index in range(num_objects):
            archive.writestr(f"{index}.dcm", header_bomb(num_items) + noise)
    return buffer.getvalue()


def mask_bomb(side_px: int, num_slices: int) -> bytes:
    """Make a gzipped NIfTI mask of one byte a voxel, all zero: a kilobyte for every megabyte."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((side_px, side_px, num_slices))
    header.set_sform(np.diag([1, 1, 2, 1]), code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"], header["magic"] = 352, b"n+1"
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6) as file:
        file.write(header.binaryblock + bytes(4))
        for _ in range(num_slices):
            file.write(bytes(side_px * side_px))
    return buffer.getvalue()
