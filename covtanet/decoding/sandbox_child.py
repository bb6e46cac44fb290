"""The decoder's child process, which prepares series and reads slices. See ``sandbox``."""

import io
import zipfile
from collections.abc import Iterator
from importlib import resources
from typing import Any

import numpy as np

from covtanet.ct.window import WindowConfig
from covtanet.decoding import confinement, header_child, slice_child
from covtanet.decoding.prepare import prepare
from covtanet.errors import Reason, StudyError, error_location


def main() -> None:
    """Answer requests from standard input until it ends."""
    handlers = {
        "series": decode_series,
        "headers": header_child.read_headers,
        "slices": slice_child.read_slices,
    }
    confinement.run(handlers, warm_up)


def warm_up() -> None:
    """Read a small chest of each format, so that all code is loaded before files cannot be opened.

    The chests are package data, made by ``covtanet.phantoms.warm_up``.
    """
    header_child.warm_up()
    data = resources.files("covtanet.decoding").joinpath("warm_up.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    dicom_objects = [data for name, data in files.items() if name.endswith(".dcm")]
    window = WindowConfig(size_px=32)
    prepare("dicom", dicom_objects, window, 2.5)
    prepare("nifti", [files["chest.nii.gz"]], window, 2.5)


def decode_series(request: dict[str, Any], contents: Iterator[bytes]) -> confinement.Answer:
    """Prepare one series; a refusal is an answer, too.

    ``is_last`` in the answer: the process must be replaced before the next request.
    """
    try:
        prepared = prepare(
            request["source_format"],
            contents,
            WindowConfig(**request["window"]),
            request["slice_step_mm"],
        )
    except StudyError as error:
        return {"reason": error.reason, "message": str(error)}, []
    except MemoryError:
        message = "decoding needs more memory than decode_memory_mib allows"
        return {"reason": Reason.TOO_LARGE, "message": message, "is_last": True}, []
    except Exception as error:
        return {"internal": error_location(error), "is_last": True}, []
    header = {
        "num_slices": prepared.num_slices,
        "num_chosen": len(prepared.chosen),
        "mask_bytes": len(prepared.masks),
        "spacing_mm": prepared.spacing_mm,
        "qc_flags": prepared.qc_flags,
    }
    slices = np.ascontiguousarray(prepared.slices)
    return header, [np.ascontiguousarray(prepared.chosen).data, slices.data, prepared.masks]
