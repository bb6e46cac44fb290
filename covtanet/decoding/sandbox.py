"""Untrusted bytes are decoded in a child process that can do nothing but compute.

The child has an empty environment and limits of memory, CPU time and wall-clock time. Once it has
loaded its code it gives up every descriptor to come, becomes nobody if it was root, and puts a
filter on its own system calls (``seccomp``): it can open no file and no socket, start and signal no
process, and lift none of this again. Its parent cannot be read by processes of the same user. It
stays warm from series to series. Bytes go in and arrays come out through two pipes, framed by
lengths and JSON: nothing is pickled in either direction, and what the child answers is checked
before it is believed.

Not covered: a child that an input has taken over lives on for later series until it is replaced,
and may lie about them within what a sound answer may be.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from covtanet.ct.nifti import MAX_SLICES
from covtanet.ct.window import WindowConfig
from covtanet.decoding.child_process import DECODER, Child, Limits, read_exactly
from covtanet.decoding.prepare import Prepared, check_masks
from covtanet.errors import QcFlag, Reason, StudyError

__all__ = ["Limits", "Sandbox"]


class Sandbox:
    """Decodes and prepares one series at a time in a child process, started when first needed.

    One thread may use it at a time; ``close`` is for any other, too.
    """

    def __init__(self, window: WindowConfig, slice_step_mm: float, limits: Limits) -> None:
        self.window, self.slice_step_mm, self.limits = window, slice_step_mm, limits
        self.child = Child(DECODER, limits)

    def __call__(self, source_format: str, objects: Iterable[Iterable[bytes]]) -> Prepared:
        """Decode and prepare a series. objects: the bytes of its objects, each in chunks.

        Raises: as ``Child.ask``.
        """
        request = {
            "kind": "series",
            "source_format": source_format,
            "window": asdict(self.window),
            "slice_step_mm": self.slice_step_mm,
        }
        return self.child.ask(request, objects, self._read_prepared)

    def close(self) -> None:
        """End the child, and a series that is being decoded with an error; from any thread, for good."""
        self.child.kill()

    def _read_prepared(self, header: dict[str, Any], pipe: IO[bytes]) -> Prepared:
        """The series behind the header; every value in it is checked before it is believed.

        Raises:
            StudyError: ``decode_crash`` if anything of it cannot be.
        """
        num_slices = _whole(header.get("num_slices"), 1, MAX_SLICES, "num_slices")
        num_chosen = _whole(header.get("num_chosen"), 1, num_slices, "num_chosen")
        max_bytes = self.limits.memory_mib << 20
        num_mask_bytes = _whole(header.get("mask_bytes"), 1, max_bytes, "mask_bytes")
        size = self.window.size_px
        if num_chosen * (size * size * 2 + 8) + num_mask_bytes > max_bytes:
            raise _contradiction("length")
        spacing_mm = _spacing(header.get("spacing_mm"))
        qc_flags = header.get("qc_flags")
        if not isinstance(qc_flags, list) or any(flag not in tuple(QcFlag) for flag in qc_flags):
            raise _contradiction("qc_flags")
        chosen = np.frombuffer(read_exactly(pipe, num_chosen * 8), np.int64)
        if chosen[0] < 0 or chosen[-1] >= num_slices or (chosen[1:] <= chosen[:-1]).any():
            raise _contradiction("chosen")
        slices = np.frombuffer(read_exactly(pipe, num_chosen * size * size * 2), np.uint16)
        masks = bytes(read_exactly(pipe, num_mask_bytes))
        try:
            check_masks(masks, num_slices, spacing_mm, QcFlag.UNKNOWN_SPACING not in qc_flags)
        except ValueError:
            raise _contradiction("masks") from None
        return Prepared(
            num_slices=num_slices,
            spacing_mm=spacing_mm,
            qc_flags=tuple(qc_flags),
            chosen=chosen,
            slices=slices.reshape(num_chosen, size, size),
            masks=masks,
        )


def _whole(value: object, low: int, high: int, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _contradiction(name)
    return value


def _spacing(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise _contradiction("spacing_mm")
    for mm in value:
        if not isinstance(mm, float) or not math.isfinite(mm) or mm <= 0:
            raise _contradiction("spacing_mm")
    z, y, x = value
    return z, y, x


def _contradiction(name: str) -> StudyError:
    return StudyError(Reason.DECODE_CRASH, f"the decoder's answer cannot be: {name}")
