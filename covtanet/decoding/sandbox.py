"""Decode untrusted bytes in a child process without file or network access.

The child has an empty environment and limits of memory, CPU time and wall-clock time. Once it has
loaded its code it gives up all further descriptors, becomes nobody if it was root, and installs a
filter of its system calls (``seccomp``): it can open no file and no socket, start and signal no
process, and lift none of these limits. Its parent cannot be read by processes of the same user. The
child stays warm from series to series. Bytes go in and arrays come out through two pipes, framed by
lengths and JSON: nothing is pickled in either direction, and the parent checks every value of an
answer before it uses it.

Not covered: a child that an input has taken over stays for later series until it is replaced, and
may answer them wrongly within the limits of these checks.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from covtanet.ct.limits import MAX_SLICES
from covtanet.ct.window import WindowConfig
from covtanet.decoding.child_process import DECODER, Child
from covtanet.decoding.framing import read_exactly
from covtanet.decoding.prepare import Prepared
from covtanet.decoding.process import Limits
from covtanet.decoding.stored_masks import check_masks
from covtanet.errors import QcFlag, Reason, StudyError

INT64_BYTES, UINT16_BYTES = 8, 2


class Sandbox:
    """Decodes and prepares one series at a time in a child process, started when first needed.

    One thread may use it at a time; any thread may call ``close``.
    """

    def __init__(self, window: WindowConfig, slice_step_mm: float, limits: Limits) -> None:
        self.window, self.slice_step_mm, self.limits = window, slice_step_mm, limits
        self.child = Child(DECODER, limits)

    def __call__(self, source_format: str, objects: Iterable[Iterable[bytes]]) -> Prepared:
        """Decode and prepare a series. objects: the bytes of its objects, each in chunks.

        Raises:
            Exception: as ``Child.ask``.
        """
        request = {
            "kind": "series",
            "source_format": source_format,
            "window": asdict(self.window),
            "slice_step_mm": self.slice_step_mm,
        }
        return self.child.ask(request, objects, self._read_prepared)

    def close(self) -> None:
        """End the child for good, and a series under way with an error; from any thread."""
        self.child.kill()

    def _read_prepared(self, header: dict[str, Any], pipe: IO[bytes]) -> Prepared:
        """Read the series after the header, and check every value.

        Raises:
            StudyError: ``decode_crash`` if a value is impossible.
        """
        num_slices = _whole(header.get("num_slices"), 1, MAX_SLICES, "num_slices")
        num_chosen = _whole(header.get("num_chosen"), 1, num_slices, "num_chosen")
        max_bytes = self.limits.memory_mib << 20
        num_mask_bytes = _whole(header.get("mask_bytes"), 1, max_bytes, "mask_bytes")
        size = self.window.size_px
        slice_bytes = size * size * UINT16_BYTES
        if num_chosen * (slice_bytes + INT64_BYTES) + num_mask_bytes > max_bytes:
            raise _impossible("length")
        spacing_mm = _spacing(header.get("spacing_mm"))
        qc_flags = _flags(header.get("qc_flags"))
        chosen = np.frombuffer(read_exactly(pipe, num_chosen * INT64_BYTES), np.int64)
        if chosen[0] < 0 or chosen[-1] >= num_slices or (chosen[1:] <= chosen[:-1]).any():
            raise _impossible("chosen")
        slices = np.frombuffer(read_exactly(pipe, num_chosen * slice_bytes), np.uint16)
        masks = bytes(read_exactly(pipe, num_mask_bytes))
        try:
            check_masks(masks, num_slices, spacing_mm, QcFlag.UNKNOWN_SPACING not in qc_flags)
        except ValueError:
            raise _impossible("masks") from None
        return Prepared(
            num_slices=num_slices,
            spacing_mm=spacing_mm,
            qc_flags=qc_flags,
            chosen=chosen,
            slices=slices.reshape(num_chosen, size, size),
            masks=masks,
        )


def _whole(value: object, low: int, high: int, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _impossible(name)
    return value


def _spacing(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise _impossible("spacing_mm")
    for mm in value:
        if not isinstance(mm, float) or not math.isfinite(mm) or mm <= 0:
            raise _impossible("spacing_mm")
    z, y, x = value
    return z, y, x


def _flags(value: object) -> tuple[QcFlag, ...]:
    if not isinstance(value, list):
        raise _impossible("qc_flags")
    try:
        return tuple(QcFlag(flag) for flag in value)
    except ValueError:
        raise _impossible("qc_flags") from None


def _impossible(name: str) -> StudyError:
    return StudyError(Reason.DECODE_CRASH, f"the decoder's answer is impossible: {name}")
