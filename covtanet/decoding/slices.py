"""Single slices of a DICOM series as pictures, decoded in a sandboxed child process."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from covtanet.decoding.child_process import DECODER, Child
from covtanet.decoding.framing import read_exactly
from covtanet.decoding.process import Limits
from covtanet.errors import Reason, StudyError


@dataclass(frozen=True, kw_only=True)
class GreyWindow:
    """HU of black and of white."""

    low_hu: float
    high_hu: float


@cache
def slice_reader(limits: Limits) -> Child:
    """Return the child of this process that decodes slices; it stays warm from call to call."""
    return Child(DECODER, limits)


def read_grey_slices(
    child: Child, objects: Sequence[bytes], shape: tuple[int, int], window: GreyWindow
) -> NDArray[np.uint8]:
    """Return the slices of single-frame objects as grey values, (slices, rows, columns).

    shape: rows and columns of every slice. Rows and columns are those of the objects; nothing is
    turned or resampled.

    Raises:
        Exception: as ``Child.ask``.
    """
    rows, columns = shape
    num_bytes = len(objects) * rows * columns

    def read(answer: dict[str, Any], pipe: IO[bytes]) -> NDArray[np.uint8]:
        if answer.get("num_slices") != len(objects):
            raise StudyError(Reason.DECODE_CRASH, "the decoder's answer is impossible: num_slices")
        grey = np.frombuffer(read_exactly(pipe, num_bytes), np.uint8)
        return grey.reshape(len(objects), rows, columns)

    request = {
        "kind": "slices",
        "rows": rows,
        "columns": columns,
        "low_hu": window.low_hu,
        "high_hu": window.high_hu,
    }
    return child.ask(request, [[data] for data in objects], read)
