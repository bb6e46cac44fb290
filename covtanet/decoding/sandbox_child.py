"""The sandbox's child: decode what comes in until there is no more, behind shut doors. See ``sandbox``."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from covtanet.ct import dicom, nifti
from covtanet.ct.volume import SourceGrid
from covtanet.ct.window import WindowConfig
from covtanet.decoding import confinement, header_child
from covtanet.decoding import prepare as decode
from covtanet.errors import StudyError, error_location


def main() -> None:
    """Answer requests from standard input until it ends."""
    confinement.run({"series": decode_series, "heads": header_child.read_heads}, warm_up)


def warm_up() -> None:
    """Read a small chest once, so that all code is loaded before files can no longer be opened."""
    header_child.warm_up()
    hu = np.full((10, 64, 64), -1000, np.int16)
    y, x = np.mgrid[:64, :64]
    body = ((y - 32) / 24) ** 2 + ((x - 32) / 28) ** 2 < 1
    left, right = (((y - 32) / 14) ** 2 + ((x - middle) / 9) ** 2 < 1 for middle in (20, 44))
    hu[:, body] = 40
    hu[:, left | right] = -850
    affine = np.array(
        [[0, 0, 6.0, 0], [0, 6.0, 0, 0], [10.0, 0, 0, 0], [0, 0, 0, 1]]
    )  # (z, y, x) -> LPS
    plain = dicom.write_series(hu, affine, study_uid="1.2", series_uid="1.2.3")
    window = WindowConfig(size_px=32)
    decode.prepare("dicom", plain, window, 2.5)
    decode.prepare(
        "nifti", [nifti.write(hu, SourceGrid(shape=hu.shape, affine=affine))], window, 2.5
    )


def decode_series(request: dict[str, Any], contents: Iterator[bytes]) -> confinement.Answer:
    """Read one series; a refusal is an answer, too. ``is_last``: the process is fit for no other."""
    try:
        prepared = decode.prepare(
            request["source_format"],
            contents,
            WindowConfig(**request["window"]),
            request["slice_step_mm"],
        )
    except StudyError as error:
        return {"reason": error.reason, "message": str(error)}, []
    except MemoryError:
        message = "decoding needs more memory than decode_memory_mib allows"
        return {"reason": "too_large", "message": message, "is_last": True}, []
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
