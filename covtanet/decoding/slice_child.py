"""Single DICOM slices as grey values, decoded in the sandbox's child. See ``slices``."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from covtanet.ct.dicom import read_slice
from covtanet.decoding import confinement
from covtanet.errors import Reason, StudyError, error_location

GREY_STEPS = 255


def read_slices(request: dict[str, Any], contents: Iterator[bytes]) -> confinement.Answer:
    """Return each object's grey values over the window of the request; a refusal is an answer."""
    try:
        slices = [grey_slice(data, request) for data in contents]
    except StudyError as error:
        return {"reason": error.reason, "message": str(error)}, []
    except MemoryError:
        message = "decoding needs more memory than the decoder has"
        return {"reason": Reason.TOO_LARGE, "message": message, "is_last": True}, []
    except Exception as error:
        return {"internal": error_location(error), "is_last": True}, []
    return {"num_slices": len(slices)}, [grey.data for grey in slices]


def grey_slice(data: bytes, request: dict[str, Any]) -> NDArray[np.uint8]:
    """Return one slice, (rows, columns), 0 at ``low_hu`` and 255 at ``high_hu``.

    Raises:
        StudyError: it cannot be decoded, or has another size than the request says.
    """
    slice_hu = read_slice(data, (request["rows"], request["columns"]))
    low_hu, high_hu = request["low_hu"], request["high_hu"]
    scaled = (slice_hu.astype(np.float32) - low_hu) * (GREY_STEPS / (high_hu - low_hu))
    return np.ascontiguousarray(np.clip(np.rint(scaled), 0, GREY_STEPS).astype(np.uint8))
