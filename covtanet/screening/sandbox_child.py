"""The sandbox's child: shut the doors, then decode what comes in until there is no more. See ``sandbox``."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from covtanet.ct import dicom, nifti
from covtanet.ct.volume import SourceGrid
from covtanet.ct.window import WindowConfig
from covtanet.errors import StudyError
from covtanet.screening import decode

PAGE_BYTES = resource.getpagesize()
# CPU time grows with a series as its wall-clock time may; this is only the net below it.
CPU_LIMIT_FACTOR = 4


def main() -> None:
    """Answer requests from standard input until it ends."""
    limits = json.loads(sys.argv[2])
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    _warm_up()
    _shut_the_doors(limits["memory_mib"] << 20)
    answers.write(b"ready\n")
    answers.flush()
    while line := requests.readline():
        _limit_cpu(CPU_LIMIT_FACTOR * limits["timeout_s"])
        is_last = _answer(requests, answers, json.loads(line))
        answers.flush()
        if is_last:
            return


def _warm_up() -> None:
    """Read a small chest once, so that all code is loaded before files can no longer be opened."""
    hu = np.full((10, 64, 64), -1000, np.int16)
    y, x = np.mgrid[:64, :64]
    body = ((y - 32) / 24) ** 2 + ((x - 32) / 28) ** 2 < 1
    left, right = (((y - 32) / 14) ** 2 + ((x - middle) / 9) ** 2 < 1 for middle in (20, 44))
    hu[:, body] = 40
    hu[:, left | right] = -850
    affine = np.array([[0, 0, 6.0, 0], [0, 6.0, 0, 0], [10.0, 0, 0, 0], [0, 0, 0, 1]])  # (z, y, x) -> LPS
    plain = dicom.write_series(hu, affine, study_uid="1.2", series_uid="1.2.3")
    window = WindowConfig(size_px=32)
    decode.prepare("dicom", plain, window, 2.5)
    decode.prepare("nifti", [nifti.write(hu, SourceGrid(shape=hu.shape, affine=affine))], window, 2.5)


def _shut_the_doors(memory_bytes: int) -> None:
    """No new file or socket, no byte written to a file, no core dump, no more memory than agreed."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    for what, value in (
        (resource.RLIMIT_AS, used + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, highest),
    ):
        resource.setrlimit(what, (value, value))


def _limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(requests: IO[bytes], answers: IO[bytes], request: dict[str, Any]) -> bool:
    """Read one series, write the answer; returns whether the process is fit for no other."""
    contents = _receive(requests)
    try:
        prepared = decode.prepare(
            request["source_format"], contents, WindowConfig(**request["window"]), request["slice_step_mm"]
        )
        _drain(contents)
    except StudyError as error:
        _drain(contents)
        _write_header(answers, {"reason": error.reason, "message": str(error)})
        return False
    except MemoryError:
        message = "decoding needs more memory than a series may take"
        _write_header(answers, {"reason": "too_large", "message": message, "is_last": True})
        return True
    except Exception as error:
        _write_header(answers, {"internal": decode.place_of(error), "is_last": True})
        return True
    header = {
        "num_slices": prepared.num_slices,
        "num_chosen": len(prepared.chosen),
        "mask_bytes": len(prepared.masks),
        "spacing_mm": prepared.spacing_mm,
        "qc_flags": prepared.qc_flags,
    }
    _write_header(answers, header)
    answers.write(np.ascontiguousarray(prepared.chosen).data)
    answers.write(np.ascontiguousarray(prepared.slices).data)
    answers.write(prepared.masks)
    return False


def _write_header(answers: IO[bytes], header: dict[str, Any]) -> None:
    answers.write(json.dumps(header).encode() + b"\n")


def _receive(requests: IO[bytes]) -> Iterator[bytes]:
    """The objects of one request: each a 1, then chunks behind their lengths, then length 0; a 0 ends them all."""
    while requests.read(1) == b"\x01":
        kept = []
        while length := int.from_bytes(requests.read(4), "little"):
            kept.append(requests.read(length))
        yield b"".join(kept)


def _drain(contents: Iterator[bytes]) -> None:
    """Read what a refusal left unread, so that the next request begins where it should."""
    for _ in contents:
        pass
